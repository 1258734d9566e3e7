"""LoRA files, in the spellings that trainers use, and their two ways into the transformer: fused or live.

A LoRA adds scale * (alpha / rank) * B @ A to the weight of a linear layer. Fused, the sum becomes the layer's new
weight: inference costs what it did without. Live, PEFT computes the two thin products beside the layer: the
memory-mapped weights stay what they are, and scales can be changed.

Only low-rank pairs for the transformer are taken. A file with anything else in it would be half applied, so it is
refused by name.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from skyreels_v3.checkpoints.hub import LORA_CONFIG, LoraError, check_lora_file, lora_errors, read_json
from skyreels_v3.checkpoints.key_maps import FEED, NATIVE_HUNYUAN, NATIVE_TRANSFORMER, KeyMap, translate
from skyreels_v3.checkpoints.load import check_keys, name_some, read_safetensors
from skyreels_v3.models.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.models.kinds import Transformer

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
Layers = dict[str, dict[str, Tensor]]  # a file's layers, as it calls them, with A, B and alpha

PEFT_PREFIX = "base_model.model."
FLAT_PREFIX = "lora_unet_"  # kohya and musubi: dots of the native names are underscores
ENTRY = re.compile(
    r"(?:(?:base_model\.model|transformer|diffusion_model)\.)*(?P<layer>.+?)"
    r"\.(?:(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight|alpha)"
)
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|lora_te)\w*(?:\..+)?")

HEADER_ENTRY = "lora_adapter_metadata"  # diffusers' place for PEFT's settings
UNSUPPORTED_SETTINGS = ("use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens")
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # the others take something out of the base weights


def read_lora(source: Path, native: KeyMap = NATIVE_TRANSFORMER) -> State:
    """A LoRA under the transformer's names, alpha / rank folded into B.

    Args:
        native: from the names of the official code's transformer, which are taken as well.

    Returns:
        A (rank, in) as `LAYER.lora_A.weight` and B (out, rank) as `LAYER.lora_B.weight`, each layer with its own rank.
        Tensors are memory-mapped in the file's dtype; a B that had to be scaled is a float32 copy.

    Raises:
        CheckpointError: not a whole safetensors file, or not only low-rank pairs; names file and keys.
    """
    with lora_errors():
        check_lora_file(source)
        tensors = read_safetensors(source)
        layers = group_entries(tensors, source)
        check_pairs(layers, source)
        settings = read_settings(source, any(key.startswith(PEFT_PREFIX) for key in tensors))
        state: State = {}
        for layer, parts in layers.items():
            pairs = model_pairs(layer, parts, alpha_of(layer, parts, settings, source), source, native)
            if twice := state.keys() & pairs.keys():
                raise LoraError(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")
            state.update(pairs)
    return state


def group_entries(tensors: Mapping[str, Tensor], source: Path) -> Layers:
    """Entries of a file by layer; raises LoraError for entries that are of no low-rank pair of the transformer."""
    layers: Layers = {}
    refused, twice = [], []
    for key, tensor in tensors.items():
        match = ENTRY.fullmatch(key)
        if match is None:
            refused.append(key)
            continue
        parts = layers.setdefault(match["layer"], {})
        part = "A" if match["A"] else "B" if match["B"] else "alpha"
        if part in parts:
            twice.append(key)
        parts[part] = tensor
    if texts := [key for key in tensors if TEXT_ENCODER.fullmatch(key)]:
        raise LoraError(f"{source}: LoRAs of text encoders are not supported: {name_some(texts)}")
    if refused or not layers:
        reason = f"not supported: {name_some(refused)}" if refused else "no entries"
        raise LoraError(f"{source}: {reason}; give a LoRA of lora_A and lora_B (or lora_down and lora_up) alone")
    if twice:
        raise LoraError(f"{source} holds more than one LoRA of {name_some(twice)}; give a file with one")
    return layers


def check_pairs(layers: Layers, source: Path) -> None:
    """Raise LoraError unless every layer has A (rank, in) and B (out, rank), and no alpha is more than a number."""
    incomplete = [layer for layer, parts in layers.items() if not parts.keys() >= {"A", "B"}]
    if incomplete:
        raise LoraError(f"{source}: incomplete, A or B is missing of {name_some(incomplete)}; download it again")
    misshapen = [
        f"{layer} ({', '.join(f'{part} {list(tensor.shape)}' for part, tensor in parts.items())})"
        for layer, parts in layers.items()
        if not is_pair(parts["A"], parts["B"]) or ("alpha" in parts and parts["alpha"].numel() != 1)
    ]
    if misshapen:
        raise LoraError(f"{source}: no low-rank pairs of a linear layer: wrong shapes {name_some(misshapen)}")


def is_pair(down: Tensor, up: Tensor) -> bool:
    """Whether `up @ down` is a matrix with a rank."""
    return down.ndim == up.ndim == 2 and up.shape[1] == down.shape[0] > 0


def model_pairs(layer: str, parts: Mapping[str, Tensor], alpha: float | None, source: Path, native: KeyMap) -> State:
    """A file's layer under the model's names; the LoRA of stacked weights is one for each of them, A in common."""
    down, up = parts["A"], parts["B"]
    names = model_names(layer, source, native)
    rows = shares(names, down, up)
    if sum(rows) != up.shape[0] or min(rows) < 1:
        raise LoraError(f"{source}: wrong shape {layer} (B {list(up.shape)}, which is to be {len(names)} weights)")
    if alpha is not None and alpha != down.shape[0]:
        up = up.float() * (alpha / down.shape[0])
    pairs = {f"{name}.lora_A.weight": down for name in names}
    return pairs | {f"{name}.lora_B.weight": part for name, part in zip(names, up.split(rows), strict=True)}


def shares(names: Sequence[str], down: Tensor, up: Tensor) -> list[int]:
    """How many of B's rows are of each of the layers that are stacked: of all as many, but for a feed-forward layer.

    That one is last and has what is left by queries, keys and values, each as wide as what they are made of.
    """
    first, rows = len(names) - 1, up.shape[0]
    if names[-1].endswith(f".{FEED}"):
        return [*[down.shape[1]] * first, rows - first * down.shape[1]]
    return [rows // len(names)] * len(names)


def model_names(layer: str, source: Path, native: KeyMap) -> tuple[str, ...]:
    """Our names of a file's layer: of a native one from the key map, flat or not; any other is taken for ours."""
    is_flat = layer.startswith(FLAT_PREFIX)
    try:
        if is_flat:
            target = translate(f"{layer.removeprefix(FLAT_PREFIX)}_weight", flat(native))
        else:
            target = translate(f"{layer}.weight", native)
    except KeyError as error:
        if is_flat:
            raise LoraError(f"{source} does not fit its model: unexpected keys {layer}") from error
        return (layer,)
    assert target is not None, "every weight of a native transformer is one of ours"
    targets = (target,) if isinstance(target, str) else target
    return tuple(name.removesuffix(".weight") for name in targets)


