"""The three attentions of a block: among the video tokens, to the text and image, to the sound.

Each takes its kernel as an `AttentionFn`, an attribute that is set from outside and never chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skyreels_v3.attention.backends import AttentionFn, attention_map, sdpa
from skyreels_v3.models.transformer.norms import rms_norm
from skyreels_v3.models.transformer.rope import THETA, Rotary, apply_rotary, rotations

# Positions on the speakers' rotary axis: range of the first and second person's tokens, the background between them,
# and the place of each person's own sound.
SPEAKER_RANGES = ((0.0, 4.0), (20.0, 24.0))
BACKGROUND_POSITION = 12.0
SPEAKER_POSITIONS = (2.0, 22.0)


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

    def rotated(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, L, N, D) of tokens x (B, L, N*D)."""
        query = rms_norm(self.to_q(x), self.norm_q).unflatten(-1, (self.heads, -1))
        query = apply_rotary(query, rotary).type_as(x)
        key = rms_norm(self.to_k(x), self.norm_k).unflatten(-1, (self.heads, -1))
        return query, apply_rotary(key, rotary).type_as(x)

    def forward(self, x: Tensor, rotary: Rotary, speaker_masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Update (B, L, D), and where two people speak the tokens' positions (B, L) on the speakers' axis."""
        query, key = self.rotated(x, rotary)
        value = self.to_v(x).unflatten(-1, (self.heads, -1))
        out = self.to_out[0](self.attention(query, key, value).flatten(2))
        if speaker_masks is None:
            return out, None
        return out, speaker_positions(query, key[:, : speaker_masks.shape[1]], speaker_masks)


class CrossAttention(NormedAttention):
    """Attention to the text and, where the checkpoint has it, to the image; the two are added."""

    def __init__(self, dim: int, heads: int, eps: float, with_image: bool) -> None:
        super().__init__(dim, heads, eps)
        if with_image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """Update (B, L, D) from text (B, 512, D) and image (B, 257, D) tokens."""
        query = rms_norm(self.to_q(x), self.norm_q).type_as(x)
        out = self.attend(query, rms_norm(self.to_k(text), self.norm_k), self.to_v(text))
        if image is not None:
            key = rms_norm(self.add_k_proj(image), self.norm_added_k)
            out = out + self.attend(query, key, self.add_v_proj(image))
        return self.to_out[0](out)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of (B, L, N*D) tensors, heads split and joined again."""
        query, key, value = (t.type_as(query).unflatten(-1, (self.heads, -1)) for t in (query, key, value))
        return self.attention(query, key, value).flatten(2)


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

    def forward(self, x: Tensor, audio: Tensor, positions: Tensor | None) -> Tensor:
        """Update (B, L, D) from audio (B, F, T, A), L = F * tokens of a frame.

        Where two people speak, T holds the first one's tokens, then the second one's, and `positions` (B, L) says on
        the speakers' axis whom a video token belongs to.
        """
        frames = audio.shape[1]
        query, key, value = (
            tensor.unflatten(-1, (self.heads, -1)) for tensor in (self.to_q(x), self.to_k(audio), self.to_v(audio))
        )
        if positions is not None:
            own = torch.tensor(SPEAKER_POSITIONS, device=x.device).repeat_interleave(audio.shape[2] // 2)
            places = head_positions(positions, frames, self.heads)
            query = apply_rotary(query, line_tables(places, query.shape[-1])).type_as(x)
            key = apply_rotary(key, line_tables(own[:, None], key.shape[-1])).type_as(x)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)  # (B*F, L/F, N, D)
        out = self.attention(query, key.flatten(0, 1), value.flatten(0, 1)).flatten(2)  # (B*F, L/F, N*D)
        return self.to_out[0](out.unflatten(0, (-1, frames)).flatten(1, 2))


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


def speaker_positions(query: Tensor, first_frame_key: Tensor, masks: Tensor) -> Tensor:
    """Position (B, L) of every token on the speakers' axis.

    How much a token looks at each region of the first frame says whom it belongs to: the mean attention weight inside
    each mask (3, S) of person one, person two and the background. The winner decides; a person's tokens are spread
    over that person's range by how strongly they look, from the weakest to the strongest token.
    """
    weights = attention_map(query, first_frame_key)  # (B, L, S)
    regions = masks.to(weights) / masks.sum(dim=1, keepdim=True).clamp(min=1)  # the background may be empty
    looks = torch.einsum("bls,ps->bpl", weights, regions)  # (B, 3, L)
    low, high = looks.amin(dim=-1, keepdim=True), looks.amax(dim=-1, keepdim=True)
    spread = (looks - low) / (high - low)
    places = torch.full_like(spread, BACKGROUND_POSITION)
    for person, (start, end) in enumerate(SPEAKER_RANGES):
        places[:, person] = start + spread[:, person] * (end - start)
    return places.gather(1, looks.argmax(dim=1, keepdim=True)).squeeze(1)
