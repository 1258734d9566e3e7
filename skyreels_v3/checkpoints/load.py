"""From checkpoint files to a model: build it on meta, map the files into memory, assign strictly.

No weight is initialized, and none is copied unless its dtype changes: parameters are views of the mapped files, read
from disk when first used. Every key of a file and every entry of a config must have its place in the model; any other
raises a `CheckpointError` that names file and key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from skyreels_v3.checkpoints.files import open_safetensors, read_json, weight_files
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, invert, restore, translate
from skyreels_v3.errors import CheckpointError, format_value
from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.memory.quantize import set_fp8_layers

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8)  # dtypes of weights
REMEDY = "give weights in float32, float16 or bfloat16, and --quant fp8 to have them in FP8"
OWN_CONFIG = "give the model's own config"
# Keys of quantized formats that are not ours, and their names. Ours has a `weight_scale` for each row.
QUANTIZED = (
    (r"(?:.+\.)?scaled_fp8|.+\.(?:scale_weight|scale_input)", "ComfyUI's scaled FP8"),
    (r".+\.comfy_quant", "ComfyUI's mixed precision"),
    (r".+\.(?:weight_scale_2|input_scale|pre_quant_scale)", "ModelOpt's FP8 or NVFP4"),
    (r".+\.weight_scale_inv", "FP8 scaled by blocks"),
    (r".+\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)", "bitsandbytes' format"),
    (r".+\.(?:qweight|qzeros|g_idx|wscales|smooth_factor)", "4-bit integers"),
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of all keys in repackaged transformers
# Entries of configs that are sizes: at most the number of tensors, or the length of the longest axis of one.
COUNT = re.compile(r"num_(?:\w+_)?layers|layers_per_block|num_res_blocks")
WIDTH = re.compile(
    r"num_(?:\w+_)?heads|(?:attention_)?head_dim|(?:hidden|intermediate|vocab)_size|d_model|d_kv|d_ff|dim_mult|"
    r"(?:(?:text|freq|ffn|image|in|out|intermediate|output|base|decoder_base|z|text_embed|pooled_projection|conv)_)?dim|"
    r"audio_dim|(?:in|out|latent|block_out)_channels|conv_kernel|num_conv_pos_embeddings|"
    r"relative_attention_num_buckets"
)
POSITIVE = re.compile(r"(?:\w+_)?eps(?:ilon)?|rope_theta|scaling_factor")
NAMED_KEYS = 5  # in an error message

Tensors = dict[str, Tensor]


def read_tensors(path: Path, values: bool = True) -> Tensors:
    """All tensors of a weight file, or of a folder with one file or an index of shards; memory-mapped.

    Args:
        values: False for tensors on meta, for which only the files' headers are read.

    Raises:
        CheckpointError: a file is missing, damaged, or holds something other than tensors, or weights that are
            quantized in a format other than ours.
    """
    tensors: Tensors = {}
    for file in weight_files(path):
        tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    for key in tensors:
        for pattern, name in QUANTIZED:
            if re.fullmatch(pattern, key):
                raise CheckpointError(f"{path} holds weights in {name} ({format_value(key)}), not supported; {REMEDY}")
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors if values else {key: tensor.to("meta") for key, tensor in tensors.items()}


def read_safetensors(file: Path) -> Tensors:
    """The tensors of one safetensors file, memory-mapped."""
    with open_safetensors(file, "pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  not a mapping


def read_pickle(file: Path) -> Tensors:
    """The tensors of one .pth or .bin file, memory-mapped; nothing but tensors is unpickled."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises whatever it runs into; torch's message may advise the worst
        raise CheckpointError(f"{file} is damaged or holds something other than tensors; download it again") from error
    items = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise CheckpointError(f"{file} holds something other than a dictionary of tensors; download it again")
    return content


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read files into free memory in the background, before their mapped weights are used."""
    size = sum(file.stat().st_size for file in files)
    if not hasattr(os, "posix_fadvise") or size > psutil.virtual_memory().available:
        return

    def read() -> None:
        for file in files:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    Thread(target=read, daemon=True).start()


# Configs


def read_config(
    folder: Path, tensors: Tensors, constants: Mapping[str, object], names: Collection[str] | None = None
) -> dict[str, Any]:
    """The arguments of a model in the config.json of `folder`, checked against the tensors beside it.

    Args:
        constants: entries that must have these values, if they are there; they are not arguments.
        names: of all arguments; None if the model's class takes any.

    Raises:
        CheckpointError: a value that is not supported, an unknown entry, or a size larger than the tensors have.
    """
    source = folder / "config.json"
    config = {key: value for key, value in read_json(source).items() if not key.startswith("_")}
    check_sizes(config, tensors, source)
    for key in config.keys() & constants.keys():
        if config[key] != constants[key]:
            value = format_value(config[key])
            raise CheckpointError(f"{source}: {key} = {value} is not supported, only {constants[key]}")
    arguments = {key: value for key, value in config.items() if key not in constants}
    if names is not None and (unknown := arguments.keys() - set(names)):
        raise CheckpointError(f"{source}: unknown entries {', '.join(map(format_value, sorted(unknown)))}")
    return arguments


def check_sizes(config: Mapping[str, Any], tensors: Tensors, source: Path) -> None:
    """Raise CheckpointError for entries of a config that are no valid numbers, or larger than the tensors allow."""
    longest = max((axis for tensor in tensors.values() for axis in tensor.shape), default=0)
    if config.get("quantization_config"):
        raise CheckpointError(f"{source}: quantization_config is not supported; {REMEDY}")
    for key, value in config.items():
        entry = f"{source}: {key} ="
        if POSITIVE.fullmatch(key) and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise CheckpointError(f"{entry} {format_value(value)} is not a positive number; {OWN_CONFIG}")
        limit = len(tensors) if COUNT.fullmatch(key) else longest if WIDTH.fullmatch(key) else None
        if limit is None or value is None:
            continue
        for size in value if isinstance(value, list) else [value]:
            if type(size) is not int or size < 1:
                raise CheckpointError(f"{entry} {format_value(size)} is not a size; {OWN_CONFIG}")
            if size > limit:
                reason = f"{entry} {format_value(size)} is more than the weights beside it have"
                raise CheckpointError(f"{reason} ({limit} at most); {OWN_CONFIG}")


def load_tokenizer(folder: Path, kind: Any) -> Any:
    """The tokenizer in `folder`, of a class of transformers'; no code of the checkpoint is run."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error


