"""The command line: flags, presets, a config file, and every check that needs nothing but the request itself.

The order of precedence is command line, `--config` file, the task's preset. All three go through the same table of
flags and the same checks. A wrong request is a `UserError`; nothing here imports torch or opens an input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyreels_v3 import __version__
from skyreels_v3.attention.kernels import ATTENTIONS
from skyreels_v3.config_text import read_yaml_text
from skyreels_v3.errors import UserError, redact_url, shown
from skyreels_v3.hints import SEE_HELP, suggest_flag, suggest_value
from skyreels_v3.tasks import (
    DEVICES,
    DTYPES,
    HUNYUAN,
    MEMORY_MODES,
    QUANTIZATIONS,
    REFERENCE_SLOTS,
    RESOLUTIONS,
    SIZE_MULTIPLE,
    TASK_NAMES,
    TINY,
    GenerationRequest,
    Lora,
    TaskSpec,
    task_spec,
)

SCRIPT = "python3 generate_video.py"
MAX_TEXT = 10_000  # characters of one value; of a prompt the model reads 512 tokens
MAX_CONFIG_BYTES = 256 << 10
INPUTS = ("image", "ref_imgs", "input_video", "input_image", "input_audio", "keyframes", "jobs")
HUB_IDS = ("model_id", "base_model_id", "lora")
OUTPUTS = ("output", "save_latents", "save_quantized")
RECORDS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".png")  # what a --config that is no YAML is called
MAX_SPEAKERS = 2
MAX_COMMAS = 20  # in the name of one of several files
KEYFRAME = re.compile(r".+@\d{1,4}(\.\d{1,6})?", re.DOTALL)
PARTIAL = ":partial"
SAME_PROMPT = "same"
CONFIG_HELP = "YAML file with flags as keys, or a video made here, to make it again; the command line wins"
METAVARS = {str: "TEXT", int: "N", float: "X"}
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # as web pages and word processors print those of a flag
MAX_SIDE = 2048
MAX_PIXELS = 1920 * 1088
MAX_SEED = 2**32 - 1  # a CPU's generator of noise takes 32 bits, and drops those above them without a word
MIN_CACHED_STEPS = 12  # with fewer, neighbouring steps differ too much
CACHE_THRESHOLD = 0.1  # of fbcache; a common choice for HunyuanVideo


@dataclass(frozen=True)
class Flag:
    """One flag, on the command line `--name`, in a config file `name`.

    `bare` is what the flag alone means, without a value; None: it needs one. `group` is the heading in --help that
    begins with this flag; "": it stands under that of the flag before it.
    """

    name: str
    help: str
    kind: type = str  # str, int, float, or bool for a switch
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    metavar: str | None = None
    bare: str | None = None
    group: str = ""


FLAGS = (
    Flag("task_type", f"what to make: {', '.join(TASK_NAMES)}", choices=TASK_NAMES, metavar="TASK", group="Input"),
    Flag("prompt", "what happens in the video"),
    Flag("negative_prompt", "what to avoid; needs --guidance_scale above 1"),
    Flag("image", "picture that the video begins with (i2v), path or URL", metavar="IMAGE"),
    Flag("ref_imgs", "1-4 reference images, paths or URLs", metavar="IMAGE[,IMAGE...]"),
    Flag("input_video", "clip to extend (or, by talking_avatar, to dub), path or URL", metavar="CLIP"),
    Flag("input_image", "portrait of the speaker, path or URL", metavar="IMAGE"),
    Flag("input_audio", "speech: sound file or video, path or URL; two for two speakers", metavar="SOUND[,SOUND]"),
    Flag("audio_type", "two speakers at once (default) or one after the other", choices=("parallel", "sequential")),
    Flag(
        "speaker_boxes", "where the two speakers are in the portrait (default: its halves)", metavar="X0,Y0,X1,Y1;..."
    ),
    Flag("keyframes", "pictures that windows end in, instead of generated ones", metavar="IMAGE@SECONDS[,...]"),
    Flag("window_prompt", "prompt of the windows after the first pass; 'same' for --prompt"),
    Flag("duration", "whole seconds of new video (default: the task's)", int, group="Size and length"),
    Flag(
        "num_frames",
        "frames of new video, 4k+1, instead of --duration (reference_to_video, t2v, i2v)",
        int,
        low=1,
        high=100_000,
    ),
    Flag("fps", "frames per second of the file (t2v, i2v; default: 24)", int, low=1, high=120),
    Flag("resolution", "size bucket (default: 720P); the sides follow the input's shape", choices=RESOLUTIONS),
    Flag("height", "in pixels, a multiple of 16, instead of --resolution", int, low=SIZE_MULTIPLE, high=MAX_SIDE),
    Flag("width", "in pixels, a multiple of 16, instead of --resolution", int, low=SIZE_MULTIPLE, high=MAX_SIDE),
    Flag("seed", "same seed, same video; -1 draws one (default: 42)", int, low=-1, high=MAX_SEED, group="Sampling"),
    Flag("num_inference_steps", "denoising steps (default: the task's)", int, low=1, high=200),
    Flag("shift", "shift of the noise schedule (default: the task's)", float, low=0.01, high=100),
    Flag("guidance_scale", "text guidance; 1 is off (default; t2v and i2v: 6)", float, low=0, high=100),
    Flag("embedded_guidance_scale", "guidance that V1's model takes as an input (default: 1)", float, low=0, high=100),
    Flag("image_guidance_scale", "guidance by the reference images, on top of text guidance", float, low=0, high=100),
    Flag("text_guidance_scale", "text guidance of talking_avatar; 1 is off (default)", float, low=0, high=100),
    Flag("audio_guidance_scale", "guidance by the sound of talking_avatar; 1 is off (default)", float, low=0, high=100),
    Flag("color_correction_strength", "1 keeps the portrait's colours (default), 0 is off", float, low=0, high=1),
    Flag("sequence_batch", "accepted as in V1, changes nothing: guidance is computed term by term", bool),
    Flag("no_riflex", "do without RIFLEx: beyond 192 frames the video repeats itself (t2v, i2v)", bool),
    Flag("cache", "skip blocks in steps that change little; off by default", metavar="fbcache[:THRESHOLD]"),
    Flag(
        "model_id",
        "hub id or folder of the checkpoint (default: the task's own); 'tiny' for a built-in toy",
        group="Checkpoint",
    ),
    Flag("base_model_id", "hub id or folder of HunyuanVideo, for its encoders and VAE (t2v, i2v)"),
    Flag("model_source", "hub to download from (default: huggingface)", choices=("huggingface", "modelscope")),
    Flag("lora", "LoRAs to add: files, folders or hub ids, each with a scale", metavar="LORA[:SCALE[:partial]][,...]"),
    Flag("device", "where to compute (default: auto)", choices=DEVICES, group="Memory and speed"),
    Flag(
        "dtype",
        "of the matrix products (default: bfloat16 on a GPU, float32 on a CPU)",
        choices=DTYPES,
    ),
    Flag("memory", "what stays on the device (default: auto, by what is free)", choices=("auto", *MEMORY_MODES)),
    Flag("offload", "only the component at work is on the device: --memory offload", bool),
    Flag("low_vram", "stream the transformer's blocks, in FP8: --memory stream --quant fp8", bool),
    Flag("stream_blocks", "blocks of a streamed transformer that stay on the device", int, low=0, high=999),
    Flag("parameters_level", "with --offload: --memory stream", bool),
    Flag("high_cpu_memory", "pin all that is streamed, however much host memory that takes", bool),
    Flag(
        "quant",
        "weights in FP8 (fp8, also without a value); fp8_dynamic computes in FP8 as well (Ada GPUs and later)",
        choices=QUANTIZATIONS,
        bare="fp8",
    ),
    Flag("save_quantized", "also save the checkpoint in FP8, as a folder for --model_id", metavar="FOLDER"),
    Flag("vae_dtype", "of the VAE (default: float32)", choices=DTYPES),
    Flag("attention", "attention kernel (default: auto)", choices=ATTENTIONS),
    Flag("compile", "compile the transformer's blocks; the first step takes longer", bool),
    Flag("compiler_transformer", "the same as --compile", bool),
    Flag("no_cache", "neither keep encoded prompts for later runs nor use kept ones", bool),
    Flag(
        "gpu_num",
        "start this many processes here, one for each GPU, with --use_usp",
        int,
        low=1,
        high=64,
        group="Several GPUs",
    ),
    Flag("use_usp", "share the work among the processes that torchrun starts, one for each GPU", bool),
    Flag("ulysses_degree", "processes that exchange tokens for heads (default: as many as can)", int, low=1, high=4096),
    Flag("ring_degree", "processes that pass keys and values around (default: the rest)", int, low=1, high=4096),
    Flag(
        "cfg_degree",
        "processes that share the guidance (default: one per term, if that divides them)",
        int,
        low=1,
        high=3,
    ),
    Flag("shard_weights", "divide the transformer's weights among the processes", bool),
    Flag("broadcast_weights", "read the weights in one process and send them to the others", bool),
    Flag(
        "output",
        "an .mp4, or a folder ending in / for PNG frames (default: result/TASK/SEED_TIME.mp4)",
        metavar="PATH",
        group="Output",
    ),
    Flag("outdir", "put the video into results/FOLDER, named by prompt, seed and number", metavar="FOLDER"),
    Flag("include_input", "write the input clip and its extension as one video", bool),
    Flag("no_metadata", "leave out of the video what made it", bool),
    Flag("save_latents", "also write the final latents of each pass", metavar="FILE.safetensors"),
    Flag("resume", "continue the interrupted run of the same command, or start where there is none", bool),
    Flag(
        "checkpoint_every",
        "seconds between safety copies while denoising (default: 60; 0: none)",
        float,
        low=0,
        high=86_400,
    ),
    Flag(
        "video_num",
        "make this many videos, with consecutive seeds",
        int,
        low=1,
        high=10_000,
        group="Many videos",
    ),
    Flag("jobs", "make a video for each line: its flags as a JSON object", metavar="FILE.jsonl"),
    Flag(
        "url_timeout", "seconds to wait for a server's answer (default: 1.2)", float, low=0.05, high=600, group="Other"
    ),
    Flag("allow_private_urls", "also fetch inputs from this machine and private networks", bool),
    Flag("dry_run", "check everything and print the plan; load and download no weights", bool),
    Flag("quiet", "warnings and the result only", bool),
    Flag("verbose", "more about what is done, and tracebacks of errors", bool),
)
BY_NAME = {flag.name: flag for flag in FLAGS}
SOURCES = ("image", "ref_imgs", "input_video", "input_image", "input_audio", "keyframes")  # paths or addresses
# flags with several entries: comma-separated, given several times, or a list in a file
LISTS = ("ref_imgs", "input_audio", "keyframes", "lora")
SWITCHES = {flag.name for flag in FLAGS if flag.kind is bool}
# flags that only some tasks take, and the inputs or the layout by which those tasks are known
ONLY_FOR = {
    **dict.fromkeys(("base_model_id", "embedded_guidance_scale", "no_riflex", "fps"), (HUNYUAN,)),
    "image": ("image",),
    "resolution": ("ref_imgs", "input_video", "input_audio"),
    "ref_imgs": ("ref_imgs",),
    "num_frames": ("ref_imgs", HUNYUAN),
    "image_guidance_scale": ("ref_imgs",),
    "input_video": ("input_video", "input_audio"),
    "include_input": ("input_video",),
    "duration": ("ref_imgs", "input_video", HUNYUAN),
    "guidance_scale": ("ref_imgs", "input_video", HUNYUAN),
    "input_image": ("input_audio",),
    "input_audio": ("input_audio",),
    "text_guidance_scale": ("input_audio",),
    "audio_guidance_scale": ("input_audio",),
    "color_correction_strength": ("input_audio",),
    "window_prompt": ("input_audio",),
    "audio_type": ("input_audio",),
    "speaker_boxes": ("input_audio",),
    "keyframes": ("input_audio",),
}
# flags that are for the same thing, in tasks that differ
ALIKE = (("image", "input_image", "ref_imgs"), ("guidance_scale", "text_guidance_scale"), ("num_frames", "duration"))
EXCLUSIVE = (
    ("duration", "num_frames"),
    ("quiet", "verbose"),
    ("input_image", "input_video"),
    ("keyframes", "input_video"),
    ("resume", "dry_run"),
    ("offload", "low_vram"),
    ("memory", "offload"),
    ("memory", "low_vram"),
    ("memory", "parameters_level"),
    ("low_vram", "parameters_level"),
    ("shard_weights", "low_vram"),
    ("shard_weights", "parameters_level"),
    ("shard_weights", "cache"),
    ("output", "outdir"),
)
# flags that belong to several processes
NEED_USP = ("ulysses_degree", "ring_degree", "cfg_degree", "shard_weights", "broadcast_weights")
# what a run does besides its video; not needed to make the same video again
NOT_RECORDED = (
    *(
        "output",
        "outdir",
        "video_num",
        "save_latents",
        "save_quantized",
        "no_metadata",
        "allow_private_urls",
        "resume",
        "checkpoint_every",
        "dry_run",
        "quiet",
        "verbose",
    ),
    *("memory", "stream_blocks", "high_cpu_memory", "no_cache"),
    *("gpu_num", "use_usp", *NEED_USP, "jobs"),
)
# what says the same as other flags
SHORTHANDS = ("offload", "low_vram", "parameters_level", "compiler_transformer", "sequence_batch")
# what beside --jobs is no default for every line, with its way out
ONLY_IN_A_JOB = dict.fromkeys(("output", "save_latents", "save_quantized"), "write it into the lines, a name for each")
ONLY_IN_A_JOB |= {"resume": "leave it out, the same command goes on by itself", "video_num": "write a line for each"}
# what is for a whole run; --config is no flag of the table
NOT_IN_A_JOB = (
    *("jobs", "config", "gpu_num", "use_usp", *NEED_USP),
    *("video_num", "resume", "dry_run", "quiet", "verbose"),
    "allow_private_urls",  # lines may be somebody else's
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that begin with the flag."""

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (--\w+): (.+)", message, re.DOTALL)
        flag, problem = named.groups() if named else ("command line", message)
        if problem == "expected one argument":
            problem = "no value given"
        raise UserError(flag, f"{problem}; see --help")


