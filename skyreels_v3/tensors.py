"""Replacing the tensors of a module, tied ones once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def replace_tensors(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer by `new(tensor)`; a tensor that is used in several places is replaced once.

    The tensor objects are replaced, not their data: the new ones may have any dtype and device, and whoever holds the
    old ones can still use them.
    """
    old = list(model.parameters()) + list(model.buffers())  # kept alive, so that ids stay unique
    made = {id(tensor): new(tensor) for tensor in old}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({name: made[id(tensor)] for name, tensor in table.items() if tensor is not None})
