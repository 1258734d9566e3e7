"""A component on the device only while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skyreels_v3.tensors import replace_tensors


@contextmanager
def on_device(
    module: nn.Module, device: torch.device, selected: Callable[[Tensor], bool] = lambda _: True
) -> Iterator[None]:
    """Hold the `selected` tensors of `module` on `device` for the length of a `with` block.

    The host's tensors, memory-mapped or not, stay as they are and are put back at the end. Nothing is copied back:
    inference changes no weight.
    """
    host: dict[int, Tensor] = {}

    @torch.inference_mode(False)  # the same kind of tensor for every caller: compiled code is specialized to it
    def move(tensor: Tensor) -> Tensor:
        if not selected(tensor):
            return tensor
        moved = tensor.detach().to(device, non_blocking=True)
        moved = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
        host[id(moved)] = tensor
        return moved

    replace_tensors(module, move)
    try:
        yield
    finally:
        replace_tensors(module, lambda tensor: host.get(id(tensor), tensor))
