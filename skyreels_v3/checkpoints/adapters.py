"""LoRAs' two ways into the transformer: fused or live.

Fused, what a LoRA adds becomes part of the weights: inference costs what it did without. Live, PEFT computes the two
thin products of a low-rank pair beside its linear layer: the memory-mapped weights stay what they are. All else that a
file may add, to biases, norms, modulation and convolutions, is small and always fused.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.checkpoints.contents import name_some
from skyreels_v3.checkpoints.hub import LoraError, lora_errors
from skyreels_v3.checkpoints.key_maps import KeyMap
from skyreels_v3.checkpoints.load import read_safetensors
from skyreels_v3.checkpoints.lora import LoraFile, read_lora
from skyreels_v3.request import Lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """What is added to a weight as a matrix, times a scale: `up @ down`, or `up` alone where `down` is None."""

    up: Tensor
    down: Tensor | None
    scale: float


Changes = dict[str, list[Change]]  # by the weight's name


@torch.no_grad()
def apply_loras(model: Any, loras: Sequence[Lora], native: KeyMap, fuse: bool) -> None:
    """Add LoRAs to a model; several on one layer add up. All at once: a model takes them one time.

    The model's tensors are neither written to nor copied, but for the weights that fusing replaces.

    Args:
        model: an `nn.Module` and a `PeftAdapterMixin`.
        loras: safetensors files, and what their updates are multiplied by.
        native: from the names of the official code's weights, which files use as well.
        fuse: make new weights, rounded once; otherwise keep low-rank pairs beside the weights, as PEFT's layers.

    Raises:
        CheckpointError: a file that cannot be read, or with what the model does not have, or of another shape.
    """
    assert not getattr(model, "peft_config", None), "all LoRAs of a model are applied in one call"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fused: Changes = {}
    live: list[tuple[Changes, float]] = []
    for lora in loras:
        file = read_lora(Path(lora.source), shapes, native, lora.partial)
        changes = read_changes(file)
        report(file, lora.scale, fuse)
        kept = {} if fuse else {name: made for name, made in changes.items() if is_live(model, name, made)}
        if kept:
            live.append((kept, lora.scale))
        for name, made in changes.items():
            if name not in kept:
                scaled = [Change(change.up, change.down, change.scale * lora.scale) for change in made]
                fused.setdefault(name, []).extend(scaled)
    for name, made in fused.items():
        place, _, parameter = name.rpartition(".")
        module = model.get_submodule(place)
        setattr(module, parameter, nn.Parameter(updated(getattr(module, parameter), made), requires_grad=False))
    if live:
        attach(model, live)


def report(file: LoraFile, scale: float, fuse: bool) -> None:
    """Say what becomes of a file."""
    weights = len({name for update in file.updates for name in update.names})
    logger.info("LoRA %s: %d weights, scale %g, %s", file.source, weights, scale, "fused" if fuse else "live")
    if file.left_out:
        used = sum(len(update.keys) for update in file.updates)
        told = name_some(file.left_out)
        logger.warning(
            "LoRA %s: %d of %d entries are left out, the model has nothing for %s",
            file.source,
            len(file.left_out),
            used + len(file.left_out),
            told,
        )


def read_changes(file: LoraFile) -> Changes:
    """The tensors of a file's updates, memory-mapped, for each weight; raises LoraError for values that are none."""
    with lora_errors():
        tensors = read_safetensors(file.source)
    changes: Changes = {}
    for update in file.updates:
        up, *rest = (tensors[key] for key in reversed(update.keys))
        down = rest[0] if rest else None
        rank = 1 if down is None else len(down)
        alpha = float(tensors[update.alpha]) if isinstance(update.alpha, str) else update.alpha
        scale = 1.0 if alpha is None else alpha / rank
        for key in (*update.keys, *([update.alpha] if isinstance(update.alpha, str) else [])):
            if not tensors[key].float().isfinite().all():
                raise LoraError(
                    f"{file.source}: {key} holds numbers that are not finite; the LoRA is damaged, give another"
                )
        stacked = up.reshape(sum(update.rows), -1)
        for name, part in zip(update.names, stacked.split(update.rows), strict=True):
            changes.setdefault(name, []).append(Change(part, None if down is None else down.flatten(1), scale))
    return changes


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
            state: dict[str, Tensor] = {}
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
