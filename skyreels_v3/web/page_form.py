"""The form of a task: components for each flag in request.py that the task takes, and their values."""

from __future__ import annotations

import json
import shlex
from abc import ABCMeta
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from skyreels_v3.cli import build_parser, convert_entries
from skyreels_v3.forms import SLOTS, explain, grouped, initial_values, label_of
from skyreels_v3.request import BY_NAME, EXCLUSIVE, FLAGS, INPUTS, SHORTHANDS, Flag
from skyreels_v3.tasks import CONFIG_DIR, TASK_NAMES, TaskSpec, task_spec
from skyreels_v3.web.fields import OWN, published
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.uploads import IMAGES, SOUNDS

TABS = {
    **{"t2v": "Text", "i2v": "Image", "reference_to_video": "References", "talking_avatar": "Avatar"},
    **{"single_shot_extension": "Extend", "shot_switching_extension": "New shot"},
}  # short titles, in order
# flags that are always visible, besides prompt and inputs
OPEN = (
    *("resolution", "width", "height", "duration", "num_frames", "num_inference_steps", "seed", "model_id"),
    *("transition", "include_input"),
)
HIDDEN = (*OWN, *SHORTHANDS, "task_type", "url_timeout")  # the page uploads files, so it needs no URLs
KEYFRAMES, CLIP = "keyframes", "input_video"
SIZE = ("resolution", "width", "height")  # either the first or the others
WAVEFORM = {"waveform_color": "#64748b", "waveform_progress_color": "#0d9488", "trim_region_color": "#0d948855"}
ASSETS = CONFIG_DIR.parent / "assets"  # only in a clone
MORE_PROMPTS = {  # made of words that the built-in model knows
    "t2v": (
        "A red lantern floats up into the night",
        "A white sailboat drifts to the left on the sea",
        "A cat wearing sunglasses sits at the pool",
    ),
    "i2v": ("The camera zooms in", "The fox walks to the right through the snow"),
    "reference_to_video": (
        "A fox walks through falling snow, next to a red lantern",
        "A fox rests beside a lantern at night",
    ),
    "single_shot_extension": (
        "The boat drifts to the right across the bay",
        "The boat sails into the sunset. The camera pans left.",
    ),
    "shot_switching_extension": (
        "[ZOOM_OUT_CUT] Wide view of the boat on the sea",
        "[CUT_AWAY] We see a red lantern at night",
    ),
    "talking_avatar": ("A woman in a red coat talks to the camera", "A lady speaks to the camera in a room"),
}


