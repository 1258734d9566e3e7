"""Tasks, defined by presets in configs/, and constants shared by all tasks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent
# inside the package if installed, beside it in a clone or an editable install
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
NO_PRESETS = ("prompts.yaml", "size_buckets.yaml", "synonyms.yaml")
TINY = "tiny"  # the built-in model, given as --model_id
RESOLUTIONS = ("480P", "540P", "720P")

MEMORY_MODES = ("resident", "offload", "stream")  # where components live, see memory/policy.py; fastest first
DEVICES = ("auto", "cuda", "cpu", "mps")
DTYPES = ("bfloat16", "float32")
QUANTIZATIONS = ("fp8", "fp8_dynamic")  # see memory/quantize.py
COMPILE = ("auto", "on", "off")

MAX_SIDE = 2048
SIZE_MULTIPLE = 16  # VAE stride 8 times patch size 2
VAE_STRIDE = (4, 8, 8)  # frames, height, width
PATCH_SIZE = (1, 2, 2)
LATENT_CHANNELS = 16
REFERENCE_SLOTS = 4  # latent frames for reference images
ROLL_OUT_SECONDS = 5  # a long single-shot extension is rolled out this much at a time
LATENT_FRAMES_PER_SECOND = 6
SEQUENCE_MULTIPLE = 8  # divides condition + new latent frames of a roll-out


@dataclass(frozen=True)
class TaskSpec:
    """One task's preset, as in `configs/<name>.yaml`. Durations in seconds."""

    name: str
    summary: str
    model_id: str
    also_published_as: tuple[str, ...]
    family: str  # its folder in the package, see families.py
    layout: str  # of the checkpoint: "diffusers" or "native" (Wan-native)
    transformer_folder: str
    inputs: tuple[str, ...]  # required flags
    takes: tuple[str, ...]  # task-specific flags
    size_buckets: str
    resolution: str
    fps: int
    num_inference_steps: int
    shift: float | None  # None: the value in the checkpoint's scheduler config
    transformer: Mapping[str, int]  # sizes of the published transformer
    tiny_size: tuple[int, int]  # height and width that the built-in model was trained at
    transformer_elements: Mapping[str, Any]  # see families.Elements; `blocks` begin with their number
    base_model_id: str = ""  # has the other components, if they are not beside the transformer
    guidance_scale: float = 1.0
    size: tuple[int, int] | None = None  # default height and width, unless an input decides the size
    prompt_prefix: str = ""
    enhancer_rules: str = ""  # task-specific instructions for --enhance_prompt
    default_duration: int = 0  # 0 if the sound decides the length
    min_duration: int = 0
    max_duration: int = 0
    condition_frames: int | Mapping[int, int] = 0
    negative_prompt: str = ""
    window_prompt: str = ""
    color_correction_strength: float = 1.0
    cut_at_seam: bool = False  # a new shot begins after the input clip
    lenient: bool = False  # accept flags without effect, with a note
    example: tuple[str, ...] = ()  # lines of flags for --help

    def condition_frames_for(self, duration: int) -> int:
        """Number of frames at the end of the input clip that condition the model."""
        return self.condition_frames[duration] if isinstance(self.condition_frames, Mapping) else self.condition_frames


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
        takes=tuple(raw.pop("takes")),
        example=tuple(raw.pop("example").splitlines()),
        size=tuple(raw.pop("size", ())) or None,
        tiny_size=tuple(raw.pop("tiny_size")),
        **raw,
    )


def load_yaml(path: Path) -> Any:
    """Read a YAML file, with libyaml's parser if PyYAML has it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def choose_size(spec: TaskSpec, resolution: str, height: int, width: int) -> tuple[int, int]:
    """Height and width of the output for an input picture of `height` x `width` pixels.

    It is the bucket with the closest height/width ratio (the first on ties), sides rounded down to multiples of 16.
    """
    buckets = load_yaml(CONFIG_DIR / "size_buckets.yaml")[spec.size_buckets][resolution]
    ratio = height / width
    closest = min(buckets, key=lambda key: abs(key - ratio))
    bucket_height, bucket_width = buckets[closest]
    return bucket_height // SIZE_MULTIPLE * SIZE_MULTIPLE, bucket_width // SIZE_MULTIPLE * SIZE_MULTIPLE


def complete_size(height: int | None, width: int | None, shape: tuple[int, int]) -> tuple[int, int]:
    """Complete a height or width by a multiple of 16, close to the aspect ratio of `shape` (height, width)."""

    def side(pixels: float) -> int:
        return min(MAX_SIDE, max(1, round(pixels / SIZE_MULTIPLE)) * SIZE_MULTIPLE)

    if height is None:
        assert width is not None
        return side(width * shape[0] / shape[1]), width
    return height, side(height * shape[1] / shape[0]) if width is None else width


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 4k+1 frames: one for the first frame, then one for every four."""
    return (frames - 1) // VAE_STRIDE[0] + 1


def plan_roll_outs(duration: int, condition_latent_frames: int = 7) -> list[int]:
    """New latent frames of each roll-out of a single-shot extension of `duration` seconds.

    Each roll-out makes up to 5 seconds at 6 latent frames a second, rounded up so that condition and new frames
    together are a multiple of 8; a surplus of one roll-out is deducted from the next ones.
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


def task_names() -> tuple[str, ...]:
    """The names of all presets, V3's first."""
    names = (path.stem for path in CONFIG_DIR.glob("*.yaml") if path.name not in NO_PRESETS)
    return tuple(sorted(names, key=lambda name: (task_spec(name).family != "wan", name)))


TASK_NAMES = task_names()
