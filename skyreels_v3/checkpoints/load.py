"""Loading a model from checkpoint files: build it on meta, memory-map the files, assign strictly.

No weight is initialized, and none is copied unless its dtype changes: parameters are views of the mapped files, read
from disk when first used. Every key of a file and every entry of a config must belong to the model; any other raises a
`CheckpointError` that names file and key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from skyreels_v3.checkpoints.files import open_safetensors, read_json, weight_files
from skyreels_v3.checkpoints.formats import PREFIXES, REMEDY, read_format
from skyreels_v3.checkpoints.gguf import read_gguf
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, invert, restore, translate
from skyreels_v3.errors import CheckpointError, format_value
from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.memory.quantize import QUANTIZED_DTYPES, Packed, QuantizedLinear

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8)  # dtypes of weights
OWN_CONFIG = "give the model's own config"
OWN_FILE = "give the model's own file"
# Config entries that are sizes: at most the number of tensors, or the length of any tensor's longest axis.
COUNT = re.compile(r"num_(?:\w+_)?layers|layers_per_block|num_res_blocks")
WIDTH = re.compile(
    r"num_(?:\w+_)?heads|(?:attention_)?head_dim|(?:hidden|intermediate|vocab)_size|d_model|d_kv|d_ff|dim_mult|"
    r"(?:(?:text|freq|ffn|image|in|out|intermediate|output|base|decoder_base|z|text_embed|pooled_projection|conv)_)?dim|"
    r"audio_dim|(?:in|out|latent|block_out)_channels|conv_kernel|num_conv_pos_embeddings|"
    r"relative_attention_num_buckets"
)
POSITIVE = re.compile(r"(?:\w+_)?eps(?:ilon)?|rope_theta|scaling_factor")
NAMED_KEYS = 5  # in an error message
GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Tensors = dict[str, Tensor]
Weights = dict[str, Tensor | Packed]  # quantized matrices as stored in the file


def read_tensors(path: Path, values: bool = True) -> Weights:
    """Read all weights of a file, or of a folder with one file or an index of shards; memory-mapped.

    Args:
        values: False for tensors on meta, for which only the files' headers are read.

    Raises:
        CheckpointError: a file is missing, damaged, or holds something other than tensors, or the weights are quantized
            in an unsupported format (see formats.py).
    """
    files = weight_files(path)
    form = read_format(files)
    tensors: Weights = {}
    not_weights = form.unused | {*form.scales.values()}
    for file in files:
        if file.suffix == ".gguf":
            tensors.update(map_gguf(file))
        else:
            tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    made: Weights = {}
    for key, weight in tensors.items():
        if key in not_weights:
            continue
        made[key] = weight
        if key in form.scales or (weight.dtype in FLOAT8 and weight.ndim == 2):
            scale = tensors[form.scales[key]] if key in form.scales else torch.ones(1)
            made[key] = with_scale(cast(Tensor, weight), cast(Tensor, scale))
    if values and not form.scales:
        check_cast(made, path)
    for prefix in PREFIXES:
        if made and all(key.startswith(prefix) for key in made):
            made = {key.removeprefix(prefix): tensor for key, tensor in made.items()}
    return made if values else {key: on_meta(tensor) for key, tensor in made.items()}


def with_scale(weight: Tensor, scale: Tensor) -> Packed:
    """A quantized matrix with one scale, or one per row."""
    scales = scale.float().flatten().expand(len(weight)).contiguous()
    return Packed(weight, tuple(weight.shape), scales)


def on_meta(weight: Tensor | Packed) -> Tensor | Packed:
    return weight.on_meta() if isinstance(weight, Packed) else weight.to("meta")


def check_cast(weights: Weights, source: Path) -> None:
    """Raise CheckpointError for FP8 weights that lost their scale.

    Weights that were merely cast to FP8 are accepted: published ones stay far below its maximum, while those that were
    divided by a scale use the full range. The first matrix is enough to tell.
    """
    for name, weight in weights.items():
        if isinstance(weight, Packed) and weight.dtype in FLOAT8:
            if weight.data.float().abs().max() > torch.finfo(weight.dtype).max / 2:
                raise CheckpointError(f"{source}: {name} is scaled FP8, but its scale is missing; {REMEDY}")
            return


def map_gguf(file: Path) -> Weights:
    """The tensors of a GGUF file, memory-mapped."""
    entries = read_gguf(file)
    content = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    made: Weights = {}
    for key, entry in entries.items():
        data = content[entry.start : entry.start + entry.nbytes]
        if entry.kind in GGUF_DTYPES:
            made[key] = data.view(GGUF_DTYPES[entry.kind]).view(entry.shape)
        else:
            made[key] = Packed(data.view(math.prod(entry.shape) // entry.columns, -1), entry.shape, kind=entry.kind)
    return made


def read_safetensors(file: Path) -> Tensors:
    """The tensors of one safetensors file, memory-mapped."""
    with open_safetensors(file, "pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  not a mapping


def read_pickle(file: Path) -> Tensors:
    """The tensors of one .pth or .bin file, memory-mapped; nothing but tensors is unpickled."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything; torch's message may suggest unsafe loading
        raise CheckpointError(f"{file} is damaged or holds something other than tensors; download it again") from error
    items = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise CheckpointError(f"{file} holds something other than a dictionary of tensors; download it again")
    return content


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read files into its page cache in the background, if they fit into free memory."""
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
    folder: Path, tensors: Weights, constants: Mapping[str, object], names: Collection[str] | None = None
) -> dict[str, Any]:
    """Read a model's arguments from the config.json of `folder`, checked against the tensors next to it.

    Args:
        constants: entries that must have these values, if present; they are not arguments.
        names: of all arguments; None if the model's class accepts any.

    Raises:
        CheckpointError: an unsupported value, an unknown entry, or a size larger than the tensors have.
    """
    source = folder / "config.json"
    config = {key: value for key, value in read_json(source).items() if not key.startswith("_")}
    check_sizes(config, tensors, source)
    for key in config.keys() & constants.keys():
        if config[key] != constants[key]:
            value = format_value(config[key])
            raise CheckpointError(f"{source}: {key} = {value} is not supported, only {constants[key]}; {OWN_CONFIG}")
    arguments = {key: value for key, value in config.items() if key not in constants}
    if names is not None and (unknown := arguments.keys() - set(names)):
        named = ", ".join(map(format_value, sorted(unknown)))
        raise CheckpointError(f"{source}: unknown entries {named}; {OWN_CONFIG}")
    return arguments


def check_sizes(config: Mapping[str, Any], tensors: Weights, source: Path) -> None:
    """Raise CheckpointError for entries of a config that are not valid numbers, or larger than the tensors allow."""
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
    """Load the tokenizer in `folder` as transformers' class `kind`; no code of the checkpoint is run."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error


