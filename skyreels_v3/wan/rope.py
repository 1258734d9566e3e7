"""Rotary positions from a list of segments.

A sequence is one or more segments in a row. Each has its own position on the time axis; rows and columns start at 0 in
each. So the layout of a task is data: a plain video is one segment at 0; condition frames are a segment at 0 before one
at P; a shot switch puts the earlier shot at 1024; reference images follow the video.

Rotary embedding (Su et al., arXiv:2104.09864) in its 3D form: of the D/2 channel pairs of a head, D/6 rotate with the
row, D/6 with the column and the rest with the frame. A pair is two adjacent channels. Angles are float64 as in Wan 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Segment(NamedTuple):
    """Consecutive latent frames of a sequence.

    Attributes:
        latents: (B, C, F, H, W).
        start_frame: position of the first latent frame on the time axis.
        clean: condition frames without noise; models with one timestep per frame see timestep 0 for them.
        position_ids: (S, 2) row and column of each of a frame's S tokens; None for the full grid, row by row.
    """

    latents: Tensor
    start_frame: int = 0
    clean: bool = False
    position_ids: Tensor | None = None


Rotary = Tensor  # cosine and sine of each channel pair, float32: (L, 1, D/2, 2), or (B, L, N, D/2, 2)


def angles(positions: Tensor, channels: int) -> Tensor:
    """Angles (P, channels/2) in float64 for positions (P,): position / theta^(2i/channels)."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    return positions.to(torch.float64)[:, None] / THETA**exponents


def rotary_tables(segments: Sequence[Segment], patch_size: Sequence[int], head_dim: int) -> Rotary:
    """Rotations (L, 1, head_dim/2, 2) of all tokens of `segments`, on the segments' device.

    The rotations of each axis are computed in float64 on the CPU (a few thousand numbers; not every device has
    float64) and expanded to all tokens on the device.
    """
    spatial = 2 * (head_dim // 6)
    tables = []
    for segment in segments:
        device = segment.latents.device
        frames, *grid = (size // patch for size, patch in zip(segment.latents.shape[2:], patch_size, strict=True))
        positions = grid_positions(*grid) if segment.position_ids is None else segment.position_ids.cpu()
        time = rotations(angles(torch.arange(frames) + segment.start_frame, head_dim - 2 * spatial)).to(device)
        space = rotations(angles(torch.arange(int(positions.max()) + 1), spatial)).to(device)
        axes = (space[axis].expand(frames, -1, -1, -1) for axis in positions.to(device).unbind(1))  # (F, S, C, 2)
        table = torch.cat((time[:, None].expand(-1, len(positions), -1, -1), *axes), dim=-2)
        tables.append(table.flatten(0, 1))  # (L, D/2, 2)
    return torch.cat(tables).unsqueeze(1)


def grid_positions(rows: int, columns: int) -> Tensor:
    """Row and column (rows * columns, 2) of each token of a frame, row by row."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)


def rotations(angle: Tensor) -> Rotary:
    """Cosine and sine of each angle, float32, on a new last axis."""
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each adjacent channel pair of x (B, L, N, D) by its token's angle; computed and returned in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, L, N, D/2, 2)
    if torch.compiler.is_compiling():  # the compiler fuses only real arithmetic, without stack
        cos, sin = (part.unsqueeze(-1) for part in rotary.unbind(-1))
        signs = 2 * torch.arange(2, device=x.device) - 1
        return (pairs * cos + pairs.flip(-1) * sin * signs).flatten(-2)
    # one pass over x; in real arithmetic it would take seven
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary)).flatten(-2)
