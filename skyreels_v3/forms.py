"""How forms show the table of flags: titles, labels, help and initial values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from skyreels_v3.checks import MAX_SPEAKERS, request_of
from skyreels_v3.errors import FLAG
from skyreels_v3.request import BY_NAME, FLAGS, Flag, GenerationRequest
from skyreels_v3.tasks import REFERENCE_SLOTS, TASK_NAMES, TaskSpec, task_spec

UNSET = "default"  # shown in a choice that is not set

TITLES = {"t2v": "Text to video", "i2v": "Image to video"}  # of tasks with abbreviated names
# parts of a flag's help that the form shows anyway
SHOWN = re.compile(
    rf",? *\((default|{'|'.join(TASK_NAMES)})\b[^()]*\)|; needs --[^;]*|, (a path or a hub's [A-Z/]+|paths? or URLs?)"
)
LABELS = {
    **{"model_id": "Model", "ref_imgs": "Reference", "num_frames": "Frames", "num_inference_steps": "Steps"},
    **{"fps": "Frames per second", "lora": "LoRA", "vae": "VAE", "vae_dtype": "VAE dtype", "no_riflex": "No RIFLEx"},
    **{"high_cpu_memory": "High CPU memory", "quant": "Quantization", "input_image": "Portrait"},
    **{"input_audio": "Speech", "input_video": "Clip", "include_input": "Join with the clip"},
}  # of flags whose names are abbreviations or less clear
SLOTS = {"ref_imgs": REFERENCE_SLOTS, "input_audio": MAX_SPEAKERS}  # number of files for flags that take several


def title_of(task: str) -> str:
    return TITLES.get(task, task.replace("_", " ").capitalize())


def label_of(flag: str) -> str:
    return LABELS.get(flag, flag.replace("_", " ").capitalize())


def without_dashes(text: str) -> str:
    """Replace the flags in a text by the labels of their form fields."""
    return FLAG.sub(lambda found: label_of(found[1]).lower(), text)


def explain(flag: Flag) -> str:
    """A flag's help and range, without what its form field shows anyway."""
    help = without_dashes(SHOWN.sub("", flag.help))
    return help if abs(flag.low) == float("inf") else f"{help}; {flag.low} to {flag.high}"


@cache
def grouped() -> list[tuple[str, list[Flag]]]:
    """The flags of each heading."""
    groups: list[tuple[str, list[Flag]]] = []
    for flag in FLAGS:
        if flag.group:
            groups.append((flag.group, []))
        groups[-1][1].append(flag)
    return groups


def initial_request(task: str, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], GenerationRequest]:
    """The defaults that apply to a task, and the request that they make on their own; raises UserError."""
    spec = task_spec(task)
    flags = {name: value for name, value in defaults.items() if BY_NAME[name].is_for(spec)}
    needed = {name: ["x"] if BY_NAME[name].several else "x" for name in spec.inputs}
    return flags, request_of({**flags, "task_type": task, "prompt": "x", **needed})


def initial_values(task: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each flag if only `defaults` are given; "" if unset."""
    flags, made = initial_request(task, defaults)
    values: dict[str, Any] = {}
    for flag in FLAGS:
        value = flags.get(flag.name, getattr(made, flag.name))
        if value is None or flag.path == "input" or flag.name == "prompt" or isinstance(value, tuple):
            value = ""
        values[flag.name] = value
    return {**values, "model_id": made.model_id} | ({"resolution": None} if values["width"] else {})


@cache
def common_values() -> dict[str, Any]:
    """The default of each flag for all tasks; "" if unset or different between tasks."""
    presets = [(task_spec(name), initial_values(name, {})) for name in TASK_NAMES]
    found = {flag.name: {values[flag.name] for task, values in presets if flag.is_for(task)} for flag in FLAGS}
    return {name: next(iter(values)) if len(values) == 1 else "" for name, values in found.items()}


def shown_value(flag: Flag, initial: Any) -> Any:
    """The initial value of a field that cannot be empty: 0 for an unset number, `UNSET` for an unset choice."""
    return initial or (UNSET if flag.choices else flag.kind())


def changed_values(shown: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the user has changed, from the values that the fields show."""
    values = {name: value.strip() if isinstance(value, str) else value for name, value in shown.items()}
    return {name: value for name, value in values.items() if value != shown_value(BY_NAME[name], initial[name])}


def limits_of(flag: Flag, task: TaskSpec | None) -> tuple[float, float]:
    """The smallest and largest value of a number flag."""
    if flag.name == "duration" and task is not None:
        return task.min_duration, task.max_duration
    return flag.low, flag.high
