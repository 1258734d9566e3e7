"""Groups of ranks that work on one video, and weights that are broadcast or sharded among them.

Ranks divide the guidance terms (`Parallel.predictions`: each predicts under its own conditions, and an all-gather
shares the predictions), the video's tokens (the family's sequence_parallel.py) and the VAE's tiles. What is needed
once, such as an encoded prompt, is computed by the main process and broadcast (`Parallel.broadcast_from_main`). All
ranks draw the same random numbers, on the CPU, so that they have the same latents at every step.

A group of one rank returns its input: a single process runs the same code without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.parallel.ranks import ParallelConfig, Ranks

# renamed in torch 2.13, where the old name warns
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """A process group; by default of this rank alone."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank, self.size = 0, 1
        if process_group is not None:
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather each rank's (...) into (N, ...), in rank order; all have the same shape."""
        if self.size == 1:
            return x[None]
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather(out, x.contiguous(), self.process_group)
        return out.unflatten(0, (self.size, -1))

    def all_gather_tokens(self, x: Tensor) -> Tensor:
        """Gather each rank's (B, L, ...) into (B, N * L, ...)."""
        return self.all_gather(x).movedim(0, 1).flatten(1, 2)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send part n of x (N, ...) to rank n; returns the parts received, in rank order."""
        if self.size == 1:
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.process_group)
        return out

    def all_reduce(self, x: Tensor, operation: Any) -> Tensor:
        """Reduce x over all ranks, in place; `operation` is one of `dist.ReduceOp`."""
        if self.size > 1:
            dist.all_reduce(x, operation, self.process_group)
        return x

    def map(self, work: Callable[[Any], Tensor], items: Sequence[Any]) -> Iterator[Tensor]:
        """Yield `work(item)` for each item, in order, divided among the ranks; all results have the same shape."""
        for start in range(0, len(items), self.size):
            some = items[start : start + self.size]
            made = self.all_gather(work(some[min(self.rank, len(some) - 1)]))  # idle ranks repeat the last item
            yield from made[: len(some)]
            del made  # before the next results are made


class Parallel:
    """The ranks that generate a video together.

    Args:
        ranks: this process's ranks in the run.
        degrees: how they divide the work; `UNDIVIDED` if each process makes its own videos.
    """

    _groups: ClassVar[dict[tuple[ParallelConfig, str], dict[str, Group]]] = {}

    def __init__(self, ranks: Ranks, degrees: ParallelConfig, device: torch.device) -> None:
        assert degrees.world_size in (ranks.world_size, 1), (degrees, ranks)
        self.degrees = degrees
        self.device = device
        self.is_single = degrees.world_size == 1
        self.is_main = self.is_single or ranks.is_main

    def group(self, name: str) -> Group:
        """This rank's group along "cfg", "ring", "ulysses", "sequence" (the latter two together) or "world"."""
        if self.is_single:
            return Group()
        key = (self.degrees, self.device.type)
        if key not in self._groups:  # created once, by all ranks together
            cfg, ring, ulysses = self.degrees.cfg, self.degrees.ring, self.degrees.ulysses
            mesh = init_device_mesh(self.device.type, (cfg, ring, ulysses), mesh_dim_names=("cfg", "ring", "ulysses"))
            joint = init_device_mesh(self.device.type, (cfg, ring * ulysses), mesh_dim_names=("cfg", "sequence"))
            made: dict[str, Any] = {one: mesh.get_group(one) for one in ("cfg", "ring", "ulysses")}
            made |= {"sequence": joint.get_group("sequence"), "world": dist.group.WORLD}
            self._groups[key] = {one: Group(process_group) for one, process_group in made.items()}
        return self._groups[key][name]

    def broadcast_from_main(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Call `make` on the main process only; returns its tensors on all ranks, on the CPU except on the main one."""
        if self.is_single:
            return dict(make())
        # as safetensors, so that nothing is unpickled
        made = save({name: tensor.cpu().clone() for name, tensor in make().items()}) if self.is_main else b""
        length = torch.tensor([len(made)])
        dist.broadcast(length, 0)
        content = (
            torch.frombuffer(bytearray(made), dtype=torch.uint8)
            if made
            else torch.empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(content, 0)
        return load(content.numpy().tobytes())

    def predictions(self, names: Sequence[str], predict: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """`predict(name)` for each name, divided among the ranks of the "cfg" group."""
        return dict(zip(names, self.group("cfg").map(predict, names), strict=True))


def pad_end(x: Tensor, dim: int, size: int) -> Tensor:
    """Pad `x` with zeros at the end of a dimension, to `size`."""
    after = x.dim() - 1 - dim % x.dim()  # F.pad counts dimensions from the last one
    return x if x.shape[dim] == size else F.pad(x, (0, 0) * after + (0, size - x.shape[dim]))


def broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Broadcast the main process's weights to `module`, on `device`; on other ranks it may be on meta before."""

    def received(tensor: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            weight = tensor.detach().to(device).contiguous()
        else:
            weight = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(weight.view(-1).view(torch.uint8), 0)
        return nn.Parameter(weight, requires_grad=False) if isinstance(tensor, nn.Parameter) else weight

    replace_tensors(module, received)


def shard_weights(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shard the weights of `model` among all ranks with FSDP; this rank's shards go to `device`."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of `module` are sharded."""
    return isinstance(module, FSDPModule)
