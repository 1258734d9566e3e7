"""ComfyUI's list of loaded models, and interruption."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy.model_patcher import ModelPatcher

interrupted = False
current_loaded_models: list[ModelPatcher] = []


class InterruptProcessingException(Exception):
    pass


class LoadedModel:
    def __init__(self, model: ModelPatcher) -> None:
        self.model = model


def get_torch_device() -> torch.device:
    return torch.device("cpu")


def throw_exception_if_processing_interrupted() -> None:
    global interrupted
    if interrupted:
        interrupted = False
        raise InterruptProcessingException


def interrupt_current_processing(value: bool = True) -> None:
    global interrupted
    interrupted = value


def loaded_models() -> list[ModelPatcher]:
    return [*current_loaded_models]


def load_models_gpu(models: Sequence[ModelPatcher]) -> None:
    current_loaded_models.extend(models)


def free_memory(memory_required: float, device: torch.device, keep_loaded: Sequence[LoadedModel] = ()) -> None:
    kept = [each.model for each in keep_loaded]
    for model in [each for each in current_loaded_models if each not in kept]:
        current_loaded_models.remove(model)
        model.detach()


def unload_all_models() -> None:
    free_memory(1e30, get_torch_device())
