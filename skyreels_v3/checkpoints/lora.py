"""LoRA files, in the spellings that trainers use: what each adds to which of the model's weights. No torch.

A LoRA adds scale * (alpha / rank) * B @ A to a weight: a low-rank pair. Files that were extracted from a trained model
hold differences beside the pairs, which are added times the scale: of a whole weight (`diff`; of a norm, mostly), of a
bias (`diff_b`) and of the modulation (`diff_m`).

All of that is in the file's header. So a file is held against a model before either is loaded. What the model has
nothing for is refused, or left out on demand; what a file means otherwise is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from skyreels_v3.checkpoints.contents import (
    WEIGHT_DTYPES,
    Stored,
    name_some,
    published_shapes,
    refuse_dtypes,
    stored_tensors,
)
from skyreels_v3.checkpoints.hub import (
    LORA_CONFIG,
    LoraError,
    check_lora_file,
    locate_lora,
    lora_errors,
    read_header,
    read_json,
)
from skyreels_v3.checkpoints.key_maps import NATIVE_HUNYUAN, NATIVE_TRANSFORMER, KeyMap, translate
from skyreels_v3.checkpoints.shapes import Shape, Shapes
from skyreels_v3.errors import shown
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import HUNYUAN

Parts = dict[str, str]  # what a file has for a layer: the key of each part

PEFT_PREFIX = "base_model.model."
FLAT_PREFIX = re.compile(r"lora_unet__?")  # kohya and musubi: dots of the native names are underscores
ENTRY = re.compile(
    r"(?:(?:base_model\.model|transformer|(?:model\.)?diffusion_model)\.)*(?P<layer>.+?)"
    r"\.(?:(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha)|(?P<weight>diff|w_norm)|(?P<bias>diff_b|b_norm)|(?P<modulation>diff_m))"
)
SLOW = re.compile(r"\)[*+{?]|(?:[*+?}].*){4}", re.DOTALL)  # patterns that may take a regular expression for ever
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|lora_te)\w*(?:\..+)?")

HEADER_ENTRY = "lora_adapter_metadata"  # diffusers' place for PEFT's settings
UNSUPPORTED_SETTINGS = ("use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens")
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # the others take something out of the base weights


@dataclass(frozen=True)
class Update:
    """What a file adds to weights of the model: to one, or to several that are stacked in the file.

    Attributes:
        names: the model's weights.
        rows: the length of each one's first axis.
        keys: of A (rank, in, ...) and B (out, rank, ...) of a low-rank pair, or of a difference.
        alpha: of a pair: the key of it or the number itself; None: the rank.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    alpha: str | float | None = None


@dataclass(frozen=True)
class LoraFile:
    """What a file adds to a model, and the keys of what the model has nothing for."""

    source: Path
    updates: tuple[Update, ...]
    left_out: tuple[str, ...] = ()


def check_loras(request: GenerationRequest, shapes: Shapes | None = None) -> None:
    """Raise LoraError unless each of the request's LoRAs that is on this machine fits its transformer.

    Args:
        shapes: of the transformer's weights; None where its checkpoint is not here, and the task's known sizes tell.
    """
    files = [(file, lora.partial) for lora in request.lora if (file := locate_lora(lora.source)) is not None]
    if files:
        shapes = published_shapes(request) if shapes is None else shapes
        native = NATIVE_HUNYUAN if request.task.layout == HUNYUAN else NATIVE_TRANSFORMER
        for file, partial in files:
            read_lora(file, shapes, native, partial)


def read_lora(source: Path, shapes: Shapes, native: KeyMap = NATIVE_TRANSFORMER, partial: bool = False) -> LoraFile:
    """What a file adds to a model.

    Args:
        shapes: of all weights of the model, by name.
        native: from the names of the official code's transformer, which are taken as well.
        partial: leave out what the model has nothing for.

    Raises:
        LoraError: not a whole safetensors file, or not only what fits the model; names the file and its keys.
    """
    with lora_errors():
        check_lora_file(source)
        tensors = stored_tensors(source)
        layers, others = group_entries(tensors, source)
        settings = read_settings(source, any(key.startswith(PEFT_PREFIX) for key in tensors))
        updates: list[Update] = []
        misshapen: list[str] = []
        for layer, parts in layers.items():
            for parameter, keys in changes_of(parts):
                names = model_names(layer, parameter, native)
                if not all(name in shapes for name in names):
                    others += keys
                    continue
                wanted = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
                misshapen += wrong_shapes(keys, tensors, wanted)
                alpha = alpha_of(layer, parts, settings, source) if len(keys) > 1 else None
                updates.append(Update(names, tuple(shapes[name][0] for name in names), keys, alpha))
        weights = {key: tensors[key].dtype for update in updates for key in update.keys}
        refuse_dtypes({key: dtype for key, dtype in weights.items() if dtype not in WEIGHT_DTYPES}, source)
        misshapen += [
            f"{alpha} ({list(tensors[alpha].shape)} instead of [])"
            for alpha in (parts["alpha"] for parts in layers.values() if "alpha" in parts)
            if math.prod(tensors[alpha].shape) != 1
        ]
    if misshapen:
        raise LoraError(f"{source} does not fit its model: wrong shapes {name_some(misshapen)}")
    refuse_twice(updates, source)
    if others and not (partial and updates):
        rest = f"{source.name}:1:partial applies the rest" if updates else "give a LoRA of this model"
        raise LoraError(f"{source} does not fit its model, which has nothing for {name_some(others)}; {rest}")
    return LoraFile(source, tuple(updates), tuple(others))


