"""RIFLEx (arXiv:2502.15894): videos longer than those that the model was trained on, without repetition.

A rotary embedding turns each channel pair by an angle that grows with the frame, each pair at a speed of its own. Of
the temporal pairs one has a period that is about the length after which the model's videos begin again: past it, its
angles come back, and so does what is seen. That pair is slowed down until its period is longer than the video. The
faster pairs, which tell neighbours apart and make motion, and the slower ones stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

REPEATS_AFTER = 48  # latent frames, of HunyuanVideo: 192 frames
SAFETY = 0.9  # of the speed that the video's length allows; the authors' own choice

Tables = tuple[Tensor, Tensor]  # cosine and sine (L, D) of all tokens, of temporal channels first


def frequencies(channels: int, theta: float) -> Tensor:
    """Angles from a frame to the next (channels/2,), float64, of each channel pair."""
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def intrinsic_component(channels: int, theta: float, repeats_after: float = REPEATS_AFTER) -> int:
    """The channel pair, from 0, whose period in latent frames is closest to the length after which videos repeat."""
    periods = 2 * math.pi / frequencies(channels, theta)
    return int((periods - repeats_after).abs().argmin())


def riflex_frequencies(channels: int, theta: float, frames: int) -> Tensor:
    """`frequencies` for a video of so many latent frames: that of the intrinsic pair is lowered, if it is too high."""
    changed = frequencies(channels, theta)
    changed[intrinsic_component(channels, theta)].clamp_(max=SAFETY * 2 * math.pi / frames)
    return changed


@contextmanager
def riflex(model: HunyuanTransformer3DModel, frames: int | None) -> Iterator[None]:
    """For the length of a `with` block `model` makes a video of so many latent frames; None changes nothing."""
    if frames is None:
        yield
        return
    channels, theta = model.config["rope_axes_dim"][0], model.config["rope_theta"]
    pair = intrinsic_component(channels, theta)
    frequency = float(riflex_frequencies(channels, theta, frames)[pair])

    def slowed(_: object, arguments: tuple[Tensor, ...], tables: Tables) -> Tables:
        count = arguments[0].shape[2] // model.config["patch_size_t"]
        return with_pair(tables, pair, torch.arange(count, dtype=torch.float64) * frequency)

    # before the hooks that are there: those of processes that share the tokens take parts of what comes out
    handle = model.rope.register_forward_hook(slowed, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def with_pair(tables: Tables, pair: int, angles: Tensor) -> Tables:
    """`tables` with the angles (F,) of each latent frame, float64, for one pair; both of its channels have the same."""
    place = slice(2 * pair, 2 * pair + 2)
    changed = (tables[0].clone(), tables[1].clone())
    for table, values in zip(changed, (angles.cos(), angles.sin()), strict=True):
        of_frames = values.to(table)[:, None, None]  # computed on the CPU: not every device has float64
        table.unflatten(0, (len(angles), -1))[..., place] = of_frames
    return changed
