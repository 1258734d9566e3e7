"""One block: self-attention, text (and image) attention, audio attention, feed-forward.

Self-attention alone sees all tokens at once (and, where two people speak, what says whom a token belongs to).
Everything before it and everything after it takes a token (for sound: a frame) by itself, and is done for a few
thousand tokens at a time: what float32 and the feed-forward layer need for themselves is then small, and the most that
exists at one time is the tokens, their queries, keys and values, and what attention makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import attention as diffusers_attention
from torch import Tensor, nn

from skyreels_v3.wan.transformer.attention import (
    AudioAttention,
    CrossAttention,
    KeysValues,
    SelfAttention,
    SpeakerFn,
    head_positions,
    speaker_positions,
)
from skyreels_v3.wan.transformer.norms import gated_residual, layer_norm, modulate
from skyreels_v3.wan.transformer.rope import Rotary

TOKENS_AT_ONCE = 8192  # enough to fill a large GPU with each product


@dataclass(frozen=True)
class Context:
    """What the blocks attend to, the same for all of them and for all steps.

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
    _kept: dict[nn.Module, Any] = field(default_factory=dict)

    def kept(self, module: nn.Module, make: Callable[[], Any]) -> Any:
        """What `make` gives for `module`, made when it is first asked for: its weights may not be here before."""
        if module not in self._kept:
            self._kept[module] = make()
        return self._kept[module]


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
        self.speaker_positions: SpeakerFn = speaker_positions

    def forward(self, x: Tensor, context: Context, modulation: Tensor, rotary: Rotary) -> Tensor:
        """Tokens x (B, L, D), overwritten, and modulation (B, F, 6, D), F = 1 or the latent frames, -> (B, L, D)."""
        modulation = self.scale_shift_table.unsqueeze(1) + modulation
        frames = modulation.shape[1] if context.audio is None else context.audio.shape[1]
        spans = [*token_spans(x.shape[1], frames)]
        query, key, value = self.projected(x, modulation, rotary, spans)
        positions = None
        if context.speaker_masks is not None:
            positions = self.speaker_positions(query, key, context.speaker_masks)
            positions = head_positions(positions, frames, query.shape[2])
        attended = self.attn1.attention(query, key, value)
        del query, key, value
        text = context.kept(self.attn2, lambda: self.attn2.keys_values(context.text, context.image))
        audio = None if context.audio is None else self.audio_keys_values(context)
        for tokens, part in spans:
            x[:, tokens] = self.finish(
                x[:, tokens],
                attended[:, tokens],
                of_frames(modulation, part),
                text,
                None if audio is None else (audio[0][:, part], audio[1][:, part]),
                None if positions is None else positions[:, tokens],
            )
        return x

    def audio_keys_values(self, context: Context) -> KeysValues:
        """Keys and values (B, F, T, N, D) of the sound."""
        two_people = context.speaker_masks is not None
        return context.kept(self.attn_audio, lambda: self.attn_audio.keys_values(context.audio, two_people))

    def projected(
        self, x: Tensor, modulation: Tensor, rotary: Rotary, spans: list[tuple[slice, slice]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, N, D) of all tokens."""
        if len(spans) == 1:
            return self.project(x, modulation, rotary)
        whole = tuple(x.new_empty(*x.shape[:2], self.attn1.heads, x.shape[2] // self.attn1.heads) for _ in range(3))
        for tokens, part in spans:
            made = self.project(x[:, tokens], of_frames(modulation, part), rotary[tokens])
            for tensor, piece in zip(whole, made, strict=True):
                tensor[:, tokens] = piece
        return whole

    def project(self, x: Tensor, modulation: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before self-attention, for some tokens x (B, l, D): queries, keys and values (B, l, N, D)."""
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        return self.attn1.project(modulate(layer_norm(x, self.norm1), shift, scale).type_as(x), rotary)

    def finish(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text: tuple[KeysValues, ...],
        audio: KeysValues | None,
        positions: Tensor | None,
    ) -> Tensor:
        """What comes after self-attention, for some tokens x (B, l, D) with attended (B, l, N, D): their new values."""
        gate1, shift2, scale2, gate2 = modulation[:, :, 2:].unbind(2)
        x = gated_residual(x, gate1, self.attn1.to_out[0](attended.flatten(2)))
        x = x + self.attn2(layer_norm(x, self.norm2).type_as(x), text)
        if audio is not None:
            x = x + self.attn_audio(layer_norm(x, self.norm_audio).type_as(x), audio, positions)
        normed = modulate(layer_norm(x, self.norm3), shift2, scale2).type_as(x)
        return gated_residual(x, gate2, self.ffn(normed))


def token_spans(tokens: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """Tokens, and the frames that they are of, to be worked on at one time: whole frames where there are several."""
    unit = tokens // frames if frames > 1 else 1
    step = max(1, TOKENS_AT_ONCE // unit)
    for start in range(0, tokens // unit, step):
        end = min(start + step, tokens // unit)
        yield slice(start * unit, end * unit), slice(start, end)


def of_frames(modulation: Tensor, frames: slice) -> Tensor:
    """The modulation (B, F, ..., D) of some frames, or the one that holds for all of them."""
    return modulation if modulation.shape[1] == 1 else modulation[:, frames]
