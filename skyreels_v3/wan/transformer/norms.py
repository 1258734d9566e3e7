"""Normalisation and modulation, in float32 whatever comes in: the model's one dtype rule outside matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the last axis, computed and returned in float32."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMSNorm over the last axis, computed and returned in float32."""
    return F.rms_norm(x.float(), tuple(norm.normalized_shape), norm.weight, norm.eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift for tokens x (B, L, D); shift and scale (B, F, D) hold for L/F tokens each."""
    grouped = x.unflatten(1, (shift.shape[1], -1))  # (B, F, L/F, D)
    return torch.addcmul(shift.unsqueeze(2), grouped, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in float32, returned in x's dtype; x and update (B, L, D), gate (B, F, D)."""
    frames = gate.shape[1]
    grouped, change = x.float().unflatten(1, (frames, -1)), update.float().unflatten(1, (frames, -1))
    return torch.addcmul(grouped, gate.unsqueeze(2), change).flatten(1, 2).type_as(x)
