"""The command line: flags, presets, a config file, and every check that needs nothing but the request itself.

The order of precedence is command line, `--config` file, the task's preset. All three go through the same table of
flags and the same checks. A wrong request is a `UserError`; nothing here imports torch or opens an input.
"""

from __future__ import annotations

import argparse
import difflib
import math
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyreels_v3 import __version__
from skyreels_v3.errors import UserError
from skyreels_v3.tasks import (
    REFERENCE_SLOTS,
    RESOLUTIONS,
    SIZE_MULTIPLE,
    TASK_NAMES,
    GenerationRequest,
    TaskSpec,
    load_yaml,
    task_spec,
)

MAX_PROMPT = 10_000  # characters; the model reads 512 tokens
MAX_SIDE = 2048
MAX_PIXELS = 1920 * 1088
MAX_SEED = 2**63 - 1
NOT_BUILT = {
    "low_vram": "FP8 weights and block streaming are not built yet; use --offload, which keeps only the component that "
    "works on the device",
    "use_usp": "running on several GPUs is not built yet; run without it on one",
}


@dataclass(frozen=True)
class Flag:
    """One flag, on the command line `--name`, in a config file `name`."""

    name: str
    help: str
    kind: type = str  # str, int, float, or bool for a switch
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    metavar: str | None = None


