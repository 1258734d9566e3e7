"""The nodes. Their inputs are made from the table of flags; only what the user has changed goes to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import folder_paths
from comfy_api.latest import io

from skyreels_v3 import forms
from skyreels_v3.forms import SLOTS, UNSET, explain, label_of
from skyreels_v3.media.files import run_folder
from skyreels_v3.request import BY_NAME, COMMAND_ONLY, FLAGS, INPUTS, SHORTHANDS, SUBSTITUTES, Flag
from skyreels_v3.tasks import SIZE_MULTIPLE, TASK_NAMES, TINY, TaskSpec, task_spec

from . import media

Model, Options = io.Custom("SKYREELS_MODEL"), io.Custom("SKYREELS_OPTIONS")  # both carry flags
FOLDER = "skyreels"  # of checkpoints, in ComfyUI's folder of models
FILES = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}  # ComfyUI's folders
LOADER = ("memory", "quant", "attention")
COMMON = (
    *("resolution", "width", "height", "duration", "num_frames", "num_inference_steps", "seed"),
    *("transition", "include_input", "text", "voice", "audio_type", "speaker_boxes", "color_correction_strength"),
)  # on the nodes of tasks, besides prompt and inputs
# on no node: the device is ComfyUI's, and inputs are connected
LEFT_OUT = ("task_type", "device", "url_timeout", *SHORTHANDS, *COMMAND_ONLY)
SOCKETS = [name for name in INPUTS if BY_NAME[name].in_request]
OPTIONS = [
    flag
    for flag in FLAGS
    if flag.in_line and flag.name not in (*LEFT_OUT, *LOADER, *COMMON, *SOCKETS, *FILES, "model_id", "lora", "prompt")
]
KEYFRAMES, CLIP, SPEECH = "keyframes", "input_video", "input_audio"


def widget(flag: Flag, initial: Mapping[str, Any], task: TaskSpec | None = None) -> io.Input:
    """The widget of a flag that does not take a file."""
    value = forms.shown_value(flag, initial[flag.name])
    options: dict[str, Any] = {"id": flag.name, "default": value, "optional": True}
    options |= {"display_name": label_of(flag.name), "tooltip": explain(flag)}
    if flag.kind is bool:
        return io.Boolean.Input(**options)
    if flag.choices:
        return io.Combo.Input(**options, options=[*([UNSET] if value == UNSET else []), *flag.choices])
    if flag.kind is str:
        return io.String.Input(**options, multiline=flag.name.endswith(("prompt", "text")))
    low, high = forms.limits_of(flag, task)
    options |= {"min": min(low, value), "max": high}
    if initial[flag.name] == "" or value < low:
        options["tooltip"] += "; 0: not set"
    if flag.kind is float:
        return io.Float.Input(**options, step=0.01)
    step = SIZE_MULTIPLE if flag.name in ("width", "height") else 1
    return io.Int.Input(**options, step=step, control_after_generate=flag.name == "seed" or None)


def sockets(flag: Flag, required: bool, task: TaskSpec) -> Iterator[io.Input]:
    """The sockets of a flag that takes files."""
    options: dict[str, Any] = {"tooltip": explain(flag), "display_name": label_of(flag.name)}
    if flag.name == CLIP:
        yield io.MultiType.Input(CLIP, [io.Video, io.Image], optional=not required, **options)
        tooltip = "frames per second of a clip given as images"
        yield io.Float.Input("clip_fps", default=task.fps, min=1, max=240, optional=True, tooltip=tooltip)
        return
    kind = io.Audio if flag.name == SPEECH else io.Image
    if flag.name not in SLOTS:
        yield kind.Input(flag.name, optional=not required, **options)
    for number in range(1, SLOTS.get(flag.name, 0) + 1):
        options["display_name"] = f"{label_of(flag.name)} {number}"
        yield kind.Input(f"{flag.name}_{number}", optional=not required or number > 1, **options)
    if flag.name == KEYFRAMES:
        yield io.String.Input("keyframe_times", default="", optional=True, tooltip="seconds, one for each: 2, 4.5")


def files_in(kind: str) -> list[str]:
    """The files in one of ComfyUI's folders of models, including GGUF."""
    gguf = [path.name for folder in folder_paths.get_folder_paths(kind) for path in sorted(Path(folder).glob("*.gguf"))]
    return [*folder_paths.get_filename_list(kind), *gguf]


