"""One block: self-attention, text (and image) attention, audio attention, feed-forward.

Only self-attention needs all tokens at once (and, with two speakers, what decides which of them a token belongs to).
The rest treats each token (for audio: each frame) by itself and runs on a chunk of tokens at a time. That keeps its
float32 and feed-forward temporaries small: the peak is the tokens, their queries, keys and values, and the output of
attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models import attention as diffusers_attention
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from skyreels_v3.wan.transformer.attention import (
    AudioAttention,
    CrossAttention,
    KeyValue,
    SelfAttention,
    SpeakerFn,
    head_positions,
    speaker_positions,
)
from skyreels_v3.wan.transformer.norms import gated_residual, modulate
from skyreels_v3.wan.transformer.rope import Rotary

TOKENS_AT_ONCE = 8192  # enough to fill a large GPU with each product


class Context(NamedTuple):
    """What all blocks attend to, brought to their width.

    Attributes:
        text: (B, 512, D).
        image: (B, 257, D), or None.
        audio: (B, F, T, audio_dim), or None.
        speaker_masks: (3, S) over the S tokens of a frame: person one, person two, background; None for one speaker.
    """

    text: Tensor
    image: Tensor | None
    audio: Tensor | None
    speaker_masks: Tensor | None


class FeedForward(diffusers_attention.FeedForward):
    """diffusers' layer with an in-place activation: the hidden tokens are the largest tensor there is, held once."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, inner_dim=hidden_dim, activation_fn="gelu-approximate")

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        expand, _, contract = cast(Iterable[Any], self.net)
        return contract(torch.ops.aten.gelu_(expand.proj(x), approximate=expand.approximate))


class TransformerBlock(nn.Module):
    """A Wan 2.1 block with optional image and audio attention."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, with_image: bool, audio_dim: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads, dim, eps)
        self.norm2 = FP32LayerNorm(dim, eps=eps)
        self.attn2 = CrossAttention(dim, heads, eps, with_image)
        self.norm_audio: Any = None if audio_dim is None else FP32LayerNorm(dim, eps=eps)
        self.attn_audio: Any = None if audio_dim is None else AudioAttention(dim, heads, audio_dim)
        self.norm3 = FP32LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.speaker_positions: SpeakerFn = speaker_positions

    def forward(self, x: Tensor, context: Context, modulation: Tensor, rotary: Rotary) -> Tensor:
        """Tokens x (B, L, D) and modulation (B, F, 6, D), F = 1 or the latent frames, -> (B, L, D).

        Without gradients x is overwritten.
        """
        modulation = self.scale_shift_table.unsqueeze(1) + modulation
        frames = modulation.shape[1] if context.audio is None else context.audio.shape[1]
        spans = [*token_spans(x.shape[1], frames)]
        query, key, value = self.projected(x, modulation, rotary, spans)
        positions = None
        if context.speaker_masks is not None:
            positions = self.speaker_positions(query.detach(), key.detach(), context.speaker_masks)
            positions = head_positions(positions, frames, query.shape[2])
        attended = self.attn1.attention(query, key, value)
        del query, key, value
        text = self.attn2.keys_values(context.text, context.image)
        audio = None if context.audio is None else self.attn_audio.keys_values(context.audio, positions is not None)
        out = torch.empty_like(x) if torch.is_grad_enabled() else x
        for tokens, part in spans:
            audio_part = None if audio is None else (audio[0][:, part], audio[1][:, part])
            position_part = None if positions is None else positions[:, tokens]
            out[:, tokens] = self.finish(
                x[:, tokens], attended[:, tokens], of_frames(modulation, part), text, audio_part, position_part
            )
        return out

    def projected(
        self, x: Tensor, modulation: Tensor, rotary: Rotary, spans: Sequence[tuple[slice, slice]]
    ) -> Sequence[Tensor]:
        """Queries, keys and values (B, L, N, D) of all tokens."""
        whole = [x.new_empty(*x.shape[:2], self.attn1.heads, x.shape[2] // self.attn1.heads) for _ in range(3)]
        for tokens, part in spans:
            chunk = self.project(x[:, tokens], of_frames(modulation, part), rotary[tokens])
            for tensor, piece in zip(whole, chunk, strict=True):
                tensor[:, tokens] = piece
        return whole

    def project(self, x: Tensor, modulation: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """What precedes self-attention, for a chunk of tokens x (B, l, D): queries, keys and values (B, l, N, D)."""
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        return self.attn1.project(modulate(self.norm1(x.float()), shift, scale).type_as(x), rotary)

    def finish(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text: Sequence[KeyValue],
        audio: KeyValue | None,
        positions: Tensor | None,
    ) -> Tensor:
        """What follows self-attention: new values for a chunk of tokens x (B, l, D) with attended (B, l, N, D)."""
        gate1, shift2, scale2, gate2 = modulation[:, :, 2:].unbind(2)
        x = gated_residual(x, gate1, self.attn1.to_out[0](attended.flatten(2)))
        x = x + self.attn2(self.norm2(x), text)
        if audio is not None:
            x = x + self.attn_audio(self.norm_audio(x), audio, positions)
        normed = modulate(self.norm3(x.float()), shift2, scale2).type_as(x)
        return gated_residual(x, gate2, self.ffn(normed))


def token_spans(tokens: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of tokens and the frames they are of; where there are several frames, chunks are of whole ones."""
    unit = tokens // frames if frames > 1 else 1
    step = max(1, TOKENS_AT_ONCE // unit)
    for start in range(0, tokens // unit, step):
        end = min(start + step, tokens // unit)
        yield slice(start * unit, end * unit), slice(start, end)


def of_frames(modulation: Tensor, frames: slice) -> Tensor:
    """The modulation (B, F, ..., D) of some frames, or the one that applies to all of them."""
    return modulation if modulation.shape[1] == 1 else modulation[:, frames]
