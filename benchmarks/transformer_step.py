"""A forward pass of our transformer in each mode against diffusers' `WanTransformer3DModel`, with the same weights.

    exact        as in a run, with the attention kernel chosen for the device
    compile      as with --compile
    fp8          as with --quant fp8
    fp8_dynamic  as with --quant fp8_dynamic
    stream       as with --memory stream: weights in host memory, pinned on a GPU

All outputs must agree with diffusers first (FP8 up to its rounding), so that the times compare equal work. Then they
take turns, each round starting with a different one: other load on the machine affects all alike, and the ratio within
a round says more than two medians. The weights are held once; FP8 and streaming have their own copies.

FLOPs are counted by the planner, the same for all. The ceiling is the fastest product of square matrices in the run's
dtype, measured on the device just before.

The defaults are the 14B model's proportions at a quarter of its width. --official uses its real sizes; with fewer
--layers, seconds are also shown scaled to all of them.

    python benchmarks/transformer_step.py
    python benchmarks/transformer_step.py --device cuda --official r2v-720p --layers 3 --rounds 3
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
from torch import Tensor

from benchmarks.common import (
    Rounds,
    Work,
    at_least,
    environment,
    gigabytes,
    median_of,
    parser_of,
    quartiles,
    ratio_of,
    report,
    seconds,
    time_rounds,
)
from benchmarks.models import (
    Case,
    add_case_flags,
    case_of,
    diffusers_forward_of,
    diffusers_twin,
    forward_of,
    make_inputs,
    outputs_of,
    random_transformer,
    twin,
)
from skyreels_v3.attention.backends import choose_attention
from skyreels_v3.components import compile_blocks
from skyreels_v3.memory.quantize import cache_dequantized, quantize
from skyreels_v3.memory.stream import BlockStream
from skyreels_v3.runtime import COMPILERS, FP8_CAPABILITY, pin
from skyreels_v3.wan.family import forward_flop
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

BASELINE = "diffusers"
EXACT = ("exact", "stream")  # exact modes, which have to be at least as fast
MODES = ("exact", "compile", "fp8", "fp8_dynamic", "stream")
CPU_MODES = ("exact", "compile", "fp8", "stream")
LIMIT = 1.0  # a mode / diffusers
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}  # RMS of the difference over that of the output
FP8_TOLERANCE = 0.3
PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
PRODUCT_RUNS = 5  # per size; the fastest counts

Model = SkyReelsTransformer3DModel


@dataclass(frozen=True)
class Result:
    """Result of a mode's untimed runs."""

    difference: float  # relative RMS, from the baseline
    peak_bytes: int | None


def main() -> int:
    """Compare, time and print; 1 if the outputs disagree."""
    args, case = parse_arguments()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    ceiling = max(product_rate(size, args.device, dtype) for size in PRODUCT_SIZES.get(args.device.type, (4096,)))
    with ExitStack() as stays:
        models = build_models(case, args, stays)
        with torch.inference_mode():  # only the forward passes, as in a run
            works = bind_inputs(models, case, args.device, dtype)
            results = compare(works, models, args.device)
            if not agree(results, args.dtype):
                return 1
            rounds = time_rounds(works, args.rounds)
    tell(args, case, ceiling, summarize(case, results, rounds, ceiling))
    return 0


def parse_arguments() -> tuple[argparse.Namespace, Case]:
    """Parse and check the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--modes", help=f"some of {','.join(MODES)} (default: all; without fp8_dynamic on a CPU)")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="timed forwards of each; at least 2")
    add_case_flags(parser)
    args = parser.parse_args()
    case = case_of(parser, args)
    args.modes = args.modes.split(",") if args.modes else [*(CPU_MODES if args.device.type == "cpu" else MODES)]
    if len({*args.modes}) < len(args.modes) or "exact" not in args.modes or not {*args.modes} <= {*MODES}:
        parser.error(f"--modes must be exact and any of {','.join(MODES[1:])}, each once")
    if reason := impossible(args.modes, args.device):
        parser.error(f"--modes: {reason}; leave it out")
    return args, case


def impossible(modes: list[str], device: torch.device) -> str | None:
    """Why one of the modes is unavailable here; None if all are available."""
    if "compile" in modes and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return "compile needs a C++ compiler"
    if "fp8_dynamic" in modes and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return "fp8_dynamic needs a GPU with FP8 units"
    return None


def product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    torch.mm(left, right)
    return 2 * size**3 / min(seconds(lambda: torch.mm(left, right)) for _ in range(PRODUCT_RUNS))


# The modes


def build_models(case: Case, args: argparse.Namespace, stays: ExitStack) -> dict[str, Any]:
    """diffusers' model and ours in every mode, with the same weights."""
    _, attention = choose_attention("auto", args.device, getattr(torch, args.dtype))
    exact = random_transformer(case.sizes, getattr(torch, args.dtype), args.device)
    exact.set_attention(attention)
    models: dict[str, Any] = {} if case.sizes.audio_dim is not None else {BASELINE: diffusers_twin(exact)}
    for mode in args.modes:
        models[mode] = exact if mode == "exact" else MAKERS[mode](models.get("fp8", exact), exact, args.device, stays)
        models[mode].set_attention(attention)
    return models


