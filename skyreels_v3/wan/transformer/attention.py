"""The three attentions of a block: among the video tokens, to the text and image, to the sound.

Each takes its kernel as an `AttentionFn`, an attribute that is set from outside and never chosen here. What depends on
the conditions alone, keys and values of text, image and sound, has a method of its own: it is computed once and kept
(see `block.Context`), and does not change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from skyreels_v3.attention.backends import AttentionFn, attention_map, sdpa
from skyreels_v3.wan.transformer.norms import rms_norm
from skyreels_v3.wan.transformer.rope import THETA, Rotary, apply_rotary, rotations

# Positions on the speakers' rotary axis: range of the first and second person's tokens, the background between them,
# and the place of each person's own sound.
SPEAKER_RANGES = ((0.0, 4.0), (20.0, 24.0))
BACKGROUND_POSITION = 12.0
SPEAKER_POSITIONS = (2.0, 22.0)
MAPPED_AT_ONCE = 4096  # tokens

KeysValues = tuple[Tensor, Tensor]  # (B, T, N, D) each
SpeakerFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # see `speaker_positions`


class NormedAttention(nn.Module):
    """The layers that self- and cross-attention share: projections, and RMS norms of queries and keys."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention: AttentionFn = sdpa
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)  # over the whole width, not per head
        self.norm_k = nn.RMSNorm(dim, eps=eps)


class SelfAttention(NormedAttention):
    """Attention among all video tokens, with rotated queries and keys."""

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, N, D) of tokens x (B, L, N*D)."""
        query = rms_norm(self.to_q(x), self.norm_q).unflatten(-1, (self.heads, -1))
        query = apply_rotary(query, rotary).type_as(x)
        key = rms_norm(self.to_k(x), self.norm_k).unflatten(-1, (self.heads, -1))
        return query, apply_rotary(key, rotary).type_as(x), self.to_v(x).unflatten(-1, (self.heads, -1))


class CrossAttention(NormedAttention):
    """Attention to the text and, where the checkpoint has it, to the image; the two are added."""

    def __init__(self, dim: int, heads: int, eps: float, with_image: bool) -> None:
        super().__init__(dim, heads, eps)
        if with_image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def keys_values(self, text: Tensor, image: Tensor | None) -> tuple[KeysValues, ...]:
        """Keys and values of text (B, 512, D) and, if there is one, image (B, 257, D) tokens."""
        key = rms_norm(self.to_k(text), self.norm_k).type_as(text)
        pairs = [(key, self.to_v(text))]
        if image is not None:
            key = rms_norm(self.add_k_proj(image), self.norm_added_k).type_as(image)
            pairs.append((key, self.add_v_proj(image)))
        return tuple(
            (key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))) for key, value in pairs
        )

    def forward(self, x: Tensor, keys_values: Sequence[KeysValues]) -> Tensor:
        """Update (B, L, D) of tokens x."""
        query = rms_norm(self.to_q(x), self.norm_q).type_as(x).unflatten(-1, (self.heads, -1))
        out = sum_of(self.attention(query, key, value) for key, value in keys_values)
        return self.to_out[0](out.flatten(2))


class AudioAttention(nn.Module):
    """Attention of each latent frame's tokens to that frame's audio tokens."""

    def __init__(self, dim: int, heads: int, audio_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention: AttentionFn = sdpa
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(audio_dim, dim)
        self.to_v = nn.Linear(audio_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, audio: Tensor, two_people: bool) -> KeysValues:
        """Keys and values (B, F, T, N, D) of audio (B, F, T, A).

        Where two people speak, T holds the first one's tokens, then the second one's, and the keys are turned to each
        one's place on the speakers' axis.
        """
        key, value = (layer(audio).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        if two_people:
            own = torch.tensor(SPEAKER_POSITIONS, device=audio.device).repeat_interleave(audio.shape[2] // 2)
            key = apply_rotary(key.flatten(0, 1), line_tables(own[:, None], key.shape[-1])).type_as(key).view_as(key)
        return key, value

    def forward(self, x: Tensor, keys_values: KeysValues, positions: Tensor | None) -> Tensor:
        """Update (B, L, D), L = F * tokens of a frame.

        `positions` (B, L, N), where two people speak, say on the speakers' axis whom a head sees a token belong to.
        """
        key, value = keys_values
        frames = key.shape[1]
        query = self.to_q(x).unflatten(-1, (self.heads, -1))
        if positions is not None:
            query = apply_rotary(query, line_tables(positions, query.shape[-1])).type_as(x)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)  # (B*F, L/F, N, D)
        out = self.attention(query, key.flatten(0, 1), value.flatten(0, 1)).flatten(2)  # (B*F, L/F, N*D)
        return self.to_out[0](out.unflatten(0, (-1, frames)).flatten(1, 2))


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor; the first is overwritten by it."""
    first, *others = parts
    for part in others:
        first = first.add_(part)
    return first


def head_positions(positions: Tensor, frames: int, heads: int) -> Tensor:
    """Positions (B, L) of tokens -> (B, L, N): which of them each head turns its queries by.

    The published model pairs them in the order in which frames and heads lie in memory: head n of frame f takes the
    positions of frame (f * N + n) modulo F. Only the recordings show this; the plain choice would be its own frame.
    """
    frame = torch.arange(frames, device=positions.device)[:, None]
    source = (frame * heads + torch.arange(heads, device=positions.device)) % frames  # (F, N)
    return positions.unflatten(1, (frames, -1))[:, source].transpose(2, 3).flatten(1, 2)


def line_tables(positions: Tensor, head_dim: int) -> Rotary:
    """Rotations (..., head_dim/2) for real-valued positions (...) on one axis."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    return rotations(positions[..., None] / THETA**exponents)


def speaker_positions(query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
    """Position (B, L) of every token on the speakers' axis, from queries and keys (B, L, N, D) of all tokens.

    How much a token looks at each region of the first frame says whom it belongs to: the mean attention weight inside
    each mask (3, S) of person one, person two and the background. The winner decides; a person's tokens are spread
    over that person's range by how strongly they look, from the weakest to the strongest token.
    """
    looks = region_looks(query, key[:, : masks.shape[1]], masks)
    return positions_between(looks, looks.amin(dim=-1, keepdim=True), looks.amax(dim=-1, keepdim=True))


def region_looks(query: Tensor, first_frame_key: Tensor, masks: Tensor) -> Tensor:
    """How much (B, 3, L) each token looks at each region of the first frame."""
    regions = masks.float() / masks.sum(dim=1, keepdim=True).clamp(min=1)  # the background may be empty
    # some tokens at a time: the weights of all tokens at once would be the largest tensor of a forward
    some = query.split(MAPPED_AT_ONCE, dim=1)
    return torch.cat([torch.einsum("bls,ps->bpl", attention_map(q, first_frame_key), regions) for q in some], dim=-1)


def positions_between(looks: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Positions (B, L) from looks (B, 3, L) and the lowest and highest (B, 3, 1) among all tokens."""
    spread = (looks - low) / (high - low)
    places = torch.full_like(spread, BACKGROUND_POSITION)
    for person, (start, end) in enumerate(SPEAKER_RANGES):
        places[:, person] = start + spread[:, person] * (end - start)
    return places.gather(1, looks.argmax(dim=1, keepdim=True)).squeeze(1)
