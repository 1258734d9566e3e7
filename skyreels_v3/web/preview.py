"""Pictures of a video that is being made: of what its latents will become, and of the frames that are done.

Latents become a picture by a linear projection of their channels to RGB, at their own size, an eighth of the video's:
that costs nothing beside a step. The idea is keturn's, https://discuss.huggingface.co/t/23204, and is how ComfyUI
previews: with numbers that were fitted for one VAE. Here they are fitted to the VAE at hand, by least squares, with
each pass whose frames are decoded; before the first one the colors are arbitrary.
"""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from skyreels_v3.tasks import LATENT_CHANNELS

MAX_SIDE = 640  # pixels of the picture of a frame
CONTRAST = 32.0  # levels for a latent of 1, before the first fit


class Noisy(NamedTuple):
    """Latents (C, h, w) and the level of the noise in them, 1 for nothing else."""

    latents: np.ndarray
    sigma: float

    def denoised(self, before: Noisy | None) -> np.ndarray:
        """What will come of them if they go on as they did in the step from `before`, on a straight line to 0."""
        if before is None or before.sigma <= self.sigma:
            return self.latents
        return self.latents + (self.latents - before.latents) * (self.sigma / (before.sigma - self.sigma))


class Projection:
    """From latents to RGB: `weights` (C + 1, 3), the last row for a constant."""

    def __init__(self) -> None:
        # cosines, which are orthogonal: where latents differ, colors do
        waves = np.cos(np.pi / LATENT_CHANNELS * np.outer(np.arange(LATENT_CHANNELS) + 0.5, (1, 2, 3)))
        self.weights = np.concatenate([CONTRAST * waves, np.full((1, 3), 128.0)])

    def fit(self, latents: np.ndarray, frame: np.ndarray) -> None:
        """Fit the weights to latents (C, h, w) and what the VAE makes of them, uint8 [H, W, 3]."""
        small = Image.fromarray(frame).resize(latents.shape[:0:-1], Image.Resampling.BOX)
        self.weights = np.linalg.lstsq(with_constant(latents), np.asarray(small, float).reshape(-1, 3), rcond=None)[0]

    def picture(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] of latents (C, h, w)."""
        levels = (with_constant(latents) @ self.weights).reshape(*latents.shape[1:], 3)
        return np.nan_to_num(levels).clip(0, 255).round().astype(np.uint8)


def with_constant(latents: np.ndarray) -> np.ndarray:
    """Latents (C, h, w) -> (h * w, C + 1), the last column 1."""
    columns = latents.reshape(len(latents), -1).T.astype(float)
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


def png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file of at most `MAX_SIDE` pixels."""
    image, file = Image.fromarray(picture), BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, "PNG")
    return file.getvalue()