def compiled(_: Model, exact: Model, device: torch.device, stays: ExitStack) -> Model:
    """The same weights with compiled blocks."""
    model = twin(exact)
    compile_blocks(model)
    return model


def in_fp8(_: Model, exact: Model, device: torch.device, stays: ExitStack) -> Model:
    """Blocks with their own weights in FP8."""
    model = twin(exact)
    quantize(model.blocks, device)
    cache_dequantized(model.blocks)
    return model


def in_fp8_dynamic(fp8: Model, exact: Model, device: torch.device, stays: ExitStack) -> Model:
    """The FP8 weights, multiplied in FP8."""
    model = twin(fp8)
    quantize(model.blocks, device, dynamic=True)
    return model


def streamed(_: Model, exact: Model, device: torch.device, stays: ExitStack) -> Model:
    """Weights in host memory; the stream lives until `stays` exits."""
    model = twin(exact, torch.device("cpu"))
    pinned = partial(pin, device) if device.type == "cuda" else None  # as in a run
    stays.enter_context(BlockStream(model, model.blocks, device, pin=pinned).active())
    return model


MAKERS: dict[str, Callable[[Model, Model, torch.device, ExitStack], Model]] = {
    "compile": compiled,
    "fp8": in_fp8,
    "fp8_dynamic": in_fp8_dynamic,
    "stream": streamed,
}


def bind_inputs(models: dict[str, Any], case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """A forward pass of each model on the same inputs."""
    inputs = make_inputs(case, device, dtype)
    return {
        name: diffusers_forward_of(model, inputs, case) if name == BASELINE else forward_of(model, inputs)
        for name, model in models.items()
    }


def compare(works: dict[str, Work], models: dict[str, Any], device: torch.device) -> dict[str, Result]:
    """Compare every output with the first."""
    expected, results = None, {}
    for name, out, peak in outputs_of(works, models, device):
        expected = out if expected is None else expected
        results[name] = Result(relative_difference(out, expected), peak)
    return results


def relative_difference(out: Tensor, expected: Tensor) -> float:
    """RMS of the difference over that of the expected output."""
    difference = (out.float() - expected.float()).square().mean() / expected.float().square().mean()
    return difference.sqrt().item()


def agree(results: dict[str, Result], dtype: str) -> bool:
    """Whether all outputs agree; prints those that do not."""
    for name, result in results.items():
        limit = FP8_TOLERANCE if name.startswith("fp8") else TOLERANCES[dtype]
        if not result.difference <= limit:
            print(f"{name} differs by {result.difference:.1e}, more than {limit:.0e}", file=sys.stderr)
            return False
    return True


# Results


def summarize(case: Case, results: dict[str, Result], rounds: Rounds, ceiling: float) -> dict[str, dict[str, Any]]:
    """Results of each mode."""
    baseline = next(iter(results))
    flop = forward_flop(case.sizes, case.tokens)
    figures = {}
    for name, result in results.items():
        taken = median_of(rounds, name)
        figures[name] = {
            "seconds": round(taken, 4),
            "seconds_scaled": case.scale and round(taken * case.scale, 3),
            "tflops": round(flop / taken / 1e12, 4),
            "of_ceiling": round(flop / taken / ceiling, 4),
            "peak_bytes": result.peak_bytes,
            "ratio": ratio_of(rounds, name, baseline),
            "difference": result.difference,
        }
    return figures


def tell(args: argparse.Namespace, case: Case, ceiling: float, figures: dict[str, dict[str, Any]]) -> None:
    """Print a table, then one JSON line."""
    baseline = next(iter(figures))
    met = baseline != BASELINE or all(
        figure["ratio"]["median"] <= LIMIT for name, figure in figures.items() if name in EXACT
    )
    title = f"one forward, {args.dtype}, {case.described()}, {args.rounds} rounds"
    scaled = f"s, measured with {case.sizes.num_layers} layers, scaled to {case.full_layers}"
    header = ("", "s", *([scaled] if case.scale else []), "TFLOP/s", "% of ceiling", "peak, GB")
    header += (f"ratio to {baseline}", "quartiles", "difference")
    notes = [f"ceiling, a matrix product: {ceiling / 1e12:.3g} TFLOP/s"]
    if baseline == BASELINE:
        judged = " and ".join(name for name in figures if name in EXACT)
        notes.append(f"{judged} at least as fast as {BASELINE}: {'yes' if met else 'NO'}")
    line = {**environment("transformer_step", args.device), "official": args.official, "dtype": args.dtype}
    line |= {**case.recorded(), "rounds": args.rounds, "baseline": baseline, "ceiling_tflops": ceiling / 1e12}
    line |= {"modes": figures, "limit": LIMIT, "met": met}
    report(title, header, [row(name, figure) for name, figure in figures.items()], notes, line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    scaled = figure["seconds_scaled"]
    return (
        name,
        f"{figure['seconds']:.3f}",
        *([] if scaled is None else [f"{scaled:.1f}"]),
        f"{figure['tflops']:.3g}",
        f"{100 * figure['of_ceiling']:.0f}",
        gigabytes(figure["peak_bytes"]),
        f"{figure['ratio']['median']:.3f}",
        quartiles(figure["ratio"], 3),
        f"{figure['difference']:.1e}",
    )


if __name__ == "__main__":
    sys.exit(main())
