"""A whole run of generate_video.py, stage by stage: time, and on a GPU peak memory against the planner's.

The normal code runs in this process and is watched from outside: every stage asks the runtime for its models by name,
every denoising step advances the progress bar, and frames are decoded while they are written.

--model_id tiny, the default, is the built-in model: it shows the overhead around the models. --model_id full has
the published sizes of V3 with random weights, created on the device in seconds: nothing is downloaded, and the output
is noise. On the host all blocks share the same weights, so they take little memory there unless pinned. With --layers N
the transformer has N blocks, and the time of a step is also scaled to all of them. --model_id small is the same at
minimal sizes. All other flags are generate_video.py's.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --model_id full --low_vram --resolution 480P
    python benchmarks/end_to_end.py --model_id full --low_vram --layers 10 --task_type talking_avatar --resolution 480P
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from benchmarks.common import at_least, environment, gigabytes, parser_of, report, wait_for
from benchmarks.models import random_model, random_transformer
from skyreels_v3 import components, runtime
from skyreels_v3 import generate as session
from skyreels_v3.cache import TensorCache
from skyreels_v3.checkpoints.hub import TINY
from skyreels_v3.cli import parse_request
from skyreels_v3.console import set_up_logging
from skyreels_v3.errors import UserError
from skyreels_v3.plan import Plan, plan, vae_bytes
from skyreels_v3.request import GenerationRequest
from skyreels_v3.resolve import AssetResolver, preflight
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.wan.checkpoint import load_text_encoder
from skyreels_v3.wan.conditioning import AudioEncoder, ImageEncoder, TextEncoder
from skyreels_v3.wan.vae import VideoVAE
from training.encoders import WIDTH
from training.layouts import AUDIO_ENCODER, IMAGE_ENCODER
from training.networks import AVATAR, TRANSFORMER

FULL, SMALL = "full", "small"
ASSETS = Path(__file__).resolve().parents[1] / "assets"
INPUTS = {
    "reference_to_video": ("--ref_imgs", f"{ASSETS / 'fox.png'},{ASSETS / 'lantern.png'}"),
    "single_shot_extension": ("--input_video", str(ASSETS / "boat.mp4")),
    "shot_switching_extension": ("--input_video", str(ASSETS / "boat.mp4")),
    "talking_avatar": ("--input_image", str(ASSETS / "portrait.png"), "--input_audio", str(ASSETS / "speech.mp3")),
    "t2v": (),
    "i2v": ("--image", str(ASSETS / "fox.png")),
}
V3 = (*INPUTS,)[:4]  # only these have random encoders
SECONDS, RATE = 3, 16_000  # of audio: short enough for one pass
FEW = ("--height", "128", "--width", "192", "--num_inference_steps", "4")  # for a small model
FEW_FULL = ("--height", "720", "--width", "1280", "--num_inference_steps", "2")
# apart from the transformer's, which are in the task
PUBLISHED: dict[str, dict[str, Any]] = {
    "text_encoder": {
        **{"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    },
    "vae": {},
    "image_encoder": {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
        **{"image_size": 224, "patch_size": 14, "hidden_act": "gelu"},
    },
    "audio_encoder": {},
}
SMALLEST: dict[str, dict[str, Any]] = {  # besides the built-in model's transformer
    "text_encoder": {"vocab_size": 1024, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "vae": {"base_dim": 4},
    "image_encoder": IMAGE_ENCODER,
    "audio_encoder": AUDIO_ENCODER,
}
DENOISING, DECODING = "denoising", "decoding with the VAE"  # names of stages
PLANNED = {  # the planner's names for the stages
    "encoding the prompt": "text encoder",
    "encoding with the VAE": "VAE encode",
    DENOISING: "transformer",
    DECODING: "VAE decode",
}
END = object()


def main() -> int:
    """Run and print; 2 if the request is invalid."""
    args, rest = parse_arguments()
    set_up_logging(-1)
    record = Record()
    try:
        with tempfile.TemporaryDirectory(prefix="end-to-end-benchmark-") as folder:
            request = watched_run(args, rest, Path(folder), record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tell(args, request, record)
    return 0


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own flags, and the remaining arguments."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--model_id", choices=(TINY, FULL, SMALL), default=TINY)
    parser.add_argument(
        "--layers", type=at_least(1), help="number of transformer blocks of the full model (default: all)"
    )
    parser.add_argument("--task_type", choices=TASK_NAMES, default="reference_to_video")
    args, rest = parser.parse_known_args()
    if args.model_id != TINY and args.task_type not in V3:
        parser.error(f"--model_id {args.model_id}: has no encoders for {args.task_type}; choose another --task_type")
    return args, rest


# Watching


@dataclass
class Record:
    """The measurements: seconds of each stage and step, and peak bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    runtime: Runtime | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a `with` block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.runtime is not None:
                wait_for(self.runtime.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def peak(self, name: str, device: torch.device) -> Iterator[None]:
        """Record the peak memory of a `with` block."""
        if device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield
        finally:  # also if remaining frames are never decoded
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))

    def timed(self, name: str, make: Callable[..., Iterator[Any]]) -> Callable[..., Generator[Any, None, None]]:
        """Wrap `make`: the time it takes to yield each item counts towards a stage."""

        def items(*arguments: Any) -> Generator[Any, None, None]:
            made = make(*arguments)
            try:
                while True:
                    with self.stage(name):
                        item = next(made, END)
                    if item is END:
                        return
                    yield item
            finally:
                made.close()

        return items


