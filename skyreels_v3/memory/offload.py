"""A component on the device only while it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold `module` on `device` for the length of a `with` block.

    The host's weights stay as they are, memory-mapped or not, and are taken back at the end: nothing is copied back,
    since inference changes no weight.
    """
    host = {parameter: parameter.data for parameter in module.parameters() if parameter.device != device}
    for parameter in host:
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, data in host.items():
            parameter.data = data
