"""What a task is and what a user asked for. Plain data, no torch.

A `TaskSpec` is one file of configs/ in a frozen dataclass; a `GenerationRequest` is one command line, checked. Sizes
and counts that follow from the two alone are worked out here: the dry run and the real run cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

PACKAGE = Path(__file__).resolve().parent
# inside an installed package; beside it in a clone and in an editable install
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
TASK_NAMES = (
    *("reference_to_video", "single_shot_extension", "shot_switching_extension", "talking_avatar"),
    *("t2v", "i2v"),
)
HUNYUAN = "hunyuan"  # the layout of V1: HunyuanVideo's transformer, trained further
TINY = "tiny"  # the built-in toy, in the place of a checkpoint's id
RESOLUTIONS = ("480P", "540P", "720P")

MEMORY_MODES = ("resident", "offload", "stream")  # where components live, see memory/policy.py; fastest first
DEVICES = ("auto", "cuda", "cpu", "mps")
DTYPES = ("bfloat16", "float32")
QUANTIZATIONS = ("fp8", "fp8_dynamic")  # see memory/quantize.py

SIZE_MULTIPLE = 16  # VAE stride 8 times patch 2
VAE_STRIDE = (4, 8, 8)  # frames, height, width
PATCH_SIZE = (1, 2, 2)
LATENT_CHANNELS = 16
REFERENCE_SLOTS = 4  # latent frames for reference images
ROLL_OUT_SECONDS = 5  # a long single-shot extension is rolled out this much at a time
LATENT_FRAMES_PER_SECOND = 6
SEQUENCE_MULTIPLE = 8  # condition + new latent frames of a roll-out


@dataclass(frozen=True)
class TaskSpec:
    """One task's preset, as in `configs/<name>.yaml`. Durations in seconds."""

    name: str
    summary: str
    model_id: str
    also_published_as: tuple[str, ...]
    layout: str  # "diffusers", "native" (Wan-native) or HUNYUAN, see checkpoints/
    transformer_folder: str
    inputs: tuple[str, ...]
    size_buckets: str
    resolution: str
    fps: int
    num_inference_steps: int
    shift: float | None  # None: the checkpoint's scheduler says
    transformer: Mapping[str, int]
    base_model_id: str = ""  # where the other components are, if not beside the transformer
    guidance_scale: float = 1.0
    size: tuple[int, int] | None = None  # height and width, where neither is given and no input has a shape
    prompt_prefix: str = ""
    default_duration: int = 0  # 0 where the length is that of the sound
    min_duration: int = 0
    max_duration: int = 0
    condition_frames: int | Mapping[int, int] = 0
    negative_prompt: str = ""
    window_prompt: str = ""
    example: tuple[str, ...] = ()  # lines of flags for --help

    @property
    def family(self) -> str:
        """The folder of the model family, "wan" or "hunyuan"."""
        return HUNYUAN if self.layout == HUNYUAN else "wan"

    @property
    def kinds(self) -> frozenset[str]:
        """What flags ask of a task that they are for: its inputs, or its layout."""
        return frozenset((*self.inputs, self.layout))

    def condition_frames_for(self, duration: int) -> int:
        """Number of last frames of the input clip that the model sees."""
        return self.condition_frames[duration] if isinstance(self.condition_frames, Mapping) else self.condition_frames


class Lora(NamedTuple):
    """A LoRA that is asked for."""

    source: str  # file, folder or hub id
    scale: float = 1.0
    partial: bool = False  # leave out what the model has nothing for


