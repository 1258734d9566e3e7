"""Reading LoRA files in the naming schemes of different trainers, and the two ways to apply them: fused or live.

A low-rank pair adds scale * (alpha / rank) * B @ A to a weight. Files that were extracted from a trained model also
hold differences, which are added times the scale: of whole weights (`diff`; norms, mostly), biases (`diff_b`) and
modulation (`diff_m`). Entries for weights that the model lacks are refused, or left out on request; any other kind of
entry is refused.

Fused, the LoRA becomes part of the weights, and inference costs no more than without it. Live, PEFT computes the two
thin products of each low-rank pair next to its linear layer, and the memory-mapped weights stay as they are. Changes to
biases, norms, modulation and convolutions are small, and are always fused.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.checkpoints.files import errors_about, open_safetensors, read_json
from skyreels_v3.checkpoints.hub import LORA_CONFIG
from skyreels_v3.checkpoints.key_maps import KeyMap, translate
from skyreels_v3.checkpoints.load import Tensors, check_dtypes, name_some, read_safetensors
from skyreels_v3.errors import UserError, counted
from skyreels_v3.request import Lora

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Parts = dict[str, str]  # of a layer: part -> its key in the file

PEFT_PREFIX = "base_model.model."
FLAT_PREFIX = re.compile(r"lora_unet__?")  # of kohya's and musubi's names, with underscores for dots
ENTRY = re.compile(
    r"(?:(?:base_model\.model|transformer|(?:model\.)?diffusion_model)\.)*(?P<layer>.+?)"
    r"\.(?:(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha)|(?P<weight>diff|w_norm)|(?P<bias>diff_b|b_norm)|(?P<modulation>diff_m))"
)
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|lora_te)\w*(?:\..+)?")
# What may be wrong with the entries of a file, in the order of reporting: the message, and the remedy
PROBLEMS = {
    "unsupported": (": not supported: ", "give a LoRA with only low-rank pairs and differences"),
    "incomplete": (": incomplete, A or B is missing for ", "download it again"),
    "misshapen": (" does not fit its model: wrong shapes ", "give a LoRA of this model"),
    "repeated": (" holds more than one LoRA of ", "give a file with one"),
    "damaged": (" holds numbers that are not finite: ", "the LoRA is damaged, give another"),
    "foreign": (" does not fit its model, which has no weights for ", "give a LoRA of this model"),
}

HEADER_ENTRY = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
# Supported values of PEFT's settings; others would mean something other than B @ A times alpha / rank
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens"), (None, False, [])),
    # other initializations change the base weights
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}

LAYER_PATTERN = re.compile(r"\^?(?:\w|\\?\.)+\$?")  # a plain name: matching other expressions might never end


@dataclass(frozen=True)
class Change:
    """What is added to a weight, as a matrix: `scale * up @ down`, or `scale * up` if `down` is None."""

    up: Tensor
    down: Tensor | None
    scale: float


Changes = dict[str, list[Change]]  # by the weight's name


def lora_error(message: str) -> UserError:
    return UserError("--lora", message)


# Reading


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of a model's weights, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_lora(source: Path, shapes: Shapes, native: KeyMap, partial: bool = False) -> tuple[Changes, list[str]]:
    """Read what a file adds to a model, memory-mapped, and the keys that are left out.

    Args:
        shapes: of all weights of the model, by name.
        native: the key map from the official code's names, which files may use as well.
        partial: leave out entries that the model has no weights for.

    Raises:
        UserError: not a complete safetensors file, or not a LoRA that fits the model; names the file and its keys.
    """
    changes: Changes = {}
    problems: defaultdict[str, list[str]] = defaultdict(list)
    with errors_about("--lora"):
        tensors = read_safetensors(source)
        settings = read_settings(source, any(key.startswith(PEFT_PREFIX) for key in tensors))
        for layer, parts in group_entries(tensors, problems).items():
            if ("A" in parts) != ("B" in parts) or parts.keys() == {"alpha"}:
                problems["incomplete"].append(layer)
                continue
            for parameter, keys in changes_of(parts):
                names = model_names(layer, parameter, native)
                if not shapes.keys() >= {*names}:
                    problems["foreign"] += keys
                    continue
                check_dtypes({key: tensors[key] for key in keys[:2]}, source)
                rows = [shapes[name][0] for name in names]
                if wrong := wrong_shapes(keys, tensors, (sum(rows), *shapes[names[0]][1:])):
                    problems["misshapen"] += wrong
                    continue
                problems["damaged"] += [key for key in keys if not tensors[key].float().isfinite().all()]
                up, down, scale = tensors[keys[-1]], None, 1.0
                if len(keys) > 1:
                    down, up = tensors[keys[0]], tensors[keys[1]]
                    down = down.reshape(len(down), -1)
                    alpha = tensors[keys[2]].item() if len(keys) > 2 else alpha_of(layer, settings, source, len(down))
                    scale = alpha / len(down)
                for name, part in zip(names, up.reshape(sum(rows), -1).split(rows), strict=True):
                    known = changes.setdefault(name, [])
                    if any((change.down is None) == (down is None) for change in known):
                        problems["repeated"] += keys
                    known.append(Change(part, down, scale))
    if not tensors:
        raise lora_error(f"{source}: it is empty; {PROBLEMS['unsupported'][1]}")
    for kind, (reason, remedy) in PROBLEMS.items():
        if kind == "foreign" and changes:
            remedy = f"{source.name}:1:partial applies the rest"
        if problems[kind] and not (kind == "foreign" and changes and partial):
            raise lora_error(f"{source}{reason}{name_some(problems[kind])}; {remedy}")
    return changes, problems["foreign"]


def group_entries(tensors: Tensors, problems: Mapping[str, list[str]]) -> dict[str, Parts]:
    """Group a file's keys by layer, under the file's names; entries of other kinds are added to `problems`."""
    layers: dict[str, Parts] = {}
    for key in tensors:
        match = ENTRY.fullmatch(key)
        if TEXT_ENCODER.fullmatch(key):
            problems["foreign"].append(key)
        elif match is None:
            problems["unsupported"].append(key)
        else:
            parts, part = layers.setdefault(match["layer"], {}), str(match.lastgroup)
            if part in parts:
                problems["repeated"].append(key)
            parts[part] = key
    return layers


def changes_of(parts: Parts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each parameter of a layer that a file changes, with the keys of A, B and any alpha, or of a difference."""
    if "A" in parts:
        yield "weight", tuple(parts[part] for part in ("A", "B", "alpha") if part in parts)
    for parameter in ("weight", "bias", "modulation"):
        if parameter in parts:
            yield parameter, (parts[parameter],)


