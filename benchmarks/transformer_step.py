"""One forward of our transformer beside diffusers' `WanTransformer3DModel`: same weights, same inputs, same process.

Both are first shown to compute the same thing, so that the times compare equal work. Then they run in pairs whose order
alternates (ours first, diffusers first, ...): what else the machine does meanwhile falls on both alike, and the ratio
within a pair says more than two medians do. The defaults are the 14B model's proportions at a quarter of its width.

    python benchmarks/transformer_step.py
    python benchmarks/transformer_step.py --device cuda --dtype bfloat16 --dim 5120 --frames 21 --height 60 --width 104
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, nothing installed

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from benchmarks.common import environment, spread, table
from skyreels_v3.models.transformer import Segment, SkyReelsTransformer3DModel

HEAD_DIM = 128
FFN_RATIO = 2.7  # 13824 / 5120
TEXT_DIM = 4096
TEXT_TOKENS = 512  # rows of a padded prompt, all of them attended to
LIMIT = 1.0  # ours / diffusers
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-1}  # on outputs of the order of 1

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """Seconds of one forward each, taken one right after the other."""

    ours: float
    diffusers: float

    @property
    def ratio(self) -> float:
        """Below 1 where ours is faster."""
        return self.ours / self.diffusers


def main() -> int:
    """Compare, time, print; 1 when the two models do not compute the same."""
    args = parse_arguments()
    torch.manual_seed(0)
    device = torch.device(args.device)
    theirs, ours = build_models(args.dim, args.layers, device, getattr(torch, args.dtype))
    forwards = bind_inputs(ours, theirs, (args.frames, args.height, args.width), device)
    with torch.no_grad():
        difference = max_difference(*forwards)
        if difference > TOLERANCES[args.dtype]:
            print(f"the outputs differ by {difference:.2e}, more than {TOLERANCES[args.dtype]:.0e}", file=sys.stderr)
            return 1
        pairs = time_pairs(*forwards, args.pairs)
    report(args, device, difference, pairs)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCES)
    parser.add_argument("--pairs", type=int, default=20, help="timed forwards of each model; at least 2")
    parser.add_argument("--dim", type=int, default=1280, help=f"model width, a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--frames", type=int, default=5, help="latent frames")
    parser.add_argument("--height", type=int, default=40, help="latent rows, even")
    parser.add_argument("--width", type=int, default=40, help="latent columns, even")
    args = parser.parse_args()
    if args.pairs < 2 or args.dim % HEAD_DIM or args.height % 2 or args.width % 2:
        parser.error(f"--pairs must be at least 2, --dim a multiple of {HEAD_DIM}, --height and --width even")
    return args


def build_models(
    dim: int, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[WanTransformer3DModel, SkyReelsTransformer3DModel]:
    """diffusers' model with random weights, and ours with the same."""
    sizes = {
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "text_dim": TEXT_DIM,
        "ffn_dim": round(FFN_RATIO * dim),
        "num_layers": layers,
    }
    with device:
        theirs = WanTransformer3DModel(**sizes)
    with torch.device("meta"):
        ours = SkyReelsTransformer3DModel(**sizes)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return cast_weights(theirs, dtype), cast_weights(ours, dtype)


def cast_weights(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Weights in `dtype` but for those that the model wants in float32, as its loader would have them."""
    for name, parameter in model.named_parameters():
        keep = any(part in name for part in model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model.eval()


def bind_inputs(
    ours: SkyReelsTransformer3DModel, theirs: WanTransformer3DModel, size: tuple[int, int, int], device: torch.device
) -> tuple[Forward, Forward]:
    """The two forwards on the same inputs: a plain video with one timestep, and a full prompt."""
    dtype = ours.patch_embedding.weight.dtype
    latents = torch.randn(1, 16, *size, device=device, dtype=dtype)  # (B, C, F, H, W)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype)
    timestep = torch.tensor([500.0])
    on_device = timestep.to(device)  # where each model wants it
    with torch.no_grad():
        context = ours.embed_context(text)  # once for all steps of a video
    return (
        lambda: ours([Segment(latents)], timestep, context)[0],
        lambda: theirs(latents, on_device, text, return_dict=False)[0],
    )


def max_difference(ours: Forward, theirs: Forward) -> float:
    """Largest difference of the outputs; also everyone's first, slower run."""
    return (ours().float() - theirs().float()).abs().max().item()


def time_pairs(ours: Forward, theirs: Forward, count: int) -> list[Pair]:
    """Time both `count` times, who goes first alternating."""
    pairs = []
    for index in range(count):
        if index % 2 == 0:
            first = seconds(ours)
            pairs.append(Pair(ours=first, diffusers=seconds(theirs)))
        else:
            first = seconds(theirs)
            pairs.append(Pair(ours=seconds(ours), diffusers=first))
    return pairs


def seconds(forward: Forward) -> float:
    """Wall time of one forward, with all that it started on its device."""
    start = time.perf_counter()
    out = forward()
    if out.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def report(args: argparse.Namespace, device: torch.device, difference: float, pairs: list[Pair]) -> None:
    """A table for people, then one JSON line."""
    ratios = spread([pair.ratio for pair in pairs])
    medians = {name: statistics.median(getattr(pair, name) for pair in pairs) for name in ("ours", "diffusers")}
    tokens = args.frames * args.height * args.width // 4
    print(f"one forward, {args.dtype}, width {args.dim}, {args.layers} layers, {tokens} tokens, {args.pairs} pairs")
    print(table(("", "median s"), [(name, f"{value:.3f}") for name, value in medians.items()]))
    quartiles = f"quartiles {ratios['q1']:.3f} to {ratios['q3']:.3f}"
    print(f"ours / diffusers within a pair: median {ratios['median']:.3f}, {quartiles}")
    print(f"at least as fast: {'yes' if ratios['median'] <= LIMIT else 'NO'}")
    print(f"outputs differ by at most {difference:.1e}")
    sizes = {"dtype": args.dtype, "dim": args.dim, "layers": args.layers, "tokens": tokens, "pairs": args.pairs}
    figures = {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": ratios,
        "limit": LIMIT,
        "met": ratios["median"] <= LIMIT,
        "max_difference": difference,
    }
    print(json.dumps({**environment("transformer_step", device), **sizes, **figures}))


if __name__ == "__main__":
    sys.exit(main())
