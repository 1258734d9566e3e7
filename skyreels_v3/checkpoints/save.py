"""Saving checkpoints: a folder like the original, with the transformer in FP8; or a transformer alone."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import ModelMixin
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.checkpoints.key_maps import KeyMap, invert, translate
from skyreels_v3.media.files import existing_folder, follow_umask, publish, remove, temporary_name

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
        sources: the folders of the checkpoint and of other components, with what the task needs from each.
        workspace: where to write the unfinished folder, if that is on the same file system.

    Returns:
        The new folder: `folder`, or another name if that was created meanwhile.
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
        write_transformer(transformer, temporary / transformer_folder)
        follow_umask(temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("the quantized checkpoint is in %s", made)
    return made


def save_transformer(transformer: ModelMixin, path: Path, key_map: KeyMap | None) -> Path:
    """Write a transformer's weights and config to a new folder; returns it, as `save_quantized` does.

    Args:
        key_map: from the official code's names to ours; if given, write one safetensors file under those names.
    """
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if key_map is None:
            write_transformer(transformer, temporary)
        else:
            state = native(weights_of(transformer), key_map)
            save_file({name: contiguous_copy(tensor) for name, tensor in state.items()}, temporary)
        follow_umask(temporary)
        return publish(temporary, path)
    finally:
        remove(temporary)


def write_transformer(transformer: ModelMixin, folder: Path) -> None:
    """Write a transformer in diffusers' layout, under our own names."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_config(folder)
    state = {name: contiguous_copy(weight) for name, weight in weights_of(transformer).items()}
    save_torch_state_dict(state, folder, filename_pattern=WEIGHTS)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def native(tensors: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors under the names of the published file, stacked where it stacks them."""
    found: dict[str, list[Tensor]] = {}
    stacked = [(pattern, target) for pattern, target in key_map if isinstance(target, tuple)]
    parts = [tuple((pattern, target[n]) for pattern, target in stacked if n < len(target)) for n in range(3)]
    for inverse in map(invert, (key_map, *parts)):
        for name, tensor in tensors.items():
            with suppress(KeyError):  # this map has no inverse for it
                found.setdefault(str(translate(name, inverse)), []).append(tensor)
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in found.items()}


def contiguous_copy(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it is a view of a larger one, as the parts of stacked weights are."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def needed_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files in a checkpoint folder that match one of the patterns, by their relative paths."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file to `target`, or copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
