"""Normalization and modulation: float32 inside, whatever the dtypes of activations and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FP32RMSNorm(nn.RMSNorm):
    """RMSNorm in float32, the result in x's dtype: what diffusers' FP32LayerNorm does for LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift for tokens x (B, L, D); shift and scale (B, F, D) each apply to L/F tokens."""
    x = x.unflatten(1, (shift.shape[1], -1))  # (B, F, L/F, D)
    return torch.addcmul(shift.unsqueeze(2), x, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in float32, returned in x's dtype; x and update (B, L, D), gate (B, F, D)."""
    frames = (gate.shape[1], -1)
    total = torch.addcmul(x.float().unflatten(1, frames), gate.unsqueeze(2), update.float().unflatten(1, frames))
    return total.flatten(1, 2).type_as(x)