class Laps:
    """A progress bar that records when it is updated."""

    def __init__(self, bar: Any, steps: list[float]) -> None:
        self.bar, self.steps, self.last = bar, steps, time.perf_counter()

    def update(self, count: int = 1) -> None:
        """Count a step; it has ended on the device by then, because its result was read."""
        if count == 0:  # the steps done by an interrupted run: none here
            return
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now
        self.bar.update(count)


@dataclass(frozen=True)
class WatchedRuntime(Runtime):
    """A runtime that records which stage runs when."""

    record: Record = field(default_factory=Record)

    @contextmanager
    def resident(self, module: nn.Module, stage: str, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """As in `Runtime`, with recording; decoding is timed per item, since it waits for the writer in between."""
        with ExitStack() as stack:
            if stage != DECODING:
                stack.enter_context(self.record.stage(stage))
            stack.enter_context(self.record.peak(stage, self.device))
            stack.enter_context(super().resident(module, stage, blocks))
            yield

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Any]:
        """As in `Runtime`, with recording of denoising steps."""
        with super().bar(name, total) as inner:
            denoising = total == self.plan.request.num_inference_steps and name.startswith(DENOISING)
            yield Laps(inner, self.record.steps) if denoising else inner


# Running


def watched_run(args: argparse.Namespace, rest: list[str], folder: Path, record: Record) -> GenerationRequest:
    """Run generate_video.py's own code with the watchers patched in; returns the request that was run."""
    flags = ["--task_type", args.task_type, "--model_id", TINY, "--prompt", "A boat sails into the dusk"]
    given = [*INPUTS[args.task_type]]
    if args.task_type == "talking_avatar" and args.model_id != TINY:
        given[-1] = str(write_sound(folder / "sound.wav"))
    flags += [*given, "--output", str(folder / "video.mp4"), "--no_cache", "--quiet"]
    sizes = [*(FEW_FULL if args.model_id == FULL else FEW)]
    if "--resolution" in rest:
        sizes = sizes[4:]
    checked = preflight(parse_request([*flags, *sizes, *rest]), folder)
    request = checked.request
    _, tiny = AssetResolver().resolve(request, None)
    loading = components.load_components
    if args.model_id != TINY:
        loading = partial(random_components, tiny)
    if args.model_id == FULL:
        layers = args.layers or request.task.transformer["num_layers"]
        task = replace(request.task, transformer={**request.task.transformer, "num_layers": layers})
        request = replace(request, model_id=request.task.model_id, task=task)
    # without a checkpoint the plan uses the published sizes
    checked = replace(checked, request=request, checkpoint=None if args.model_id == FULL else tiny)
    starting, frames = runtime.start, session.all_frames
    with ExitStack() as stack:
        for module, name, watcher in (
            (runtime, "start", lambda *given: watch(starting(*given), record)),
            (session, "load_components", lambda *given: watched_loading(loading, record, *given)),
            (session, "all_frames", record.timed("frames", frames)),
            (session, "write", watched_writing(session.write, record)),
        ):
            stack.enter_context(patch.object(module, name, watcher))
        with record.stage("total"):
            made = plan(checked, runtime.find_machine(request))
            session.Generator(made).write(made)
    record.seconds["write"] -= record.seconds.pop("frames")
    return request


def watch(started: Runtime, record: Record) -> Runtime:
    """The same runtime with recording."""
    known = {each.name: getattr(started, each.name) for each in fields(started)}
    record.runtime = WatchedRuntime(**known, record=record)
    return record.runtime


def watched_loading(load: Callable[..., components.Components], record: Record, *given: Any) -> components.Components:
    """Load the components, with the VAE's decoding recorded."""
    with record.stage("load"):
        made = load(*given)
    made.vae.decode_stream = record.timed(DECODING, made.vae.decode_stream)
    return made


def watched_writing(write: Callable[..., Path], record: Record) -> Callable[..., Path]:
    """Time the writer; this includes making its frames, which is subtracted later."""

    def written(*given: Any) -> Path:
        with record.stage("write"):
            return write(*given)

    return written


