"""The class that ComfyUI wraps loaded models in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.size = self.model_size()
        self.model, self.load_device, self.offload_device = model, load_device, offload_device

    def model_size(self) -> int:
        raise NotImplementedError

    def loaded_size(self) -> int:
        raise NotImplementedError

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        raise NotImplementedError

    def partially_unload(self, device_to: Any, memory_to_free: float = 0) -> int:
        raise NotImplementedError

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        raise NotImplementedError
