"""Saving a quantised checkpoint: a folder like the one it came from, with the transformer's weights in FP8."""

from __future__ import annotations

import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from skyreels_v3.checkpoints.hub import download_patterns
from skyreels_v3.media.files import publish, temporary_name
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.tasks import TaskSpec

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
TRANSFORMER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def save_quantized(transformer: SkyReelsTransformer3DModel, checkpoint: Path, folder: Path, task: TaskSpec) -> Path:
    """Write `transformer`, and whatever else of `checkpoint` the task needs, to a new folder for --model_id.

    The transformer is written under our own names, which `load_transformer` reads in every layout. The other files are
    linked where the file system can, else copied.

    Returns:
        the folder that it became, `folder` unless that was taken meanwhile.
    """
    temporary = temporary_name(folder)
    own = (checkpoint / task.transformer_folder).resolve()
    try:
        for file in needed_files(checkpoint, task):
            if file.parent.resolve() != own or not any(fnmatch(file.name, pattern) for pattern in TRANSFORMER_FILES):
                link_or_copy(file, temporary / file.relative_to(checkpoint))
        target = temporary / task.transformer_folder
        target.mkdir(parents=True, exist_ok=True)
        transformer.save_config(target)
        state = {name: standing_alone(parameter.detach()) for name, parameter in transformer.named_parameters()}
        save_torch_state_dict(state, target, filename_pattern=WEIGHTS)
        made = publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("the quantised checkpoint is in %s", made)
    return made


def standing_alone(tensor: Tensor) -> Tensor:
    """`tensor`, copied where it is a part of another one: stacked weights are split without copying."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def needed_files(checkpoint: Path, task: TaskSpec) -> list[Path]:
    """The files of a checkpoint's folder that the task needs."""
    patterns = download_patterns(task)
    names = {path: path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    return [path for path, name in names.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def link_or_copy(source: Path, target: Path) -> None:
    """Have a file's content at `target` too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
