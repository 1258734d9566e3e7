"""Rounding to float8 (e4m3) with scales that are powers of two, which are exact in any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
MIN_EXPONENT = -126  # of a scale: smaller numbers are subnormal, which not every device supports


def fitting_scale(largest: Tensor) -> Tensor:
    """The smallest power of two by which to divide values up to `largest` (float32), so that float8 holds them."""
    mantissa, exponent = torch.frexp(largest)  # exact, unlike a logarithm
    limit, highest = math.frexp(LARGEST)
    scale = torch.exp2((exponent - highest + (mantissa > limit)).float().clamp_(min=MIN_EXPONENT))
    return torch.where(largest.isfinite(), scale, torch.nan)  # the cast to float8 would hide an infinity