def shape_of(key: str, axes: int, tensors: Tensors, source: Path) -> tuple[int, ...]:
    """The shape of the tensor `key`, from which a model's sizes are derived; it must have so many axes."""
    if key not in tensors:
        raise CheckpointError(f"{source} lacks {key}, which the model's sizes are read from; give the model's own file")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{source}: wrong shape {key} ({list(shape)}); give the model's own file")
    return shape


# Models


def load_model(
    build: Callable[[], nn.Module],
    tensors: Tensors,
    source: Path,
    dtype: torch.dtype,
    key_map: KeyMap = IDENTITY,
    float32_names: Collection[str] = (),
    buffers: Mapping[str, Tensor] | None = None,
) -> Any:
    """Build a model on meta and give it its weights.

    Args:
        build: makes the model; called with meta as the default device.
        tensors: all weights of a checkpoint, under its own names.
        source: where the tensors are from, for error messages.
        dtype: of the weights.
        key_map: from the checkpoint's names to the model's.
        float32_names: weights with one of these in their dotted name are float32, whatever `dtype` is.
        buffers: values of the model's buffers, by name.

    Returns:
        The model in eval mode, without gradients. Matrices with scales beside them become FP8 layers.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, by name; dtypes that hold no weights; or sizes that no
            model can have.
    """
    tensors = rename(tensors, key_map, source)
    scales = scales_of(tensors, source)
    with config_errors(source), torch.device("meta"):
        model = build()
        if scales:
            set_fp8_layers(model, scales)
    parameters = dict(model.named_parameters())  # tied weights once, under their first name
    check_keys(parameters, tensors, source, key_map)
    check_dtypes(tensors, source)
    check_fp8(parameters, tensors, source)
    loaded: dict[int, Tensor] = {id(buffer): (buffers or {})[name] for name, buffer in model.named_buffers()}
    float32_names = {*float32_names, SCALE}
    for name, parameter in parameters.items():
        target = parameter.dtype if parameter.dtype in FP8 else dtype
        if not float32_names.isdisjoint(name.split(".")):
            target = torch.float32
        loaded[id(parameter)] = nn.Parameter(tensors[name].to(target), requires_grad=False)
    replace_tensors(model, lambda tensor: loaded[id(tensor)])
    return model.eval()


