"""What conditions the blocks, brought to their width: timestep, text, image and audio, under diffusers' Wan names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

LATENT_STRIDE = 4  # video frames per latent frame, except for the first


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding (..., channels) of `timestep` in float32 on the CPU, cosines first.

    The angles are float64, which the CPU always has. Keep timesteps on the CPU, so that nothing waits for the device.
    """
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = timestep.detach().to("cpu", torch.float64)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class ImageEmbedding(nn.Module):
    """CLIP tokens (B, 257, image_dim) -> (B, 257, D)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, dim, mult=1, activation_fn="gelu")
        self.norm2 = FP32LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """Project the tokens."""
        return self.norm2(self.ff(self.norm1(image)))


class ConditionEmbedding(nn.Module):
    """Timesteps to modulation, text and image tokens to the blocks' width.

    The time embedding is computed in float32 unless its weights were cast: it scales every token of every block.
    """

    def __init__(self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.image_embedder: Any = None if image_dim is None else ImageEmbedding(image_dim, dim)

    def forward(
        self, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Timesteps (B, F), text (B, 512, text_dim) and image (B, 257, image_dim) tokens.

        Returns:
            time embedding (B, F, D) and modulation (B, F, 6, D), float32; text (B, 512, D) and image (B, 257, D).
        """
        weight = self.time_embedder.linear_1.weight
        time = self.time_embedder(sinusoid(timestep, self.freq_dim).to(text.device, weight.dtype))
        modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        image = None if image is None else self.image_embedder(image)
        return time.float(), modulation.float(), self.text_embedder(text), image


class AudioProjection(nn.Module):
    """Windows of audio features to `tokens` audio tokens of width `audio_dim` for each latent frame.

    The first latent frame is one video frame and sees the whole window of that frame. A later one is four video frames.
    Of their windows it sees the past half and the center of the first, the centers of the middle two, and the center
    and the future half of the last.
    """

    def __init__(self, window: int, features: int, hidden: int, tokens: int, audio_dim: int) -> None:
        super().__init__()
        self.center = window // 2
        self.tokens = tokens
        self.first_frame = nn.Linear(window * features, hidden)
        self.later_frames = nn.Linear((2 * (self.center + 1) + LATENT_STRIDE - 2) * features, hidden)
        self.shared = nn.Linear(hidden, hidden)
        self.to_tokens = nn.Linear(hidden, tokens * audio_dim)
        self.norm = FP32LayerNorm(audio_dim)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, P, F, window, layers, channels), P speakers, 4k+1 video frames -> (B, k+1, P*tokens, audio_dim)."""
        speakers = audio.shape[1]
        audio = audio.flatten(0, 1).flatten(3)  # (B*P, F, window, features)
        later = audio[:, 1:].unflatten(1, (-1, LATENT_STRIDE))  # (B*P, k, 4, window, features)
        past, future = later[:, :, 0, : self.center + 1], later[:, :, -1, self.center :]
        later = torch.cat((past, later[:, :, 1:-1, self.center], future), dim=2)  # (B*P, k, entries, features)
        first = F.relu(self.first_frame(audio[:, :1].flatten(2)))
        later = F.relu(self.later_frames(later.flatten(2)))
        hidden = F.relu(self.shared(torch.cat((first, later), dim=1)))
        tokens = self.norm(self.to_tokens(hidden).unflatten(-1, (self.tokens, -1)))
        return tokens.unflatten(0, (-1, speakers)).transpose(1, 2).flatten(2, 3)