def write_sound(path: Path) -> Path:
    """Write a tone that rises and fades."""
    time = np.linspace(0, SECONDS, SECONDS * RATE)
    samples = 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(2 * np.pi * time) ** 2
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def random_components(tiny: Path, plan: Plan, runtime: Runtime) -> components.Components:
    """Networks with random weights, of the published sizes or small ones; the tokenizer is the built-in model's."""
    request = plan.request
    small = request.model_id == TINY
    sizes, device = SMALLEST if small else PUBLISHED, runtime.device
    home = device if runtime.policy.mode == "resident" else torch.device("cpu")
    config = UMT5Config(
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **sizes["text_encoder"]
    )
    text_encoder = random_model(lambda: UMT5EncoderModel(config), runtime.dtype, device, home)
    tokenizer = load_text_encoder(tiny, runtime.dtype).tokenizer
    vae = VideoVAE(fresh(lambda: AutoencoderKLWan(**sizes["vae"]), getattr(torch, request.vae_dtype), device, home))
    components.set_up_vae(vae, runtime)
    sound: dict[str, Any] = {}
    if "input_audio" in request.task.inputs:
        image, audio = CLIPVisionConfig(**sizes["image_encoder"]), Wav2Vec2Config(**sizes["audio_encoder"])
        sound["image_encoder"] = ImageEncoder(fresh(lambda: CLIPVisionModel(image), runtime.dtype, device, home))
        sound["audio_encoder"] = AudioEncoder(fresh(lambda: Wav2Vec2Model(audio), torch.float32, device, home))
    tiny_sizes = AVATAR if sound else TRANSFORMER
    known = tiny_sizes if small else request.task.transformer
    transformer = random_transformer(known, runtime.dtype, device, home)
    components.set_up_transformer(transformer, request, runtime)
    return components.Components(
        transformer,
        vae,
        text_encoder=TextEncoder(text_encoder, tokenizer),
        prompt_cache=TensorCache(None, ""),
        quant=request.quant,
        **sound,
    )


def fresh(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, home: torch.device) -> Any:
    """A newly initialized model, created on `device` and kept on `home`."""
    with device:
        model = build()
    return model.eval().requires_grad_(False).to(home, dtype)


# Results


def predicted(planned: Plan, made: Runtime, stage: str) -> int | None:
    """The planner's bytes for a stage, None if it has none."""
    name = PLANNED.get(stage)
    if name is None:
        return None
    now = planned.components[name]
    part = name.removeprefix("VAE ")
    working = now.activations if part == name else vae_bytes(planned.request, part, made.policy.tiles)
    if made.policy.mode != "resident":
        return working + (now.streamed if made.policy.mode == "stream" else now.weights)
    there = {name.split()[0]: part.weights for name, part in planned.components.items()}  # counts the VAE once
    return working + sum(there.values())


def summarize(record: Record, full: bool) -> dict[str, Any]:
    """Results of each stage, in the order they first ended."""
    assert record.runtime is not None
    planned = record.runtime.plan if full else None
    made: dict[str, Any] = {}
    for stage, taken in record.seconds.items():
        peak = record.peaks.get(stage)
        says = None if planned is None else predicted(planned, record.runtime, stage)
        made[stage] = {"seconds": round(taken, 4), "peak_bytes": peak, "predicted_bytes": says}
    return made


def tell(args: argparse.Namespace, request: GenerationRequest, record: Record) -> None:
    """Print a table, then one JSON line."""
    assert record.runtime is not None
    stages = summarize(record, args.model_id == FULL)
    total = stages.pop("total")["seconds"]
    made, first, later = record.runtime, record.steps[0], record.steps[1:]
    title = f"{args.model_id}, {request.task.name}, {request.frames_out} frames of {request.height} x {request.width}, "
    title += f"{made.dtype}, {request.quant or 'not quantized'}, memory {made.policy.mode}"
    rows = [row(name, figure) for name, figure in stages.items()]
    step = statistics.median(later or [first])
    named = [("its first step", first), ("a later step", step)]
    blocks = request.task.transformer["num_layers"]
    all_blocks = task_spec(args.task_type).transformer["num_layers"]
    if blocks != all_blocks:
        named += [(f"with {all_blocks} blocks, not {blocks}", step * all_blocks / blocks)]
    rows += [(f"  {name}", f"{taken:.3f}", "-", "-", "-") for name, taken in named]
    rest = total - sum(figure["seconds"] for figure in stages.values())
    rows += [("all else", f"{rest:.3f}", "-", "-", "-")]
    rows += [("everything", f"{total:.3f}", gigabytes(max(record.peaks.values(), default=None)), "-", "-")]
    line = {**environment("end_to_end", made.device), "model_id": args.model_id, "task": request.task.name}
    line |= {"frames": request.frames_out, "height": request.height, "width": request.width}
    line |= {"dtype": str(made.dtype).removeprefix("torch."), "memory": made.policy.mode, "quant": request.quant}
    line |= {"stages": stages, "steps": [round(taken, 4) for taken in record.steps], "total": total}
    line |= {"blocks": blocks, "step_of_all_blocks": round(step * all_blocks / blocks, 3)}
    report(title, ("", "s", "peak, GB", "planned, GB", "peak / planned"), rows, [], line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    peak, says = figure["peak_bytes"], figure["predicted_bytes"]
    ratio = "-" if peak is None or says is None else f"{peak / says:.2f}"
    return (name, f"{figure['seconds']:.3f}", gigabytes(peak), gigabytes(says), ratio)


if __name__ == "__main__":
    sys.exit(main())