# A gr.Image that does not open the file, so that our own checks report what is wrong with it. Not a `class` statement:
# with one, Gradio would write a .pyi file beside this one.
Picture: Any = ABCMeta.__new__(
    type(gr.Image), "Picture", (gr.Image,),
    {"is_template": True, "preprocess": lambda self, payload: payload and payload.path},
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A flag's part of a form.

    Attributes:
        initial: its value unless the user changes it; it is then not sent, and the server's default applies. The size
            is always sent as shown, so that it applies to any model.
    """

    flag: Flag
    components: tuple[gr.components.Component, ...]
    initial: Any

    def value_of(self, data: Mapping[Any, Any]) -> Any:
        """The value to send; None for none.

        Files are lists of paths; keyframes end with a string of their times, a clip with its two cutting times.
        """
        values = [data[component] for component in self.components]
        if self.flag.name not in INPUTS:
            value = values[0].strip() if isinstance(values[0], str) else values[0]
            return None if value in (None, "" if self.flag.name in SIZE else self.initial) else value
        if self.flag.name == KEYFRAMES:
            return [*values[0], values[1]] if values[0] else None
        if self.flag.name == CLIP:
            return values if values[0] else None
        return [value for value in values if value] or None

    def updates_for(self, value: Any) -> dict[Any, Any]:
        """Gradio updates that make the components show a value; None: the initial one, "": none."""
        if self.flag.name == KEYFRAMES:
            paths, times = value or ([], [])
            return dict(zip(self.components, (gr.update(value=paths), gr.update(value=", ".join(times))), strict=True))
        if self.flag.name in INPUTS:
            files = [*(value or ()), *[None] * len(self.components)]
            return {component: gr.update(value=path) for component, path in zip(self.components, files, strict=False)}
        shown = self.initial if value is None else value
        shown = ",".join(map(str, shown)) if isinstance(shown, list | tuple) else shown
        return {self.components[0]: gr.update(value=None if shown == "" else shown)}


@dataclass
class Form:
    """A task's form, built within a tab."""

    task: TaskSpec
    settings: Settings
    fields: list[Field] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)  # ids of folded groups, by the flags in them
    notice: Any = None
    plan_button: Any = None
    start_button: Any = None

    @property
    def components(self) -> set[Any]:
        return {component for each in self.fields for component in each.components}

    @property
    def typed(self) -> list[Any]:
        """The components that do not hold files."""
        return [part for each in self.fields for part in each.components if not hasattr(part, "upload")]

    def build(self) -> None:
        """Make the components."""
        values = initial_values(self.task.name, self.settings.defaults)
        self.defaults = {**values, "model_id": self.settings.model_name(values["model_id"])}
        mine = [flag for flag in FLAGS if self.has(flag)]
        self.add(BY_NAME["prompt"])
        inputs = [flag for flag in mine if flag.name in INPUTS and flag.name != KEYFRAMES]
        inputs.sort(key=lambda flag: (flag.name in SLOTS, flag.name not in self.task.inputs))  # required ones first
        if single := [flag for flag in inputs if flag.name not in SLOTS]:
            with gr.Row(elem_classes="files"):
                for flag in single:
                    self.add(flag)
        for flag in inputs[len(single) :]:
            self.add(flag)
        components = [component for each in self.example_fields for component in each.components]
        rows = self.examples()
        prompts = [str(row[0]) for row in rows]  # as labels they become buttons, which the keyboard reaches
        gr.Examples(rows, components, label="Examples", example_labels=prompts, elem_id=f"{self.task.name}-examples")
        with gr.Row(elem_classes=["numbers", "common"]):
            for name in OPEN:
                if BY_NAME[name] in mine:
                    self.add(BY_NAME[name])
        placed = {each.flag.name for each in self.fields}
        for group, flags in grouped():
            rest = [flag for flag in flags if flag in mine and flag.name not in placed]
            if rest:
                self.build_group(group, sorted(rest, key=lambda flag: flag.name == KEYFRAMES))
        self.keep_one_size()

    def keep_one_size(self) -> None:
        """Keep only one size filled in, resolution or width and height; runs in the browser."""
        fields = [each for each in self.fields if each.flag.name in SIZE]
        parts: list[Any] = [each.components[0] for each in fields]
        *resolution, width, height = parts
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        same = "{__type__: 'update'}"
        for part in resolution:  # this event also fires when the field loses focus
            chosen = f"(resolution) => resolution ? ['', ''] : [{same}, {same}]"
            part.input(None, part, [width, height], js=chosen, **options)
        left = (
            f"(...shown) => shown.some(Boolean) ? shown.map(() => ({same})) : {json.dumps([x.initial for x in fields])}"
        )
        for side in (width, height):  # its `input` event does not fire for all typing
            side.change(None, side, resolution, js=f"(side) => side ? [null] : [{same}]", **options)
            side.blur(None, parts, parts, js=left, **options)

    def build_group(self, name: str, flags: list[Flag]) -> None:
        """Make a folded group of flags."""
        id = f"{self.task.name}-{name.lower().replace(' ', '-')}"
        with gr.Accordion(name, open=False, elem_id=id), gr.Row(elem_classes="numbers"):
            for flag in flags:
                self.add(flag)
                self.folded[flag.name] = id

    def has(self, flag: Flag) -> bool:
        """Whether the form has a flag: one of the task that clients may set, and not a shorthand for another."""
        return flag.in_line and flag.is_for(self.task) and flag.name not in HIDDEN

    def add(self, flag: Flag) -> None:
        """Make the components of a flag."""
        id = f"{self.task.name}-{flag.name}"
        initial = self.defaults[flag.name]
        if flag.name == KEYFRAMES:
            pictures = gr.File(label="Keyframes", file_count="multiple", file_types=["image"], height=150, elem_id=id)
            times = gr.Textbox(label="Keyframe times", info="seconds, one for each: 2, 4.5", elem_id=f"{id}-times")
            components: tuple[Any, ...] = (pictures, times)
        elif flag.name in INPUTS:
            several = flag.name in SLOTS
            with gr.Row(elem_classes="files", elem_id=id) if several else gr.Column(min_width=240, elem_id=id):
                components = tuple(self.file_component(flag, number) for number in range(SLOTS.get(flag.name, 1)))
                if flag.name == CLIP:
                    with gr.Row(elem_classes="cut"):
                        components += tuple(
                            gr.Textbox(label=label, placeholder=text, min_width=100, elem_id=f"{id}-{label.lower()}")
                            for label, text in (("From", "0 s"), ("To", "the end"))
                        )
        else:
            components = (value_component(flag, id, initial, self.models),)
        self.fields.append(Field(flag, components, initial))

    def file_component(self, flag: Flag, number: int) -> Any:
        """The component for one file of a flag."""
        many = f" {number + 1}" if flag.name in SLOTS else ""
        others = (a if b == flag.name else b for a, b in EXCLUSIVE if flag.name in (a, b))
        instead = [label_of(other).lower() for other in others if other not in HIDDEN]
        note = f" (instead of the {instead[0]})" if instead else " (optional)"
        needed = flag.name in self.task.inputs and not number
        options: dict[str, Any] = {
            "label": f"{label_of(flag.name)}{many}{'' if needed else note}",
            "elem_id": f"{self.task.name}-{flag.name}-{number}",
            "buttons": [],
        }
        if flag.name in IMAGES:
            options |= {"height": 150 if flag.name in SLOTS else 200, "min_width": 120}
            return Picture(type="filepath", image_mode=None, sources=["upload"], **options)
        if flag.name in SOUNDS:
            return gr.Audio(type="filepath", sources=["upload"], min_width=240, waveform_options=WAVEFORM, **options)
        return gr.Video(sources=["upload"], include_audio=True, height=200, **options)

    @property
    def models(self) -> list[str]:
        """The server's models for this task."""
        others = {name for task in map(task_spec, TASK_NAMES) for name in published(task)} - {*published(self.task)}
        return [name for name in self.settings.models if name not in others]

    def examples(self) -> list[list[Any]]:
        """Rows of prompt and inputs: the preset's example, and more prompts for the same inputs."""
        names = [each.flag.name for each in self.example_fields]
        values = example_of(self.task.name)
        prompts = [values["prompt"], *MORE_PROMPTS.get(self.task.name, ())]
        rows: list[list[Any]] = []
        for prompt in prompts:
            row: list[Any] = []
            for each in self.example_fields:
                files = [str(path) for path in values.get(each.flag.name, ())] if each.flag.name in INPUTS else []
                row += (
                    [prompt]
                    if each.flag.name == "prompt"
                    else [*files, *[None] * len(each.components)][: len(each.components)]
                )
            rows.append(row)
        return rows if names else []

    @property
    def example_fields(self) -> list[Field]:
        """The fields of the prompt and the required inputs."""
        return [each for each in self.fields if each.flag.name in ("prompt", *self.task.inputs)]