@dataclass(frozen=True)
class GenerationRequest:
    """Everything one run needs, checked. `height` and `width` are None until the inputs have been seen."""

    task: TaskSpec
    model_id: str
    prompt: str
    model_source: str = "huggingface"
    base_model_id: str | None = None  # None: beside the transformer if it is there, else the task's own
    negative_prompt: str = ""
    image: str | None = None
    ref_imgs: tuple[str, ...] = ()
    input_video: str | None = None
    input_image: str | None = None
    input_audio: tuple[str, ...] = ()  # one for each speaker
    audio_type: str = "parallel"  # or "sequential": how two speakers' sounds lie in time
    speaker_boxes: tuple[tuple[int, int, int, int], ...] = ()  # (x0, y0, x1, y1) in pixels of the portrait
    keyframes: tuple[tuple[str, float], ...] = ()  # (image, seconds)
    audio_seconds: float | None = None  # None until the input has been looked at
    window_prompt: str = ""
    duration: int = 5
    num_frames: int | None = None
    resolution: str = "720P"
    height: int | None = None
    width: int | None = None
    seed: int = 42
    num_inference_steps: int = 8
    shift: float | None = 5.0
    guidance_scale: float = 1.0
    embedded_guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    text_guidance_scale: float = 1.0
    audio_guidance_scale: float = 1.0
    color_correction_strength: float = 1.0
    device: str = "auto"
    dtype: str | None = None
    no_riflex: bool = False
    cache: float | None = None  # threshold of the step cache, see denoising/step_cache.py
    output: Path | None = None
    outdir: str | None = None  # a folder of results/, with V1's names of files
    video_num: int = 1
    number: int = 0  # of this video among `video_num`
    frame_folder: bool = False  # the output is a folder of PNG files
    save_latents: Path | None = None
    include_input: bool = False
    no_metadata: bool = False
    memory: str = "auto"  # where components live, see memory/policy.py
    stream_blocks: int = 0  # blocks of the transformer that stay on the device when it is streamed
    high_cpu_memory: bool = False  # pin what is streamed, however much of the host's memory that is
    quant: str | None = None  # "fp8" or "fp8_dynamic", see memory/quantize.py
    save_quantized: Path | None = None
    vae_dtype: str = "float32"
    attention: str = "auto"
    compile: bool = False
    lora: tuple[Lora, ...] = ()
    no_cache: bool = False
    use_usp: bool = False
    ulysses_degree: int | None = None  # None: see ranks.choose_degrees
    ring_degree: int | None = None
    cfg_degree: int | None = None
    shard_weights: bool = False
    broadcast_weights: bool = False
    dry_run: bool = False
    resume: bool = False  # refuse what cannot be gone on with, but begin where nothing is left
    checkpoint_every: float = 60.0  # seconds between copies of latents that are being denoised; 0: none
    resume_if_same: bool = False  # go on with an interrupted run of just this request, else begin
    seed_drawn: bool = False
    url_timeout: float = 1.2
    allow_private_urls: bool = False
    verbosity: int = 0
    flags: Mapping[str, Any] = field(default_factory=dict)  # as given, to run it again
    notes: tuple[str, ...] = ()  # on what was changed of it, for the user

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """All inputs, paths or URLs, each after the name of its flag."""
        keyframes = tuple(image for image, _ in self.keyframes)
        several = {"ref_imgs": self.ref_imgs, "input_audio": self.input_audio, "keyframes": keyframes}
        single = ((name, getattr(self, name)) for name in ("image", "input_image", "input_video"))
        return (
            *((name, source) for name, source in single if source),
            *((name, source) for name, sources in several.items() for source in sources),
        )

    def videos(self) -> Iterator[GenerationRequest]:
        """A request for each of the videos, with seeds that follow each other."""
        for number in range(self.video_num):
            seed = self.seed + number
            yield replace(self, seed=seed, number=number, flags={**self.flags, "seed": seed})

    @property
    def frames_out(self) -> int:
        """Number of newly generated frames that are written."""
        if self.audio_seconds is not None:
            return math.ceil(self.audio_seconds * self.task.fps)
        if self.task.condition_frames:
            return self.duration * self.task.fps
        return self.num_frames or self.duration * self.task.fps // VAE_STRIDE[0] * VAE_STRIDE[0] + 1

    @property
    def condition_frames(self) -> int:
        """Number of last frames of the input clip that the model sees."""
        return self.task.condition_frames_for(self.duration)


@dataclass(frozen=True)
class ResolvedRequest(GenerationRequest):
    """A request whose inputs have been looked at, so that nothing about the output is open."""

    height: int = 0
    width: int = 0
    output: Path = Path()

    @staticmethod
    def of(request: GenerationRequest, **changes: Any) -> ResolvedRequest:
        """`request` with what was open about it."""
        return ResolvedRequest(**{each.name: getattr(request, each.name) for each in fields(request)} | changes)


Request = TypeVar("Request", bound=GenerationRequest)


@cache
def task_spec(name: str) -> TaskSpec:
    """The preset of task `name`, read from `configs/`."""
    raw = load_yaml(CONFIG_DIR / f"{name}.yaml")
    duration = raw.pop("duration", {"default": 0, "min": 0, "max": 0})
    return TaskSpec(
        name=name,
        default_duration=duration["default"],
        min_duration=duration["min"],
        max_duration=duration["max"],
        also_published_as=tuple(raw.pop("also_published_as")),
        inputs=tuple(raw.pop("inputs")),
        example=tuple(raw.pop("example").splitlines()),
        size=tuple(raw.pop("size", ())) or None,
        **raw,
    )


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; libyaml's parser where PyYAML has it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def choose_size(spec: TaskSpec, resolution: str, height: int, width: int) -> tuple[int, int]:
    """Height and width of the output for an input picture of `height` x `width` pixels.

    The bucket with the closest height/width ratio (the first one on ties), both sides rounded down to multiples of 16.
    """
    buckets = load_yaml(CONFIG_DIR / "size_buckets.yaml")[spec.size_buckets][resolution]
    ratio = height / width
    closest = min(buckets, key=lambda key: abs(key - ratio))
    bucket_height, bucket_width = buckets[closest]
    return bucket_height // SIZE_MULTIPLE * SIZE_MULTIPLE, bucket_width // SIZE_MULTIPLE * SIZE_MULTIPLE


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 4k+1 frames: the first frame stands alone, then one for every four."""
    return (frames - 1) // VAE_STRIDE[0] + 1


def plan_roll_outs(duration: int, condition_latent_frames: int = 7) -> list[int]:
    """New latent frames of every roll-out of a single-shot extension of `duration` seconds.

    Each roll-out makes up to 5 seconds at 6 latent frames a second, rounded up so that condition and new frames
    together are a multiple of 8; what one roll-out makes too much, the next ones make less.
    """
    rolls: list[int] = []
    surplus = 0
    for start in range(0, duration, ROLL_OUT_SECONDS):
        frames = LATENT_FRAMES_PER_SECOND * min(ROLL_OUT_SECONDS, duration - start)
        excess = (frames + condition_latent_frames) % SEQUENCE_MULTIPLE
        if excess > surplus:
            surplus += SEQUENCE_MULTIPLE - excess
            frames += SEQUENCE_MULTIPLE - excess
        else:
            surplus -= excess
            frames -= excess
        rolls.append(frames)
    return rolls
