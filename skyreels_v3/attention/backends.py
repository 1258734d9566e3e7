"""What the models call for attention, and which kernel does it.

An `AttentionFn` maps q (B, Lq, N, D), k and v (B, Lk, N, D) to (B, Lq, N, D): full softmax attention, scale 1/sqrt(D),
no mask. Models take one; they never look for kernels themselves.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionFn(Protocol):
    """Full attention on tensors laid out (B, L, N, D): batch, tokens, heads, head size."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, which picks the fastest kernel the device has."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)  # (B, L, N, D)


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Softmax weights (B, Lq, Lk), averaged over the heads, in float32.

    One head at a time: the weights of all heads at once would not fit for a video's worth of tokens.
    """
    scale = query.shape[-1] ** -0.5
    total: Tensor | None = None
    for head in range(query.shape[2]):
        scores = torch.einsum("bqd,bkd->bqk", query[:, :, head].float() * scale, key[:, :, head].float())
        weights = scores.softmax(dim=-1)
        total = weights if total is None else total.add_(weights)
    assert total is not None
    return total / query.shape[2]
