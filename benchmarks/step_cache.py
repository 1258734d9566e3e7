"""A denoising loop with First-Block Cache at two thresholds, against the loop that computes every block.

The model is diffusers' HunyuanVideo transformer, small and with random weights; all loops have the same weights, prompt
and noise. The loops take turns, each round starting with a different one, and ratios are within a round.

The share of blocks computed and the time saved hold for any model whose blocks take most of the time. How much a
threshold skips, and how far the result is from the exact one (PSNR of the latents), depends on the weights: random ones
say little about the published checkpoints. The thresholds are chosen so that random weights have something to
skip; they are not a recommendation.

    python benchmarks/step_cache.py
    python benchmarks/step_cache.py --device cuda --dim 1024 --json step_cache.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from benchmarks.common import (
    Rounds,
    at_least,
    environment,
    median_of,
    parser_of,
    quartiles,
    ratio_of,
    report,
    time_rounds,
)
from skyreels_v3.denoising.guidance import FULL
from skyreels_v3.denoising.step_cache import StepCache

BASELINE = "uncached"
THRESHOLDS = (0.3, 0.5)
HEAD_DIM = 64
TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 32, 64, 32
CHANNELS = 16
GUIDANCE = 6000.0
SHIFT = 7.0  # of the noise levels, as in HunyuanVideo

Model = HunyuanVideoTransformer3DModel


@dataclass(frozen=True)
class Loop:
    """A model and its inputs, apart from latents and timestep."""

    model: Model
    prompt: dict[str, Tensor]
    sigmas: Tensor

    def __call__(self, latents: Tensor, cache: StepCache) -> Tensor:
        """Euler steps from noise to data."""
        with cache.attached(self.model):
            for sigma, following in pairwise(self.sigmas):
                velocity = cache.under(FULL, partial(self.predict, latents, sigma))
                latents = latents + (following - sigma) * velocity
        return latents

    def predict(self, latents: Tensor, sigma: Tensor, _: str) -> Tensor:
        return self.model(latents, 1000 * sigma.reshape(1), **self.prompt, return_dict=False)[0]

    def exact(self, latents: Tensor) -> Tensor:
        """The same, without a cache."""
        for sigma, following in pairwise(self.sigmas):
            latents = latents + (following - sigma) * self.predict(latents, sigma, FULL)
        return latents


@dataclass(frozen=True)
class Result:
    """Result of a loop's untimed run."""

    computed: float  # share of the blocks
    psnr: float | None  # dB, over the span of the exact latents; None if they are equal


def main() -> None:
    """Compare, time and print."""
    args = parse_arguments()
    torch.manual_seed(0)
    with torch.inference_mode():
        loop = build_loop(args)
        noise = torch.randn(1, CHANNELS, args.frames, args.height, args.width, device=args.device)
        works = {BASELINE: partial(loop.exact, noise)}
        works |= {name_of(threshold): partial(run, loop, noise, threshold) for threshold in THRESHOLDS}
        results = compare(loop, noise)
        rounds = time_rounds(works, args.rounds)
    tell(args, summarize(results, rounds))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--dim", type=at_least(HEAD_DIM), default=256, help=f"width, a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=at_least(1), default=4, help="double blocks; twice as many single blocks")
    parser.add_argument("--frames", type=at_least(1), default=2, help="latent frames")
    parser.add_argument("--height", type=at_least(2), default=16, help="rows of the latents, an even number")
    parser.add_argument("--width", type=at_least(2), default=24, help="columns of the latents, an even number")
    parser.add_argument("--steps", type=at_least(2), default=30)
    parser.add_argument("--rounds", type=at_least(2), default=3, help="timed runs of each loop; at least 2")
    args = parser.parse_args()
    if args.dim % HEAD_DIM or args.height % 2 or args.width % 2:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, --height and --width of 2")
    return args


# The loops


def build_loop(args: argparse.Namespace) -> Loop:
    """A model with random weights, a random prompt and HunyuanVideo's noise levels."""
    with args.device:
        model = Model(
            num_attention_heads=args.dim // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            num_layers=args.layers,
            num_single_layers=2 * args.layers,
            num_refiner_layers=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            rope_axes_dim=(16, 24, 24),
        )
        prompt = {
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_DIM),
            "encoder_attention_mask": torch.ones(1, TEXT_TOKENS),
            "pooled_projections": torch.randn(1, POOLED_DIM),
            "guidance": torch.tensor([GUIDANCE]),
        }
        even = torch.linspace(1, 0, args.steps + 1)
    return Loop(model.eval(), prompt, SHIFT * even / (1 + (SHIFT - 1) * even))


def name_of(threshold: float) -> str:
    return f"fbcache:{threshold}"


def run(loop: Loop, noise: Tensor, threshold: float) -> Tensor:
    """Run a loop with a new cache."""
    return loop(noise, StepCache(threshold))


def compare(loop: Loop, noise: Tensor) -> dict[str, Result]:
    """Compare every loop's first run with the exact one."""
    exact = loop.exact(noise)
    results = {BASELINE: Result(1.0, None)}
    for threshold in THRESHOLDS:
        cache = StepCache(threshold)
        error, span = loop(noise, cache) - exact, exact.max() - exact.min()
        loss = error.square().mean()
        psnr = (10 * torch.log10(span**2 / loss)).item() if loss else None
        results[name_of(threshold)] = Result(cache.computed / (cache.computed + cache.skipped), psnr)
    return results


# Results


def summarize(results: dict[str, Result], rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Results of each loop."""
    return {
        name: {
            "seconds": round(median_of(rounds, name), 4),
            "ratio": ratio_of(rounds, name, BASELINE),
            "computed": round(result.computed, 4),
            "psnr": result.psnr and round(result.psnr, 1),
        }
        for name, result in results.items()
    }


def tell(args: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> None:
    """Print a table, then one JSON line."""
    tokens = args.frames * args.height * args.width // 4
    blocks = f"{args.layers} double and {2 * args.layers} single blocks"
    title = f"{args.steps} steps, {blocks}, {args.dim} wide, {tokens} tokens, float32, {args.rounds} rounds"
    header = ("", "s", "blocks computed, %", f"ratio to {BASELINE}", "quartiles", "PSNR, dB")
    rows = [row(name, figure) for name, figure in figures.items()]
    notes = ["random weights: the PSNR says little about the published checkpoints"]
    sizes = {key: getattr(args, key) for key in ("dim", "layers", "frames", "height", "width", "steps", "rounds")}
    line = {**environment("step_cache", args.device), **sizes, "baseline": BASELINE, "loops": figures}
    report(title, header, rows, notes, line, args.json)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    return (
        name,
        f"{figure['seconds']:.3f}",
        f"{100 * figure['computed']:.0f}",
        f"{figure['ratio']['median']:.3f}",
        quartiles(figure["ratio"], 3),
        "equal" if figure["psnr"] is None else f"{figure['psnr']:.1f}",
    )


if __name__ == "__main__":
    main()
