"""Offloading: a component is on the device only while it runs. Also replaces the tensors of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def on_device(
    module: nn.Module, device: torch.device, selected: Callable[[Tensor], bool] = lambda _: True
) -> Iterator[None]:
    """Keep the `selected` tensors of `module` on `device` within a `with` block.

    Afterwards the module gets its original tensors back, memory-mapped or not. Nothing is copied back, since inference
    does not change weights.
    """
    host: dict[int, Tensor] = {}

    @torch.inference_mode(False)  # not inference tensors: compiled code is specialized on that
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


def replace_tensors(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer with `new(tensor)`, called once even for a tensor used in several places.

    The tensor objects are replaced, not their data: the new ones may have any dtype and device, and the old ones remain
    valid where they are still referenced.
    """
    old = list(model.parameters()) + list(model.buffers())  # kept alive, so that ids stay unique
    made = {id(tensor): new(tensor) for tensor in old}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({name: made[id(tensor)] for name, tensor in table.items() if tensor is not None})