def checkpoints() -> dict[str, str]:
    """The checkpoint folders in ComfyUI's folders of models, by name."""
    parents = [Path(parent) for kind in (FOLDER, "diffusers") for parent in folder_paths.get_folder_paths(kind)]
    found = [path for parent in parents if parent.is_dir() for path in sorted(parent.iterdir()) if path.is_dir()]
    return {path.name: str(path) for path in found}


class Node(io.ComfyNode):
    """The base of all nodes."""

    @classmethod
    def schema(cls, title: str, description: str, inputs: list[io.Input], *outputs: io.Output) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__, display_name=f"SkyReels {title}", category="SkyReels", description=description,
            inputs=inputs, outputs=[*outputs],
        )  # fmt: skip


class SkyReelsLoadModel(Node):
    """Selects the model that tasks use; it is loaded when the first task runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = [UNSET, TINY, *dict.fromkeys(task_spec(name).model_id for name in TASK_NAMES), *checkpoints()]
        known = f"default: the task's own, which is downloaded; tiny: the built-in one; or a folder in models/{FOLDER}"
        inputs: list[io.Input] = [
            io.Combo.Input("model_id", models, default=UNSET, display_name=label_of("model_id"), tooltip=known),
            io.String.Input("other_model", default="", optional=True, tooltip="another hub id, or a folder's path"),
        ]
        for name, kind in FILES.items():
            options = {"display_name": label_of(name), "tooltip": f"{explain(BY_NAME[name])}, in models/{kind}"}
            inputs.append(io.Combo.Input(name, [UNSET, *files_in(kind)], default=UNSET, optional=True, **options))
        inputs += [widget(BY_NAME[name], forms.common_values()) for name in LOADER]
        description = "The model for the tasks: its files, where it is kept in memory, and the attention kernel."
        return cls.schema("Load Model", description, inputs, Model.Output(display_name="model"))

    @classmethod
    def execute(cls, model_id: str, other_model: str = "", **values: Any) -> io.NodeOutput:
        chosen = {name: values.pop(name) for name in FILES if name in values}
        flags = forms.changed_values(values, forms.common_values())
        if model_id != UNSET or other_model.strip():
            flags["model_id"] = other_model.strip() or checkpoints().get(model_id, model_id)
        paths = {name: folder_paths.get_full_path(FILES[name], file) for name, file in chosen.items() if file != UNSET}
        return io.NodeOutput({**flags, **paths})


class SkyReelsLoRA(Node):
    """Adds a LoRA to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        partial = "skip entries that the model has no weights for, instead of rejecting the file"
        inputs: list[io.Input] = [
            Model.Input("model"),
            io.Combo.Input("lora", files_in("loras"), display_name="LoRA", tooltip="a file in models/loras"),
            io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="its scale"),
            io.Boolean.Input("partial", default=False, optional=True, tooltip=partial),
        ]
        description = "Adds a LoRA to a model. For several, chain the nodes."
        return cls.schema("LoRA", description, inputs, Model.Output(display_name="model"))

    @classmethod
    def execute(cls, model: Mapping[str, Any], lora: str, strength: float, partial: bool = False) -> io.NodeOutput:
        entry = f"{folder_paths.get_full_path('loras', lora)}:{strength}{':partial' * partial}"
        return io.NodeOutput({**model, "lora": [*model.get("lora", ()), entry]})