def wrong_shapes(keys: Sequence[str], tensors: Tensors, wanted: Shape) -> list[str]:
    """The tensors that do not fit a change to a weight of shape `wanted`, with actual and expected shape.

    A has the axes of a convolution's kernel, or one for all of them. Axes of size 1 are ignored.
    """
    rank = (*tensors[keys[0]].shape, 1)[0] or 1
    needed: list[Shape] = [wanted] if len(keys) == 1 else [(rank, *wanted[1:]), (wanted[0], rank), ()]

    def plain(shape: Shape) -> Shape:
        return tuple(axis for axis in shape if axis != 1)

    return [
        f"{key} ({list(tensors[key].shape)} instead of {list(right)})"
        for key, right in zip(keys, needed, strict=False)
        if plain(tensors[key].shape) not in (plain(right), plain((*right[:1], math.prod(right[1:]))))
    ]


def model_names(layer: str, parameter: str, native: KeyMap) -> tuple[str, ...]:
    """Our names for a layer's parameter: native names, dotted or flat, by the key map; others are taken as ours."""
    prefix = FLAT_PREFIX.match(layer)
    name, key_map = f"{layer}.{parameter}", native
    if prefix is not None:
        name, key_map = f"{layer[prefix.end() :]}_{parameter}", flat(native)
    try:
        target = translate(name, key_map)
    except KeyError:
        return (f"{layer}.{parameter}",)
    return (target,) if isinstance(target, str) else target or ()


@cache
def flat(native: KeyMap) -> KeyMap:
    """The same key map, with underscores for dots."""
    # the group for any parameter may match these two only, or k would match k_img
    return tuple((pattern.replace("(.+)", "(weight|bias)").replace(r"\.", "_"), target) for pattern, target in native)


def alpha_of(layer: str, settings: Mapping[str, Any], source: Path, rank: int) -> float:
    """The alpha of a layer in a file's settings; the rank if the file has no settings."""
    patterns = settings.get("alpha_pattern") or {}  # PEFT: the end of the layer's name, or a regular expression for it
    if not isinstance(patterns, dict) or not all(map(LAYER_PATTERN.fullmatch, patterns)):
        raise lora_error(f"{source}: its settings have an alpha_pattern whose keys are not names; give a plain LoRA")
    own = [value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer)]
    alpha = own[0] if own else settings.get("lora_alpha") if settings else rank
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        reason = f"{source}: its settings give {alpha} for the lora_alpha of {layer}, which is not a number"
        raise lora_error(f"{reason}; give a plain LoRA")
    return alpha


