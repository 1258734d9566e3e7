"""What a checkpoint holds, by its configs and the headers of its safetensors files, held against what is needed.

No torch, and no weight is read: what cannot work is refused in milliseconds, before anything is loaded. The loaders
hold the tensors themselves against the models by the same functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from skyreels_v3.checkpoints import key_maps
from skyreels_v3.checkpoints.hub import read_header, read_json, transformer_config, weight_files
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, invert, restore, translate
from skyreels_v3.checkpoints.shapes import Shape, Shapes, hunyuan_shapes, wan_shapes
from skyreels_v3.errors import CheckpointError, shown
from skyreels_v3.hunyuan.sizes import HunyuanSizes
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.plan import Sizes, transformer_sizes
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import HUNYUAN, TaskSpec

NAMED_KEYS = 5  # keys spelled out in an error message
WEIGHT_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # as safetensors calls them
REMEDY = "give weights in float32, float16 or bfloat16, and --quant fp8 to have them in FP8"
# Keys that only quantized weights have, and whose they are. Our own are `weight_scale`, one for each row.
QUANTIZED = (
    (r"(?:.+\.)?scaled_fp8|.+\.(?:scale_weight|scale_input)", "ComfyUI's scaled FP8"),
    (r".+\.comfy_quant", "ComfyUI's mixed precision"),
    (r".+\.(?:weight_scale_2|input_scale|pre_quant_scale)", "ModelOpt's FP8 or NVFP4"),
    (r".+\.weight_scale_inv", "FP8 scaled by blocks"),
    (r".+\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)", "bitsandbytes' format"),
    (r".+\.(?:qweight|qzeros|g_idx|wscales|smooth_factor)", "4-bit integers"),
)
SCALE_END = f".{SCALE}"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # what repackaged transformers' names begin with
# Entries of configs that say how large a model is, by what none of them can be more than: the number of tensors, and
# the longest axis of one.
COUNT = re.compile(r"num_(?:\w+_)?layers|num_layers|layers_per_block|num_res_blocks")
WIDTH = re.compile(
    r"num_(?:\w+_)?heads|(?:attention_)?head_dim|(?:hidden|intermediate|vocab)_size|d_model|d_kv|d_ff|dim_mult|"
    r"(?:(?:text|freq|ffn|image|in|out|intermediate|output|base|decoder_base|z|text_embed|pooled_projection|conv)_)?dim|"
    r"audio_dim|(?:in|out|latent|block_out)_channels|conv_kernel|num_conv_pos_embeddings|"
    r"relative_attention_num_buckets"
)
POSITIVE = re.compile(r"(?:\w+_)?eps(?:ilon)?|rope_theta|scaling_factor")


class Tensorlike(Protocol):
    """What is asked of a tensor here."""

    @property
    def shape(self) -> Shape: ...

    def chunk(self, number: int) -> Iterable[Self]: ...


T = TypeVar("T", bound=Tensorlike)


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, as the header describes it."""

    shape: Shape
    dtype: str

    def chunk(self, number: int) -> list[Stored]:
        """As torch does: that many equal parts along the first axis."""
        return [Stored((self.shape[0] // number, *self.shape[1:]), self.dtype)] * number


def stored_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file, or of a folder with one or with shards; raises CheckpointError as read."""
    made: dict[str, Stored] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        for name, entry in read_header(file).tensors.items():
            made[name] = Stored(tuple(entry["shape"]), entry["dtype"])
    return made


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json without the library's own underscored entries."""
    return {key: value for key, value in read_json(path).items() if not key.startswith("_")}


# Checks that are the same for headers and for tensors


def check_format(keys: Iterable[str], source: Path) -> None:
    """Raise CheckpointError for weights that are quantized in a way that is not ours, by the name of that."""
    for key in keys:
        for pattern, name in QUANTIZED:
            if re.fullmatch(pattern, key):
                raise CheckpointError(f"{source} holds weights in {name} ({shown(key)}), not supported; {REMEDY}")


def check_scales(tensors: Mapping[str, Tensorlike], source: Path) -> None:
    """Raise CheckpointError unless each scale is a row's of a matrix beside it."""
    for key, scale in tensors.items():
        weight = tensors.get(f"{key.removesuffix(SCALE_END)}.weight")
        if key.endswith(SCALE_END) and (weight is None or len(weight.shape) != 2 or scale.shape != weight.shape[:1]):
            reason = f"{source} holds weights in FP8 that is scaled otherwise than by rows"
            raise CheckpointError(f"{reason} ({shown(key)} {list(scale.shape)}), not supported; {REMEDY}")


def refuse_dtypes(dtypes: Mapping[str, object], source: Path) -> None:
    """Raise CheckpointError for weights of these dtypes, which cannot be weights as they are."""
    if dtypes:
        told = name_some(f"{key} ({dtype})" for key, dtype in dtypes.items())
        raise CheckpointError(f"{source}: numbers of this kind are no weights: {told}; {REMEDY}")


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensorlike], source: Path) -> None:
    """Raise CheckpointError for numbers in a config that are none, and for sizes larger than the tensors there."""
    longest = max((axis for tensor in tensors.values() for axis in tensor.shape), default=0)
    for key, value in config.items():
        if POSITIVE.fullmatch(key) and not (isinstance(value, int | float) and 0 < value < math.inf):
            reason = f"{source}: {key} = {shown(value)} is no positive number"
            raise CheckpointError(f"{reason}; give the model's own config")
        limit = len(tensors) if COUNT.fullmatch(key) else longest if WIDTH.fullmatch(key) else None
        for size in value if isinstance(value, list) else [value]:
            if limit is None or size is None:
                continue
            if type(size) is not int or size < 1:
                raise CheckpointError(f"{source}: {key} = {shown(size)} is no size; give the model's own config")
            if size > limit:
                reason = f"{source}: {key} = {shown(size)} is more than the weights beside it have"
                raise CheckpointError(f"{reason} ({limit} at most); give the model's own config")
    if config.get("quantization_config"):
        raise CheckpointError(f"{source}: quantization_config is not supported; {REMEDY}")


def check_constants(config: Mapping[str, Any], constants: Mapping[str, object], source: Path) -> None:
    """Raise CheckpointError when a config turns a knob that the code does not have."""
    for key in config.keys() & constants.keys():
        if config[key] != constants[key]:
            reason = f"{source}: {key} = {shown(config[key])} is not supported, only {constants[key]}"
            raise CheckpointError(reason)


def known_arguments(
    names: Collection[str], config: Mapping[str, Any], constants: Mapping[str, object], source: Path
) -> dict[str, Any]:
    """A model's arguments from its config; knobs that are not turned, and unknown ones, are refused by name.

    Args:
        names: all arguments that there are.
        constants: the only values that some knobs may have; they are no arguments.
    """
    check_constants(config, constants, source)
    arguments = {key: value for key, value in config.items() if key not in constants}
    if unknown := arguments.keys() - set(names):
        raise CheckpointError(f"{source}: unknown entries {', '.join(map(shown, sorted(unknown)))}")
    return arguments


def shape_of(key: str, axes: int, tensors: Mapping[str, Tensorlike], source: Path) -> Shape:
    """The shape of a tensor that a model's sizes are read from."""
    if key not in tensors:
        raise CheckpointError(f"{source} lacks {key}, which the model's sizes are read from; give the model's own file")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{source}: wrong shape {key} ({list(shape)}); give the model's own file")
    return shape


def rename(tensors: Mapping[str, T], key_map: KeyMap, source: Path) -> dict[str, T]:
    """Tensors under their models' names; stacked ones are split (views, not copies)."""
    renamed: dict[str, T] = {}
    unknown = []
    for key, tensor in tensors.items():
        try:
            target = translate(key, key_map)
        except KeyError:
            unknown.append(key)
            continue
        if isinstance(target, tuple):
            if not tensor.shape or tensor.shape[0] % len(target):
                reason = f"{source}: wrong shape {key} ({list(tensor.shape)}), which is to be {len(target)} weights"
                raise CheckpointError(f"{reason}; give the model's own file")
            renamed.update(zip(target, tensor.chunk(len(target)), strict=True))
        elif target is not None:
            renamed[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys {name_some(unknown)}")
    return renamed


def check_keys(
    expected: Mapping[str, Shape], found: Mapping[str, Tensorlike], source: Path, key_map: KeyMap = IDENTITY
) -> None:
    """Raise CheckpointError, in the checkpoint's own names, unless `found` has the keys and shapes of `expected`."""
    names = invert(key_map)
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing keys {name_some(restore(key, names) for key in missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"unexpected keys {name_some(restore(key, names) for key in unexpected)}")
    misshapen = [
        f"{restore(key, names)} ({list(found[key].shape)} instead of {list(expected[key])})"
        for key in expected.keys() & found.keys()
        if tuple(found[key].shape) != tuple(expected[key])
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


def sizes_of(folder: Path, tensors: Mapping[str, Tensorlike], model_type: str | None = None) -> dict[str, Any]:
    """The config in `folder`, held against the tensors there; `model_type`: the only one that is taken, if named."""
    config, source = read_config(folder / "config.json"), folder / "config.json"
    check_sizes(config, tensors, source)
    if model_type is not None:
        check_constants(config, {"model_type": model_type}, source)
    return config


# Transformers


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """A transformer's tensors without what repackaged files put before all of its names."""
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def wan_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensorlike], folder: Path) -> dict[str, Any]:
    """Arguments of `SkyReelsTransformer3DModel` from a config, diffusers' or Wan-native, and its tensors' shapes."""
    source = folder / "config.json"
    check_sizes(config, tensors, source)
    if "num_heads" in config:
        return native_arguments(config, tensors, folder)
    return known_arguments(arguments_of(Sizes) | {"eps"}, config, key_maps.DIFFUSERS_CONSTANTS, source)


def native_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensorlike], folder: Path) -> dict[str, Any]:
    """The same from a Wan-native config, and from the tensors what it leaves out."""
    known = known_arguments(key_maps.NATIVE_CONFIG, config, key_maps.NATIVE_CONSTANTS, folder / "config.json")
    arguments = {ours: known[theirs] for theirs, ours in key_maps.NATIVE_CONFIG.items() if ours and theirs in known}
    arguments |= transformer_config(folder, arguments.keys() - {"eps"})
    arguments["text_dim"] = shape_of("text_embedding.0.weight", 2, tensors, folder)[1]
    if "img_emb.proj.1.weight" in tensors:
        arguments["image_dim"] = shape_of("img_emb.proj.1.weight", 2, tensors, folder)[1]
    if "audio_window" in config:
        width = shape_of("audio_proj.proj1.weight", 2, tensors, folder)[1]
        arguments["audio_features"] = width // config["audio_window"]
    return arguments


