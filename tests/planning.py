"""Plans for requests that were not validated, and a counter to check their numbers."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyreels_v3.inputs import Inputs
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Checked, Machine, Plan, plan
from skyreels_v3.request import GenerationRequest, ResolvedRequest

GB = 10**9
NONE = Inputs()


def planned(
    request: GenerationRequest,
    checkpoint: Path | None = None,
    dtype: str = "float32",
    ranks: Ranks = SINGLE,
    free: int | None = None,
    inputs: Inputs = NONE,
    free_host: int = 1000 * GB,
) -> Plan:
    """The plan of a request on a CPU, or on a device with `free` bytes of memory of its own."""
    resolved = ResolvedRequest.of(request, output=request.output or Path("made.mp4"))
    machine = Machine("cpu", request.dtype or dtype, free, free_host)
    return plan(Checked(resolved, inputs, checkpoint), machine, ranks)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.parameters())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self.live.values()))
        return out
