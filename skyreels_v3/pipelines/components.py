"""The networks a task works with, each loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skyreels_v3.checkpoints.published import (
    load_audio_encoder,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from skyreels_v3.models.audio_encoder import AudioEncoder
from skyreels_v3.models.image_encoder import ImageEncoder
from skyreels_v3.models.text_encoder import TextEncoder
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.models.vae import VideoVAE
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import TaskSpec


@dataclass(frozen=True)
class Components:
    """A checkpoint's networks.

    The VAE and the audio encoder are float32 whatever the rest is: errors of the one are seen, the other is small.
    """

    transformer: SkyReelsTransformer3DModel
    vae: VideoVAE
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None = None
    audio_encoder: AudioEncoder | None = None


def load_components(folder: Path, task: TaskSpec, runtime: Runtime) -> Components:
    """Map the checkpoint in `folder` into memory; every file is checked before anything long begins."""
    loaders: dict[str, Callable[[], Any]] = {
        "vae": lambda: load_vae(folder, task.layout, torch.float32),
        "text_encoder": lambda: load_text_encoder(folder, task.layout, runtime.dtype),
        "transformer": lambda: load_transformer(folder / task.transformer_folder, task.layout, runtime.dtype),
    }
    if "input_audio" in task.inputs:
        loaders["image_encoder"] = lambda: load_image_encoder(folder, runtime.dtype)
        loaders["audio_encoder"] = lambda: load_audio_encoder(folder, torch.float32)
    loaded = {}
    with runtime.bar("loading", len(loaders)) as bar:
        for name, load in loaders.items():
            loaded[name] = load()
            bar.update()
    return Components(**loaded)