def wan_key_map(tensors: Collection[str]) -> KeyMap:
    """From the names of a V3 transformer's tensors, Wan-native or diffusers', to ours."""
    return key_maps.NATIVE_TRANSFORMER if "head.modulation" in tensors else IDENTITY


def hunyuan_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensorlike], folder: Path) -> dict[str, Any]:
    """Arguments of `HunyuanTransformer3DModel` from its config."""
    if "double_blocks.0.img_attn_proj.weight" in tensors or "double_blocks.0.img_attn.proj.weight" in tensors:
        reason = f"{folder} holds the transformer under HunyuanVideo's own names (double_blocks.0...), not supported"
        raise CheckpointError(f"{reason}; give one under diffusers' names, as the published one is")
    source = folder / "config.json"
    check_sizes(config, tensors, source)
    names = arguments_of(HunyuanSizes) | {"rope_theta", "rope_axes_dim"}
    return known_arguments(names, config, key_maps.HUNYUAN_CONSTANTS, source)


def arguments_of(sizes: type) -> set[str]:
    """The names of the sizes in a dataclass."""
    return {field.name for field in fields(sizes)}


def check_transformer(folder: Path, task: TaskSpec) -> Shapes:
    """The shapes of the weights of the transformer in `folder`; raises CheckpointError unless it holds just those."""
    config, tensors = read_config(folder / "config.json"), stored_tensors(folder)
    check_format(tensors, folder)
    tensors = without_prefix(tensors)
    if task.layout == HUNYUAN:
        key_map, arguments = IDENTITY, hunyuan_arguments(config, tensors, folder)
        known = {name: value for name, value in arguments.items() if name in arguments_of(HunyuanSizes)}
        expected = hunyuan_shapes(HunyuanSizes(**known))
    else:
        key_map, arguments = wan_key_map(tensors), wan_arguments(config, tensors, folder)
        known = {name: value for name, value in arguments.items() if name in arguments_of(Sizes)}
        expected = wan_shapes(Sizes(**(dict(task.transformer) | known)))
    check_scales(tensors, folder)
    found = rename(tensors, key_map, folder)
    scales = {key: found[key] for key in found if key.endswith(SCALE_END)}
    check_keys(expected | {key: scale.shape for key, scale in scales.items()}, found, folder, key_map)
    refuse_dtypes({key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES}, folder)
    for key in scales:
        if (dtype := found[f"{key.removesuffix(SCALE_END)}.weight"].dtype) != "F8_E4M3":
            raise CheckpointError(f"{folder}: {key} is a scale of FP8 weights, beside it are {dtype}; {REMEDY}")
    return expected


