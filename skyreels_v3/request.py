"""The single table of flags, which defines what a user can ask for.

Each field of `GenerationRequest` created by `flag` is a flag: `--name` on the command line, `name` in a config file, a
line of --jobs or a call from Python. Help, parsing, checks and docs/options.md are generated from this table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from skyreels_v3.attention.kernels import ATTENTIONS, INEXACT
from skyreels_v3.errors import UserError
from skyreels_v3.prompts import AUTO, transitions
from skyreels_v3.tasks import (
    COMPILE,
    DEVICES,
    DTYPES,
    MAX_SIDE,
    MEMORY_MODES,
    QUANTIZATIONS,
    RESOLUTIONS,
    SIZE_MULTIPLE,
    TASK_NAMES,
    VAE_STRIDE,
    TaskSpec,
)

ON, OFF = "on", "off"
DEFAULT_ENHANCER = "Qwen/Qwen3-VL-4B-Instruct"
ENHANCER_OFF, ENHANCER_LOCAL = OFF, "local"  # values of --enhance_prompt that are not URLs
ENHANCER_KEY = "SKYREELS_ENHANCER_API_KEY"  # an environment variable
IN_PROMPT = ("transition", "enhance_prompt", "enhancer_model")  # not recorded; the resulting prompt is
SAME_PROMPT = "same"  # as --window_prompt
MAX_PIXELS = 1920 * 1088
MAX_SEED = 2**32 - 1  # the CPU generator takes 32 bits and silently drops higher ones


@dataclass(frozen=True)
class Flag:
    """The definition of a flag.

    Attributes:
        kind: str, int, float, or bool for a switch.
        bare: the value if the flag is given without one; None: it needs one.
        group: the --help heading that starts with this flag; "" for that of the previous flag.
        task_specific: only for tasks whose preset lists it in `takes`.
        usp: only with --use_usp.
        server: only with --serve.
        path: "input" (a path or URL), "output" or "hub" (a folder or a hub's id); "" for other values.
        several: takes several entries: comma-separated, the flag repeated, or a list in a file.
        recorded: needed to make the same video again.
        in_line: allowed in a line of --jobs.
        only_in_line: not allowed together with --jobs; the text says what to do instead.
        in_request: if also `in_line`, allowed in a client's request to a server; others are set on the server.
    """

    name: str
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    metavar: str | None = None
    bare: str | None = None
    group: str = ""
    task_specific: bool = False
    usp: bool = False
    server: bool = False
    path: str = ""
    several: bool = False
    recorded: bool = True
    in_line: bool = True
    only_in_line: str = ""
    in_request: bool = True

    def is_for(self, task: TaskSpec) -> bool:
        """Whether a task takes the flag."""
        return not self.task_specific or self.name in task.takes

    @property
    def is_for_clients(self) -> bool:
        """Whether a client of a server may set the flag."""
        return self.in_line and self.in_request


def flag(default: Any, help: str, kind: type = str, **more: Any) -> Any:
    """Declare a dataclass field as a flag, see `Flag`."""
    return field(default=default, metadata={"flag": {"help": help, "kind": kind, **more}})


def check_pixels(height: int, width: int) -> None:
    """Raise UserError for a size that is too large."""
    if (pixels := height * width) > MAX_PIXELS:
        size = f"{width} x {height}"
        raise UserError("--height", f"{size} is {pixels:,} pixels; give a size of at most {MAX_PIXELS:,}")


task_flag = partial(flag, task_specific=True)  # for some tasks only
unrecorded = partial(flag, recorded=False)
run_flag = partial(flag, recorded=False, in_line=False)  # for a whole run, not allowed in a line of --jobs
parallel = partial(run_flag, usp=True)
server = partial(run_flag, server=True)


class Lora(NamedTuple):
    """A LoRA to apply."""

    source: str  # file, folder or hub id
    scale: float = 1.0
    partial: bool = False  # leave out entries that the model has no weights for


@dataclass(frozen=True)
class GenerationRequest:
    """Everything one run needs, checked. `height` and `width` may be None until inputs are opened."""

    task: TaskSpec
    # fmt: off
    task_type: str = flag("", f"what to make: {', '.join(TASK_NAMES)}", choices=TASK_NAMES, metavar="TASK",
        group="Input")
    prompt: str = flag("", "what happens in the video")
    negative_prompt: str = flag("", "what to avoid; needs --guidance_scale above 1")
    transition: str | None = task_flag(None,
        "how the new shot begins: adds a sentence before the prompt, and for cut_in and cut_out [ZOOM_IN_CUT] or "
        "[ZOOM_OUT_CUT], the only tags that the model's authors document; auto: chosen from the prompt's words, else "
        "from a face in the clip, or by the enhancer (default: the prompt is used as is)",
        choices=(AUTO, *transitions()), recorded=False)
    enhance_prompt: str = unrecorded(ENHANCER_OFF,
        "rewrite the prompt in more detail (default: off), with a model on this machine or an OpenAI-compatible "
        f"endpoint, which also gets the pictures; its key is read from {ENHANCER_KEY}",
        metavar=f"{ENHANCER_OFF}|{ENHANCER_LOCAL}|URL", in_request=False)
    enhancer_model: str | None = unrecorded(None,
        f"hub id or folder of the model for --enhance_prompt local (default: {DEFAULT_ENHANCER}), or its name "
        "at the URL", metavar="MODEL", path="hub", in_request=False)
    image: str | None = task_flag(None, "first frame of the video (i2v), path or URL", metavar="IMAGE",
        path="input")
    ref_imgs: tuple[str, ...] = task_flag((), "1-4 reference images, paths or URLs", metavar="IMAGE[,IMAGE...]",
        path="input", several=True)
    input_video: str | None = task_flag(None, "clip to extend (or, for talking_avatar, to dub), path or URL",
        metavar="CLIP", path="input")
    input_image: str | None = task_flag(None, "portrait of the speaker, path or URL", metavar="IMAGE", path="input")
    input_audio: tuple[str, ...] = task_flag((), "speech: audio file or video, path or URL; two for two speakers",
        metavar="AUDIO[,AUDIO]", path="input", several=True)
    text: str = task_flag("",
        "text for the portrait to speak, instead of --input_audio; synthesized by kokoro if installed, else espeak-ng",
        in_request=False)
    voice: str | None = task_flag(None, "voice for --text, of kokoro (default: af_heart) or espeak-ng",
        metavar="NAME", in_request=False)
    vocals: bool = task_flag(False, "give the model the voice without the music (uses audio-separator)", bool)
    speech_only: bool = task_flag(False, "give the model silence between the words (uses silero-vad)", bool)
    diarization: str | None = task_flag(None,
        "RTTM file that says who speaks when, for two speakers in one --input_audio",
        metavar="FILE.rttm", path="input", in_request=False)
    audio_type: str = task_flag("parallel", "whether two speakers talk at once (default) or one after the other",
        choices=("parallel", "sequential"))
    speaker_boxes: tuple[tuple[int, int, int, int], ...] = task_flag((),
        "where the two speakers are in the portrait, in pixels (default: its halves); 'auto': found by their faces",
        metavar="X0,Y0,X1,Y1;...")
    keep_background: bool = task_flag(False,
        "keep a dubbed clip's pixels outside the speaker's box, given as --speaker_boxes", bool)
    keyframes: tuple[tuple[str, float], ...] = task_flag((),
        "images for windows to end on, instead of generated frames", metavar="IMAGE@SECONDS[,...]", path="input",
        several=True)
    window_prompt: str = task_flag("", "prompt for the windows after the first pass; 'same' for --prompt")
    duration: int = task_flag(5, "whole seconds of new video (default: the task's)", int, group="Size and length")
    num_frames: int | None = task_flag(None,
        "frames of new video, 4k+1, instead of --duration (reference_to_video, t2v, i2v)", int, low=1, high=100000)
    fps: int | None = task_flag(None, "frames per second of the file (t2v, i2v; default: 24)", int, low=1, high=120)
    resolution: str = task_flag("720P", "size bucket (default: 720P); height and width follow the input's aspect ratio",
        choices=RESOLUTIONS)
    height: int | None = flag(None, "in pixels, a multiple of 16, instead of --resolution", int, low=SIZE_MULTIPLE,
        high=MAX_SIDE)
    width: int | None = flag(None, "in pixels, a multiple of 16, instead of --resolution", int, low=SIZE_MULTIPLE,
        high=MAX_SIDE)
    seed: int = flag(42, "same seed, same video; -1 for a random one (default: 42)", int, low=-1, high=MAX_SEED,
        group="Sampling")
    num_inference_steps: int = flag(8, "denoising steps (default: the task's)", int, low=1, high=200)
    shift: float | None = flag(5.0, "shift of the noise schedule (default: the task's)", float, low=0.01, high=100)
    guidance_scale: float = task_flag(1.0, "text guidance; 1 is off (default; t2v and i2v: 6)", float, low=0, high=100)
    embedded_guidance_scale: float = task_flag(1.0, "guidance that V1's transformer takes as an input (default: 1)",
        float, low=0, high=100)
    image_guidance_scale: float = task_flag(1.0, "guidance from the reference images, on top of text guidance", float,
        low=0, high=100)
    text_guidance_scale: float = task_flag(1.0, "text guidance of talking_avatar; 1 is off (default)", float, low=0,
        high=100)
    audio_guidance_scale: float = task_flag(1.0, "audio guidance of talking_avatar; 1 is off (default)", float,
        low=0, high=100)
    color_correction_strength: float = task_flag(1.0,
        "how strongly to keep the colors of the portrait (default: 1), or of the clip's end (default: 0, off)", float,
        low=0, high=1)
    sequence_batch: bool = flag(False,
        "accepted as in V1, but has no effect: guidance terms always run one after the other", bool)
    no_riflex: bool = task_flag(False,
        "turn RIFLEx off; beyond 192 frames the video then repeats itself (t2v, i2v)", bool)
    cache: float | None = flag(None, "skip blocks in steps that change little (default: off)",
        metavar="fbcache[:THRESHOLD]")
    model_id: str = flag("", "hub id or folder of the checkpoint (default: the task's own); 'tiny': the built-in one",
        group="Checkpoint", path="hub")
    transformer: str | None = flag(None,
        "file to load the transformer from, a path or a hub's OWNER/NAME/FILE: safetensors or GGUF, quantized or not",
        metavar="FILE", path="hub", in_request=False)
    text_encoder: str | None = task_flag(None, "safetensors file to load the text encoder (UMT5) from",
        metavar="FILE", path="hub", in_request=False)
    vae: str | None = task_flag(None, "safetensors file to load the VAE from", metavar="FILE", path="hub",
        in_request=False)
    base_model_id: str | None = task_flag(None, "hub id or folder of HunyuanVideo, for its encoders and VAE (t2v, i2v)",
        path="hub", in_request=False)
    model_source: str = flag("huggingface", "hub to download from (default: huggingface)",
        choices=("huggingface", "modelscope"), in_request=False)
    lora: tuple[Lora, ...] = flag((), "LoRAs to apply: files, folders or hub ids, each with a scale",
        metavar="LORA[:SCALE[:partial]][,...]", path="hub", several=True)
    device: str = flag("auto", "device to compute on (default: auto)", choices=DEVICES, group="Memory and speed",
        in_request=False)
    dtype: str | None = flag(None, "dtype of matrix products (default: bfloat16 on a GPU, float32 on a CPU)",
        choices=DTYPES)
    memory: str = unrecorded("auto", "what stays on the device (default: auto, depending on free memory)",
        choices=("auto", *MEMORY_MODES))
    offload: bool = flag(False, "keep only the component in use on the device: same as --memory offload", bool)
    low_vram: bool = flag(False, "stream the transformer's blocks in FP8: same as --memory stream --quant fp8", bool)
    stream_blocks: int = unrecorded(0, "number of blocks of a streamed transformer to keep on the device",
        int, low=0, high=999)
    parameters_level: bool = flag(False, "with --offload: same as --memory stream", bool)
    high_cpu_memory: bool = unrecorded(False, "pin everything that is streamed, however much host memory it takes",
        bool, in_request=False)
    quant: str | None = flag(None,
        "keep weights in FP8 (fp8, also if no value is given); fp8_dynamic also computes in FP8 (Ada GPUs and later)",
        choices=QUANTIZATIONS, bare="fp8")
    save_quantized: Path | None = unrecorded(None, "also save the FP8 checkpoint, as a folder for --model_id",
        metavar="FOLDER", path="output", only_in_line="give it in the lines, a different name in each",
        in_request=False)
    vae_dtype: str = flag("float32", "dtype of the VAE (default: float32)", choices=DTYPES)
    attention: str = flag("auto", "attention kernel (default: auto)", choices=ATTENTIONS)
    exact_steps: int = flag(0,
        f"with --attention {' or '.join(INEXACT)}: use an exact kernel in this many of the first and of the last steps",
        int, low=1, high=100)
    compile: str = flag(AUTO,
        "compile the transformer's blocks, which makes the first step slower: on (also if no value is given), off, or "
        "auto, for long videos on a GPU (default: auto)", choices=COMPILE, bare=ON)
    compiler_transformer: bool = flag(False, "same as --compile on", bool)
    no_cache: bool = unrecorded(False, "do not cache encoded prompts or use cached ones", bool)
    gpu_num: int = run_flag(1,
        "start this many processes on this machine, one per GPU; without --jobs, implies --use_usp", int, low=1,
        high=64, group="Several GPUs")
    use_usp: bool = run_flag(False, "split each video over all processes started by torchrun, one per GPU", bool)
    ulysses_degree: int | None = parallel(None, "Ulysses sequence parallelism degree (default: as large as possible)",
        int, low=1, high=4096)
    ring_degree: int | None = parallel(None, "ring attention degree (default: the rest)", int,
        low=1, high=4096)
    cfg_degree: int | None = parallel(None,
        "processes to split the guidance terms over (default: one per term, if that divides the world size)",
        int, low=1, high=3)
    shard_weights: bool = parallel(False, "shard the transformer's weights over the processes (FSDP2)", bool)
    broadcast_weights: bool = parallel(False, "read the weights in one process and broadcast them to the others", bool)
    output: Path | None = unrecorded(None,
        "an .mp4, or a folder ending in / for PNG frames (default: result/TASK/SEED_TIME.mp4)",
        metavar="FILE.mp4|FOLDER/", group="Output", path="output",
        only_in_line="give it in the lines, a different name in each", in_request=False)
    outdir: str | None = unrecorded(None,
        "write the video to results/FOLDER, named after prompt, seed and number; with --serve: the folder of its jobs",
        metavar="FOLDER", in_request=False)
    include_input: bool = task_flag(False, "write the input clip and the extension as one video", bool)
    check: bool = unrecorded(False, "measure the new frames, log the figures, and warn if the video looks bad", bool)
    no_metadata: bool = unrecorded(False, "do not store the flags in the video's metadata", bool)
    save_latents: Path | None = unrecorded(None, "also save the final latents of each pass",
        metavar="FILE.safetensors", path="output", only_in_line="give it in the lines, a different name in each",
        in_request=False)
    resume: bool = run_flag(False, "continue an interrupted run of the same command, or start it if there is none",
        bool, only_in_line="leave it out, since repeating the command resumes")
    checkpoint_every: float = unrecorded(60.0,
        "seconds between saved states while denoising, for resuming (default: 60; 0: none)", float, low=0, high=86400,
        in_request=False)
    video_num: int = run_flag(1, "make this many videos, with consecutive seeds", int, low=1, high=10000,
        group="Many videos", only_in_line="write one line per video")
    jobs: str | None = run_flag(None,
        "make one video per line of the file, a JSON object of flags", metavar="FILE.jsonl", path="input")
    concat: Path | None = run_flag(None, "with --jobs: also join all videos into one, in the order of the lines",
        metavar="FILM.mp4", path="output")
    serve: bool = run_flag(False, "serve an HTTP API, OpenAI's for videos, instead of making a video", bool,
        group="Server")
    mcp: bool = server(False,
        "serve MCP, the Model Context Protocol, to agents: on stdin and stdout, or with --serve at /mcp", bool)
    files: str | None = server(None, "with --mcp: folder whose files clients may use as inputs (default: none)",
        metavar="FOLDER")
    host: str = server("127.0.0.1", "address to listen on (default: 127.0.0.1); any other needs --api_key or --no_auth",
        metavar="ADDRESS")
    allowed_hosts: tuple[str, ...] = server((), "other host names that clients use for the server, such as a proxy's",
        metavar="NAME[,NAME]", several=True)
    port: int = server(8000, "port to listen on; 0: any free one (default: 8000)", int, low=0, high=65535)
    api_key: str | None = server(None, "key that clients must send, or a file with one per line", metavar="KEY")
    no_auth: bool = server(False, "serve other machines without a key", bool)
    workers: int | None = server(None, "processes that make videos (default: one for each GPU)", int, low=1, high=64)
    keep_days: float | None = server(None, "days to keep a job that has ended (default: forever)", float, low=0.01,
        high=36500)
    keep_gb: float | None = server(None,
        "most gigabytes for the files of all jobs; beyond it, the oldest ended jobs are deleted (default: no limit)",
        float, low=0.01, high=1000000)
    url_timeout: float = flag(1.2, "seconds to wait for a server to respond (default: 1.2)", float, low=0.05, high=600,
        group="Other", in_request=False)
    allow_private_urls: bool = run_flag(False, "also fetch inputs from this machine and private networks", bool)
    dry_run: bool = run_flag(False, "check everything and print the plan, without loading or downloading weights", bool)
    quiet: bool = run_flag(False, "print only warnings and the result", bool)
    verbose: bool = run_flag(False, "log more detail, and tracebacks of errors", bool)
    # fmt: on
    # derived fields
    audio_seconds: float | None = None  # None until the inputs are opened, or without sound
    number: int = 0  # of this video among `video_num`
    find_speakers: bool = False  # find them by their faces in the portrait
    frame_folder: bool = False  # the output is a folder of PNG files
    resume_if_same: bool = False  # resume an interrupted run of the same request, if any
    frames_copy: Path | None = None  # a lossless copy of the frames, for videos that continue this one
    seed_drawn: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)  # to run it again
    given: Mapping[str, Any] = field(default_factory=dict)  # flags that a changed prompt was made from
    notes: tuple[str, ...] = ()  # for the user, on what was changed

    @property
    def verbosity(self) -> int:
        """-1 for warnings and the result only, 0 by default, 1 for everything."""
        return self.verbose - self.quiet

    @property
    def to_enhance(self) -> bool:
        """Whether the prompt is still to be rewritten."""
        return self.enhance_prompt != ENHANCER_OFF

    def with_prompt(self, prompt: str) -> Self:
        """The request with its final prompt, which is not rewritten any more."""
        same = self.flags.get("window_prompt") == SAME_PROMPT
        return replace(
            self,
            prompt=prompt,
            window_prompt=prompt if same else self.window_prompt,
            enhance_prompt=ENHANCER_OFF,
            flags={**self.flags, "prompt": prompt},
        )

    @property
    def speakers(self) -> int:
        """The number of speakers; 0 without sound."""
        return 2 if self.diarization else len(self.input_audio) or int(bool(self.text))

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """All inputs as pairs of flag name and path or URL."""
        keyframes = tuple(image for image, _ in self.keyframes)
        several = {"ref_imgs": self.ref_imgs, "input_audio": self.input_audio, "keyframes": keyframes}
        single = ((name, getattr(self, name)) for name in ("image", "input_image", "input_video", "diarization"))
        return (
            *((name, source) for name, source in single if source),
            *((name, source) for name, sources in several.items() for source in sources),
        )

    def videos(self) -> Iterator[GenerationRequest]:
        """A request for each video, with consecutive seeds."""
        for number in range(self.video_num):
            seed = self.seed + number
            yield replace(self, seed=seed, number=number, flags={**self.flags, "seed": seed})

    @property
    def frames_out(self) -> int:
        """Number of new frames to write."""
        if self.audio_seconds is not None:
            return math.ceil(self.audio_seconds * self.task.fps)
        if self.task.condition_frames:
            return self.duration * self.task.fps
        return self.num_frames or self.duration * self.task.fps // VAE_STRIDE[0] * VAE_STRIDE[0] + 1

    @property
    def condition_frames(self) -> int:
        """Number of frames at the end of the input clip that condition the model."""
        return self.task.condition_frames_for(self.duration)


@dataclass(frozen=True)
class ResolvedRequest(GenerationRequest):
    """A request whose inputs have been opened, with its size and output path decided."""

    height: int = 0
    width: int = 0
    output: Path = Path()

    @staticmethod
    def of(request: GenerationRequest, **changes: Any) -> ResolvedRequest:
        """A resolved `request`, with `changes` for the fields that were undecided."""
        return ResolvedRequest(**{each.name: getattr(request, each.name) for each in fields(request)} | changes)


Request = TypeVar("Request", bound=GenerationRequest)

FLAGS = tuple(Flag(each.name, **each.metadata["flag"]) for each in fields(GenerationRequest) if each.metadata)
BY_NAME = {each.name: each for each in FLAGS}
INPUTS = tuple(each.name for each in FLAGS if each.path == "input" and each.in_line)
OUTPUTS = tuple(sorted(each.name for each in FLAGS if each.path == "output"))
COMMAND_ONLY = (*OUTPUTS, "outdir", "no_metadata", "checkpoint_every")  # not allowed in calls from Python
# flags with the same purpose in different tasks
ALIKE = (
    ("image", "input_image", "ref_imgs"),
    ("guidance_scale", "text_guidance_scale"),
    ("num_frames", "duration"),
    ("text", "prompt"),
)
INSTEAD = (("resolution", "height"), ("resolution", "width"))  # if both are given, the second wins
SUBSTITUTES = {"input_image": "input_video", "input_audio": "text"}  # a clip to dub, a text to speak
EXCLUSIVE = (
    ("duration", "num_frames"),
    ("quiet", "verbose"),
    ("input_image", "input_video"),
    ("keyframes", "input_video"),
    ("window_prompt", "input_video"),
    ("text", "input_audio"),
    ("text", "vocals"),
    ("text", "diarization"),
    ("diarization", "input_video"),
    ("resume", "dry_run"),
    ("offload", "low_vram"),
    ("memory", "offload"),
    ("memory", "low_vram"),
    ("memory", "parameters_level"),
    ("low_vram", "parameters_level"),
    ("shard_weights", "low_vram"),
    ("shard_weights", "parameters_level"),
    ("shard_weights", "cache"),
    ("exact_steps", "use_usp"),
    ("output", "outdir"),
)
# flags that need another one with a certain value (None: any), and the message without it
REQUIRED = (
    (
        "parameters_level",
        (("memory", "stream"),),
        "only changes how --offload works; add --offload, or give just --memory stream",
    ),
    (
        "stream_blocks",
        (("memory", "stream"),),
        "has no effect unless the transformer is streamed; add --memory stream or --low_vram",
    ),
    (
        "save_quantized",
        tuple(("quant", kind) for kind in QUANTIZATIONS),
        "nothing is quantized; add --quant fp8 or --low_vram",
    ),
    (
        "exact_steps",
        tuple(("attention", name) for name in INEXACT),
        f"all steps are exact; add --attention {' or '.join(INEXACT)}, or leave it out",
    ),
    ("keep_background", (("input_video", None),), "is for dubbing a clip; add --input_video, or leave it out"),
    ("keep_background", (("speaker_boxes", None),), "needs to know where the speaker is; add --speaker_boxes"),
    ("voice", (("text", None),), "is for text to be spoken; add --text"),
)
# other spellings of flags
SHORTHANDS = ("offload", "low_vram", "parameters_level", "compiler_transformer", "sequence_batch")