def read_settings(source: Path, peft_names: bool) -> dict[str, Any]:
    """PEFT's settings of a file: from its header or, for PEFT's own names, from the file next to it; else empty.

    Raises:
        UserError: they mean something other than B @ A times alpha / rank.
    """
    with open_safetensors(source) as handle:
        header = (handle.metadata() or {}).get(HEADER_ENTRY)
    beside = source.parent / LORA_CONFIG
    if header is not None:
        try:
            settings = {key.removeprefix("transformer."): value for key, value in json.loads(header).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            reason = f"{source}: {HEADER_ENTRY} in its header is not a JSON object ({error})"
            raise lora_error(f"{reason}; give another file") from error
    elif peft_names and beside.is_file():
        settings, source = read_json(beside), beside
    else:
        return {}
    wrong = [f"{key} = {settings[key]}" for key, plain in PLAIN_SETTINGS.items() if settings.get(key) not in plain]
    if wrong:
        raise lora_error(f"{source}: {', '.join(wrong)} not supported; give a plain LoRA")
    return settings


# Applying


@torch.no_grad()
def apply_loras(model: Any, loras: Sequence[Lora], fuse: bool) -> None:
    """Apply LoRAs to a model; changes to the same weight add up. Must be called once, with all of them.

    Fusing replaces weights with new ones; no tensor of the model is modified.

    Args:
        model: an `nn.Module` with PEFT's methods and `native_names`, see `families.Transformer`.
        loras: safetensors files, and the scales of their changes.
        fuse: add everything to the weights, rounded once; otherwise low-rank pairs become PEFT layers.

    Raises:
        UserError: a file cannot be read or does not fit the model.
    """
    assert not getattr(model, "peft_config", None), "all LoRAs of a model are applied in one call"
    shapes = shapes_of(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fused: Changes = {}
    live: list[tuple[Tensors, float]] = []
    for lora in loras:
        changes, left_out = read_lora(Path(lora.source), shapes, model.native_names, lora.partial)
        way = "fused" if fuse else "live"
        logger.info("LoRA %s: %s, scale %g, %s", lora.source, counted(len(changes), "weight"), lora.scale, way)
        if left_out:
            entries = counted(len(left_out), "entry is", "entries are")
            message = "LoRA %s: %s left out, as the model has no weights for %s"
            logger.warning(message, lora.source, entries, name_some(left_out))
        state: Tensors = {}
        for name, made in changes.items():
            down, layer = made[0].down, name.removesuffix(".weight")
            if down is not None and not fuse and name in linear and len(made) == 1:
                state[f"{layer}.lora_A.weight"] = down
                state[f"{layer}.lora_B.weight"] = made[0].up.float() * made[0].scale
            else:
                scaled = [replace(change, scale=change.scale * lora.scale) for change in made]
                fused.setdefault(name, []).extend(scaled)
        if state:
            live.append((state, lora.scale))
    for name, made in fused.items():
        place, _, parameter = name.rpartition(".")
        weight = nn.Parameter(updated(model.get_parameter(name), made), requires_grad=False)
        setattr(model.get_submodule(place), parameter, weight)
    if live:
        attach(model, live)


def attach(model: Any, loras: Sequence[tuple[Tensors, float]]) -> None:
    """Add LoRAs to a model as PEFT adapters with their scales; A and B get the dtype of their layer."""
    names = [f"adapter_{number}" for number in range(len(loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are intended
        for name, (state, _) in zip(names, loras, strict=True):
            model.load_lora_adapter(state, prefix=None, adapter_name=name, low_cpu_mem_usage=True)
    model.set_adapters(names, [scale for _, scale in loras])
    model.requires_grad_(False).eval()  # PEFT's new layers are set up for training


def updated(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """A weight plus all changes, summed in float32 and rounded once, as a new tensor."""
    total = weight.float().reshape(len(weight), -1)
    for change in changes:
        up = change.up.to(total)
        added = up if change.down is None else up @ change.down.to(total)
        total = torch.add(total, added, alpha=change.scale)
    return total.view_as(weight).to(weight.dtype)