def parse_request(argv: Sequence[str]) -> GenerationRequest:
    """The request that a command line makes, checked.

    Raises:
        UserError: whatever is wrong with it, the first thing found.
        SystemExit: 0, after --help or --version.
    """
    return request_of(parse_flags(argv))


def parse_flags(argv: Sequence[str], default_task: str | None = None, command: str = SCRIPT) -> dict[str, Any]:
    """The flags of a command line and of its config file, with a task if neither has one; raises as `parse_request`.

    `command` is what --help says to type.
    """
    found, unknown = build_parser(command).parse_known_args(join_values(argv))
    refuse_unknown(unknown, argv)
    given = {name: value for name, value in vars(found).items() if value is not None}
    config = given.pop("config", None)
    values = {name: convert_given(name, value) for name, value in given.items()}
    if config is not None:
        values = without_overruled(read_config_file(config), values) | values
    if default_task is not None:
        values.setdefault("task_type", default_task)
    if "jobs" in values:
        check_beside_jobs(values)
    elif values.get("gpu_num", 1) > 1:
        values["use_usp"] = True
    return values


def request_of(values: Mapping[str, Any]) -> GenerationRequest:
    """The request that flags make, checked; raises UserError for the first thing that is wrong."""
    values = dict(values)
    if "task_type" not in values:
        raise UserError("--task_type", f"missing; choose one of {', '.join(TASK_NAMES)}")
    spec = task_spec(values.pop("task_type"))
    notes = drop_unused(spec, values) if spec.layout == HUNYUAN else []
    check_conflicts(spec, values)
    check_values(spec, values)
    return make_request(spec, values, notes)