def shape_of(key: str, axes: int, tensors: Weights, source: Path) -> tuple[int, ...]:
    """The shape of the tensor `key`, from which a model's sizes are derived; it must have `axes` axes."""
    if key not in tensors:
        raise CheckpointError(f"{source} lacks {key}, which the model's sizes are read from; {OWN_FILE}")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{source}: wrong shape {key} ({list(shape)}); {OWN_FILE}")
    return shape


# Models


def load_model(
    build: Callable[[], nn.Module],
    tensors: Mapping[str, Tensor | Packed],
    source: Path,
    dtype: torch.dtype,
    key_map: KeyMap = IDENTITY,
    float32_names: Collection[str] = (),
    buffers: Mapping[str, Tensor] | None = None,
    blocks: Callable[[Any], Iterable[nn.Module]] = lambda model: getattr(model, "blocks", ()),
) -> Any:
    """Build a model on meta and assign its weights.

    Args:
        build: makes the model; called with meta as the default device.
        tensors: all weights of a checkpoint, under its own names.
        source: where the tensors are from, for error messages.
        dtype: of the weights.
        key_map: from the checkpoint's names to the model's.
        float32_names: weights with one of these in their dotted name are float32, whatever `dtype` is.
        buffers: values of the model's buffers, by name.
        blocks: returns the modules whose linear layers may stay quantized; by default the model's own `blocks`.

    Returns:
        The model in eval mode, without gradients. Quantized matrices in its blocks become quantized layers.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, by name; dtypes that weights cannot have; or sizes that
            no model can have.
    """
    with config_errors(source), torch.device("meta"):
        model = build()
    expected = dict(model.named_parameters())
    weights = rename(tensors, key_map, source, expected)
    check_keys(expected, weights, source, key_map)
    check_dtypes(weights, source)
    float32_names = {*float32_names, SCALE}
    inside = {part for block in blocks(model) for part in block.modules()}
    whole = set_quantized_layers(model, inside, weights, float32_names)
    parameters = dict(model.named_parameters())  # tied weights once, under their first name
    loaded: dict[int, Tensor] = {id(buffer): (buffers or {})[name] for name, buffer in model.named_buffers()}
    for name, parameter in parameters.items():
        target = parameter.dtype if parameter.dtype in QUANTIZED_DTYPES else dtype
        if not float32_names.isdisjoint(name.split(".")):
            target = torch.float32
        weight = whole[name]
        made = weight.dequantized(target) if isinstance(weight, Packed) else weight.to(target)
        loaded[id(parameter)] = nn.Parameter(made, requires_grad=False)
    replace_tensors(model, lambda tensor: loaded[id(tensor)])
    return model.eval()


