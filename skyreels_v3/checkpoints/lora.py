"""LoRA files, in the spellings that trainers use, and their two ways into the transformer: fused or live.

A LoRA adds scale * (alpha / rank) * B @ A to a weight: a low-rank pair. Files that were extracted from a trained model
hold differences beside the pairs, which are added times the scale: of a whole weight (`diff`; of a norm, mostly), of a
bias (`diff_b`) and of the modulation (`diff_m`). What the model has nothing for is refused, or left out on demand; what
a file means otherwise is refused by name.

Fused, what a LoRA adds becomes part of the weights: inference costs what it did without. Live, PEFT computes the two
thin products of a low-rank pair beside its linear layer: the memory-mapped weights stay what they are. All else that a
file may add, to biases, norms, modulation and convolutions, is small and always fused.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.checkpoints.files import errors_about, read_header, read_json
from skyreels_v3.checkpoints.hub import LORA_CONFIG, check_lora_file
from skyreels_v3.checkpoints.key_maps import KeyMap, translate
from skyreels_v3.checkpoints.load import WEIGHTS, Tensors, name_some, read_safetensors, refuse_dtypes
from skyreels_v3.errors import UserError
from skyreels_v3.request import Lora

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Parts = dict[str, str]  # what a file has for a layer: the key of each part

PEFT_PREFIX = "base_model.model."
FLAT_PREFIX = re.compile(r"lora_unet__?")  # kohya and musubi: dots of the native names are underscores
ENTRY = re.compile(
    r"(?:(?:base_model\.model|transformer|(?:model\.)?diffusion_model)\.)*(?P<layer>.+?)"
    r"\.(?:(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha)|(?P<weight>diff|w_norm)|(?P<bias>diff_b|b_norm)|(?P<modulation>diff_m))"
)
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|lora_te)\w*(?:\..+)?")

HEADER_ENTRY = "lora_adapter_metadata"  # diffusers' place for PEFT's settings
UNSUPPORTED_SETTINGS = ("use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens")
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # the others take something out of the base weights


@dataclass(frozen=True)
class Change:
    """What is added to a weight as a matrix, times a scale: `up @ down`, or `up` alone where `down` is None.

    `keys` are those of the file's tensors, down before up.
    """

    up: Tensor
    down: Tensor | None
    scale: float
    keys: tuple[str, ...]


Changes = dict[str, list[Change]]  # by the weight's name


@dataclass(frozen=True)
class LoraFile:
    """What a file adds to a model, mapped into memory, and the keys of what the model has nothing for."""

    source: Path
    changes: Changes
    left_out: tuple[str, ...]


def lora_error(message: str) -> UserError:
    return UserError("--lora", message)


# Reading


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of a model's weights, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_lora(source: Path, shapes: Shapes, native: KeyMap, partial: bool = False) -> LoraFile:
    """What a file adds to a model.

    Args:
        shapes: of all weights of the model, by name.
        native: from the names of the official code's transformer, which are taken as well.
        partial: leave out what the model has nothing for.

    Raises:
        UserError: not a whole safetensors file, or not only what fits the model; names the file and its keys.
    """
    check_lora_file(source)
    with errors_about("--lora"):
        tensors = read_safetensors(source)
        layers, others = group_entries(tensors, source)
        settings = read_settings(source, any(key.startswith(PEFT_PREFIX) for key in tensors))
        changes: Changes = {}
        twice: list[str] = []
        misshapen = [
            f"{key} ({list(tensors[key].shape)} instead of [])"
            for key in (parts["alpha"] for parts in layers.values() if "alpha" in parts)
            if tensors[key].numel() != 1
        ]
        for layer, parts in layers.items():
            for parameter, keys in changes_of(parts):
                names = model_names(layer, parameter, native)
                if not all(name in shapes for name in names):
                    others += keys
                    continue
                refuse_dtypes({key: tensors[key] for key in keys if tensors[key].dtype not in WEIGHTS}, source)
                rows = [shapes[name][0] for name in names]
                wrong = wrong_shapes(keys, tensors, (sum(rows), *shapes[names[0]][1:]))
                misshapen += wrong
                if wrong or misshapen:
                    continue
                *downs, up = (tensors[key] for key in keys)
                down = downs[0].flatten(1) if downs else None
                scale = (
                    1.0 if down is None else alpha_of(layer, parts, tensors, settings, source, len(down)) / len(down)
                )
                for name, part in zip(names, up.reshape(sum(rows), -1).split(rows), strict=True):
                    known = changes.setdefault(name, [])
                    if any((change.down is None) == (down is None) for change in known):
                        twice += keys
                    known.append(Change(part, down, scale, keys))
    if misshapen:
        raise lora_error(f"{source} does not fit its model: wrong shapes {name_some(misshapen)}")
    if twice:
        raise lora_error(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")
    if others and not (partial and changes):
        rest = f"{source.name}:1:partial applies the rest" if changes else "give a LoRA of this model"
        raise lora_error(f"{source} does not fit its model, which has nothing for {name_some(others)}; {rest}")
    return LoraFile(source, changes, tuple(others))


def group_entries(tensors: Tensors, source: Path) -> tuple[dict[str, Parts], list[str]]:
    """A file's parts by layer, as it calls them, and what is no transformer's.

    Raises UserError for entries that are neither of low-rank pairs nor differences.
    """
    layers: dict[str, Parts] = {}
    refused, twice, others = [], [], []
    for key in tensors:
        match = ENTRY.fullmatch(key)
        if TEXT_ENCODER.fullmatch(key):
            others.append(key)
        elif match is None:
            refused.append(key)
        else:
            (part,) = (name for name, text in match.groupdict().items() if name != "layer" and text)
            parts = layers.setdefault(match["layer"], {})
            if part in parts:
                twice.append(key)
            parts[part] = key
    if refused or not tensors:
        reason = f"not supported: {name_some(refused)}" if refused else "no entries"
        raise lora_error(f"{source}: {reason}; give a LoRA of low-rank pairs and differences alone")
    if twice:
        raise lora_error(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")
    incomplete = [layer for layer, p in layers.items() if ("A" in p) != ("B" in p) or p.keys() == {"alpha"}]
    if incomplete:
        raise lora_error(f"{source}: incomplete, A or B is missing of {name_some(incomplete)}; download it again")
    return layers, others


def changes_of(parts: Parts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A layer's parameters that a file changes, with the keys of what it adds."""
    if "A" in parts:
        yield "weight", (parts["A"], parts["B"])
    for parameter in ("weight", "bias", "modulation"):
        if parameter in parts:
            yield parameter, (parts[parameter],)