def join_values(argv: Sequence[str]) -> list[str]:
    """`--flag value` as `--flag=value` where the value begins with one dash: argparse would take it for a flag."""
    takes_value = {f"--{flag.name}" for flag in FLAGS if flag.kind is not bool} | {"--config"}
    words: list[str] = []
    for word in argv:
        if words and words[-1] in takes_value and re.match(r"-(?!-)", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def refuse_unknown(words: Sequence[str], argv: Sequence[str]) -> None:
    """Raise UserError for what argparse did not know what to do with."""
    if not words:
        return
    name, _, value = words[0].partition("=")
    if len(words) > 1 and not value and not words[1].startswith("-"):
        value = words[1]
    meant = suggest_flag(name, value, (*BY_NAME, "config", "help", "version")) if re.match(r"-+\w", name) else SEE_HELP
    if re.match(r"--.", name) or meant != SEE_HELP:
        raise UserError(shown(name), f"there is no such flag; {meant}")
    if name and name[0] in DASHES:
        reason = f"{told(name)} begins with a dash that is not two hyphens"
        raise UserError("command line", f"{reason}; type --{shown(name.lstrip(DASHES + '-'))}")
    before = argv[argv.index(words[0]) - 1] if words[0] in argv[1:] else ""
    if before.removeprefix("--") in SWITCHES:
        reason = f"{told(words[0])}: a switch takes no value"
        raise UserError(before, f"{reason}; give {before} alone for yes, or leave it out for no")
    raise UserError(
        "command line", f"{told(words[0])} does not belong to any flag; put quotes around values with spaces"
    )


def build_parser(command: str = SCRIPT) -> Parser:
    """All flags; values stay text until `convert`."""
    examples = "\n\n".join(example_of(task_spec(name), command) for name in TASK_NAMES)
    parser = Parser(
        prog=command,
        usage="%(prog)s --task_type TASK --prompt TEXT [flags]",
        description="Make video with the SkyReels V3 and V1 models. Each task has an example below.",
        epilog=f"Tasks, each with an example (add --dry_run to see what it takes first):\n\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    for flag in FLAGS:
        if flag.group:
            group = parser.add_argument_group(flag.group)
        if flag.kind is bool:
            group.add_argument(f"--{flag.name}", action="store_const", const=True, help=flag.help)
        else:
            metavar = flag.metavar or "|".join(flag.choices) or METAVARS[flag.kind]
            help_text = flag.help.replace("%", "%%")
            options: dict[str, Any] = {} if flag.bare is None else {"nargs": "?", "const": flag.bare}
            if flag.name in LISTS:
                options["action"] = "append"
            group.add_argument(f"--{flag.name}", metavar=metavar, help=help_text, **options)
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    group.add_argument("--version", action="version", version=f"skyreels_v3 {__version__}", help="print the version")
    group.add_argument("-h", "--help", action="help", help="print this")
    return parser


def example_of(spec: TaskSpec, command: str) -> str:
    """What a task makes, and a command for it."""
    lines = (f"{command} --task_type {spec.name}", *(f"  {line}" for line in spec.example))
    return f"  {spec.summary}:\n    " + " \\\n    ".join(lines)


def convert(flag: Flag, value: Any) -> Any:
    """A value from the command line (text) or a config file (any YAML) as the flag's kind, in its range."""
    if flag.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"--{flag.name}", f"{told(value)}: give true or false")
        return value
    return convert_text(flag, value) if flag.kind is str else convert_number(flag, value)


def convert_text(flag: Flag, value: Any) -> str:
    """A text that can be written down: no half characters, not endless, one of the choices if there are any."""
    name = f"--{flag.name}"
    if flag.choices and value not in flag.choices:
        choices = f"{', '.join(flag.choices[:-1])} or {flag.choices[-1]}"
        raise UserError(name, f"{told(value)}: choose {choices}{suggest_value(flag.name, told(value), flag.choices)}")
    if not isinstance(value, str):
        raise UserError(name, f"{told(value)} is not text; put it in quotes")
    if len(value) > MAX_TEXT:
        raise UserError(name, f"{shown(value)}: {len(value)} characters are too many; give at most {MAX_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(name, f"{shown(value)} {encoding_problem(value)}") from None
    return value


def encoding_problem(value: str) -> str:
    """What is wrong with a value that is not UTF-8 in Python's eyes: it, or the locale that Python has read it by."""
    try:
        os.fsencode(value).decode()
    except UnicodeError:
        return "is not UTF-8; type it again, or rename the file"
    locale = sys.getfilesystemencoding()
    return f"is UTF-8, but the terminal's locale says {locale}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"


def convert_number(flag: Flag, value: Any) -> int | float:
    kind = "a whole number" if flag.kind is int else "a number"
    limits = "" if math.isinf(flag.low) else f" from {flag.low} to {flag.high}"
    allowed = int | str if flag.kind is int else int | float | str
    try:
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError
        number = flag.kind(value)
    except (ValueError, OverflowError):
        raise UserError(f"--{flag.name}", f"{told(value)} is not {kind}; give {kind}{limits}") from None
    if not flag.low <= number <= flag.high:  # not true of NaN either
        raise UserError(f"--{flag.name}", f"{told(value)} is out of range; give {kind}{limits}")
    return number


def told(value: Any) -> str:
    """A value for a one-line message."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    try:
        text = str(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "an endless number"
    return shown(text) if text.strip() else "an empty value"


def joined(value: Any) -> Any:
    """A flag's value, entries as one text."""
    return ", ".join(value) if isinstance(value, list) else value


def read_config_file(name: str) -> dict[str, Any]:
    """The flags in a YAML file, or in what a video says of how it was made, converted."""
    path = Path(os.path.expanduser(name))
    recorded = path.suffix.lower() in RECORDS or (bool(name) and os.path.isdir(path))  # unlike Path's for odd names
    content = read_record(path) if recorded else read_yaml(name)
    folder = "" if recorded else os.path.dirname(path)
    if not isinstance(content, Mapping):
        raise UserError("--config", f"{shown(name)} holds no 'flag: value' lines; write some, such as 'seed: 1'")
    values = {}
    for key, value in content.items():
        if key not in BY_NAME:
            raise UserError("--config", f"{shown(name)}: {unknown_key(key, value)}")
        try:
            values[key] = convert_entry(key, value, folder)
        except UserError as error:
            raise UserError("--config", f"{shown(name)}: {error}") from None
    return values


def read_record(path: Path) -> Any:
    """The flags in the comment of a video, of a folder of frames, or of one of those. All of it is distrusted."""
    from skyreels_v3.media.files import check_readable
    from skyreels_v3.media.video_writer import read_comment

    if not path.is_dir():
        check_readable(path, "--config")
    try:
        flags = json.loads(read_comment(path))["flags"]
        return {name: value for name, value in flags.items() if name not in NOT_RECORDED}
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{shown(path)} does not say how it was made"
        raise UserError("--config", f"{reason}; give a video that generate_video.py made, or a YAML file") from error


def unknown_key(key: Any, value: Any) -> str:
    meant = suggest_flag(told(key), told(value), BY_NAME)
    meant = meant if meant == SEE_HELP else meant.replace(" --", " ")  # keys have no dashes
    return f"unknown key {told(key)}; {meant}"


def convert_given(name: str, value: Any) -> Any:
    """A value from the command line, where a flag with several entries may be given several times, converted."""
    if name not in LISTS:
        return convert(BY_NAME[name], value)
    return [entry for text in value for entry in split(name, convert(BY_NAME[name], text))]


def convert_entry(name: str, value: Any, folder: str) -> Any:
    """A value from a file in `folder`, where a flag with several entries may be a list, converted."""
    if name not in LISTS:
        return from_folder(name, convert(BY_NAME[name], value), folder)
    if isinstance(value, list):
        entries = [convert(BY_NAME[name], entry) for entry in value]
        convert(BY_NAME[name], ",".join(entries))  # the limit is for all of them together
    else:
        entries = split(name, convert(BY_NAME[name], value), folder)
    return [from_folder(name, entry, folder) for entry in entries]


def from_folder(name: str, entry: Any, folder: str) -> Any:
    """A value in a file in `folder`; if it is a relative path, as it is called from the current folder.

    What is not there but here is meant as it stands, as a run has recorded it; and so is what may be a hub's id.
    """
    if not folder or name not in (*INPUTS, *HUB_IDS, *OUTPUTS) or not entry.strip():
        return entry
    if "://" in entry or entry == TINY or os.path.isabs(os.path.expanduser(entry)):
        return entry
    there = os.path.join(folder, entry)
    if name in OUTPUTS or exists(name, there):
        return there
    return entry if name in HUB_IDS or exists(name, entry) else there


def split(name: str, text: str, folder: str = "") -> list[str]:
    """The entries of a comma-separated value; commas in the name of a file that is there, or in an address, are its.

    Args:
        folder: where files may be as well.
    """
    if exists(name, text, folder):
        return [text.strip()]
    parts, entries = text.split(","), []
    while parts:
        count = file_length(name, parts, folder) or address_length(name, parts, folder) or 1
        entries.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return entries


def file_length(name: str, parts: Sequence[str], folder: str) -> int:
    """How many of the first pieces between commas are together a file that is there, at most; 0 for none."""
    lengths = range(min(len(parts), MAX_COMMAS), 0, -1)
    return next((length for length in lengths if exists(name, ",".join(parts[:length]), folder)), 0)


def address_length(name: str, parts: Sequence[str], folder: str) -> int:
    """The same of an address: all up to the next one, or to a file that is there; 0 for no address."""
    if not is_address(parts[0]):
        return 0
    for length in range(1, len(parts)):
        ended = name == "keyframes" and KEYFRAME.fullmatch(parts[length - 1].strip())
        if ended or is_address(parts[length]) or file_length(name, parts[length:], folder):
            return length
    return len(parts)


def exists(name: str, entry: str, folder: str = "") -> bool:
    """Whether an entry of a flag names a file or a folder that is there, or in `folder`."""
    entry = entry.strip()
    if name == "lora":
        entry = parse_lora(entry).source
    elif name == "keyframes":
        entry = entry.rpartition("@")[0] if KEYFRAME.fullmatch(entry) else ""
    path = os.path.expanduser(entry)
    return bool(entry) and (os.path.exists(path) or (bool(folder) and os.path.exists(os.path.join(folder, path))))


def is_address(entry: str) -> bool:
    return re.match(r"\s*https?://", entry, re.IGNORECASE) is not None


def check_beside_jobs(values: Mapping[str, Any]) -> None:
    """Raise UserError for a flag that cannot stand beside --jobs, and for a name of none."""
    if not values["jobs"].strip():
        raise UserError("--jobs", "an empty path; give a file")
    for name, remedy in ONLY_IN_A_JOB.items():
        if values.get(name, False) is not False:
            value = "" if values[name] is True else f"{told(values[name])}: "
            raise UserError(f"--{name}", f"{value}is for one video, --jobs makes several; {remedy}")


def job_flags(line: Mapping[str, Any], defaults: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The flags of a line of --jobs, converted, with those of the command line where they leave room for them.

    Args:
        folder: that of the file, where its relative paths begin.

    Raises:
        UserError: an unknown flag, one that a line cannot have, or a value that is none.
    """
    values = {}
    for name, value in line.items():
        if name in NOT_IN_A_JOB:
            raise UserError(f"--{name}", "is not allowed in a line of --jobs; give it on the command line")
        if name not in BY_NAME:
            raise UserError("--jobs", unknown_key(name, value))
        values[name] = convert_entry(name, value, folder)
    return without_overruled(defaults, values) | values


def read_yaml(name: str) -> Any:
    """The content of a YAML file of a user's."""
    path = Path(os.path.expanduser(name))
    try:
        status = path.stat()
        if not name or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONFIG_BYTES:
            raise UserError("--config", f"{told(name)} is not a file of at most {MAX_CONFIG_BYTES >> 10} KiB; give one")
        return read_yaml_text(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError("--config", f"{shown(name)} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else shown(error)
        raise UserError("--config", f"{shown(name)} is not YAML ({place}); write 'flag: value' lines") from error


def without_overruled(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values, of a config file for example, without those that contradict a flag that wins over them."""
    overruled = {pair[1 - side] for pair in EXCLUSIVE for side in (0, 1) if pair[side] in given}
    return {name: value for name, value in config.items() if name not in overruled}


def drop_unused(spec: TaskSpec, values: dict[str, Any]) -> list[str]:
    """Take out what V1's own command accepts and does nothing with; returns notes on it. For V3 it is an error."""
    notes = []
    if "image" in values and not takes(spec, "image"):
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


def check_conflicts(spec: TaskSpec, values: Mapping[str, Any]) -> None:
    """Flags that the task needs, does not take, or that contradict each other."""
    for name in ONLY_FOR:
        if values.get(name, False) is not False and not takes(spec, name):
            value = "" if values[name] is True else f"{told(joined(values[name]))}: "
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
    for name in NEED_USP:
        if values.get(name, False) is not False and not values.get("use_usp"):
            value = "" if values[name] is True else f"{values[name]}: "
            raise UserError(f"--{name}", f"{value}is for several processes; add --use_usp, and start with torchrun")
    for one, other in (("height", "width"), ("width", "height")):
        if one in values and other not in values:
            raise UserError(f"--{one}", f"{values[one]} alone is no size; give --{other} as well")
    text_scale = "text_guidance_scale" if "input_audio" in spec.inputs else "guidance_scale"
    guided = values.get(text_scale, spec.guidance_scale) > 1.0
    for name in ("image_guidance_scale", "negative_prompt"):
        if values.get(name, "") not in ("", 1.0) and not guided:
            reason = f"{shown(values[name])} has no effect without text guidance"
            raise UserError(f"--{name}", f"{reason}; give --{text_scale} above 1 as well")


def counterparts(spec: TaskSpec, name: str) -> Iterator[str]:
    """The flags by which the task takes what another one takes by the flag of that name."""
    return (other for alike in ALIKE if name in alike for other in alike if other != name and takes(spec, other))


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
        raise UserError("--duration", f"{told(duration)} is out of range; {spec.name} takes {limits} whole seconds")
    if values.get("num_frames", 1) % 4 != 1 and spec.layout != HUNYUAN:
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
        reason = f"{told(', '.join(references))}: {len(references)} entries" if any(references) else "an empty value"
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
        reason = f"{told(values['save_quantized'])}: nothing is quantized"
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
            "--cache", f"{told(text)}: choose fbcache, with a threshold after a colon if need be, such as fbcache:0.1"
        )
    return threshold


def parse_loras(values: Mapping[str, Any]) -> tuple[Lora, ...]:
    """--lora as sources, scales and whether a part will do."""
    loras = []
    for entry in values.get("lora", ()):
        lora = parse_lora(entry)
        if not lora.source.strip() or not math.isfinite(lora.scale):
            raise UserError("--lora", f"{told(entry)}: give FILE, FOLDER or OWNER/NAME, and its scale after a colon")
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
        reason = f"{told(', '.join(sounds))}: {len(sounds)} sounds, or an empty one"
        raise UserError("--input_audio", f"{reason}; give one, or two for two speakers, comma-separated")
    for name in ("audio_type", "speaker_boxes"):
        if name in values and len(sounds) != MAX_SPEAKERS:
            raise UserError(f"--{name}", f"{told(values[name])}: is for two speakers; give two sounds, or leave it out")
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
        raise UserError("--speaker_boxes", f"{told(text)}: give two boxes as x0,y0,x1,y1;x0,y0,x1,y1 in pixels")
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
            raise UserError("--keyframes", f"{told(entry)}: give an image and its time in seconds, such as a.png@2.5")
        found.append((image, float(seconds)))
    return tuple(found)


def check_outputs(values: Mapping[str, Any]) -> None:
    check_several(values)
    output = values.get("output", "video.mp4")
    if not output.endswith("/") and Path(output).suffix != ".mp4":
        raise UserError("--output", f"{told(output)}: give a name ending in .mp4, or in / for a folder of PNG frames")
    latents = Path(values.get("save_latents", "latents.safetensors"))
    if latents.suffix != ".safetensors":
        raise UserError("--save_latents", f"{told(values['save_latents'])}: give a name ending in .safetensors")
    if not output.endswith("/") and Path(output) in latents.parents:
        raise UserError(
            "--save_latents", f"{shown(latents)} would be inside the file that --output names; give another path"
        )


def check_several(values: Mapping[str, Any]) -> None:
    """Raise UserError for what cannot be with several videos, and for a folder of results that is none."""
    if values.get("video_num", 1) > 1:
        for name in ("output", "save_latents", "save_quantized"):
            if name in values:
                reason = f"{told(values[name])}: is for one video, --video_num makes {values['video_num']}"
                raise UserError(f"--{name}", f"{reason}; give --outdir, or leave it out")
        if values.get("seed", 0) > (last := MAX_SEED - values["video_num"] + 1):
            reason = f"{values['seed']}: --video_num {values['video_num']} goes beyond the largest seed"
            raise UserError("--seed", f"{reason}, {MAX_SEED}; give at most {last}")
    outdir = values.get("outdir", "some")
    if not outdir.strip() or "\0" in outdir:
        raise UserError("--outdir", f"{told(outdir)} is not a folder name; give one")


def verbosity_of(values: Mapping[str, Any]) -> int:
    """-1 for warnings and the result only, 1 for everything."""
    return int(values.get("verbose", False)) - int(values.get("quiet", False))


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
    values["verbosity"] = verbosity_of(values)
    values |= {name: tuple(values.get(name, ())) for name in ("ref_imgs", "input_audio")}
    values |= {"speaker_boxes": parse_boxes(values), "keyframes": parse_keyframes(values), "lora": parse_loras(values)}
    values["cache"] = parse_cache(values["cache"]) if values.get("cache") else None
    values["frame_folder"] = values.get("output", "").endswith("/")
    for name in ("output", "save_latents", "save_quantized"):
        if name in values:
            values[name] = Path(os.path.expanduser(values[name]))
    values = {name: value for name, value in values.items() if name not in ("verbose", "quiet", "gpu_num", "fps")}
    return GenerationRequest(task=spec, flags=recorded, notes=(*notes, *changes), seed_drawn=drawn, **values)


def without_secrets(name: str, value: Any) -> Any:
    """A flag's value as it is recorded: addresses of inputs without user, password and query."""
    if name not in SOURCES:
        return value
    safe = []
    for entry in value.split(",") if isinstance(value, str) else value:
        source, *time = entry.rsplit("@", 1) if name == "keyframes" else [entry]
        safe.append("@".join([redact_url(source), *time]))
    return ",".join(safe) if isinstance(value, str) else safe


def is_recorded(spec: TaskSpec, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a value is needed to make the same video again, and can be given for the task."""
    return name not in NOT_RECORDED and values[name] is not None and takes(spec, name)


def takes(spec: TaskSpec, name: str) -> bool:
    """Whether a flag is for the task."""
    return name not in ONLY_FOR or bool(set(ONLY_FOR[name]) & spec.kinds)


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
