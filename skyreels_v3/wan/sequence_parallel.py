"""Sequence parallelism: divides the tokens of a `SkyReelsTransformer3DModel` forward pass among ranks.

Each rank has the same spatial part of every latent frame, so per-frame inputs such as timesteps and audio need no
communication. Only self-attention needs the tokens of the other ranks (see parallel/usp.py).

The model itself is unchanged: hooks give it a part of each frame, laid out as one row of patches with explicit position
ids, and gather the velocities that it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_v3.parallel.groups import Group, pad_end
from skyreels_v3.parallel.usp import UspFn
from skyreels_v3.wan.rope import Segment, grid_positions
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel, positions_between, region_weights


@dataclass(frozen=True)
class Layout:
    """How the tokens of a forward pass are divided.

    Attributes:
        segments: latent frames of each segment.
        grid: rows and columns of a frame's tokens.
        share: tokens of a frame on each rank, padding included.
        own: tokens of a frame on this rank, without padding.
    """

    segments: tuple[int, ...]
    grid: tuple[int, int]
    share: int
    own: int

    @property
    def frames(self) -> int:
        return sum(self.segments)

    @property
    def tokens(self) -> int:
        """Tokens on all ranks, without padding."""
        return self.frames * self.grid[0] * self.grid[1]


class SequenceParallel:
    """Divides the tokens of every forward pass of a model among the ranks of a group.

    Args:
        usp: attention among the tokens of all ranks.
    """

    def __init__(self, group: Group, usp: UspFn) -> None:
        self.group = group
        self.usp = usp
        self.layout = Layout((), (0, 0), 0, 0)  # of the current forward pass

    def attach(self, model: SkyReelsTransformer3DModel) -> None:
        """Divide every forward pass of `model`; attention to the conditions stays local."""
        patch = model.config["patch_size"]
        for block in cast(Iterable[Any], model.blocks):
            block.attn1.attention = self.attention
            block.speaker_positions = self.speaker_positions
        model.register_forward_pre_hook(lambda _, arguments: (self.shard(arguments[0], patch), *arguments[1:]))
        model.register_forward_hook(lambda _, __, velocities: self.gather(velocities, patch))

    def shard(self, segments: Sequence[Segment], patch: Sequence[int]) -> tuple[Segment, ...]:
        """This rank's spatial part of every frame."""
        rows, columns = (size // step for size, step in zip(segments[0].latents.shape[3:], patch[1:], strict=True))
        share = -(-rows * columns // self.group.size)
        first = min(self.group.rank * share, rows * columns)
        own = min(share, rows * columns - first)
        self.layout = Layout(tuple(s.latents.shape[2] for s in segments), (rows, columns), share, own)
        position_ids = pad_end(grid_positions(rows, columns)[first : first + own], 0, share)
        width = patch[2]
        parts = (to_row(s.latents, patch)[..., first * width : (first + own) * width] for s in segments)
        return tuple(
            segment._replace(latents=pad_end(part, -1, share * width), position_ids=position_ids)
            for segment, part in zip(segments, parts, strict=True)
        )

    def gather(self, velocities: Sequence[Tensor], patch: Sequence[int]) -> tuple[Tensor, ...]:
        """All-gather the velocities of all segments."""
        rows, columns = self.layout.grid
        parts = self.group.all_gather(torch.cat(list(velocities), dim=2))  # (N, B, C, F, p, share * p)
        row = parts.movedim(0, -2).flatten(-2)[..., : rows * columns * patch[2]]
        return from_row(row, rows, columns).split(self.layout.segments, dim=2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's tokens (B, L, N, D) to those of all ranks, without padding."""
        layout = self.layout
        if layout.own == layout.share:
            return self.usp(query, key, value, layout.tokens)
        # the last ranks have padding in every frame: move it to the end of the sequence, where it is ignored
        padded = layout.frames * layout.share
        query, key, value = (pad_end(self.unpadded(part), 1, padded) for part in (query, key, value))
        out = self.usp(query, key, value, layout.tokens)[:, : layout.frames * layout.own]
        return pad_end(out.unflatten(1, (layout.frames, layout.own)), 2, layout.share).flatten(1, 2)

    def unpadded(self, x: Tensor) -> Tensor:
        """The tokens (B, L, ...) without padding."""
        return x.unflatten(1, (self.layout.frames, self.layout.share))[:, :, : self.layout.own].flatten(1, 2)

    def speaker_positions(self, query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
        """Like `transformer.speaker_positions`, with the first frame's keys and the extremes over all ranks."""
        first_frame = self.group.all_gather_tokens(key[:, : self.layout.share])
        weights = region_weights(query, first_frame[:, : masks.shape[1]], masks)
        real = self.unpadded(weights.transpose(1, 2))  # (B, L', 3)
        infinite = real.new_full((real.shape[0], 1, 3), torch.inf)  # a rank may have only padding
        low = self.group.all_reduce(torch.cat((real, infinite), dim=1).amin(dim=1), dist.ReduceOp.MIN)
        high = self.group.all_reduce(torch.cat((real, -infinite), dim=1).amax(dim=1), dist.ReduceOp.MAX)
        return positions_between(weights, low[..., None], high[..., None])


def to_row(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, F, H, W) -> (B, C, F, p, S * q): a frame's S patches of p x q pixels in one row."""
    grid = latents.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1]))  # (B, C, F, rows, p, columns, q)
    return grid.movedim(4, 3).flatten(4)


def from_row(row: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `to_row`."""
    return row.unflatten(4, (rows, columns, -1)).movedim(3, 4).flatten(5, 6).flatten(3, 4)
