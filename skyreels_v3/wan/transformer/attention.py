"""The three attentions of a block: among the video tokens, to text and image, to audio.

Each calls an `AttentionFn`, an attribute that is set from outside; none chooses a kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from skyreels_v3.attention.backends import AttentionFn, attention_map, sdpa
from skyreels_v3.wan.transformer.norms import FP32RMSNorm
from skyreels_v3.wan.transformer.rope import THETA, Rotary, apply_rotary, rotations

# Positions on the speakers' rotary axis: the ranges of the first and second person's tokens, the background between
# them, and the position of each person's audio.
SPEAKER_RANGES = ((0.0, 4.0), (20.0, 24.0))
BACKGROUND_POSITION = 12.0
SPEAKER_POSITIONS = (2.0, 22.0)
MAP_CHUNK = 4096  # tokens whose attention weights exist at a time

KeyValue = tuple[Tensor, Tensor]  # (B, T, N, D) each
SpeakerFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # see `speaker_positions`


class Attention(nn.Module):
    """The layers that all three share: `eps` is that of the norms of queries and keys, None for none."""

    def __init__(self, dim: int, heads: int, condition_dim: int, eps: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.attention: AttentionFn = sdpa
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(condition_dim, dim)
        self.to_v = nn.Linear(condition_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if eps is not None:
            self.norm_q = FP32RMSNorm(dim, eps=eps)  # over the whole width, not per head
            self.norm_k = FP32RMSNorm(dim, eps=eps)


class SelfAttention(Attention):
    """Attention among all video tokens, with rotary positions."""

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, N, D) of tokens x (B, L, N*D)."""
        heads = (self.heads, -1)
        query = apply_rotary(self.norm_q(self.to_q(x).float()).unflatten(-1, heads), rotary).type_as(x)
        key = apply_rotary(self.norm_k(self.to_k(x).float()).unflatten(-1, heads), rotary).type_as(x)
        return query, key, self.to_v(x).unflatten(-1, heads)


class CrossAttention(Attention):
    """Attention to the text and, where the checkpoint has it, to the image; the two are added."""

    def __init__(self, dim: int, heads: int, eps: float, with_image: bool) -> None:
        super().__init__(dim, heads, dim, eps)
        if with_image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = FP32RMSNorm(dim, eps=eps)

    def keys_values(self, text: Tensor, image: Tensor | None) -> list[KeyValue]:
        """Keys and values of text (B, 512, D) and, if given, image (B, 257, D) tokens."""
        pairs = [(self.norm_k(self.to_k(text)), self.to_v(text))]
        if image is not None:
            pairs.append((self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)))
        return [(key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))) for key, value in pairs]

    def forward(self, x: Tensor, keys_values: Sequence[KeyValue]) -> Tensor:
        """The update (B, L, D) of tokens x."""
        query = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))
        out, *more = (self.attention(query, key, value) for key, value in keys_values)
        return self.to_out[0](sum(more, out).flatten(2))


class AudioAttention(Attention):
    """Attention of each latent frame's tokens to the audio tokens of that frame."""

    def keys_values(self, audio: Tensor, two_people: bool) -> KeyValue:
        """Keys and values (B, F, T, N, D) of audio tokens (B, F, T, A).

        With two people, T is the first one's tokens followed by the second one's, and the keys are rotated to each
        one's position on the speakers' axis.
        """
        key, value = (layer(audio).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        if two_people:
            position = torch.tensor(SPEAKER_POSITIONS, device=audio.device).repeat_interleave(audio.shape[2] // 2)
            rotary = speaker_rotary(position[:, None], key.shape[-1])
            key = apply_rotary(key.flatten(0, 1), rotary).type_as(key).view_as(key)
        return key, value

    def forward(self, x: Tensor, keys_values: KeyValue, positions: Tensor | None) -> Tensor:
        """The update (B, L, D) of tokens x, L = F * tokens per frame.

        `positions` (B, L, N), given with two people, are those of each token and head on the speakers' axis.
        """
        key, value = keys_values
        frames = key.shape[1]
        query = self.to_q(x).unflatten(-1, (self.heads, -1))
        if positions is not None:
            query = apply_rotary(query, speaker_rotary(positions, query.shape[-1])).type_as(x)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)  # (B*F, L/F, N, D)
        out = self.attention(query, key.flatten(0, 1), value.flatten(0, 1)).flatten(2)  # (B*F, L/F, N*D)
        return self.to_out[0](out.unflatten(0, (-1, frames)).flatten(1, 2))


def speaker_rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Rotations (..., head_dim/2, 2) for real-valued positions (...) on the speakers' axis."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    return rotations(positions[..., None] / THETA**exponents)


def head_positions(positions: Tensor, frames: int, heads: int) -> Tensor:
    """Positions (B, L) of tokens -> (B, L, N): which of them each head rotates its queries by.

    The published model pairs them in the order in which frames and heads lie in memory: head n of frame f takes the
    positions of frame (f * N + n) modulo F. Only the recordings show this; the obvious choice is its own frame.
    """
    frame = torch.arange(frames, device=positions.device)[:, None]
    source = (frame * heads + torch.arange(heads, device=positions.device)) % frames  # (F, N)
    return positions.unflatten(1, (frames, -1))[:, source].transpose(2, 3).flatten(1, 2)


def speaker_positions(query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
    """Position (B, L) of every token on the speakers' axis, from queries and keys (B, L, N, D) of all tokens.

    A token belongs to the region of the first frame that it attends to most: `masks` (3, S) are those of person one,
    person two and the background. A person's tokens are spread over that person's range by how much they attend to it.
    """
    weights = region_weights(query, key[:, : masks.shape[1]], masks)
    return positions_between(weights, weights.amin(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True))


def region_weights(query: Tensor, first_frame_key: Tensor, masks: Tensor) -> Tensor:
    """Mean attention weight (B, 3, L) of each token inside each region of the first frame."""
    regions = masks.float() / masks.sum(dim=1, keepdim=True).clamp(min=1)  # the background may be empty
    # in chunks: the weights of all tokens at once would be the largest tensor of a forward
    chunks = query.split(MAP_CHUNK, dim=1)
    return torch.cat([torch.einsum("bls,ps->bpl", attention_map(q, first_frame_key), regions) for q in chunks], dim=-1)


def positions_between(weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Positions (B, L) from region weights (B, 3, L) and the lowest and highest (B, 3, 1) among all tokens."""
    spread = (weights - low) / (high - low)
    positions = torch.full_like(spread, BACKGROUND_POSITION)
    for person, (start, end) in enumerate(SPEAKER_RANGES):
        positions[:, person] = start + spread[:, person] * (end - start)
    return positions.gather(1, weights.argmax(dim=1, keepdim=True)).squeeze(1)
