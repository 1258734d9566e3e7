"""One block: self-attention, text (and image) attention, audio attention, feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models import attention as diffusers_attention
from torch import Tensor, nn

from skyreels_v3.models.transformer.attention import AudioAttention, CrossAttention, SelfAttention
from skyreels_v3.models.transformer.norms import gated_residual, layer_norm, modulate
from skyreels_v3.models.transformer.rope import Rotary


@dataclass(frozen=True)
class Context:
    """What the blocks attend to, the same for all of them.

    Attributes:
        text: (B, 512, D).
        image: (B, 257, D), or None.
        audio: (B, F, T, audio_dim), or None.
        speaker_masks: (3, S) over the S tokens of a frame: person one, person two, background; None for one speaker.
    """

    text: Tensor
    image: Tensor | None = None
    audio: Tensor | None = None
    speaker_masks: Tensor | None = None


class FeedForward(diffusers_attention.FeedForward):
    """diffusers' layer with its activation in place: the hidden tokens are the largest tensor there is, held once."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, inner_dim=hidden_dim, activation_fn="gelu-approximate")

    def forward(self, x: Tensor) -> Tensor:
        expand, _, contract = self.net
        hidden = expand.proj(x)  # (B, L, hidden_dim)
        return contract(torch.ops.aten.gelu_(hidden, approximate=expand.approximate))


class TransformerBlock(nn.Module):
    """A Wan 2.1 block with optional image and audio attention."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, with_image: bool, audio_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.attn2 = CrossAttention(dim, heads, eps, with_image)
        if audio_dim is not None:
            self.norm_audio = nn.LayerNorm(dim, eps=eps)
            self.attn_audio = AudioAttention(dim, heads, audio_dim)
        self.norm3 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, context: Context, modulation: Tensor, rotary: Rotary) -> Tensor:
        """Tokens x (B, L, D) and modulation (B, F, 6, D), F = 1 or the latent frames, -> (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.unsqueeze(1) + modulation).unbind(2)
        normed = modulate(layer_norm(x, self.norm1), shift1, scale1).type_as(x)
        update, positions = self.attn1(normed, rotary, context.speaker_masks)
        x = gated_residual(x, gate1, update)
        x = x + self.attn2(layer_norm(x, self.norm2).type_as(x), context.text, context.image)
        if context.audio is not None:
            x = x + self.attn_audio(layer_norm(x, self.norm_audio).type_as(x), context.audio, positions)
        normed = modulate(layer_norm(x, self.norm3), shift2, scale2).type_as(x)
        return gated_residual(x, gate2, self.ffn(normed))
