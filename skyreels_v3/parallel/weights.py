"""Weights on several ranks: sent by the one that has read them, or sharded among all by torch's FSDP2.

A rank keeps its shard of every block, and gathers a block's weights just before it runs: besides the shards there are
two whole blocks on the device, the one that runs and the next.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from skyreels_v3.tensors import replace_tensors


def broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Give `module` the main process's weights, on `device`; those of the other ranks may be on meta."""

    def received(tensor: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            weight = tensor.detach().to(device).contiguous()
        else:
            weight = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(weight.view(-1).view(torch.uint8), 0)
        return nn.Parameter(weight, requires_grad=False) if isinstance(tensor, nn.Parameter) else weight

    replace_tensors(module, received)


def shard_weights(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shard the weights of `model` among all ranks; this rank's shards go to `device`."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether other ranks have a part of the weights."""
    return isinstance(module, FSDPModule)
