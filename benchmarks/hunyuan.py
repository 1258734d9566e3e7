"""A denoising step of SkyReels V1's transformer: resident, in the mode for small GPUs, and in diffusers.

    diffusers       diffusers' model, resident, called as its pipeline calls it: the text is padded to 256 tokens, and
                    a mask hides the padding from every attention
    resident        ours, resident: the text is cropped to its real tokens, and attention needs no mask
    fp8, streamed   ours with --quant --offload --parameters_level: FP8 weights, blocks on the device while they run

A guided step is two forwards: one with the prompt, one with the negative prompt. Their weighted sum is left out: it
would amplify rounding differences. Ours are set up by the same code as a run with those flags: attention kernel, FP8
layers, streaming and pinned memory. All have the same random weights, and their velocities must agree first (FP8 up to
its rounding). Then all take turns, each round starting with a different one, and ratios are within a round.

On a GPU the peak memory is shown next to the planner's for the same request. It is that of one model alone: what it
keeps on the device between steps plus what a step adds.

    python benchmarks/hunyuan.py
    python benchmarks/hunyuan.py --device cuda --official --rounds 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from benchmarks.common import (
    Rounds,
    Work,
    at_least,
    environment,
    gigabytes,
    measure_peak,
    median_of,
    parser_of,
    quartiles,
    ratio_of,
    report,
    time_rounds,
)
from benchmarks.models import DTYPES, HEAD_DIM, random_model
from benchmarks.transformer_step import LIMIT, Result, agree, relative_difference
from skyreels_v3 import runtime
from skyreels_v3.cli import parse_request
from skyreels_v3.components import set_up_transformer
from skyreels_v3.denoising.loop import Condition
from skyreels_v3.families import width_of
from skyreels_v3.hunyuan.conditioning import HunyuanConditioning
from skyreels_v3.hunyuan.key_maps import TEXT_TOKENS
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.inputs import Inputs
from skyreels_v3.plan import Checked, plan
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import VAE_STRIDE, latent_frames, task_spec

TASK = "t2v"
BASELINE, RESIDENT, SMALL = "diffusers", "resident", "fp8, streamed"
FLAGS = {RESIDENT: ("--memory", "resident"), SMALL: ("--quant", "--offload", "--parameters_level")}
TOKENS = (40, 30)  # in a prompt of a few sentences, and in a negative prompt
TIMESTEP, GUIDANCE = 500.0, 1.0  # embedded guidance, an input of the model
LEAST_LAYERS = 2  # plus 4 single blocks; with fewer, all fit into the stream's two slots
SINGLE_RATIO = 2  # single blocks per double block
OFFICIAL_FRAMES = 97
PUBLISHED_PEAK = 18.5  # GB

Model = HunyuanVideoTransformer3DModel


@dataclass(frozen=True)
class Padded(HunyuanConditioning):
    """The conditioning as diffusers' pipeline passes it."""

    def arguments(self, model: Any) -> dict[str, Tensor]:
        """The padded text states, and a mask of the real ones in the model's dtype."""
        context = super().arguments(model)
        padding = TEXT_TOKENS - self.text.shape[1]
        context["encoder_hidden_states"] = F.pad(context["encoder_hidden_states"], (0, 0, 0, padding))
        context["encoder_attention_mask"] = F.pad(context["encoder_attention_mask"], (0, padding))
        return context


@dataclass(frozen=True)
class Way:
    """A model ready to run.

    Attributes:
        held: bytes it keeps on a GPU between steps.
        planned: peak bytes according to the planner, None if it has none.
    """

    model: Any
    condition: type[HunyuanConditioning]
    held: int
    planned: int | None


def main() -> int:
    """Compare, time and print; 1 if the outputs disagree."""
    args, sizes = parse_arguments()
    torch.manual_seed(0)
    requests = {name: request_of(args, sizes, flags) for name, flags in FLAGS.items()}
    with torch.no_grad(), ExitStack() as stays:  # as in the denoising loop
        ways = build_ways(args, sizes, requests, stays)
        works = bind_inputs(ways, args, sizes)
        results = compare(works, ways, args.device)
        if not agree(results, args.dtype):
            return 1
        rounds = time_rounds(works, args.rounds)
    tell(args, sizes, summarize(ways, results, rounds))
    return 0


