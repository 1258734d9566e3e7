"""Saving a quantized checkpoint: a folder like the one it came from, with the transformer's weights in FP8."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import ModelMixin
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.media.files import existing_folder, follow_umask, publish, temporary_name

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
TRANSFORMER_FILES = ("config.json", "*.safetensors", "*.safetensors.index*.json")


def save_quantized(
    transformer: ModelMixin, sources: Sequence[tuple[Path, Repository]], folder: Path, workspace: Path | None = None
) -> Path:
    """Write `transformer`, and everything else that its task needs, to a new folder for --model_id.

    The transformer is written under our own names, which the loaders accept in every layout. The other files are
    hard-linked if the file system allows, else copied.

    Args:
        sources: the checkpoint's folder, and those of other components, with what the task needs of each.
        workspace: where to write until it is complete, if that is on the same file system.

    Returns:
        The new folder: `folder`, unless that was created meanwhile.
    """
    if workspace is None or workspace.stat().st_dev != existing_folder(folder).stat().st_dev:
        workspace = folder.parent
    temporary = temporary_name(workspace / folder.name)
    (transformer_folder,) = sources[0][1].components["transformer"]
    own = (sources[0][0] / transformer_folder).resolve()
    try:
        needed: dict[str, Path] = {}
        for source, repository in sources:
            needed |= needed_files(source, repository.patterns)
        for name, file in needed.items():
            if file.parent.resolve() != own or not any(fnmatch(file.name, pattern) for pattern in TRANSFORMER_FILES):
                link_or_copy(file, temporary / name)
        target = temporary / transformer_folder
        target.mkdir(parents=True, exist_ok=True)
        transformer.save_config(target)
        state = {name: contiguous_copy(parameter.detach()) for name, parameter in transformer.named_parameters()}
        save_torch_state_dict(state, target, filename_pattern=WEIGHTS)
        follow_umask(temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("the quantized checkpoint is in %s", made)
    return made


def contiguous_copy(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it is a view of a larger one, as stacked weights are when they have been split."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def needed_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a checkpoint's folder that match one of the patterns, by their names in it."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file to `target`, or copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
