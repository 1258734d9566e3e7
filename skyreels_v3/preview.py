"""Previews of a video in progress, from its latents and its finished frames.

A linear projection of the latent channels to RGB makes a picture of an eighth of the video's size, at negligible cost.
The idea is keturn's, https://discuss.huggingface.co/t/23204. ComfyUI previews the same way, with weights fitted to one
VAE. Here they are fitted by least squares to the VAE in use, with each pass whose frames are decoded; before the first
one the colors are arbitrary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from skyreels_v3.media.image import encode_image
from skyreels_v3.tasks import LATENT_CHANNELS

if TYPE_CHECKING:
    from torch import Tensor

    from skyreels_v3.stages import Step

MAX_SIDE = 640  # pixels of a frame's preview
CONTRAST = 32.0  # levels for a latent of 1, before the first fit


class Noisy(NamedTuple):
    """Latents (C, h, w) and their noise level, 1 for pure noise."""

    latents: np.ndarray
    sigma: float

    def denoised(self, before: Noisy | None) -> np.ndarray:
        """Predict the denoised latents by extending the step from `before` in a straight line to sigma 0."""
        if before is None or before.sigma <= self.sigma:
            return self.latents
        return self.latents + (self.latents - before.latents) * (self.sigma / (before.sigma - self.sigma))


class Projection:
    """A projection from latents to RGB: `weights` (C + 1, 3), the last row for a constant."""

    def __init__(self) -> None:
        # orthogonal cosines, so that different latents get different colors
        waves = np.cos(np.pi / LATENT_CHANNELS * np.outer(np.arange(LATENT_CHANNELS) + 0.5, (1, 2, 3)))
        self.weights = np.concatenate([CONTRAST * waves, np.full((1, 3), 128.0)])

    def fit(self, latents: np.ndarray, frame: np.ndarray) -> None:
        """Fit the weights to latents (C, h, w) and the frame decoded from them, uint8 [H, W, 3]."""
        small = Image.fromarray(frame).resize(latents.shape[:0:-1], Image.Resampling.BOX)
        self.weights = np.linalg.lstsq(with_constant(latents), np.asarray(small, float).reshape(-1, 3), rcond=None)[0]

    def picture(self, latents: np.ndarray) -> np.ndarray:
        """Project latents (C, h, w) to a picture, uint8 [h, w, 3]."""
        levels = (with_constant(latents) @ self.weights).reshape(*latents.shape[1:], 3)
        return np.nan_to_num(levels).clip(0, 255).round().astype(np.uint8)


class Preview:
    """Previews a video in progress, step by step.

    Args:
        projection: refitted to each pass whose frames are decoded.
    """

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._last: Noisy | None = None
        self._shown = np.zeros((LATENT_CHANNELS, 1, 1))

    def add(self, step: Step) -> None:
        """Record the latents of a step."""
        before = self._last if step.number > 1 else None
        self._last = Noisy(last_of(step.latents), step.sigma)
        self._shown = self._last.denoised(before)

    def picture(self) -> np.ndarray:
        """A preview of the last step's denoised latents, uint8 [h, w, 3]."""
        return self.projection.picture(self._shown)

    def fit(self, frame: np.ndarray, latents: Tensor | None = None) -> None:
        """Fit the projection to the last frame of a pass, uint8 [H, W, 3], and its latents (default: the last step)."""
        if latents is not None:
            self.projection.fit(last_of(latents), frame)
        elif self._last is not None:
            self.projection.fit(self._last.latents, frame)


def last_of(latents: Tensor) -> np.ndarray:
    """The last frame (C, h, w) of latents (1, C, F, h, w)."""
    return np.asarray(latents[0, :, -1].float().cpu().numpy())


def with_constant(latents: np.ndarray) -> np.ndarray:
    """Latents (C, h, w) -> (h * w, C + 1), the last column 1."""
    columns = latents.reshape(len(latents), -1).T.astype(float)
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


def png(picture: np.ndarray) -> bytes:
    """Encode a picture, uint8 [H, W, 3], as a PNG file with sides of at most `MAX_SIDE` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return encode_image(image, "PNG")