def group_entries(tensors: Mapping[str, Stored], source: Path) -> tuple[dict[str, Parts], list[str]]:
    """A file's parts by layer, as it calls them, and what is no transformer's.

    Raises LoraError for entries that are neither of low-rank pairs nor differences.
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
        raise LoraError(f"{source}: {reason}; give a LoRA of low-rank pairs and differences alone")
    if twice:
        raise LoraError(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")
    incomplete = [layer for layer, parts in layers.items() if not is_complete(parts)]
    if incomplete:
        raise LoraError(f"{source}: incomplete, A or B is missing of {name_some(incomplete)}; download it again")
    return layers, others


def is_complete(parts: Parts) -> bool:
    """Whether a layer has both of a pair, or none, and more than an alpha."""
    return parts.keys() >= {"A", "B"} or (parts.keys().isdisjoint({"A", "B"}) and parts.keys() != {"alpha"})


def changes_of(parts: Parts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A layer's parameters that a file changes, with the keys of what it adds."""
    if "A" in parts:
        yield "weight", (parts["A"], parts["B"])
    for parameter in ("weight", "bias", "modulation"):
        if parameter in parts:
            yield parameter, (parts[parameter],)


def wrong_shapes(keys: tuple[str, ...], tensors: Mapping[str, Stored], wanted: Shape) -> Iterator[str]:
    """The tensors of an update of a weight of shape `wanted` that do not fit it, with both shapes.

    A convolution's pair has its kernel's axes in A, or one axis in the place of all of A's but the first.
    """
    found = [tensors[key].shape for key in keys]
    if len(keys) == 1:
        fits = [axes(found[0]) == axes(wanted)]
        shapes = [wanted]
    else:
        rank = found[0][0] if found[0] else 0
        shapes = [(rank, *wanted[1:]), (wanted[0], rank)]
        fits = [
            rank > 0 and len(found[0]) > 1 and math.prod(found[0][1:]) == math.prod(wanted[1:]),
            rank > 0 and found[1][:1] == wanted[:1] and len(found[1]) > 1 and math.prod(found[1][1:]) == rank,
        ]
    for key, shape, right, fit in zip(keys, found, shapes, fits, strict=True):
        if not fit:
            yield f"{key} ({list(shape)} instead of {list(right)})"


def axes(shape: Shape) -> Shape:
    """A shape without the axes of one entry, which some files have more of."""
    return tuple(axis for axis in shape if axis != 1)


def refuse_twice(updates: Sequence[Update], source: Path) -> None:
    """Raise LoraError for a file with two pairs, or two differences, of one weight."""
    seen: set[tuple[str, int]] = set()
    twice = []
    for update in updates:
        entries = {(name, len(update.keys)) for name in update.names}
        if entries & seen:
            twice += update.keys
        seen |= entries
    if twice:
        raise LoraError(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")


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


def alpha_of(layer: str, parts: Parts, settings: Mapping[str, Any], source: Path) -> str | float | None:
    """A layer's alpha: the key of the file's own, else that of its settings; None where B is meant as it stands."""
    if "alpha" in parts:
        return parts["alpha"]
    if not settings:
        return None
    patterns = settings.get("alpha_pattern") or {}  # PEFT: a name, or a regular expression, that ends the layer's name
    if endless := [pattern for pattern in patterns if SLOW.search(str(pattern))]:
        raise LoraError(f"{source}: its settings give an alpha_pattern that takes too long, {shown(endless[0])}")
    try:
        own = [value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer)]
    except (AttributeError, re.error) as error:
        raise LoraError(f"{source}: its settings give an alpha_pattern that cannot be read ({error})") from error
    alpha = own[0] if own else settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{source}: its settings give {alpha} for the lora_alpha of {layer}, which is no number")
    return alpha


def read_settings(source: Path, peft_names: bool) -> dict[str, Any]:
    """PEFT's settings of a file: in its header, or in the file beside it where its names are PEFT's; else empty."""
    header = read_header(source).metadata.get(HEADER_ENTRY)
    beside = source.parent / LORA_CONFIG
    if header is not None:
        settings = parse_header(header, source)
    elif peft_names and beside.is_file():
        settings, source = read_json(beside), beside
    else:
        return {}
    check_settings(settings, source)
    return settings


def parse_header(header: Any, source: Path) -> dict[str, Any]:
    """The transformer's settings in a header's entry."""
    try:
        content = json.loads(header)
    except (ValueError, TypeError, RecursionError) as error:
        raise LoraError(f"{source}: {HEADER_ENTRY} in its header is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise LoraError(f"{source}: {HEADER_ENTRY} in its header is no JSON object")
    return {key.removeprefix("transformer."): value for key, value in content.items()}


def check_settings(settings: Mapping[str, Any], source: Path) -> None:
    """Raise LoraError when a LoRA means more than B @ A times alpha / rank."""
    unsupported = [f"{key} = {settings[key]}" for key in UNSUPPORTED_SETTINGS if settings.get(key)]
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        unsupported.append(f"peft_type = {kind}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights = {start}")
    if unsupported:
        raise LoraError(f"{source}: {', '.join(unsupported)} not supported; give a plain LoRA")
