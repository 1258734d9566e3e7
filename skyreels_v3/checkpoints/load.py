"""One way from checkpoint files to a model: build on meta, map the files into memory, assign strictly.

No weight is ever initialised and none is copied unless its dtype changes: parameters are views of the mapped files,
read from disk when they are first needed. Every key must be accounted for. A missing, unexpected or misshapen key, an
unknown entry of a config or a damaged file is a `CheckpointError` that names file and key.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skyreels_v3.checkpoints.contents import check_format, check_keys, name_some, refuse_dtypes, rename
from skyreels_v3.checkpoints.hub import weight_files
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap
from skyreels_v3.errors import CheckpointError
from skyreels_v3.tensors import replace_tensors

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8)  # dtypes that hold some


def read_tensors(path: Path, values: bool = True) -> dict[str, Tensor]:
    """All tensors of a weight file, or of a folder with one file or an index of shards; memory-mapped.

    Without `values` they are on meta: the weights come from another process, and nothing but headers is read.

    Raises:
        CheckpointError: a file that is missing, truncated or no checkpoint, or holds something other than tensors, or
            weights that are quantized in a way that is not ours.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    check_format(tensors, path)
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
        reason = f"{source}: no model has the sizes of its config ({error})"
        raise CheckpointError(f"{reason}; give the model's own config") from error
    tensors = rename(tensors, key_map, source)
    parameters = dict(model.named_parameters())  # tied weights once, under their first name
    check_keys({name: parameter.shape for name, parameter in parameters.items()}, tensors, source, key_map)
    check_dtypes(parameters, tensors, source)
    loaded: dict[int, Tensor] = {id(buffer): (buffers or {})[name] for name, buffer in model.named_buffers()}
    for name, parameter in parameters.items():
        target = torch.float32 if any(part in name for part in float32_names) else dtype
        if parameter.dtype == tensors[name].dtype and parameter.element_size() == 1:  # quantized
            target = parameter.dtype
        loaded[id(parameter)] = nn.Parameter(tensors[name].to(target), requires_grad=False)
    replace_tensors(model, lambda tensor: loaded[id(tensor)])
    return model.eval()


def check_dtypes(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError for tensors that are no weights as they stand: integers, or FP8 whose scale is missing.

    A plain cast to FP8 is taken: what published weights are is far from the end of its range. Divided by a scale they
    fill it. One matrix tells.
    """
    wrong = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in WEIGHTS}
    wrong |= {
        name: tensors[name].dtype
        for name, parameter in parameters.items()
        if parameter.dtype in FP8 and tensors[name].dtype != parameter.dtype
    }
    refuse_dtypes(wrong, source)
    casts = (name for name, tensor in tensors.items() if tensor.dtype in FP8 and parameters[name].dtype not in FP8)
    name = next((name for name in casts if tensors[name].ndim == 2 and not tensors[name].is_meta), None)
    if name is not None and tensors[name].float().abs().max() > torch.finfo(tensors[name].dtype).max / 2:
        raise CheckpointError(
            f"{source}: {name} is FP8 that was divided by a scale, and there is none; give the scaled "
            "weights in bfloat16, and --quant fp8 to have them in FP8"
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError for a model's weights that hold infinity or no numbers."""
    wrong = [key for key, weight in model.named_parameters() if not weight.float().isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"the {name}'s {name_some(wrong)}: numbers that are not finite; give a checkpoint without"
        )
