"""The VAE's encode and decode, whole and in tiles, in bfloat16 and with channels-last weights.

All modes have the same random weights and inputs and run in one process. Each round runs all of them, starting with a
different one, so that other load on the machine affects all alike; ratios are within a round. A first, untimed round
compares each mode's result with that of the whole frame in float32, and on a GPU measures the memory it takes on top of
weights and inputs.

The defaults are for a CPU: a VAE of a third of the width and a small frame, whose halos add a fifth more work (at
720 x 1280 a twenty-fifth). The frame is tall because torch has a different, several times slower CPU kernel for float32
inputs with few channels, frames and rows. In so narrow a VAE, tiles of a shorter frame would hit it; the real VAE's do
not.

    python benchmarks/vae.py
    python benchmarks/vae.py --device cuda --base_dim 96 --frames 17 --height 720 --width 1280 --json vae.json
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

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
from skyreels_v3.wan.vae import VideoVAE

BASELINE = "whole"
TILES = (2, 2)
CPU_BASE_DIM, FULL_BASE_DIM = 32, 96


@dataclass(frozen=True)
class Result:
    """Result of a mode's untimed run."""

    max_difference: float  # from the baseline's
    psnr: float | None  # dB, over the span of the baseline's result; None if they are equal
    peak_bytes: int | None  # on top of what was allocated; None without a GPU


def main() -> None:
    """Compare, time and print."""
    args = parse_arguments()
    torch.manual_seed(0)
    device = args.device
    works = bind_inputs(build_modes(args.base_dim, device), args, device)
    figures = {}
    for part, modes in works.items():
        results = compare(modes, device)
        rounds = time_rounds(modes, args.rounds)
        figures[part] = {mode: summarize(results[mode], rounds, mode, args.frames) for mode in modes}
    tell(args, device, figures)


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--base_dim", type=at_least(1), help=f"width; {FULL_BASE_DIM}, the real one, or {CPU_BASE_DIM} on a CPU"
    )
    parser.add_argument("--frames", type=at_least(1), default=5, help="4k + 1")
    parser.add_argument("--height", type=at_least(8), default=512, help="frame height, a multiple of 8")
    parser.add_argument("--width", type=at_least(8), default=96, help="frame width, a multiple of 8")
    parser.add_argument("--rounds", type=at_least(2), default=5, help="timed runs of each mode; at least 2")
    args = parser.parse_args()
    if args.frames % 4 != 1 or args.height % 8 or args.width % 8:
        parser.error("--frames must be 4k + 1, --height and --width multiples of 8")
    args.base_dim = args.base_dim or (CPU_BASE_DIM if args.device.type == "cpu" else FULL_BASE_DIM)
    return args


def build_modes(base_dim: int, device: torch.device) -> dict[str, VideoVAE]:
    """Models with the same weights in every mode."""
    with device:
        module = AutoencoderKLWan(base_dim=base_dim).eval()
    tiled = VideoVAE(module)
    tiled.tiles = TILES
    half = copy.deepcopy(module).to(torch.bfloat16)
    half_tiled = VideoVAE(half)
    half_tiled.tiles = TILES
    return {
        BASELINE: VideoVAE(module),
        f"tiled {TILES[0]} x {TILES[1]}": tiled,
        "channels-last": VideoVAE(channels_last(module)),
        "bfloat16": VideoVAE(half),
        f"bfloat16, tiled {TILES[0]} x {TILES[1]}": half_tiled,
        "bfloat16, channels-last": VideoVAE(channels_last(half)),
    }


def channels_last(module: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy with channels-last 3D convolution weights."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Conv3d):  # not the whole module: it has 2D convolutions too
            part.to(memory_format=torch.channels_last_3d)
    return module


def bind_inputs(
    modes: Mapping[str, VideoVAE], args: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Work]]:
    """An encode and a decode of noise in each mode."""
    video = torch.rand(1, 3, args.frames, args.height, args.width, device=device) * 2 - 1
    latents = torch.randn(1, 16, args.frames // 4 + 1, args.height // 8, args.width // 8, device=device)
    return {
        "encode": {name: partial(vae.encode, video) for name, vae in modes.items()},
        "decode": {name: partial(decode, vae, latents) for name, vae in modes.items()},
    }


def decode(vae: VideoVAE, latents: Tensor) -> Tensor:
    """The whole video (1, 3, F, H, W)."""
    return torch.cat([*vae.decode_stream(latents)], dim=2)


def compare(modes: Mapping[str, Work], device: torch.device) -> dict[str, Result]:
    """Compare every mode's first, slower run with the baseline's."""
    expected, results = modes[BASELINE]().cpu(), {}
    for name, work in modes.items():
        out, peak = measure_peak(work, device)
        error = out - expected
        noise, span = error.square().mean(), expected.max() - expected.min()
        psnr = float(10 * torch.log10(span**2 / noise)) if noise else None
        results[name] = Result(error.abs().max().item(), psnr, peak)
    return results


def summarize(result: Result, rounds: Rounds, mode: str, frames: int) -> dict[str, Any]:
    """Results of one mode."""
    return {
        "seconds_per_frame": round(median_of(rounds, mode) / frames, 5),
        "ratio": ratio_of(rounds, mode, BASELINE),
        "max_difference": result.max_difference,
        "psnr": result.psnr and round(result.psnr, 1),
        "peak_bytes": result.peak_bytes,
    }


def tell(args: argparse.Namespace, device: torch.device, figures: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print a table, then one JSON line."""
    size = f"{args.frames} frames of {args.height} x {args.width}"
    title = f"{size}, base_dim {args.base_dim}, {args.rounds} rounds; all beside {BASELINE}, in float32"
    header = ("", "ms a frame", "ratio", "quartiles", "max difference", "PSNR, dB", "peak, GB")
    rows = [row(f"{part}, {mode}", of) for part, modes in figures.items() for mode, of in modes.items()]
    sizes = {key: getattr(args, key) for key in ("base_dim", "frames", "height", "width", "rounds")}
    line = {**environment("vae", device), **sizes, "baseline": BASELINE, **figures}
    report(title, header, rows, [], line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ratio, psnr, peak = figure["ratio"], figure["psnr"], figure["peak_bytes"]
    return (
        name,
        f"{figure['seconds_per_frame'] * 1e3:.1f}",
        f"{ratio['median']:.2f}",
        quartiles(ratio),
        f"{figure['max_difference']:.1e}",
        "equal" if psnr is None else f"{psnr:.1f}",
        gigabytes(peak),
    )


if __name__ == "__main__":
    main()