def set_quantized_layers(
    model: nn.Module, inside: Collection[nn.Module], weights: Weights, float32_names: Collection[str]
) -> Weights:
    """Replace a model's linear layers whose weights are quantized; returns the tensors of all layers.

    Args:
        inside: the layers that may be replaced. Elsewhere weights are small, and some code reads the dtype of layers.
    """
    whole: Weights = {}
    for name, weight in weights.items():
        path, _, parameter = name.rpartition(".")
        whole[name] = weight
        if isinstance(weight, Packed) and parameter == "weight" and set(float32_names).isdisjoint(path.split(".")):
            layer = model.get_submodule(path)
            if type(layer) is nn.Linear and layer in inside:
                model.set_submodule(path, QuantizedLinear(weight.on_meta(), layer.bias))
                whole |= {name: weight.data} | ({} if weight.scale is None else {f"{path}.{SCALE}": weight.scale})
    return whole


@contextmanager
def config_errors(source: Path) -> Iterator[None]:
    """Turn anything that the libraries' classes raise for strange sizes or names into a CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{source}: no model can be made with the sizes in its config ({error}); {OWN_CONFIG}"
        ) from error


def rename(
    tensors: Mapping[str, Tensor | Packed], key_map: KeyMap, source: Path, expected: Mapping[str, Tensor]
) -> Weights:
    """Rename tensors to the model's names; stacked ones are split into views, whose shapes are checked later.

    Args:
        expected: the model's parameters, which tell how many rows each part has.
    """
    renamed: Weights = {}
    unknown = []
    for key, tensor in tensors.items():
        try:
            target = translate(key, key_map)
        except KeyError:
            unknown.append(key)
            continue
        if isinstance(target, tuple):
            whole = torch.atleast_1d(tensor) if isinstance(tensor, Tensor) else tensor
            rows = [len(expected[part]) if part in expected else 0 for part in target]
            fits = sum(rows) == whole.shape[0]
            renamed.update(zip(target, whole.split(rows) if fits else [whole] * len(target), strict=True))
        elif target is not None:
            renamed[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys {name_some(unknown)}; {OWN_FILE}")
    return renamed


def check_keys(expected: Mapping[str, Tensor], found: Weights, source: Path, key_map: KeyMap) -> None:
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
        raise CheckpointError(f"{source} does not fit its model: {named}; {OWN_FILE}")


def check_dtypes(tensors: Mapping[str, Tensor | Packed], source: Path) -> None:
    """Raise CheckpointError for tensors with a dtype that weights cannot have."""
    wrong = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.dtype not in WEIGHTS
    }
    if wrong:
        named = name_some(f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in wrong.items())
        raise CheckpointError(f"{source}: dtype not supported for weights: {named}; {REMEDY}")


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError for weights of a model that are infinite or NaN."""
    wrong = [key for key, weight in model.named_parameters() if not weight.float().isfinite().all()]
    if wrong:
        reason = f"the {name} has numbers that are not finite in {name_some(wrong)}"
        raise CheckpointError(f"{reason}; give a checkpoint without any")


def name_some(names: Iterable[str]) -> str:
    """The first few names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more
