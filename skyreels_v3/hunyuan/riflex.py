"""RIFLEx (arXiv:2502.15894): videos longer than the model was trained on, without repetition.

A rotary embedding rotates each channel pair by an angle that grows with the frame, at the pair's own frequency. One
temporal pair has a period close to the length after which the model's videos repeat: beyond it the angles recur, and so
does the content. That pair is slowed down until its period is longer than the video. Higher frequencies, which tell
neighboring frames apart and drive motion, and lower ones are unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

REPEATS_AFTER = 48  # latent frames, for HunyuanVideo: 192 frames
SAFETY = 0.9  # fraction of the highest frequency that the video's length allows; the authors' choice

Tables = tuple[Tensor, Tensor]  # cosine and sine (L, D) of all tokens, temporal channels first


def frequencies(channels: int, theta: float) -> Tensor:
    """Angle per frame (channels/2,), float64, of each channel pair."""
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def intrinsic_component(channels: int, theta: float, repeats_after: float = REPEATS_AFTER) -> int:
    """The channel pair, from 0, whose period in latent frames is closest to the length after which videos repeat."""
    periods = 2 * math.pi / frequencies(channels, theta)
    return int((periods - repeats_after).abs().argmin())


def riflex_frequencies(channels: int, theta: float, frames: int) -> Tensor:
    """`frequencies` for a video of `frames` latent frames, with the intrinsic pair's lowered if too high."""
    changed = frequencies(channels, theta)
    changed[intrinsic_component(channels, theta)].clamp_(max=SAFETY * 2 * math.pi / frames)
    return changed


@contextmanager
def riflex(model: HunyuanTransformer3DModel, frames: int | None) -> Iterator[None]:
    """Within a `with` block, let `model` generate videos of `frames` latent frames; None changes nothing."""
    if frames is None:
        yield
        return
    channels, theta = model.config["rope_axes_dim"][0], model.config["rope_theta"]
    pair = intrinsic_component(channels, theta)
    frequency = float(riflex_frequencies(channels, theta, frames)[pair])

    def slow_down(_: object, arguments: tuple[Tensor, ...], tables: Tables) -> Tables:
        count = arguments[0].shape[2] // model.config["patch_size_t"]
        angles = torch.arange(count, dtype=torch.float64) * frequency  # on the CPU: not every device has float64
        cos, sin = (table.clone() for table in tables)
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            table.unflatten(0, (count, -1))[..., 2 * pair : 2 * pair + 2] = values.to(table)[:, None, None]
        return cos, sin

    # before existing hooks: those of sequence parallelism keep only a part of the tables
    handle = model.rope.register_forward_hook(slow_down, prepend=True)
    try:
        yield
    finally:
        handle.remove()