def value_component(flag: Flag, id: str, initial: Any, models: list[str]) -> Any:
    """The component of a flag that does not take a file."""
    help = explain(flag)
    options: dict[str, Any] = {"label": label_of(flag.name), "info": help, "elem_id": id, "min_width": 150}
    if flag.kind is bool:
        return gr.Checkbox(value=initial, **options)
    if flag.name == "model_id":
        return gr.Dropdown(models, value=initial, **options | {"min_width": 310})
    if flag.choices:
        unset = [("default", "")] if initial == "" else []
        return gr.Dropdown([*unset, *((choice, choice) for choice in flag.choices)], value=initial, **options)
    if flag.kind in (int, float) and initial != "" and flag.name not in SIZE:  # an empty one would show 0
        return gr.Number(value=initial, precision=0 if flag.kind is int else None, **options)
    if flag.name == "prompt":
        options |= {"info": None, "placeholder": f"{help[0].upper()}{help[1:]}", "lines": 3}
    else:
        options["placeholder"] = flag.metavar or ("default" if flag.kind is not str else "")
    return gr.Textbox(value=initial, max_lines=8, **options)


def one_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a form with only one size: width and height win over a resolution."""
    sides = dict.fromkeys(SIZE[1:], "")
    if any(values.get(side) for side in sides):
        return {**sides, **values, "resolution": ""}
    return {**values, **sides} if values.get("resolution") else {**values}


@cache
def example_of(task: str) -> dict[str, Any]:
    """The prompt and inputs of a preset's example; files that do not exist are left out."""
    found, _ = build_parser().parse_known_args(shlex.split(" ".join(task_spec(task).example)))
    given = {name: value for name, value in vars(found).items() if value is not None}
    values: dict[str, Any] = {"prompt": given["prompt"].removeprefix(task_spec(task).prompt_prefix)}  # added later
    for name in filter(given.__contains__, INPUTS):
        entries = convert_entries(BY_NAME[name], given[name]) if BY_NAME[name].several else [given[name]]
        paths = [ASSETS / Path(entry).name for entry in entries]
        values[name] = [path for path in paths if path.is_file()]
    return values
