"""Turn flags into a request, with every check that needs only the flags themselves."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from skyreels_v3.errors import UserError, counted, format_value, redact_url
from skyreels_v3.prompts import model_prompt
from skyreels_v3.request import (
    ALIKE,
    BY_NAME,
    DEFAULT_ENHANCER,
    ENHANCER_KEY,
    ENHANCER_LOCAL,
    ENHANCER_OFF,
    EXCLUSIVE,
    IN_PROMPT,
    MAX_SEED,
    ON,
    OUTPUTS,
    REQUIRED,
    SAME_PROMPT,
    SHORTHANDS,
    SUBSTITUTES,
    GenerationRequest,
    Lora,
    check_pixels,
)
from skyreels_v3.tasks import REFERENCE_SLOTS, SIZE_MULTIPLE, TASK_NAMES, TINY, TaskSpec, complete_size, task_spec

MAX_SPEAKERS = 2
KEYFRAME = re.compile(r".+@\d{1,4}(\.\d{1,6})?", re.DOTALL)
REFERENCE = re.compile(r"\{prev\}|\{job:([^{}]*)\}")  # in a line of --jobs: another line's video
BOX = re.compile(r" *\d{1,6} *(, *\d{1,6} *){3}")
VOICE = re.compile(r"[A-Za-z]\w{0,30}([+-]\w{1,30})?", re.ASCII)
AUTO = "auto"  # as --speaker_boxes
PARTIAL = ":partial"
MIN_CACHED_STEPS = 12  # with fewer, neighboring steps differ too much
CACHE_THRESHOLD = 0.1  # default of fbcache; a common choice for HunyuanVideo


def request_of(values: Mapping[str, Any]) -> GenerationRequest:
    """Check flags and make a request of them; raises UserError for the first problem."""
    values = dict(values)
    if "task_type" not in values:
        raise UserError("--task_type", f"missing; choose one of {', '.join(TASK_NAMES)}")
    spec = task_spec(values.pop("task_type"))
    notes = drop_unused(spec, values) if spec.lenient else []
    check_flags(spec, values)
    check_values(spec, values)
    return make_request(spec, values, notes)


def drop_unused(spec: TaskSpec, values: dict[str, Any]) -> list[str]:
    """Remove flags that V1's own script accepts but ignores (errors for V3), complete the size; returns notes."""
    unused = {
        "image": ("image" in spec.takes, f"{spec.name} takes no image; --task_type i2v starts from one"),
        "negative_prompt": (is_guided(spec, values), "it needs --guidance_scale above 1"),
        "parameters_level": (values.get("offload"), "it needs --offload"),
    }
    notes = [f"--{name} is not used: {why}" for name, (used, why) in unused.items() if values.get(name) and not used]
    for name, (used, _) in unused.items():
        if not used:
            values.pop(name, None)
    missing = {"height", "width"} - values.keys()
    if len(missing) == 1 and not spec.inputs:  # otherwise the input decides the aspect ratio
        (side,), shape = missing, default_size(spec, values)
        assert shape is not None
        sides = complete_size(values.get("height"), values.get("width"), shape)
        values["height"], values["width"] = sides
        notes.append(
            f"--{side} is not given: using {values[side]}, for the aspect ratio of the default, {shape[1]} x {shape[0]}"
        )
    return notes