@cache
def flat(native: KeyMap) -> KeyMap:
    """The key map of the same names with underscores for their dots."""
    # The groups that stand for a parameter's name can only be this one, or k would match k_img.
    return tuple((pattern.replace("(.+)", "(weight)").replace(r"\.", "_"), target) for pattern, target in native)


def alpha_of(layer: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any], source: Path) -> float | None:
    """A layer's alpha: the file's own, else that of its settings; None where B is meant as it stands."""
    if "alpha" in parts:
        return float(parts["alpha"])
    if not settings:
        return None
    patterns = settings.get("alpha_pattern") or {}  # PEFT: a name, or a regular expression, that ends the layer's name
    try:
        own = [value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer)]
    except (AttributeError, re.error) as error:
        raise LoraError(f"{source}: its settings give an alpha_pattern that cannot be read ({error})") from error
    alpha = own[0] if own else settings.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise LoraError(f"{source}: its settings give {alpha} for the lora_alpha of {layer}, which is no number")
    return alpha


def read_settings(source: Path, peft_names: bool) -> dict[str, Any]:
    """PEFT's settings of a file: in its header, or in the file beside it where its names are PEFT's; else empty."""
    with safe_open(source, framework="pt") as handle:
        header = (handle.metadata() or {}).get(HEADER_ENTRY)
    beside = source.parent / LORA_CONFIG
    if header is not None:
        settings = parse_header(header, source)
    elif peft_names and beside.is_file():
        settings, source = read_json(beside), beside
    else:
        return {}
    check_settings(settings, source)
    return settings


