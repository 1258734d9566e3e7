"""Exchanging a module's tensors, tied ones together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def replace_tensors(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Put `new(tensor)` in the place of each parameter and buffer; one that stands in several places is made once.

    Whole tensors are exchanged, not their data, so the new ones may be of any dtype and on any device, and the old ones
    stay as they are for whoever holds them.
    """
    made: dict[int, Tensor] = {}
    old = list(model.parameters()) + list(model.buffers())  # held, so that no address is used twice
    for tensor in old:
        made[id(tensor)] = new(tensor)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[id(tensor)] for name, tensor in tensors.items() if tensor is not None})