def wrong_shapes(keys: tuple[str, ...], tensors: Tensors, wanted: Shape) -> list[str]:
    """The tensors of a change to a weight of shape `wanted` that do not fit it, with both shapes.

    A convolution's pair has its kernel's axes in A, or one axis in the place of all of A's but the first; axes of one
    entry count for nothing.
    """
    found = [tuple(tensors[key].shape) for key in keys]
    rank = found[0][0] if found[0] else 0
    needed = [wanted] if len(keys) == 1 else [(rank, *wanted[1:]), (wanted[0], rank)]

    def fits(shape: Shape, needed: Shape) -> bool:
        if len(keys) == 1:
            return [axis for axis in shape if axis != 1] == [axis for axis in needed if axis != 1]
        return len(shape) > 1 and shape[0] == needed[0] and 0 < math.prod(shape) == math.prod(needed)

    return [
        f"{key} ({list(shape)} instead of {list(right)})"
        for key, shape, right in zip(keys, found, needed, strict=True)
        if not fits(shape, right)
    ]


def model_names(layer: str, parameter: str, native: KeyMap) -> tuple[str, ...]:
    """Our names of a layer's parameter: of a native one from the key map, flat or not; any other is taken for ours."""
    prefix = FLAT_PREFIX.match(layer)
    try:
        if prefix is not None:
            target = translate(f"{layer[prefix.end() :]}_{parameter}", flat(native))
        else:
            target = translate(f"{layer}.{parameter}", native)
    except KeyError:
        return (f"{layer}.{parameter}",)
    assert target is not None, "every weight of a native transformer is one of ours"
    return (target,) if isinstance(target, str) else target


@cache
def flat(native: KeyMap) -> KeyMap:
    """The key map of the same names with underscores for their dots."""
    # The groups that stand for a parameter's name can only be this one, or k would match k_img.
    return tuple((pattern.replace("(.+)", "(weight|bias)").replace(r"\.", "_"), target) for pattern, target in native)


def alpha_of(layer: str, parts: Parts, tensors: Tensors, settings: Mapping[str, Any], source: Path, rank: int) -> float:
    """A layer's alpha: the file's own, else that of its settings; the rank where B is meant as it stands."""
    if "alpha" in parts:
        alpha = float(tensors[parts["alpha"]])
        if not math.isfinite(alpha):
            raise lora_error(f"{source}: {parts['alpha']} holds numbers that are not finite; give another LoRA")
        return alpha
    if not settings:
        return rank
    patterns = settings.get("alpha_pattern") or {}  # PEFT: a name, or a regular expression, that ends the layer's name
    try:
        own = [value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer)]
    except (AttributeError, re.error) as error:
        raise lora_error(f"{source}: its settings give an alpha_pattern that cannot be read ({error})") from error
    given = own[0] if own else settings.get("lora_alpha")
    if not isinstance(given, int | float) or not math.isfinite(given):
        raise lora_error(f"{source}: its settings give {given} for the lora_alpha of {layer}, which is no number")
    return given