def parse_header(header: str, source: Path) -> dict[str, Any]:
    """The transformer's settings in a header's entry."""
    try:
        content = json.loads(header)
    except ValueError as error:
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


@torch.no_grad()
def apply_loras(model: Transformer, loras: Sequence[tuple[Path, float]], fuse: bool) -> None:
    """Add LoRAs to a model; several on one layer add up. All at once: a model takes them one time.

    The model's tensors are neither written to nor copied, but for the weights that fusing replaces.

    Args:
        loras: safetensors files, and what their updates are multiplied by.
        fuse: make new weights, rounded once; otherwise keep the LoRAs beside the weights, as PEFT's layers.

    Raises:
        CheckpointError: a file that cannot be read, or with a layer or a shape that the model does not have.
    """
    assert not getattr(model, "peft_config", None), "all LoRAs of a model are applied in one call"
    native = NATIVE_HUNYUAN if isinstance(model, HunyuanTransformer3DModel) else NATIVE_TRANSFORMER
    states = []
    for source, scale in loras:
        state = read_lora(source, native)
        check_fit(model, state, source)
        logger.info("LoRA %s: %d layers, scale %g, %s", source, len(state) // 2, scale, "fused" if fuse else "live")
        states.append((state, scale))
    if states:
        (fuse_loras if fuse else attach_loras)(model, states)


def check_fit(model: nn.Module, state: State, source: Path) -> None:
    """Raise LoraError unless every key is of a linear layer of the model and has its shape."""
    expected: State = {}
    for layer, module in model.named_modules():
        down = state.get(f"{layer}.lora_A.weight")
        if isinstance(module, nn.Linear) and down is not None:
            rank = down.shape[0]
            expected[f"{layer}.lora_A.weight"] = torch.empty(rank, module.in_features, device="meta")
            expected[f"{layer}.lora_B.weight"] = torch.empty(module.out_features, rank, device="meta")
    with lora_errors():
        check_keys(expected, state, source)


def attach_loras(model: Transformer, states: Sequence[tuple[State, float]]) -> None:
    """Put PEFT's layers around the model's; A and B get the dtype of the layer that they belong to."""
    names = [f"adapter_{number}" for number in range(len(states))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are what is wanted
        for name, (state, _) in zip(names, states, strict=True):
            model.load_lora_adapter(state, prefix=None, adapter_name=name, low_cpu_mem_usage=True)
    model.set_adapters(names, [scale for _, scale in states])
    model.requires_grad_(False).eval()  # PEFT makes layers to be trained


def fuse_loras(model: nn.Module, states: Sequence[tuple[State, float]]) -> None:
    """Give the layers of `states` new weights, W plus all updates."""
    for layer in dict.fromkeys(key.rsplit(".", 2)[0] for state, _ in states for key in state):
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        updates = [(state[down], state[up], scale) for state, scale in states if down in state]
        module = model.get_submodule(layer)
        module.weight = nn.Parameter(updated(module.weight, updates), requires_grad=False)


def updated(weight: Tensor, updates: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """weight (out, in) + the sum of scale * B @ A, in float32 and rounded once, as a new tensor."""
    total = weight.float()
    for down, up, scale in updates:
        total = torch.addmm(total, up.to(total), down.to(total), alpha=scale)
    return total.to(weight.dtype)
