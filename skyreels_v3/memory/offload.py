"""A component on the device only while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skyreels_v3.tensors import replace_tensors


@contextmanager
def on_device(
    module: nn.Module, device: torch.device, wanted: Callable[[Tensor], bool] = lambda _: True
) -> Iterator[None]:
    """Hold `module`, or what is `wanted` of it, on `device` for the length of a `with` block.

    The host's weights stay as they are, memory-mapped or not, and are taken back at the end: nothing is copied back,
    since inference changes no weight.
    """
    host: dict[int, Tensor] = {}

    @torch.inference_mode(False)  # whoever asks, the same kind of tensor: compiled code is for one
    def move(tensor: Tensor) -> Tensor:
        if not wanted(tensor):
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