FLAGS = (
    Flag("task_type", "what to make", choices=TASK_NAMES),
    Flag("model_id", "hub id or folder of the checkpoint (default: the task's own); 'tiny' for a built-in toy"),
    Flag("model_source", "hub to fetch from (default: huggingface)", choices=("huggingface", "modelscope")),
    Flag("prompt", "what happens in the video"),
    Flag("negative_prompt", "what to keep away from; needs --guidance_scale above 1"),
    Flag("ref_imgs", "1-4 reference images, paths or URLs", metavar="IMAGE[,IMAGE...]"),
    Flag("input_video", "clip to go on from, path or URL", metavar="CLIP"),
    Flag("duration", "seconds of new video, a whole number", int, low=1, high=3600),
    Flag("num_frames", "frames of new video, 4k+1, instead of --duration (reference_to_video)", int, low=1, high=1025),
    Flag("resolution", "size bucket (default: 720P); the input's shape chooses the sides", choices=RESOLUTIONS),
    Flag("height", "height in pixels, a multiple of 16, instead of the bucket's", int, low=1, high=100_000),
    Flag("width", "width in pixels, a multiple of 16, instead of the bucket's", int, low=1, high=100_000),
    Flag("seed", "same seed, same video; -1 draws one (default: 42)", int, low=-1, high=MAX_SEED),
    Flag("num_inference_steps", "denoising steps (default: the task's)", int, low=1, high=200),
    Flag("shift", "shift of the noise schedule (default: the task's)", float, low=0.01, high=100),
    Flag("guidance_scale", "text guidance; 1 is off (default)", float, low=0, high=100),
    Flag("image_guidance_scale", "guidance by the reference images, beside text guidance", float, low=0, high=100),
    Flag("device", "where to compute (default: auto)", choices=("auto", "cuda", "cpu", "mps")),
    Flag(
        "dtype",
        "of the matrix products (default: bfloat16 on a GPU, float32 on a CPU)",
        choices=("bfloat16", "float32"),
    ),
    Flag("offload", "keep only the working component on the device", bool),
    Flag("low_vram", "FP8 weights and block streaming (not built yet)", bool),
    Flag("use_usp", "several GPUs (not built yet)", bool),
    Flag(
        "output", "an .mp4, or a folder ending in / for PNG frames (default: result/TASK/SEED_TIME.mp4)", metavar="PATH"
    ),
    Flag("save_latents", "also write the final latents of each pass", metavar="FILE.safetensors"),
    Flag("include_input", "write the input clip and its extension as one video", bool),
    Flag("url_timeout", "seconds to wait for a server's answer (default: 1.5)", float, low=0.05, high=600),
    Flag("dry_run", "check everything, print the plan, load and fetch no weights", bool),
    Flag("quiet", "warnings and the result only", bool),
    Flag("verbose", "more on what is done, tracebacks of errors", bool),
)
BY_NAME = {flag.name: flag for flag in FLAGS}
# flags that only some tasks take, and the inputs of the tasks that do
ONLY_FOR = {
    "ref_imgs": "ref_imgs",
    "num_frames": "ref_imgs",
    "image_guidance_scale": "ref_imgs",
    "input_video": "input_video",
    "include_input": "input_video",
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", f"{message}; see --help")


def parse_request(argv: Sequence[str]) -> GenerationRequest:
    """The request that a command line makes, checked.

    Raises:
        UserError: whatever is wrong with it, the first thing found.
        SystemExit: 0, after --help or --version.
    """
    given = vars(build_parser().parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    config = given.pop("config", None)
    values = {name: convert(BY_NAME[name], value) for name, value in given.items()}
    if config is not None:
        values = read_config_file(Path(config)) | values
    if "task_type" not in values:
        raise UserError("--task_type", f"missing; choose one of {', '.join(TASK_NAMES)}")
    for name, reason in NOT_BUILT.items():
        if values.pop(name, False):
            raise UserError(f"--{name}", reason)
    spec = task_spec(values.pop("task_type"))
    check_conflicts(spec, values)
    check_values(spec, values)
    return make_request(spec, values)


def build_parser() -> Parser:
    """All flags; values stay text until `convert`."""
    tasks = "\n".join(f"  {name:26}{task_spec(name).summary}" for name in TASK_NAMES)
    parser = Parser(
        prog="generate_video.py",
        usage="%(prog)s --task_type TASK --prompt TEXT [flags]",
        description="Make video with the SkyReels V3 models.",
        epilog=f"tasks:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"skyreels_v3 {__version__}")
    parser.add_argument("--config", metavar="FILE.yaml", help="any flags as keys; the command line wins")
    for flag in FLAGS:
        if flag.kind is bool:
            parser.add_argument(f"--{flag.name}", action="store_const", const=True, help=flag.help)
        else:
            metavar = flag.metavar or ("|".join(flag.choices) if flag.choices else flag.kind.__name__.upper())
            help_text = flag.help.replace("%", "%%")
            parser.add_argument(f"--{flag.name}", metavar=metavar, help=help_text)
    return parser


def convert(flag: Flag, value: Any) -> Any:
    """A value from the command line (text) or a config file (any YAML) as the flag's kind, in its range."""
    name = f"--{flag.name}"
    if flag.kind is bool or flag.kind is str:
        if type(value) is not flag.kind:
            raise UserError(name, f"{brief(value)} is not {'true or false' if flag.kind is bool else 'text'}")
        if flag.choices and value not in flag.choices:
            close = difflib.get_close_matches(value, flag.choices, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(name, f"{brief(value)}: choose {' or '.join(flag.choices)}{hint}")
        return value
    kind = "a whole number" if flag.kind is int else "a number"
    try:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float | str)
            or (flag.kind is int and isinstance(value, float))
        ):
            raise ValueError
        number = flag.kind(value)
    except ValueError:
        raise UserError(name, f"{brief(value)} is not {kind}") from None
    if not flag.low <= number <= flag.high:  # not true of NaN either
        raise UserError(name, f"{brief(value)} is out of range; give {kind} from {flag.low:g} to {flag.high:g}")
    return number


def brief(value: Any) -> str:
    """A value for a one-line message."""
    return textwrap.shorten(str(value), 80, placeholder="...") if str(value).strip() else "an empty value"


def read_config_file(path: Path) -> dict[str, Any]:
    """The flags in a YAML file, converted."""
    try:
        content = load_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--config", f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise UserError("--config", f"{path} is not YAML ({brief(error)})") from error
    if not isinstance(content, Mapping):
        raise UserError("--config", f"{path} holds no 'flag: value' lines")
    values = {}
    for key, value in content.items():
        if key not in BY_NAME:
            close = difflib.get_close_matches(str(key), BY_NAME, 1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help for the flags"
            raise UserError("--config", f"{path}: unknown key {brief(key)}{hint}")
        if key == "ref_imgs" and isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ",".join(value)
        try:
            values[key] = convert(BY_NAME[key], value)
        except UserError as error:
            raise UserError("--config", f"{path}: {error}") from None
    return values


def check_conflicts(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Flags that the task needs, does not take, or that contradict each other."""
    for name, needs in ONLY_FOR.items():
        if values.get(name) and needs not in spec.inputs:
            raise UserError(f"--{name}", f"{spec.name} does not take it; leave it out")
    for name in spec.inputs:
        if name not in values:
            raise UserError(f"--{name}", f"missing; {spec.name} needs {BY_NAME[name].help}")
    for one, other in (("duration", "num_frames"), ("quiet", "verbose")):
        if values.get(one) and values.get(other):
            raise UserError(f"--{one}", f"conflicts with --{other}; give one of them")
    for one, other in (("height", "width"), ("width", "height")):
        if one in values and other not in values:
            raise UserError(f"--{one}", f"{values[one]} alone is no size; give --{other} as well")
    guided = values.get("guidance_scale", 1.0) > 1.0
    for name in ("image_guidance_scale", "negative_prompt"):
        if values.get(name) and not guided and values[name] != 1.0:
            raise UserError(f"--{name}", "has no effect without text guidance; give --guidance_scale above 1 as well")


def check_values(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Values that are wrong for the task or impossible."""
    check_prompts(values)
    duration = values.get("duration", spec.default_duration)
    if not spec.min_duration <= duration <= spec.max_duration:
        raise UserError(
            "--duration", f"{duration}: {spec.name} takes {spec.min_duration} to {spec.max_duration} whole seconds"
        )
    if values.get("num_frames", 1) % 4 != 1:
        frames = values["num_frames"] // 4 * 4 + 1
        raise UserError("--num_frames", f"{values['num_frames']} is not 4k+1; give {frames} or {frames + 4}")
    for name in ("height", "width"):
        side = values.get(name, SIZE_MULTIPLE)
        if side % SIZE_MULTIPLE or side > MAX_SIDE:
            raise UserError(f"--{name}", f"{side}: give a multiple of {SIZE_MULTIPLE} up to {MAX_SIDE}")
    if (pixels := values.get("height", 0) * values.get("width", 0)) > MAX_PIXELS:
        raise UserError(
            "--height", f"{values['height']} x {values['width']} is {pixels} pixels; give at most {MAX_PIXELS}"
        )
    references = values.get("ref_imgs", "")
    if "ref_imgs" in values and not (1 <= len(references.split(",")) <= REFERENCE_SLOTS and all(split(references))):
        raise UserError(
            "--ref_imgs", f"{brief(references)}: give 1 to {REFERENCE_SLOTS} images, comma-separated, none empty"
        )
    check_paths(values)


def check_prompts(values: Mapping[str, Any]) -> None:
    if not values.get("prompt", "").strip():
        raise UserError("--prompt", "missing or empty; say what happens in the video")
    for name in ("prompt", "negative_prompt"):
        if (length := len(values.get(name, ""))) > MAX_PROMPT:
            raise UserError(f"--{name}", f"{length} characters are too many; give at most {MAX_PROMPT}")


def check_paths(values: Mapping[str, Any]) -> None:
    output = values.get("output", "video.mp4")
    if not output.endswith("/") and Path(output).suffix != ".mp4":
        raise UserError("--output", f"{brief(output)}: give a name ending in .mp4, or in / for a folder of PNG frames")
    latents = values.get("save_latents", "latents.safetensors")
    if Path(latents).suffix != ".safetensors":
        raise UserError("--save_latents", f"{brief(latents)}: give a name ending in .safetensors")


def split(references: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [entry.strip() for entry in references.split(",")]


def make_request(spec: TaskSpec, values: dict[str, Any]) -> GenerationRequest:
    """A request from checked values, the preset's where none was given."""
    seed = values.get("seed", 42)
    seed = secrets.randbelow(2**32) if seed == -1 else seed
    flags = {"task_type": spec.name, **values, "seed": seed}
    values = {
        "model_id": spec.model_id,
        "duration": spec.default_duration,
        "resolution": spec.resolution,
        "num_inference_steps": spec.num_inference_steps,
        "shift": spec.shift,
        **values,
        "seed": seed,
    }
    values["verbosity"] = int(values.pop("verbose", False)) - int(values.pop("quiet", False))
    values["ref_imgs"] = tuple(split(values["ref_imgs"])) if "ref_imgs" in values else ()
    if "output" in values:
        values["frame_folder"] = values["output"].endswith("/")
        values["output"] = Path(values["output"]).expanduser()
    if "save_latents" in values:
        values["save_latents"] = Path(values["save_latents"]).expanduser()
    return GenerationRequest(task=spec, flags=flags, **values)