def read_settings(source: Path, peft_names: bool) -> dict[str, Any]:
    """PEFT's settings of a file: in its header, or in the file beside it where its names are PEFT's; else empty.

    Raises:
        UserError: they mean more than B @ A times alpha / rank.
    """
    header = (read_header(source)[0].get("__metadata__") or {}).get(HEADER_ENTRY)
    beside = source.parent / LORA_CONFIG
    if header is not None:
        try:
            settings = {key.removeprefix("transformer."): value for key, value in json.loads(header).items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise lora_error(f"{source}: {HEADER_ENTRY} in its header is no JSON object ({error})") from error
    elif peft_names and beside.is_file():
        settings, source = read_json(beside), beside
    else:
        return {}
    unsupported = [f"{key} = {settings[key]}" for key in UNSUPPORTED_SETTINGS if settings.get(key)]
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        unsupported.append(f"peft_type = {kind}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights = {start}")
    if unsupported:
        raise lora_error(f"{source}: {', '.join(unsupported)} not supported; give a plain LoRA")
    return settings


# Applying


@torch.no_grad()
def apply_loras(model: Any, loras: Sequence[Lora], fuse: bool) -> None:
    """Add LoRAs to a model; several on one layer add up. All at once: a model takes them one time.

    The model's tensors are neither written to nor copied, but for the weights that fusing replaces.

    Args:
        model: an `nn.Module` with PEFT's methods and `native_names`, see `families.Transformer`.
        loras: safetensors files, and what their changes are multiplied by.
        fuse: make new weights, rounded once; otherwise keep low-rank pairs beside the weights, as PEFT's layers.

    Raises:
        UserError: a file that cannot be read, or with what the model does not have, or of another shape.
    """
    assert not getattr(model, "peft_config", None), "all LoRAs of a model are applied in one call"
    shapes = shapes_of(model)
    fused: Changes = {}
    live: list[tuple[Changes, float]] = []
    for lora in loras:
        file = read_lora(Path(lora.source), shapes, model.native_names, lora.partial)
        check_finite(file)
        report(file, lora.scale, fuse)
        kept = {} if fuse else {name: made for name, made in file.changes.items() if is_live(model, name, made)}
        if kept:
            live.append((kept, lora.scale))
        for name, made in file.changes.items():
            if name not in kept:
                scaled = [replace(change, scale=change.scale * lora.scale) for change in made]
                fused.setdefault(name, []).extend(scaled)
    for name, made in fused.items():
        place, _, parameter = name.rpartition(".")
        module = model.get_submodule(place)
        setattr(module, parameter, nn.Parameter(updated(getattr(module, parameter), made), requires_grad=False))
    if live:
        attach(model, live)


def check_finite(file: LoraFile) -> None:
    """Raise UserError for values that are no numbers."""
    for changes in file.changes.values():
        for change in changes:
            for key, tensor in zip(reversed(change.keys), (change.up, change.down), strict=False):
                if tensor is not None and not tensor.float().isfinite().all():
                    reason = f"{file.source}: {key} holds numbers that are not finite"
                    raise lora_error(f"{reason}; the LoRA is damaged, give another")


def report(file: LoraFile, scale: float, fuse: bool) -> None:
    """Log what becomes of a file."""
    way = "fused" if fuse else "live"
    logger.info("LoRA %s: %d weights, scale %g, %s", file.source, len(file.changes), scale, way)
    if file.left_out:
        used = {key for changes in file.changes.values() for change in changes for key in change.keys}
        message = "LoRA %s: %d of %d entries are left out, the model has nothing for %s"
        entries = len(used) + len(file.left_out)
        logger.warning(message, file.source, len(file.left_out), entries, name_some(file.left_out))


def is_live(model: nn.Module, name: str, changes: Sequence[Change]) -> bool:
    """Whether PEFT can have what is added to a weight beside it: one pair of a linear layer."""
    layer, _, parameter = name.rpartition(".")
    linear = parameter == "weight" and isinstance(model.get_submodule(layer), nn.Linear)
    return linear and len(changes) == 1 and changes[0].down is not None


def attach(model: Any, loras: Sequence[tuple[Changes, float]]) -> None:
    """Put PEFT's layers around the model's; A and B get the dtype of the layer that they belong to."""
    names = [f"adapter_{number}" for number in range(len(loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are what is wanted
        for adapter, (changes, _) in zip(names, loras, strict=True):
            state: Tensors = {}
            for name, (change,) in changes.items():
                assert change.down is not None
                layer = name.removesuffix(".weight")
                up = change.up if change.scale == 1 else change.up.float() * change.scale
                state |= {f"{layer}.lora_A.weight": change.down, f"{layer}.lora_B.weight": up}
            model.load_lora_adapter(state, prefix=None, adapter_name=adapter, low_cpu_mem_usage=True)
    model.set_adapters(names, [scale for _, scale in loras])
    model.requires_grad_(False).eval()  # PEFT makes layers to be trained


def updated(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """A weight with all that is added to it, in float32 and rounded once, as a new tensor."""
    total = weight.float().reshape(len(weight), -1)
    for change in changes:
        up = change.up.to(total)
        added = up if change.down is None else up @ change.down.to(total)
        total = torch.add(total, added, alpha=change.scale)
    return total.view_as(weight).to(weight.dtype)
