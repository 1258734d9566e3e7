"""Timestep, text and image embeddings: everything that conditions the blocks, under diffusers' Wan names."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from torch import Tensor, nn

from skyreels_v3.wan.transformer.norms import layer_norm


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding (..., channels) of `timestep`, cosines first, with float64 angles; returned in float32.

    Computed on the CPU, where float64 always exists; keep timesteps there so that nothing waits for a device.
    """
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = timestep.detach().to("cpu", torch.float64)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class ImageEmbedding(nn.Module):
    """CLIP tokens (B, 257, image_dim) -> (B, 257, D)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, dim, mult=1, activation_fn="gelu")
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        normed = layer_norm(image, self.norm1).type_as(image)
        return layer_norm(self.ff(normed), self.norm2).type_as(image)


class ConditionEmbedding(nn.Module):
    """Timesteps to modulation vectors, text and image tokens to the blocks' width.

    The time path runs in float32 whatever the model's dtype: its output scales every token of every block.
    """

    def __init__(self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.image_embedder = None if image_dim is None else ImageEmbedding(image_dim, dim)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) timesteps -> embedding (B, F, D) and modulation (B, F, 6, D), float32."""
        device = self.time_proj.weight.device
        embedding = self.time_embedder(sinusoid(timestep, self.freq_dim).to(device))
        return embedding, self.time_proj(nn.functional.silu(embedding)).unflatten(-1, (6, -1))
