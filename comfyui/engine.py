"""Makes a video within ComfyUI: with progress, previews, interruption, and memory that is handed back."""

from __future__ import annotations

from contextlib import closing
from functools import cache
from typing import Any

import numpy as np
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image
from torch import nn

from skyreels_v3 import Done, Step, UserError, load
from skyreels_v3.errors import FLAG, OutOfMemory
from skyreels_v3.preview import MAX_SIDE, Preview, Projection
from skyreels_v3.tasks import TASK_NAMES


class Networks(ModelPatcher):
    """The loaded networks, as a model that ComfyUI unloads when others need the memory.

    A run's memory policy places them, so ComfyUI has nothing to load, or to unload in part.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator, self.load_device = load(TASK_NAMES[0]), device  # before `super`, which asks for the size
        self.projections: dict[str, Projection] = {}  # of previews, by model
        super().__init__(nn.Module(), device, torch.device("cpu"))

    def loaded_size(self) -> int:
        return self.generator.bytes_on(self.load_device)

    def model_size(self) -> int:
        return self.loaded_size()

    def partially_load(self, *arguments: Any, **options: Any) -> int:
        return 0

    def partially_unload(self, *arguments: Any, **options: Any) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:  # else ComfyUI only drops its entry
            self.generator.unload()
        return self.model


@cache
def networks() -> Networks:
    """The networks that all nodes share; a run that needs others replaces them."""
    return Networks(model_management.get_torch_device())


def make(**flags: Any) -> tuple[list[np.ndarray], Done]:
    """Make a video; returns its frames, uint8 [H, W, 3] each, and its `Done` event.

    Raises:
        RuntimeError: flags or inputs are invalid, or there is too little memory; the message says what to change.
        InterruptProcessingException: the user has interrupted it.
    """
    mine = networks()
    device = mine.load_device
    model_management.free_memory(1e30, device, keep_loaded=[model_management.LoadedModel(mine)])
    if mine not in model_management.loaded_models():
        model_management.load_models_gpu([mine])
    preview = Preview(mine.projections.setdefault(f"{flags['task_type']} {flags.get('model_id')}", Projection()))
    frames: list[np.ndarray] = []
    shown = 0  # frames of passes that are done
    try:
        # nodes run in inference mode, whose tensors other threads could not change
        with torch.inference_mode(False), closing(mine.generator(**flags, device=device.type)) as events:
            for event in events:
                model_management.throw_exception_if_processing_interrupted()
                if isinstance(event, Step | Done) and len(frames) > shown:
                    preview.fit(frames[-1])
                    shown = len(frames)
                if isinstance(event, Step):
                    preview.add(event)
                    picture = Image.fromarray(preview.picture())
                    ProgressBar(event.total).update_absolute(event.number, preview=("JPEG", picture, MAX_SIDE))
                elif isinstance(event, Done):
                    return frames, event
                else:
                    frames.append(event.image)
    except (UserError, OutOfMemory) as error:
        if isinstance(error, OutOfMemory):
            mine.generator.unload()
        raise RuntimeError(FLAG.sub(r"\1", str(error))) from error
    raise AssertionError("unreachable")
