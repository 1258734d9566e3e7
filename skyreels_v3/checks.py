"""From flags to a request: every check that needs nothing but the flags themselves."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyreels_v3.errors import UserError, format_value, redact_url
from skyreels_v3.request import (
    ALIKE,
    BY_NAME,
    EXCLUSIVE,
    MAX_SEED,
    SHORTHANDS,
    GenerationRequest,
    Lora,
)
from skyreels_v3.tasks import REFERENCE_SLOTS, SIZE_MULTIPLE, TASK_NAMES, TaskSpec, task_spec

MAX_SPEAKERS = 2
KEYFRAME = re.compile(r".+@\d{1,4}(\.\d{1,6})?", re.DOTALL)
PARTIAL = ":partial"
SAME_PROMPT = "same"
MAX_PIXELS = 1920 * 1088
MIN_CACHED_STEPS = 12  # with fewer, neighbouring steps differ too much
CACHE_THRESHOLD = 0.1  # of fbcache; a common choice for HunyuanVideo


def request_of(values: Mapping[str, Any]) -> GenerationRequest:
    """The request that flags make, checked; raises UserError for the first thing that is wrong."""
    values = dict(values)
    if "task_type" not in values:
        raise UserError("--task_type", f"missing; choose one of {', '.join(TASK_NAMES)}")
    spec = task_spec(values.pop("task_type"))
    notes = drop_unused(spec, values) if spec.lenient else []
    check_conflicts(spec, values)
    check_values(spec, values)
    return make_request(spec, values, notes)


def drop_unused(spec: TaskSpec, values: dict[str, Any]) -> list[str]:
    """Take out what V1's own command accepts and does nothing with; returns notes on it. For V3 it is an error."""
    notes = []
    if "image" in values and not BY_NAME["image"].is_for(spec):
        notes.append(f"--image is not used: {spec.name} takes none; --task_type i2v begins with a picture")
        del values["image"]
    if "negative_prompt" in values and values.get("guidance_scale", spec.guidance_scale) <= 1.0:
        notes.append("--negative_prompt is not used: it needs --guidance_scale above 1")
        del values["negative_prompt"]
    if values.get("parameters_level") and not values.get("offload"):
        notes.append("--parameters_level is not used: it needs --offload")
        del values["parameters_level"]
    assert spec.size is not None
    sides = dict(zip(("height", "width"), spec.size, strict=True))
    if len(missing := sides.keys() - values.keys()) == 1:
        (side,) = missing
        notes.append(f"--{side} is not given: it is {sides[side]}")
        values[side] = sides[side]
    return notes


def describe_value(value: Any) -> str:
    """A value for a one-line message."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    try:
        text = str(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "an endless number"
    return format_value(text) if text.strip() else "an empty value"


def joined(value: Any) -> Any:
    """A flag's value, entries as one text."""
    return ", ".join(value) if isinstance(value, list) else value


