"""Several processes at work on one video: who computes what, and what they tell each other.

Three things are divided. The terms of the guidance: each process predicts under its own conditions, and all hear of all
(`Parallel.predictions`). The tokens of the video: every process has the same part of the space of every frame, so that
whatever belongs to a frame, such as its timestep and its sound, is there without asking, and self-attention alone needs
the others (`SequenceParallel`). The VAE's tiles (`Parallel.spread`). What is needed once, such as an encoded prompt, is
made by the first process and told to the others (`Parallel.once`).

The model does not know. It is called with a part of each frame, laid out as a line of patches whose places are given,
and returns the velocities of that part: hooks around it cut and join. The random numbers are drawn by all alike, on the
CPU. So all processes have the same latents at every step, and one that is alone runs the same code with nobody to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from skyreels_v3.attention.backends import AttentionFn
from skyreels_v3.denoising.loop import one_by_one
from skyreels_v3.parallel.collectives import all_gather, broadcast_tensors
from skyreels_v3.parallel.ranks import Degrees, Ranks
from skyreels_v3.parallel.usp import UspFn, collected, has_xdit, torch_usp, xdit_usp
from skyreels_v3.wan.transformer import Segment, SkyReelsTransformer3DModel
from skyreels_v3.wan.transformer.attention import positions_between, region_looks
from skyreels_v3.wan.transformer.rope import grid_positions


@dataclass(frozen=True)
class Layout:
    """How the tokens of a forward lie on the processes.

    Attributes:
        segments: latent frames of each segment.
        grid: rows and columns of a frame's tokens.
        own: tokens of a frame that are this process's; the rest up to `share` is padding.
        share: tokens of a frame that each process has.
    """

    segments: tuple[int, ...]
    grid: tuple[int, int]
    own: int
    share: int

    @property
    def frames(self) -> int:
        return sum(self.segments)

    @property
    def tokens(self) -> int:
        """Tokens of all frames, on all processes together."""
        return self.frames * self.grid[0] * self.grid[1]


class Team:
    """Some processes, in an order of theirs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors (N, ...) of all N processes, each of the same shape (...)."""
        return all_gather(x, self.group)


class SequenceParallel:
    """The tokens of a video on several processes.

    Args:
        team: those processes, in the order of their parts.
        usp: attention among the tokens of all of them.
    """

    def __init__(self, team: Team, usp: UspFn) -> None:
        self.team = team
        self.usp = usp
        self.layout: Layout | None = None  # of the forward that is going on

    def attach(self, model: SkyReelsTransformer3DModel, cross_attention: AttentionFn) -> None:
        """Have every forward of `model` computed by all processes."""
        patch = model.config.patch_size
        model.set_attention(self.attention, cross_attention, self.speaker_positions)
        model.register_forward_pre_hook(lambda _, arguments: (self.shard(arguments[0], patch), *arguments[1:]))
        model.register_forward_hook(lambda _, __, velocities: self.gather(velocities, patch))

    def shard(self, segments: Sequence[Segment], patch: Sequence[int]) -> tuple[Segment, ...]:
        """This process's part of the space of every frame."""
        rows, columns = (size // step for size, step in zip(segments[0].latents.shape[3:], patch[1:], strict=True))
        share = -(-rows * columns // self.team.size)
        first = min(self.team.rank * share, rows * columns)
        own = min(share, rows * columns - first)
        self.layout = Layout(tuple(s.latents.shape[2] for s in segments), (rows, columns), own, share)
        positions = pad_end(grid_positions(rows, columns)[first : first + own], 0, share)
        width = patch[2]
        parts = (line_up(s.latents, patch)[..., first * width : (first + own) * width] for s in segments)
        return tuple(
            segment._replace(latents=pad_end(part, -1, share * width), position_ids=positions)
            for segment, part in zip(segments, parts, strict=True)
        )

    def gather(self, velocities: Sequence[Tensor], patch: Sequence[int]) -> tuple[Tensor, ...]:
        """The whole of what each process has a part of."""
        assert self.layout is not None
        rows, columns = self.layout.grid
        parts = self.team.all_gather(torch.cat(list(velocities), dim=2))  # (N, B, C, F, p, share * p)
        line = parts.movedim(0, -2).flatten(-2)[..., : rows * columns * patch[2]]
        return take_down(line, rows, columns).split(self.layout.segments, dim=2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this process's tokens (B, L, N, D) to those of all; padding is neither asked nor seen."""
        layout = self.layout
        assert layout is not None
        if layout.own == layout.share:
            return self.usp(query, key, value, layout.tokens)
        # the last processes have padding in every frame: to the end with it, where it can be cut off
        whole = layout.frames * layout.share
        packed = [pad_end(self.real(part), 1, whole) for part in (query, key, value)]
        out = self.usp(*packed, layout.tokens)[:, : layout.frames * layout.own]
        return pad_end(out.unflatten(1, (layout.frames, layout.own)), 2, layout.share).flatten(1, 2)

    def real(self, x: Tensor) -> Tensor:
        """The tokens (B, L', ...) among (B, L, ...) that are no padding."""
        assert self.layout is not None
        return x.unflatten(1, (self.layout.frames, self.layout.share))[:, :, : self.layout.own].flatten(1, 2)

    def speaker_positions(self, query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
        """`attention.speaker_positions` of these tokens; the first frame's keys and the extremes are shared."""
        assert self.layout is not None
        first_frame = collected(key[:, : self.layout.share], self.team.group)
        looks = region_looks(query, first_frame[:, : masks.shape[1]], masks)
        real = self.real(looks.transpose(1, 2))  # (B, L', 3)
        infinite = real.new_full((real.shape[0], 1, 3), torch.inf)
        low = torch.cat((real, infinite), dim=1).amin(dim=1)
        high = torch.cat((real, -infinite), dim=1).amax(dim=1)
        dist.all_reduce(low, dist.ReduceOp.MIN, self.team.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, self.team.group)
        return positions_between(looks, low[..., None], high[..., None])


def line_up(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, F, H, W) -> (B, C, F, p, S * q): the frame's patches of p x q pixels side by side, row after row."""
    grid = latents.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1]))  # (B, C, F, rows, p, columns, q)
    return grid.movedim(4, 3).flatten(4)


def take_down(line: Tensor, rows: int, columns: int) -> Tensor:
    """What `line_up` was given."""
    return line.unflatten(4, (rows, columns, -1)).movedim(3, 4).flatten(5, 6).flatten(3, 4)


def pad_end(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros at the end of an axis, so that it has `size`."""
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)


class Parallel:
    """All processes of a run. One that is alone talks to nobody.

    Args:
        degrees: how they divide the work on a video.
        device: this process's own.
    """

    _teams: ClassVar[dict[tuple[Degrees, str], dict[str, Team]]] = {}

    def __init__(self, ranks: Ranks, degrees: Degrees, device: torch.device) -> None:
        assert degrees.world in (ranks.world, 1), (degrees, ranks)
        self.ranks = ranks
        self.degrees = degrees
        self.device = device

    @property
    def alone(self) -> bool:
        return self.degrees.world == 1

    @property
    def main(self) -> bool:
        """Whether this process does what is done once."""
        return self.alone or self.ranks.main

    def team_along(self, name: str) -> Team:
        """This process and those that differ from it in "cfg", "ring", "ulysses" or "sequence" (the last two)."""
        key = (self.degrees, self.device.type)
        if key not in self._teams:  # groups are made once, by all processes together
            sizes = (self.degrees.cfg, self.degrees.ring, self.degrees.ulysses)
            mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("cfg", "ring", "ulysses"))
            meshes = {one: mesh[one] for one in ("cfg", "ring", "ulysses")}
            meshes["sequence"] = mesh["ring", "ulysses"]._flatten("sequence")
            self._teams[key] = {one: Team(mesh.get_group()) for one, mesh in meshes.items()}
        return self._teams[key][name]

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        smallest = torch.tensor(number)
        if not self.alone:
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def once(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives on the first process, on all of them, on the CPU there; the others do not call it."""
        if self.alone:
            return dict(make())
        return broadcast_tensors(dict(make()) if self.main else {})

    def predictions(self, names: Sequence[str], predict: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """`predict` of each name; each is computed by one of the processes that divide the guidance."""
        if self.degrees.cfg == 1:
            return one_by_one(names, predict)
        team = self.team_along("cfg")
        found: dict[str, Tensor] = {}
        for start in range(0, len(names), team.size):
            some = names[start : start + team.size]
            # whoever has nothing to do repeats the last one: all must have something to show
            own = predict(some[min(team.rank, len(some) - 1)])
            found |= zip(some, team.all_gather(own), strict=False)
        return found

    @property
    def team(self) -> Team | None:
        """All processes, for work that is divided without regard to the degrees; None for one that is alone."""
        return None if self.alone else Team(dist.group.WORLD)


def choose_usp(kernel: str, attention: AttentionFn, parallel: Parallel) -> UspFn:
    """Attention among the processes that divide a video: xDiT's on GPUs, torch's own exchanges elsewhere.

    Args:
        kernel, attention: what computes on one process, by its name and itself.
    """
    ulysses, ring = parallel.team_along("ulysses").group, parallel.team_along("ring").group
    plain = torch_usp(attention, ulysses, ring)
    if not has_xdit(kernel, parallel.device):
        return plain
    degrees = parallel.degrees
    usp = xdit_usp(kernel, degrees.cfg, degrees.ring, degrees.ulysses)
    if degrees.ring == 1:
        return usp

    def ring_or_plain(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        # the ring takes no padding, and its kernels no float32
        fits = query.shape[1] * degrees.sequence == tokens and query.dtype != torch.float32
        return (usp if fits else plain)(query, key, value, tokens)

    return ring_or_plain