@contextmanager
def config_errors(source: Path) -> Iterator[None]:
    """Turn whatever the libraries' classes raise for strange sizes or names into a CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{source}: no model has the sizes of its config ({error}); {OWN_CONFIG}") from error


def rename(tensors: Tensors, key_map: KeyMap, source: Path) -> Tensors:
    """Tensors under their model's names; stacked ones are split into views, whose shapes are checked later."""
    renamed: Tensors = {}
    unknown = []
    for key, tensor in tensors.items():
        try:
            target = translate(key, key_map)
        except KeyError:
            unknown.append(key)
            continue
        if isinstance(target, tuple):
            renamed.update(zip(target, torch.atleast_1d(tensor).tensor_split(len(target)), strict=True))
        elif target is not None:
            renamed[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys {name_some(unknown)}")
    return renamed


def scales_of(tensors: Tensors, source: Path) -> list[str]:
    """The keys of FP8 scales; raises CheckpointError unless each has an entry for every row of the matrix beside it."""
    keys = [key for key in tensors if key.endswith(f".{SCALE}")]
    for key in keys:
        scale, weight = tensors[key], tensors.get(f"{key.removesuffix(SCALE)}weight")
        if weight is None or weight.ndim != 2 or scale.shape != weight.shape[:1]:
            reason = f"{source} holds weights in FP8 that is scaled otherwise than by rows"
            raise CheckpointError(f"{reason} ({format_value(key)} {list(scale.shape)}), not supported; {REMEDY}")
    return keys


def check_keys(expected: Mapping[str, Tensor], found: Tensors, source: Path, key_map: KeyMap) -> None:
    """Raise CheckpointError, in the checkpoint's own names, unless `found` has the keys and shapes of `expected`."""
    inverse = invert(key_map)
    problems = {
        "missing keys": [restore(key, inverse) for key in expected.keys() - found.keys()],
        "unexpected keys": [restore(key, inverse) for key in found.keys() - expected.keys()],
        "wrong shapes": [
            f"{restore(key, inverse)} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
            for key in expected.keys() & found.keys()
            if found[key].shape != expected[key].shape
        ],
    }
    named = "; ".join(f"{problem} {name_some(keys)}" for problem, keys in problems.items() if keys)
    if named:
        raise CheckpointError(f"{source} does not fit its model: {named}")


def check_fp8(parameters: Mapping[str, Tensor], tensors: Tensors, source: Path) -> None:
    """Raise CheckpointError for FP8 layers without FP8 weights, and for FP8 weights that lost their scale.

    Weights that were merely cast to FP8 are accepted: published ones stay far below the end of its range, while those
    that were divided by a scale fill it. The first matrix tells.
    """
    check_dtypes({key: tensor for key, tensor in tensors.items() if parameters[key].dtype in FP8}, source, FP8)
    for name, tensor in tensors.items():
        if tensor.dtype in FP8 and parameters[name].dtype not in FP8 and tensor.ndim == 2 and not tensor.is_meta:
            if tensor.float().abs().max() > torch.finfo(tensor.dtype).max / 2:
                reason = f"{source}: {name} is FP8 that was divided by a scale, and there is none"
                raise CheckpointError(f"{reason}; give it in bfloat16, and --quant fp8 to have it in FP8")
            return


def check_dtypes(tensors: Tensors, source: Path, allowed: Collection[torch.dtype] = WEIGHTS) -> None:
    """Raise CheckpointError for tensors whose dtype does not hold weights."""
    wrong = {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype not in allowed}
    if wrong:
        named = name_some(f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in wrong.items())
        raise CheckpointError(f"{source}: weights cannot have this dtype: {named}; {REMEDY}")


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError for weights of a model that are infinite or NaN."""
    wrong = [key for key, weight in model.named_parameters() if not weight.float().isfinite().all()]
    if wrong:
        reason = f"the {name}'s {name_some(wrong)}: numbers that are not finite"
        raise CheckpointError(f"{reason}; give a checkpoint without")


def name_some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more
