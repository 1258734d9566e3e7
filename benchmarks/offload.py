"""The cost of not keeping all blocks on the device: time of a forward pass relative to a resident model.

    resident             all weights on the device
    stream               ours, as with --memory stream: two blocks on the device, pinned host memory on a GPU
    stream, half kept    the same with every other block on the device (--stream_blocks)
    group offloading     diffusers' apply_group_offloading: block_level, one block at a time, with streams on a GPU
    block by block       each block moved to the device before it runs and back after, which needs no library

Same weights, same inputs, our transformer; the outputs must be bitwise identical. All take turns, and ratios are within
a round. A CPU has no separate device memory: our streaming and the block-by-block moves copy the weights within host
memory while compute waits; diffusers' offloading moves nothing, so only the overhead of its hooks is timed.

    python benchmarks/offload.py
    python benchmarks/offload.py --device cuda --official r2v-480p --layers 8 --rounds 3
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

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
    time_rounds,
)
from benchmarks.models import (
    Case,
    add_case_flags,
    case_of,
    forward_of,
    make_inputs,
    outputs_of,
    random_transformer,
    twin,
)
from skyreels_v3.attention.backends import choose_attention
from skyreels_v3.memory.offload import on_device
from skyreels_v3.memory.stream import BlockStream, tensors_of
from skyreels_v3.runtime import pin
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

BASELINE = "resident"
LEAST_LAYERS = 3  # with fewer, all blocks fit into the stream's two slots
CPU = torch.device("cpu")

Model = SkyReelsTransformer3DModel


@dataclass(frozen=True)
class Result:
    """Result of a variant's untimed runs."""

    same: bool  # bitwise identical to resident
    peak_bytes: int | None


def main() -> int:
    """Compare, time and print; 1 if the outputs differ."""
    args, case = parse_arguments()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    with torch.no_grad(), ExitStack() as stays:
        models = build_ways(random_transformer(case.sizes, dtype, args.device), args.device, stays)
        inputs = make_inputs(case, args.device, dtype)
        inputs = replace(inputs, timestep=inputs.timestep.to(args.device))  # as diffusers' hooks expect
        (_, attention), works = choose_attention("auto", args.device, dtype), {}
        for name, model in models.items():
            model.set_attention(attention)
            works[name] = forward_of(model, inputs)
        results = compare(works, models, args.device)
        rounds = time_rounds(works, args.rounds)
    tell(args, case, {name: summarize(result, rounds, name) for name, result in results.items()})
    return 0 if all(result.same for result in results.values()) else 1


def parse_arguments() -> tuple[argparse.Namespace, Case]:
    """Parse and check the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=7, help="timed forwards of each; at least 2")
    add_case_flags(parser)
    args = parser.parse_args()
    case = case_of(parser, args)
    if case.sizes.num_layers < LEAST_LAYERS:
        parser.error(f"--layers must be at least {LEAST_LAYERS}, or there is nothing to stream")
    return args, case


def build_ways(resident: Model, device: torch.device, stays: ExitStack) -> dict[str, Model]:
    """Every variant with the same weights; their hooks live until `stays` exits."""
    pinned = partial(pin, device) if device.type == "cuda" else None  # as in a run
    models = {BASELINE: resident}
    for name, count in (("stream", 0), ("stream, half kept", len(resident.blocks) // 2)):
        models[name] = model = twin(resident, CPU)
        stays.enter_context(BlockStream(model, model.blocks, device, count, pinned).active())
    models["group offloading"] = model = twin(resident, CPU)
    apply_group_offloading(model, device, CPU, "block_level", 1, use_stream=device.type != "cpu")
    models["block by block"] = model = twin(resident, CPU)
    move_block_by_block(model, device, stays)
    return models


def move_block_by_block(model: Model, device: torch.device, stays: ExitStack) -> None:
    """Keep each block on the device only while it runs, and the rest of the model always."""
    of_blocks = {id(tensor) for tensor in tensors_of(model.blocks)}
    stays.enter_context(on_device(model, device, lambda tensor: id(tensor) not in of_blocks))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, _: move(block, device))
        block.register_forward_hook(lambda block, *_: move(block, CPU))


def move(block: nn.Module, device: torch.device) -> None:
    """Like `block.to(device)`, but always a copy."""
    for tensor in tensors_of(block):
        tensor.data = tensor.data.to(device, copy=True)


def compare(works: dict[str, Work], models: dict[str, Model], device: torch.device) -> dict[str, Result]:
    """Compare every output with the first."""
    expected, results = None, {}
    for name, out, peak in outputs_of(works, models, device):
        expected = out if expected is None else expected
        results[name] = Result(torch.equal(out, expected), peak)
    return results


def summarize(result: Result, rounds: Rounds, name: str) -> dict[str, Any]:
    """Results of one variant."""
    return {
        "seconds": round(median_of(rounds, name), 4),
        "tax": ratio_of(rounds, name, BASELINE),
        "peak_bytes": result.peak_bytes,
        "same": result.same,
    }


def tell(args: argparse.Namespace, case: Case, figures: dict[str, dict[str, Any]]) -> None:
    """Print a table, then one JSON line."""
    title = f"one forward, {args.dtype}, {case.described()}, {args.rounds} rounds"
    header = ("", "s", f"ratio to {BASELINE}", "quartiles", "peak, GB", "same output")
    rows = [row(name, figure) for name, figure in figures.items()]
    notes = ["on a CPU: copies within the host's memory; group offloading moves nothing"]
    line = {**environment("offload", args.device), "official": args.official, "dtype": args.dtype}
    line |= {**case.recorded(), "rounds": args.rounds, "baseline": BASELINE, "ways": figures}
    report(title, header, rows, notes if args.device.type == "cpu" else [], line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    return (
        name,
        f"{figure['seconds']:.3f}",
        f"{figure['tax']['median']:.3f}",
        quartiles(figure["tax"], 3),
        gigabytes(figure["peak_bytes"]),
        "yes" if figure["same"] else "NO",
    )


if __name__ == "__main__":
    sys.exit(main())
