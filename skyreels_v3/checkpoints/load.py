"""One way from checkpoint files to a model: build on meta, map the files into memory, assign strictly.

No weight is ever initialised and none is copied unless its dtype changes: parameters are views of the mapped files,
read from disk when they are first needed. Every key must be accounted for. A missing, unexpected or misshapen key, an
unknown entry of a config or a damaged file is a `CheckpointError` that names file and key.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skyreels_v3.checkpoints.hub import read_json, weight_files
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, invert, restore, translate
from skyreels_v3.errors import CheckpointError
from skyreels_v3.models.parameters import replace_tensors

NAMED_KEYS = 5  # keys spelled out in an error message


def read_tensors(path: Path, values: bool = True) -> dict[str, Tensor]:
    """All tensors of a weight file, or of a folder with one file or an index of shards; memory-mapped.

    Without `values` they are on meta: the weights come from another process, and nothing but headers is read.

    Raises:
        CheckpointError: a file that is missing, truncated or no checkpoint, or holds something other than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    return tensors if values else {key: tensor.to("meta") for key, tensor in tensors.items()}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one .pth file, memory-mapped; nothing but tensors is unpickled."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # its own message advises to unpickle anything
        raise CheckpointError(f"{file} is damaged or holds something other than tensors; download it again") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}); download it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} holds something other than a dictionary of tensors; download it again")
    return content


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read files into free memory in the background, so that mapped weights are there when needed."""
    if (
        not hasattr(os, "posix_fadvise")
        or sum(file.stat().st_size for file in files) > psutil.virtual_memory().available
    ):
        return

    def read() -> None:
        for file in files:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    Thread(target=read, daemon=True).start()


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json without the library's own underscored entries."""
    return {key: value for key, value in read_json(path).items() if not key.startswith("_")}


def rename(tensors: Mapping[str, Tensor], key_map: KeyMap, source: Path) -> dict[str, Tensor]:
    """Tensors under their models' names; stacked weights are split (views, not copies)."""
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        try:
            target = translate(key, key_map)
        except KeyError:
            unknown.append(key)
            continue
        if isinstance(target, tuple):
            renamed.update(zip(target, tensor.chunk(len(target)), strict=True))
        elif target is not None:
            renamed[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys {name_some(unknown)}")
    return renamed


def load_model(
    build: Callable[[], nn.Module],
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype,
    key_map: KeyMap = IDENTITY,
    float32_names: Sequence[str] = (),
    buffers: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build a model on meta and give it its weights.

    Args:
        build: makes the model; called with meta as the default device.
        tensors: all weights of a checkpoint, under its own names.
        source: what the tensors were read from, for error messages.
        dtype: of the model's weights.
        key_map: from the checkpoint's names to the model's; together they must give all weights and no others.
        float32_names: parts of the names of weights that are float32 in every case.
        buffers: the model's constants that are in no checkpoint, by name; on meta they have no values.
    """
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # the libraries' classes raise whatever a strange size or name leads to
        raise CheckpointError(f"{source}: no model has the sizes of its config ({error}); download it again") from error
    tensors = rename(tensors, key_map, source)
    parameters = dict(model.named_parameters())  # tied weights once, under their first name
    check_keys(parameters, tensors, source, key_map)
    loaded: dict[int, Tensor] = {id(buffer): (buffers or {})[name] for name, buffer in model.named_buffers()}
    for name, parameter in parameters.items():
        target = torch.float32 if any(part in name for part in float32_names) else dtype
        if parameter.dtype == tensors[name].dtype and parameter.element_size() == 1:  # quantised
            target = parameter.dtype
        loaded[id(parameter)] = nn.Parameter(tensors[name].to(target), requires_grad=False)
    replace_tensors(model, lambda tensor: loaded[id(tensor)])
    return model.eval()


def check_keys(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path, key_map: KeyMap = IDENTITY
) -> None:
    """Raise CheckpointError, in the checkpoint's own names, unless `found` has the keys and shapes of `expected`."""
    names = invert(key_map)
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing keys {name_some(restore(key, names) for key in missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"unexpected keys {name_some(restore(key, names) for key in unexpected)}")
    misshapen = [
        f"{restore(key, names)} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    if misshapen:
        problems.append(f"wrong shapes {name_some(misshapen)}")
    if problems:
        raise CheckpointError(f"{source} does not fit its model: {'; '.join(problems)}")


def name_some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more