def default_size(spec: TaskSpec, values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Default height and width; None if the size depends on an input."""
    if values.get("model_id") == TINY and "resolution" not in values:
        return spec.tiny_size
    return None if spec.inputs else spec.size


def is_guided(spec: TaskSpec, values: Mapping[str, Any]) -> bool:
    """Whether text guidance is on."""
    return max(values.get("text_guidance_scale", 1.0), values.get("guidance_scale", spec.guidance_scale)) > 1.0


def describe_value(value: Any) -> str:
    """Describe a value of any YAML type in a one-line message."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or isinstance(value, bool):
        return "an empty value" if value is None else str(value).lower()
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return format_value(text) if text.strip() else "an empty value"


def refuse(values: Mapping[str, Any], name: str, problem: str) -> NoReturn:
    """Raise UserError about a flag, with its value and `problem`, which includes the remedy."""
    value = values[name]
    shown = "" if value is True else f"{describe_value(', '.join(value) if isinstance(value, list) else value)}: "
    raise UserError(f"--{name}", f"{shown}{problem}")


def is_set(values: Mapping[str, Any], name: str) -> bool:
    """Whether a flag is given; a switch turned off in a config file does not count."""
    return values.get(name, False) is not False


def check_flags(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Raise UserError for missing or unsupported flags of the task, conflicts, and flags that need others."""
    for name in filter(lambda name: is_set(values, name), values):
        if not BY_NAME[name].is_for(spec):
            alike = next((group for group in ALIKE if name in group), ())
            instead = (other for other in alike if BY_NAME[other].is_for(spec) and other not in values)
            remedy = next((f"give --{other} instead" for other in instead), "leave it out")
            refuse(values, name, f"{spec.name} does not take it; {remedy}")
        if BY_NAME[name].usp and not values.get("use_usp"):
            refuse(values, name, "is for several processes; add --use_usp, and start with torchrun")
        if name == "concat":
            refuse(values, name, "joins the videos of a jobs file; give one as --jobs")
        if BY_NAME[name].server:
            command = "mcp" if name == "files" else "serve"
            raise UserError(f"--{name}", f"is for a server; add --{command}")  # without the value, which may be a key
    for name in spec.inputs:
        if name not in values and SUBSTITUTES.get(name) not in values:
            raise UserError(f"--{name}", f"missing; {spec.name} needs {BY_NAME[name].help}")
    for one, other in EXCLUSIVE:
        if is_set(values, one) and is_set(values, other):
            refuse(values, one, f"conflicts with --{other}; give one of them")
    full = written_out(values)
    for name, needed, problem in REQUIRED:
        if is_set(values, name) and not any(other in full and value in (None, full[other]) for other, value in needed):
            refuse(values, name, problem)
    if full.get("shard_weights"):
        for name, value, reason in (
            ("memory", "stream", "sharded weights cannot be streamed; leave one of the two out"),
            (
                "save_quantized",
                full.get("save_quantized"),
                "no process has all the weights; save them in a separate run",
            ),
        ):
            if name in full and full[name] == value:
                raise UserError("--shard_weights", f"conflicts with --{name}: {reason}")
    text_scale = "guidance_scale" if "guidance_scale" in spec.takes else "text_guidance_scale"
    for name in ("image_guidance_scale", "negative_prompt"):
        if values.get(name, "") not in ("", 1.0) and not is_guided(spec, values):
            refuse(values, name, f"has no effect without text guidance; give --{text_scale} above 1 as well")


def check_values(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Raise UserError for values that this task, or any task, does not allow."""
    if not values.get("prompt", "").strip():
        raise UserError("--prompt", "missing or empty; say what happens in the video")
    if "window_prompt" in values and not values["window_prompt"].strip():
        refuse(values, "window_prompt", "say what happens, give 'same' for --prompt, or leave it out")
    if not spec.min_duration <= values.get("duration", spec.default_duration) <= spec.max_duration:
        limits = f"{spec.min_duration} to {spec.max_duration}"
        refuse(values, "duration", f"out of range; {spec.name} takes {limits} whole seconds")
    frames, most = values.get("num_frames", 1), spec.max_duration * spec.fps + 1
    if frames % 4 != 1 and not spec.lenient:
        refuse(values, "num_frames", f"not 4k+1; give {frames // 4 * 4 + 1} or {frames // 4 * 4 + 5}")
    if frames > most:
        refuse(values, "num_frames", f"out of range; {spec.name} makes up to {most} frames")
    if values.get("duration", 0) * (fps := values.get("fps", spec.fps)) + 1 > most:
        refuse(values, "duration", f"too long at --fps {fps}; {spec.name} makes up to {most} frames")
    if values.get("cache"):
        parse_cache(values["cache"])
        steps = values.get("num_inference_steps", spec.num_inference_steps)
        if steps < MIN_CACHED_STEPS:
            way_out = f"give --num_inference_steps {MIN_CACHED_STEPS} or more, or leave it out"
            refuse(values, "cache", f"{counted(steps, 'step is', 'steps are')} too few to skip any; {way_out}")
    check_enhancer(values)
    check_size(spec, values)
    check_inputs(values)
    check_outputs(values)
    parse_loras(values)


def check_enhancer(values: Mapping[str, Any]) -> None:
    """Check --enhance_prompt and --enhancer_model."""
    way, model = values.get("enhance_prompt", ENHANCER_OFF), values.get("enhancer_model")
    if way == ENHANCER_OFF:
        if model is not None:
            refuse(values, "enhancer_model", "has no effect without --enhance_prompt; add that, with local or a URL")
        return
    if way != ENHANCER_LOCAL:
        check_endpoint(values)
        if model is None:
            raise UserError("--enhancer_model", "missing; give the model's name at the URL of --enhance_prompt")
    if model is not None and not model.strip():
        refuse(values, "enhancer_model", "give a hub id or a folder, or the name of a model at the URL")


def check_endpoint(values: Mapping[str, Any]) -> None:
    """Check the URL of --enhance_prompt and the API key in the environment."""
    choices = f"choose {ENHANCER_OFF}, {ENHANCER_LOCAL} or an address such as http://127.0.0.1:8080/v1"
    try:
        parts = urlsplit(values["enhance_prompt"])
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    if not complete or not values["enhance_prompt"].isprintable() or " " in values["enhance_prompt"]:
        refuse(values, "enhance_prompt", choices)
    if parts.query or parts.fragment or "@" in parts.netloc:
        refuse(values, "enhance_prompt", f"leave out user, password and query; set {ENHANCER_KEY} to the key")
    if not re.fullmatch(r"[!-~]*", os.environ.get(ENHANCER_KEY, "")):
        raise UserError(
            "--enhance_prompt", f"{ENHANCER_KEY} has spaces or other characters that a key cannot have; set it again"
        )


def check_size(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    for name, other in (("height", "width"), ("width", "height")):
        if name not in values:
            continue
        if other not in values and not spec.lenient:
            refuse(values, name, f"a size needs both sides; give --{other} as well")
        if values[name] % SIZE_MULTIPLE:
            below = values[name] // SIZE_MULTIPLE * SIZE_MULTIPLE
            refuse(values, name, f"not a multiple of {SIZE_MULTIPLE}; give {below} or {below + SIZE_MULTIPLE}")
    check_pixels(values.get("height", 0), values.get("width", 0))


def check_inputs(values: Mapping[str, Any]) -> None:
    """Check the number of reference images and sounds, flags for two speakers, --text and --voice."""
    references, sounds = values.get("ref_imgs", ["one"]), values.get("input_audio", ["one"])
    if not (1 <= len(references) <= REFERENCE_SLOTS and all(references)):
        remedy = f"give 1 to {REFERENCE_SLOTS} images, comma-separated, none empty"
        refuse(values, "ref_imgs", f"{counted(len(references), 'entry', 'entries')}; {remedy}")
    if not (1 <= len(sounds) <= MAX_SPEAKERS and all(sounds)):
        remedy = "give one, or two for two speakers, comma-separated"
        refuse(values, "input_audio", f"{counted(len(sounds), 'recording')}, or an empty one; {remedy}")
    if "diarization" in values and len(sounds) == MAX_SPEAKERS:
        refuse(values, "diarization", "is for one recording of two speakers; give one --input_audio, or leave it out")
    if "audio_type" in values and len(sounds) != MAX_SPEAKERS:
        refuse(values, "audio_type", "is for two speakers; give two recordings, or leave it out")
    several = len(sounds) == MAX_SPEAKERS or "diarization" in values
    if "speaker_boxes" in values and not several and not values.get("keep_background"):
        refuse(values, "speaker_boxes", "is for two speakers; give two recordings, or leave it out")
    if values.get("speaker_boxes") == AUTO and "input_video" in values:
        refuse(values, "speaker_boxes", "finds two speakers in a portrait; give the box of the one in the clip")
    if not any(map(str.isalnum, values.get("text", "some"))):
        refuse(values, "text", "has no words; give some, or leave it out")
    if not VOICE.fullmatch(values.get("voice", "some")):
        refuse(values, "voice", "is not the name of a voice; give one such as af_heart (kokoro) or en-us (espeak-ng)")
    if len(sounds) == MAX_SPEAKERS and "input_video" in values:
        refuse(values, "input_video", "a clip can be dubbed with only one speaker; give one --input_audio")
    parse_boxes(values)
    parse_keyframes(values)


def check_outputs(values: Mapping[str, Any]) -> None:
    """Check the names of outputs, and what --video_num does not allow."""
    output, latents = values.get("output", "video.mp4"), Path(values.get("save_latents", "latents.safetensors"))
    if not output.endswith("/") and Path(output).suffix != ".mp4":
        refuse(values, "output", "give a name ending in .mp4, or in / for a folder of PNG frames")
    if latents.suffix != ".safetensors":
        refuse(values, "save_latents", "give a name ending in .safetensors")
    if not output.endswith("/") and Path(output) in latents.parents:
        refuse(values, "save_latents", "would be inside the file that --output names; give another path")
    outdir = values.get("outdir", "some")
    if not outdir.strip() or "\0" in outdir or Path(outdir).is_absolute() or ".." in Path(outdir).parts:
        refuse(values, "outdir", "is not a folder name; give one, to be made in results/")
    videos = values.get("video_num", 1)
    if videos == 1:
        return
    for name in filter(values.__contains__, OUTPUTS):
        refuse(values, name, f"is for one video, but --video_num makes {videos}; give --outdir, or leave it out")
    if values.get("seed", 0) > (last := MAX_SEED - videos + 1):
        refuse(values, "seed", f"--video_num {videos} goes beyond the largest seed, {MAX_SEED}; give at most {last}")
    if values.get("resume") and values.get("seed") == -1:
        remedy = "random seeds cannot be drawn again; give the first seed of the interrupted run as --seed"
        raise UserError("--resume", remedy)


# Flags whose values have parts


def parse_cache(text: str) -> float:
    """The threshold of --cache, fbcache[:THRESHOLD]."""
    method, colon, end = text.partition(":")
    try:
        threshold = float(end) if colon else CACHE_THRESHOLD
    except ValueError:
        threshold = math.nan
    if method != "fbcache" or not 0 <= threshold < math.inf:
        refuse({"cache": text}, "cache", "choose fbcache, optionally with a threshold, such as fbcache:0.1")
    return threshold


def parse_loras(values: Mapping[str, Any]) -> tuple[Lora, ...]:
    """Parse --lora into sources, scales and whether a partial match is enough."""
    loras = tuple(map(parse_lora, values.get("lora", ())))
    for entry, lora in zip(values.get("lora", ()), loras, strict=True):
        if not lora.source.strip() or not math.isfinite(lora.scale):
            refuse({"lora": entry}, "lora", "give FILE, FOLDER or OWNER/NAME, optionally with a scale after a colon")
    return loras


def parse_lora(entry: str) -> Lora:
    """Parse SOURCE[:SCALE][:partial]; the part after the last colon is the scale if it is a number."""
    rest = entry.removesuffix(PARTIAL)
    name, _, end = rest.rpartition(":")
    try:
        return Lora(name, float(end), rest != entry) if name else Lora(rest, 1.0, rest != entry)
    except ValueError:
        return Lora(rest, 1.0, rest != entry)


def parse_boxes(values: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Parse --speaker_boxes into (x0, y0, x1, y1) in pixels."""
    if "speaker_boxes" not in values or values["speaker_boxes"] == AUTO:
        return ()
    boxes = values["speaker_boxes"].split(";")
    alone = values.get("keep_background")  # then the one box is where the speaker of the clip is
    if len(boxes) != (1 if alone else MAX_SPEAKERS) or not all(map(BOX.fullmatch, boxes)):
        wanted = "one box as x0,y0,x1,y1" if alone else "two boxes as x0,y0,x1,y1;x0,y0,x1,y1"
        refuse(values, "speaker_boxes", f"give {wanted} in pixels")
    numbers = tuple(tuple(map(int, box.split(","))) for box in boxes)
    for x0, y0, x1, y1 in numbers:
        if x0 >= x1 or y0 >= y1:
            raise UserError("--speaker_boxes", f"{x0},{y0},{x1},{y1} is empty; give x0 < x1 and y0 < y1")
    return numbers


def parse_keyframes(values: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Parse --keyframes into images and times in seconds."""
    for entry in values.get("keyframes", ()):
        if not KEYFRAME.fullmatch(entry):
            refuse({"keyframes": entry}, "keyframes", "give an image and its time in seconds, such as a.png@2.5")
    parts = (entry.rpartition("@") for entry in values.get("keyframes", ()))
    return tuple((image, float(seconds)) for image, _, seconds in parts)


# The request


def make_request(spec: TaskSpec, values: Mapping[str, Any], notes: Sequence[str]) -> GenerationRequest:
    """Make a request from checked values, with the preset's for flags that are not given."""
    given = written_out(values)
    drawn = values.get("seed") == -1
    seed = secrets.randbelow(MAX_SEED - values.get("video_num", 1) + 2)  # so that the last video's seed fits, too
    given["seed"] = seed if drawn else values.get("seed", 42)
    values, original, changes = as_trained(spec, {**presets(spec, given), **given})
    recorded = {"task_type": spec.name} | {
        name: without_secrets(name, value)
        for name, value in values.items()
        if BY_NAME[name].recorded and value is not None and BY_NAME[name].is_for(spec)
    }
    if values.get("window_prompt") == SAME_PROMPT:
        values["window_prompt"] = values["prompt"]
    if "num_frames" in values:
        del recorded["duration"]
    if "fps" in values:
        spec = replace(spec, fps=values["fps"])
    values |= {name: tuple(values.get(name, ())) for name in ("ref_imgs", "input_audio")}
    values["find_speakers"] = values.get("speaker_boxes") == AUTO
    values |= {"speaker_boxes": parse_boxes(values), "keyframes": parse_keyframes(values), "lora": parse_loras(values)}
    values["cache"] = parse_cache(values["cache"]) if values.get("cache") else None
    values["frame_folder"] = values.get("output", "").endswith("/")
    for name in filter(values.__contains__, OUTPUTS):
        values[name] = Path(os.path.expanduser(values[name]))
    values = {name: value for name, value in values.items() if name not in ("gpu_num", "fps")}
    return GenerationRequest(
        task=spec, flags=recorded, given=original, notes=(*notes, *changes), seed_drawn=drawn, **values
    )


def without_secrets(name: str, value: Any) -> Any:
    """A flag's value as recorded: input URLs without user, password and query."""
    if BY_NAME[name].path != "input":
        return value
    if isinstance(value, str):
        return redact_url(value)
    parts = (entry.rsplit("@", 1) if name == "keyframes" else [entry] for entry in value)
    return ["@".join([redact_url(source), *time]) for source, *time in parts]


def written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with shorthand flags expanded."""
    full = {name: value for name, value in values.items() if name not in SHORTHANDS}
    if values.get("offload") or values.get("low_vram"):
        full["memory"] = "stream" if values.get("low_vram") or values.get("parameters_level") else "offload"
    if values.get("low_vram"):
        full.setdefault("quant", "fp8")
    if values.get("compiler_transformer"):
        full["compile"] = ON
    return full


def presets(spec: TaskSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The task preset's defaults for a request with these values."""
    made: dict[str, Any] = {
        **{name: getattr(spec, name) for name in ("model_id", "resolution", "num_inference_steps", "shift")},
        "guidance_scale": spec.guidance_scale if spec.guidance_scale != 1.0 else "",
        "color_correction_strength": spec.color_correction_strength if spec.color_correction_strength != 1.0 else "",
        "negative_prompt": spec.negative_prompt if is_guided(spec, values) else "",
        "window_prompt": spec.window_prompt if "input_video" not in values else "",
        "duration": spec.default_duration or "",
    }
    if "fps" in values and "duration" not in values:  # as many frames as at the default rate
        made["num_frames"] = spec.default_duration * spec.fps // 4 * 4 + 1
    size = default_size(spec, values)
    if size is not None and not {"height", "width"} & values.keys():
        made["height"], made["width"] = size
    return {name: value for name, value in made.items() if value != ""}


def as_trained(spec: TaskSpec, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Adapt values to what the models were trained with: the prompt (see `model_prompt`) and 4k+1 frames.

    Returns:
        The values, the flags that a changed prompt was or will be made from, and notes on what was changed.
    """
    made, original = dict(values), {}
    notes: list[str] = []
    made["prompt"], changes = model_prompt(spec, values["prompt"], values.get("transition"))
    way = values.get("enhance_prompt", ENHANCER_OFF)
    if way == ENHANCER_OFF:
        notes += changes
    elif way == ENHANCER_LOCAL:
        made.setdefault("enhancer_model", DEFAULT_ENHANCER)
    if way != ENHANCER_OFF or made["prompt"] != values["prompt"]:
        original = {name: made[name] for name in IN_PROMPT if name in made} | {"prompt": values["prompt"]}
    if way not in (ENHANCER_OFF, ENHANCER_LOCAL):
        original["enhance_prompt"] = "remote"  # the address is not recorded in the video
    if (frames := made.get("num_frames", 1)) % 4 != 1:
        made["num_frames"] = max(1, (frames - 1) // 4 * 4 + 1)
        notes.append(f"--num_frames {frames} becomes {made['num_frames']}: the VAE makes 4k+1 frames")
    return made, original, tuple(notes)