def check_conflicts(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Flags that the task needs, does not take, or that contradict each other."""
    for name in values:
        if values[name] is not False and not BY_NAME[name].is_for(spec):
            value = "" if values[name] is True else f"{describe_value(joined(values[name]))}: "
            instead = (f"give --{other} instead" for other in counterparts(spec, name) if other not in values)
            raise UserError(f"--{name}", f"{value}{spec.name} does not take it; {next(instead, 'leave it out')}")
    for name in spec.inputs:
        if name == "input_image" and "input_video" in values:  # an existing video is dubbed
            continue
        if name not in values:
            raise UserError(f"--{name}", f"missing; {spec.name} needs {BY_NAME[name].help}")
    for one, other in EXCLUSIVE:
        if values.get(one, False) is not False and values.get(other, False) is not False:
            value = "" if values[one] is True else f"{joined(values[one])} "
            raise UserError(f"--{one}", f"{value}conflicts with --{other}; give one of them")
    for name in values:
        if BY_NAME[name].usp and values[name] is not False and not values.get("use_usp"):
            value = "" if values[name] is True else f"{values[name]}: "
            raise UserError(f"--{name}", f"{value}is for several processes; add --use_usp, and start with torchrun")
    for one, other in (("height", "width"), ("width", "height")):
        if one in values and other not in values:
            raise UserError(f"--{one}", f"{values[one]} alone is no size; give --{other} as well")
    text_scale = "guidance_scale" if "guidance_scale" in spec.takes else "text_guidance_scale"
    guided = values.get(text_scale, spec.guidance_scale) > 1.0
    for name in ("image_guidance_scale", "negative_prompt"):
        if values.get(name, "") not in ("", 1.0) and not guided:
            reason = f"{format_value(values[name])} has no effect without text guidance"
            raise UserError(f"--{name}", f"{reason}; give --{text_scale} above 1 as well")


def counterparts(spec: TaskSpec, name: str) -> Iterator[str]:
    """The flags by which the task takes what another one takes by the flag of that name."""
    return (
        other for alike in ALIKE if name in alike for other in alike if other != name and BY_NAME[other].is_for(spec)
    )


def check_values(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Values that are wrong for the task or impossible."""
    if not values.get("prompt", "").strip():
        raise UserError("--prompt", "missing or empty; say what happens in the video")
    duration = values.get("duration", spec.default_duration)
    if "window_prompt" in values and not values["window_prompt"].strip():
        raise UserError(
            "--window_prompt", "an empty value; say what happens, give 'same' for --prompt, or leave it out"
        )
    if not spec.min_duration <= duration <= spec.max_duration:
        limits = f"{spec.min_duration} to {spec.max_duration}"
        raise UserError(
            "--duration", f"{describe_value(duration)} is out of range; {spec.name} takes {limits} whole seconds"
        )
    if values.get("num_frames", 1) % 4 != 1 and not spec.lenient:
        frames = values["num_frames"] // 4 * 4 + 1
        raise UserError("--num_frames", f"{values['num_frames']} is not 4k+1; give {frames} or {frames + 4}")
    if values.get("num_frames", 1) > (most := spec.max_duration * spec.fps + 1):
        raise UserError(
            "--num_frames", f"{values['num_frames']} is out of range; {spec.name} makes up to {most} frames"
        )
    if values.get("cache"):
        parse_cache(values["cache"])
        steps = values.get("num_inference_steps", spec.num_inference_steps)
        if steps < MIN_CACHED_STEPS:
            way_out = f"give --num_inference_steps {MIN_CACHED_STEPS} or more, or leave it out"
            raise UserError("--cache", f"fbcache: {steps} steps are too few to skip any; {way_out}")
    check_size(values)
    check_references(values)
    check_memory(values)
    check_speakers(values)
    check_outputs(values)


def check_size(values: Mapping[str, Any]) -> None:
    for name in ("height", "width"):
        side = values.get(name, SIZE_MULTIPLE)
        if side % SIZE_MULTIPLE:
            below = side // SIZE_MULTIPLE * SIZE_MULTIPLE
            near = f"{below} or {below + SIZE_MULTIPLE}"
            raise UserError(f"--{name}", f"{side} is not a multiple of {SIZE_MULTIPLE}; give {near}")
    if (pixels := values.get("height", 0) * values.get("width", 0)) > MAX_PIXELS:
        size = f"{values['width']} x {values['height']}"
        raise UserError("--height", f"{size} is {pixels:,} pixels; give a size of at most {MAX_PIXELS:,}")


def check_references(values: Mapping[str, Any]) -> None:
    if "ref_imgs" not in values:
        return
    references = values["ref_imgs"]
    if not (1 <= len(references) <= REFERENCE_SLOTS and all(references)):
        reason = (
            f"{describe_value(', '.join(references))}: {len(references)} entries"
            if any(references)
            else "an empty value"
        )
        raise UserError("--ref_imgs", f"{reason}; give 1 to {REFERENCE_SLOTS} images, comma-separated, none empty")


def check_memory(values: Mapping[str, Any]) -> None:
    """Flags that belong to streaming and to quantised weights, and the LoRAs' form."""
    if values.get("parameters_level") and not values.get("offload"):
        raise UserError("--parameters_level", "says how to offload; add --offload, or give --memory stream alone")
    streamed = values.get("low_vram") or values.get("parameters_level") or values.get("memory") == "stream"
    if "stream_blocks" in values and not streamed:
        reason = f"{values['stream_blocks']} blocks can only stay if the others are streamed"
        raise UserError("--stream_blocks", f"{reason}; add --memory stream or --low_vram")
    if values.get("shard_weights") and values.get("memory") == "stream":
        raise UserError(
            "--shard_weights", "conflicts with --memory stream: divided weights are not streamed; leave one of them out"
        )
    if values.get("shard_weights") and "save_quantized" in values:
        raise UserError(
            "--shard_weights",
            "conflicts with --save_quantized: no process has all the weights; save them in a run of its own",
        )
    if "save_quantized" in values and not (values.get("low_vram") or "quant" in values):
        reason = f"{describe_value(values['save_quantized'])}: nothing is quantized"
        raise UserError("--save_quantized", f"{reason}; add --quant fp8 or --low_vram")
    parse_loras(values)


def parse_cache(text: str) -> float:
    """The threshold of --cache, fbcache[:THRESHOLD]."""
    method, colon, end = text.partition(":")
    try:
        threshold = float(end) if colon else CACHE_THRESHOLD
    except ValueError:
        threshold = math.nan
    if method != "fbcache" or not 0 <= threshold < math.inf:
        raise UserError(
            "--cache",
            f"{describe_value(text)}: choose fbcache, with a threshold after a colon if need be, such as fbcache:0.1",
        )
    return threshold


def parse_loras(values: Mapping[str, Any]) -> tuple[Lora, ...]:
    """--lora as sources, scales and whether a part will do."""
    loras = []
    for entry in values.get("lora", ()):
        lora = parse_lora(entry)
        if not lora.source.strip() or not math.isfinite(lora.scale):
            raise UserError(
                "--lora", f"{describe_value(entry)}: give FILE, FOLDER or OWNER/NAME, and its scale after a colon"
            )
        loras.append(lora)
    return tuple(loras)


def parse_lora(entry: str) -> Lora:
    """SOURCE[:SCALE][:partial]; a scale is what follows the last colon, if it is a number."""
    rest = entry.removesuffix(PARTIAL)
    name, colon, end = rest.rpartition(":")
    try:
        scale = float(end) if colon and name else None
    except ValueError:
        scale = None
    return Lora(rest, 1.0, rest != entry) if scale is None else Lora(name, scale, rest != entry)


def check_speakers(values: Mapping[str, Any]) -> None:
    """One or two sounds; where two people are and how they take turns only if there are two."""
    sounds = values.get("input_audio", ["one"])
    if not 1 <= len(sounds) <= MAX_SPEAKERS or not all(sounds):
        reason = f"{describe_value(', '.join(sounds))}: {len(sounds)} sounds, or an empty one"
        raise UserError("--input_audio", f"{reason}; give one, or two for two speakers, comma-separated")
    for name in ("audio_type", "speaker_boxes"):
        if name in values and len(sounds) != MAX_SPEAKERS:
            raise UserError(
                f"--{name}", f"{describe_value(values[name])}: is for two speakers; give two sounds, or leave it out"
            )
    if "input_audio" in values and len(sounds) == MAX_SPEAKERS and "input_video" in values:
        raise UserError("--input_video", "a video can be dubbed with one speaker only; give one --input_audio")
    parse_boxes(values)
    parse_keyframes(values)
    if values.get("resume") and values.get("seed") == -1 and values.get("video_num", 1) > 1:
        raise UserError(
            "--resume", "the seeds of the interrupted run cannot be drawn again; give its first one as --seed"
        )


def parse_boxes(values: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """--speaker_boxes as numbers."""
    text = values.get("speaker_boxes")
    if text is None:
        return ()
    boxes = [box.split(",") for box in text.split(";")]
    if len(boxes) != MAX_SPEAKERS or not all(
        len(box) == 4 and all(re.fullmatch(r" *\d{1,6} *", n) for n in box) for box in boxes
    ):
        raise UserError(
            "--speaker_boxes", f"{describe_value(text)}: give two boxes as x0,y0,x1,y1;x0,y0,x1,y1 in pixels"
        )
    numbers = tuple(tuple(int(number) for number in box) for box in boxes)
    for x0, y0, x1, y1 in numbers:
        if x0 >= x1 or y0 >= y1:
            raise UserError("--speaker_boxes", f"{x0},{y0},{x1},{y1} is empty; give x0 < x1 and y0 < y1")
    return numbers


def parse_keyframes(values: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """--keyframes as images and seconds."""
    found = []
    for entry in values.get("keyframes", ()):
        image, _, seconds = entry.rpartition("@")
        if not KEYFRAME.fullmatch(entry):
            raise UserError(
                "--keyframes", f"{describe_value(entry)}: give an image and its time in seconds, such as a.png@2.5"
            )
        found.append((image, float(seconds)))
    return tuple(found)


def check_outputs(values: Mapping[str, Any]) -> None:
    check_several(values)
    output = values.get("output", "video.mp4")
    if not output.endswith("/") and Path(output).suffix != ".mp4":
        raise UserError(
            "--output", f"{describe_value(output)}: give a name ending in .mp4, or in / for a folder of PNG frames"
        )
    latents = Path(values.get("save_latents", "latents.safetensors"))
    if latents.suffix != ".safetensors":
        raise UserError(
            "--save_latents", f"{describe_value(values['save_latents'])}: give a name ending in .safetensors"
        )
    if not output.endswith("/") and Path(output) in latents.parents:
        raise UserError(
            "--save_latents", f"{format_value(latents)} would be inside the file that --output names; give another path"
        )


def check_several(values: Mapping[str, Any]) -> None:
    """Raise UserError for what cannot be with several videos, and for a folder of results that is none."""
    if values.get("video_num", 1) > 1:
        for name in ("output", "save_latents", "save_quantized"):
            if name in values:
                reason = f"{describe_value(values[name])}: is for one video, --video_num makes {values['video_num']}"
                raise UserError(f"--{name}", f"{reason}; give --outdir, or leave it out")
        if values.get("seed", 0) > (last := MAX_SEED - values["video_num"] + 1):
            reason = f"{values['seed']}: --video_num {values['video_num']} goes beyond the largest seed"
            raise UserError("--seed", f"{reason}, {MAX_SEED}; give at most {last}")
    outdir = values.get("outdir", "some")
    if not outdir.strip() or "\0" in outdir:
        raise UserError("--outdir", f"{describe_value(outdir)} is not a folder name; give one")


def make_request(spec: TaskSpec, values: Mapping[str, Any], notes: Sequence[str]) -> GenerationRequest:
    """A request from checked values, the preset's where none was given."""
    given = written_out(values)
    drawn = values.get("seed") == -1
    seed = secrets.randbelow(MAX_SEED - values.get("video_num", 1) + 2)  # the last video has a seed, too
    given["seed"] = seed if drawn else values.get("seed", 42)
    values, changes = as_trained(spec, {**presets(spec, given), **given})
    recorded = {"task_type": spec.name} | {
        name: without_secrets(name, values[name]) for name in values if is_recorded(spec, name, values)
    }
    if values.get("window_prompt") == SAME_PROMPT:
        values["window_prompt"] = values["prompt"]
    if "num_frames" in values:
        del recorded["duration"]
    if "fps" in values:
        spec = replace(spec, fps=values["fps"])
    values |= {name: tuple(values.get(name, ())) for name in ("ref_imgs", "input_audio")}
    values |= {"speaker_boxes": parse_boxes(values), "keyframes": parse_keyframes(values), "lora": parse_loras(values)}
    values["cache"] = parse_cache(values["cache"]) if values.get("cache") else None
    values["frame_folder"] = values.get("output", "").endswith("/")
    for name in ("output", "save_latents", "save_quantized"):
        if name in values:
            values[name] = Path(os.path.expanduser(values[name]))
    values = {name: value for name, value in values.items() if name not in ("gpu_num", "fps")}
    return GenerationRequest(task=spec, flags=recorded, notes=(*notes, *changes), seed_drawn=drawn, **values)


def without_secrets(name: str, value: Any) -> Any:
    """A flag's value as it is recorded: addresses of inputs without user, password and query."""
    if BY_NAME[name].path != "input":
        return value
    safe = []
    for entry in value.split(",") if isinstance(value, str) else value:
        source, *time = entry.rsplit("@", 1) if name == "keyframes" else [entry]
        safe.append("@".join([redact_url(source), *time]))
    return ",".join(safe) if isinstance(value, str) else safe


def is_recorded(spec: TaskSpec, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a value is needed to make the same video again, and can be given for the task."""
    return BY_NAME[name].recorded and values[name] is not None and BY_NAME[name].is_for(spec)


def written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without shorthands, and with what those stand for."""
    full = {name: value for name, value in values.items() if name not in SHORTHANDS}
    if values.get("offload") or values.get("low_vram"):
        full["memory"] = "stream" if values.get("low_vram") or values.get("parameters_level") else "offload"
    if values.get("low_vram"):
        full.setdefault("quant", "fp8")
    if values.get("compiler_transformer"):
        full["compile"] = True
    return full


def presets(spec: TaskSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's preset says for a request of these values."""
    made: dict[str, Any] = {
        "model_id": spec.model_id,
        "resolution": spec.resolution,
        "num_inference_steps": spec.num_inference_steps,
        "shift": spec.shift,
    }
    if spec.default_duration:
        made["duration"] = spec.default_duration
    if spec.window_prompt:
        made["window_prompt"] = spec.window_prompt
    if spec.guidance_scale != 1.0:
        made["guidance_scale"] = spec.guidance_scale
    guided = max(values.get("text_guidance_scale", 1.0), values.get("guidance_scale", spec.guidance_scale)) > 1.0
    if spec.negative_prompt and guided:
        made["negative_prompt"] = spec.negative_prompt
    if spec.size is not None and not spec.inputs and "height" not in values:
        made["height"], made["width"] = spec.size
    return made


def as_trained(spec: TaskSpec, values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values in the form that V1's models were trained with, and notes of what was changed.

    The prompt begins with certain words, and the number of frames is 4k+1.
    """
    made, notes = dict(values), []
    if not made["prompt"].lstrip().startswith(spec.prompt_prefix.strip()):
        made["prompt"] = spec.prompt_prefix + made["prompt"]
        notes.append(f'--prompt now begins with "{spec.prompt_prefix.strip()}", as in training')
    if (frames := made.get("num_frames", 1)) % 4 != 1:
        made["num_frames"] = max(1, (frames - 1) // 4 * 4 + 1)
        notes.append(f"--num_frames {frames} becomes {made['num_frames']}: the VAE makes 4k+1 frames")
    return made, tuple(notes)
