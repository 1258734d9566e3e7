"""Weights divided among processes: each keeps a part of every block, and gathers a block when it is to work.

This is torch's FSDP2. The gathered block is dropped again, so that a process holds its part of all weights and two
blocks: the one that works and the next one on its way.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from skyreels_v3.model_api import Transformer


def shard_weights(model: Transformer, device: torch.device, processes: int) -> None:
    """Divide the weights of `model` among all processes; this one's part goes to `device`."""
    mesh = init_device_mesh(device.type, (processes,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether other processes have a part of the weights."""
    return isinstance(module, FSDPModule)