def parse_arguments() -> tuple[argparse.Namespace, dict[str, int]]:
    """Parse and check the command line; also returns the sizes it asks for."""
    parser = parser_of(__doc__)
    parser.add_argument("--official", action="store_true", help="sizes of the published model and its 16:9 video")
    parser.add_argument(
        "--layers",
        type=at_least(LEAST_LAYERS),
        help="double blocks, with twice as many single blocks (default: 2, official: all)",
    )
    parser.add_argument("--dim", type=at_least(HEAD_DIM), default=512, help=f"model width, a multiple of {HEAD_DIM}")
    parser.add_argument("--frames", type=at_least(1), default=5, help="latent frames")
    parser.add_argument("--height", type=at_least(2), default=40, help="latent rows, even")
    parser.add_argument("--width", type=at_least(2), default=40, help="latent columns, even")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=at_least(2), default=5, help="timed steps of each; at least 2")
    args = parser.parse_args()
    if args.dim % HEAD_DIM or args.height % 2 or args.width % 2:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, --height and --width even")
    args.dtype = args.dtype or DTYPES[args.device.type != "cpu"]
    spec = task_spec(TASK)
    sizes = dict(spec.transformer)
    if args.official:
        assert spec.size is not None
        args.dim, args.frames = width_of(sizes), latent_frames(OFFICIAL_FRAMES)
        args.height, args.width = (side // stride for side, stride in zip(spec.size, VAE_STRIDE[1:], strict=True))
    args.layers = args.layers or (sizes["num_layers"] if args.official else LEAST_LAYERS)
    layers = {"num_layers": args.layers, "num_single_layers": SINGLE_RATIO * args.layers}
    return args, sizes | layers | {"num_attention_heads": args.dim // HEAD_DIM}


def request_of(args: argparse.Namespace, sizes: dict[str, int], flags: tuple[str, ...]) -> GenerationRequest:
    """A user's request for a checkpoint of these sizes."""
    height, width = args.height * VAE_STRIDE[1], args.width * VAE_STRIDE[2]
    frames = (args.frames - 1) * VAE_STRIDE[0] + 1
    video = ("--height", str(height), "--width", str(width), "--num_frames", str(frames))
    where = ("--device", args.device.type, "--dtype", args.dtype)
    request = parse_request(["--task_type", TASK, "--prompt", "A boat", "--quiet", *video, *where, *flags])
    return replace(request, task=replace(request.task, transformer=sizes))


# The variants


def build_ways(
    args: argparse.Namespace, sizes: dict[str, int], requests: Mapping[str, GenerationRequest], stays: ExitStack
) -> dict[str, Way]:
    """Every variant with the same weights; their hooks live until `stays` exits."""
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # a run uses the current device
    build, host = partial(HunyuanTransformer3DModel, **sizes), torch.device("cpu")
    resident = random_model(build, getattr(torch, args.dtype), args.device, host)
    small = with_weights_of(resident, HunyuanTransformer3DModel)  # before the other's weights are on the device
    ours = {
        name: set_up(model, requests[name], args.device, stays)
        for name, model in ((SMALL, small), (RESIDENT, resident))
    }
    baseline = Way(with_weights_of(resident, Model), Padded, ours[RESIDENT].held, None)
    return {BASELINE: baseline, RESIDENT: ours[RESIDENT], SMALL: ours[SMALL]}


def with_weights_of(model: Any, kind: Callable[..., Model]) -> Any:
    """A model of class `kind` that shares the weights."""
    with torch.device("meta"):
        made = kind(**model.config)
    made.load_state_dict(model.state_dict(), assign=True)
    return made.requires_grad_(False).eval()


def set_up(model: Any, request: GenerationRequest, device: torch.device, stays: ExitStack) -> Way:
    """Our model set up as for a run, until `stays` exits."""
    checked = Checked(ResolvedRequest.of(request), Inputs(), None)
    started = runtime.start(plan(checked, runtime.find_machine(request)))
    before = allocated(device)
    set_up_transformer(model, request, started)
    stays.enter_context(started.resident(model, "denoising", model.blocks))
    stage = started.plan.components["transformer"]
    weights = stage.streamed if started.policy.mode == "stream" else stage.weights
    return Way(model, HunyuanConditioning, allocated(device) - before, weights + stage.activations)


def allocated(device: torch.device) -> int:
    """Bytes allocated on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def bind_inputs(ways: Mapping[str, Way], args: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Work]:
    """A step of each variant on the same noise and texts."""
    noise = partial(torch.randn, device=args.device)
    latents = noise(1, sizes["in_channels"], args.frames, args.height, args.width)
    texts = [
        (noise(1, tokens, sizes["text_embed_dim"]), noise(1, sizes["pooled_projection_dim"]), GUIDANCE)
        for tokens in TOKENS
    ]
    return {
        name: partial(step, way.model, [way.condition(*text) for text in texts], latents) for name, way in ways.items()
    }


def step(model: Any, conditions: Sequence[Condition], latents: Tensor) -> Tensor:
    """The velocity under each condition; embeddings are recomputed each time, at next to no cost."""
    timestep = torch.tensor(TIMESTEP)
    return torch.cat([made.predict(model, latents, timestep) for made in conditions])


def compare(works: Mapping[str, Work], ways: Mapping[str, Way], device: torch.device) -> dict[str, Result]:
    """Compare every velocity with the first and measure the peak, after a first, slower step."""
    expected, results = None, {}
    for name, work in works.items():
        work()
        out, added = measure_peak(work, device)
        expected = out if expected is None else expected
        peak = None if added is None else ways[name].held + added
        results[name] = Result(relative_difference(out, expected), peak)
    return results


# Results


def summarize(ways: Mapping[str, Way], results: Mapping[str, Result], rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Results of each variant."""
    return {
        name: {
            "seconds": round(median_of(rounds, name), 4),
            "ratio": ratio_of(rounds, name, BASELINE),
            "peak_bytes": result.peak_bytes,
            "predicted_bytes": ways[name].planned,
            "difference": result.difference,
        }
        for name, result in results.items()
    }


def tell(args: argparse.Namespace, sizes: dict[str, int], figures: dict[str, dict[str, Any]]) -> None:
    """Print a table, then one JSON line."""
    met = figures[RESIDENT]["ratio"]["median"] <= LIMIT
    tokens = args.frames * args.height * args.width // 4
    shape = f"{args.frames} x {args.height} x {args.width}"
    blocks = f"{sizes['num_layers']} double and {sizes['num_single_layers']} single blocks of width {args.dim}"
    title = f"one guided step, {args.dtype}, {blocks}, {tokens} tokens (latents {shape}), {args.rounds} rounds"
    header = ("", "s", f"ratio to {BASELINE}", "quartiles", "peak, GB", "planned, GB", "peak / planned", "difference")
    texts = " and ".join(map(str, TOKENS))
    notes = [f"texts of {texts} tokens; {BASELINE} has them padded to {TEXT_TOKENS}, with a mask"]
    notes += [f"{RESIDENT} at least as fast as {BASELINE}: {'yes' if met else 'NO'}"]
    if args.official:
        notes += [f"published for V1's own quantized, offloaded mode, a whole run of this video: {PUBLISHED_PEAK} GB"]
    chosen = {key: getattr(args, key) for key in ("official", "dtype", "dim", "layers", "frames", "height", "width")}
    line = {**environment("hunyuan", args.device), **chosen, "tokens": tokens, "rounds": args.rounds}
    line |= {"baseline": BASELINE, "ways": figures, "limit": LIMIT, "met": met}
    report(title, header, [row(name, figure) for name, figure in figures.items()], notes, line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    peak, says = figure["peak_bytes"], figure["predicted_bytes"]
    return (
        name,
        f"{figure['seconds']:.3f}",
        f"{figure['ratio']['median']:.3f}",
        quartiles(figure["ratio"], 3),
        gigabytes(peak),
        gigabytes(says),
        "-" if peak is None or says is None else f"{peak / says:.2f}",
        f"{figure['difference']:.1e}",
    )


if __name__ == "__main__":
    sys.exit(main())