class SkyReelsOptions(Node):
    """The flags that are rarely changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        description = "Rarely changed settings. A task rejects a changed one that it does not take."
        inputs = [widget(flag, forms.common_values()) for flag in OPTIONS]
        return cls.schema("Options", description, inputs, Options.Output(display_name="options"))

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(forms.changed_values(values, forms.common_values()))


class Task(Node):
    """The base of the tasks' nodes."""

    TASK = ""

    @classmethod
    def define_schema(cls) -> io.Schema:
        task, initial = task_spec(cls.TASK), forms.initial_values(cls.TASK, {})
        flags = [flag for flag in FLAGS if flag.is_for(task)]
        inputs: list[io.Input] = [Model.Input("model")]
        inputs.append(io.String.Input("prompt", multiline=True, tooltip=explain(BY_NAME["prompt"])))
        for flag in flags:
            if flag.name in SOCKETS:
                inputs += sockets(flag, flag.name in task.inputs and flag.name not in SUBSTITUTES, task)
        inputs += [widget(BY_NAME[name], initial, task) for name in COMMON if BY_NAME[name] in flags]
        inputs.append(Options.Input("options", optional=True, tooltip="from SkyReels Options"))
        outputs = io.Image.Output(display_name="images"), io.Video.Output(display_name="video")
        description = f"{task.summary[0].upper()}{task.summary[1:]}."
        return cls.schema(forms.title_of(cls.TASK), description, inputs, *outputs)

    @classmethod
    def execute(cls, model: Mapping[str, Any], prompt: str, **values: Any) -> io.NodeOutput:
        from .engine import make  # imports the whole engine, so only now

        shown = {name: values[name] for name in COMMON if name in values}
        flags = {**model, **(values.get("options") or {}), "task_type": cls.TASK, "prompt": prompt}
        flags |= forms.changed_values(shown, forms.initial_values(cls.TASK, {}))
        clip_sound: media.Audio | None = None
        with run_folder() as folder:
            for name in sorted(values):  # numbered ones in their order
                flag = flag_of(name)
                if flag not in SOCKETS or (value := values[name]) is None:
                    continue
                if flag == CLIP:
                    fps = values.get("clip_fps", task_spec(cls.TASK).fps)
                    flags[flag], clip_sound = media.write_clip(value, fps, folder)
                elif flag == SPEECH:
                    flags[flag] = [*flags.get(flag, ()), media.write_sound(value, folder / f"{name}.au")]
                else:
                    paths = media.write_images(value, folder, name)
                    if flag == KEYFRAMES:
                        paths = with_times(paths, values.get("keyframe_times", ""))
                    flags[flag] = [*flags.get(flag, ()), *paths] if BY_NAME[flag].several else paths[0]
            frames, done = make(**flags)
        images = media.to_images(frames)
        return io.NodeOutput(images, media.to_video(images, done, clip_sound if flags.get("include_input") else None))


def flag_of(input: str) -> str:
    """The flag of an input, whose name ends in a number if the flag takes several files."""
    return input if input in BY_NAME else input.rpartition("_")[0]


def with_times(paths: list[str], times: str) -> list[str]:
    """Keyframes as entries of their flag, PATH@SECONDS."""
    seconds = times.replace(",", " ").split()
    if len(seconds) != len(paths):
        raise RuntimeError(f"keyframe_times: {len(seconds)} for {len(paths)} keyframes; give one time for each")
    return [f"{path}@{time}" for path, time in zip(paths, seconds, strict=True)]


def task_node(task: str) -> type[Task]:
    """The node of a task, such as SkyReelsTextToVideo."""
    name = "SkyReels" + forms.title_of(task).title().replace(" ", "")
    return cast(type[Task], type(name, (Task,), {"TASK": task, "__doc__": task_spec(task).summary}))


TASKS = [task_node(name) for name in TASK_NAMES]
NODES: list[type[io.ComfyNode]] = [SkyReelsLoadModel, SkyReelsLoRA, SkyReelsOptions, *TASKS]
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