def published_shapes(request: GenerationRequest) -> Shapes:
    """The weights of the request's transformer, as long as its checkpoint is not here to tell."""
    sizes = transformer_sizes(request, None)
    return hunyuan_shapes(sizes) if isinstance(sizes, HunyuanSizes) else wan_shapes(sizes)


# The other components


def check_component(folder: Path, key_map: KeyMap, model_type: str | None, constants: Mapping[str, object]) -> None:
    """Raise CheckpointError for what a model's headers and config tell of what its loader would refuse.

    Its names and shapes, which the libraries know, are not among that.
    """
    tensors = stored_tensors(folder)
    check_format(tensors, folder)
    check_constants(sizes_of(folder, tensors, model_type), constants, folder / "config.json")
    wrong = {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES}
    refuse_dtypes({key: dtype for key, dtype in wrong.items() if translate(key, key_map) is not None}, folder)


def check_components(folder: Path, task: TaskSpec) -> None:
    """`check_component` of all in a checked folder besides the transformer whose weights are safetensors."""
    if task.layout == "diffusers":
        check_component(folder / "vae", IDENTITY, None, key_maps.WAN_VAE_CONSTANTS)
        check_component(folder / "text_encoder", key_maps.TRANSFORMERS_TEXT_ENCODER, "umt5", {})
    elif task.layout == HUNYUAN:
        check_component(folder / "vae", IDENTITY, None, key_maps.HUNYUAN_VAE_CONSTANTS)
        check_component(folder / "text_encoder", key_maps.LLAMA, "llama", {})
        check_component(folder / "text_encoder_2", key_maps.CLIP, "clip_text_model", {})
