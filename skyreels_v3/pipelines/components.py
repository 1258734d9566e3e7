"""The networks a task works with, each loaded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from skyreels_v3.checkpoints.published import load_text_encoder, load_transformer, load_vae
from skyreels_v3.models.text_encoder import TextEncoder
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.models.vae import VideoVAE
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import TaskSpec


@dataclass(frozen=True)
class Components:
    """A checkpoint's networks. The VAE is float32 whatever the rest is: its errors are seen as such."""

    transformer: SkyReelsTransformer3DModel
    vae: VideoVAE
    text_encoder: TextEncoder


def load_components(folder: Path, task: TaskSpec, runtime: Runtime) -> Components:
    """Map the checkpoint in `folder` into memory; every file is checked before anything long begins."""
    loaded = {}
    with runtime.bar("loading", 3) as bar:
        for name, load in (
            ("vae", lambda: load_vae(folder, task.layout, torch.float32)),
            ("text_encoder", lambda: load_text_encoder(folder, task.layout, runtime.dtype)),
            ("transformer", lambda: load_transformer(folder / task.transformer_folder, task.layout, runtime.dtype)),
        ):
            loaded[name] = load()
            bar.update()
    return Components(**loaded)
