"""One forward of our transformer beside diffusers' `WanTransformer3DModel`: same weights, same inputs, same run.

Both are first shown to compute the same thing, so that the times compare equal work. Then they run in pairs whose order
alternates (ours first, theirs first, ...): whatever else the machine does at the time falls on both alike, and the ratio
within a pair says more than the two medians.

    python benchmarks/transformer_step.py
    python benchmarks/transformer_step.py --device cuda --dtype bfloat16 --dim 3072 --frames 21 --height 60 --width 104
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from a checkout that is not installed

from torch import Tensor

PATCH = (1, 2, 2)
CHANNELS = 16
FREQ_DIM = 256
TEXT_TOKENS = 512  # rows of a padded prompt, all of them attended to
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}  # largest difference of the outputs, which are of the order of 1

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What both models are called with."""

    latents: Tensor  # (B, C, F, H, W)
    timestep: Tensor  # (B,)
    text: Tensor  # (B, 512, text_dim)


@dataclass(frozen=True)
class Pair:
    """Seconds of one forward each, taken one right after the other."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs
