"""Keeps a dubbed clip's pixels outside the speaker's box.

A model generates whole frames, so the background changes a little, if only by the VAE. Here the clip's own pixels are
restored, and the generated ones' error is measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from skyreels_v3.media.image import covered_box
from skyreels_v3.media.video_reader import ClipInfo, read_frames, resize_frames
from skyreels_v3.stages import Event, Frame, Pass, Stages, frames_to_video, video_to_frames
from skyreels_v3.wan.windows import WINDOW_FRAMES

logger = logging.getLogger(__name__)

SOFT = 0.15  # width of the blended edge inside the box, as a fraction of the box's shorter side


class Background:
    """The clip's pixels around the speaker.

    Attributes:
        weights: float32 (H, W, 1), blend weights of the model's pixels; 0 outside the box.
    """

    def __init__(self, stages: Stages, clip: ClipInfo) -> None:
        request = stages.request
        self.stages, self.clip = stages, clip
        (box,) = request.speaker_boxes
        covered = covered_box(box, (clip.width, clip.height), request.height, request.width)
        self.weights = soft_box(covered, request.height, request.width)
        self.outside = self.weights[..., 0] == 0
        self.errors: list[float] = []  # mean squared error outside the box, per frame

    def keep(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events, with the clip's pixels outside the box in their frames; logs the frames' error at the end."""
        own = self.vae_error()
        source = self.frames()
        for event in events:
            yield replace(event, frames=self.blended(event.frames, source)) if isinstance(event, Pass) else event
        if self.errors and self.outside.any():
            told = "outside the speaker's box, the frames' PSNR to the clip is %.1f dB, that of the VAE alone %.1f dB"
            logger.info(f"{told}; the clip's pixels are kept", psnr(float(np.mean(self.errors))), psnr(own))

    def frames(self) -> Iterator[Frame]:
        """The clip's frames at the output size; the last one is repeated forever."""
        request = self.stages.request
        frame = None
        for frame in resize_frames(read_frames(self.clip.path, request.task.fps), request.height, request.width):
            yield frame
        while frame is not None:
            yield frame

    def blended(self, frames: Iterator[Frame], source: Iterator[Frame]) -> Iterator[Frame]:
        for made, frame in zip(frames, source, strict=False):
            self.errors.append(self.error(made, frame))
            mixed = self.weights * made + (1 - self.weights) * frame
            yield mixed.round().astype(np.uint8)

    def vae_error(self) -> float:
        """The VAE's own error outside the box: the clip's first frames, encoded and decoded."""
        frames = [*islice(self.frames(), WINDOW_FRAMES)]
        latents = self.stages.encode_video(frames_to_video(frames).to(self.stages.runtime.device))
        pieces = (video_to_frames(piece, False) for piece in self.stages.decode_video(latents))
        made = (frame for piece in pieces for frame in piece)
        return float(np.mean([self.error(*pair) for pair in zip(made, frames, strict=False)]))

    def error(self, made: Frame, frame: Frame) -> float:
        """Mean squared error outside the box; 0 if the box covers the frame."""
        if not self.outside.any():
            return 0.0
        return float(np.square(made[self.outside].astype(np.float32) - frame[self.outside]).mean())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of 8-bit values."""
    return 10 * math.log10(255**2 / error) if error else math.inf


def soft_box(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Weights float32 (height, width, 1): 0 outside a box (x0, y0, x1, y1), rising to 1 within it.

    Along sides where the box reaches the frame's border there is no such edge.
    """
    x0, y0, x1, y1 = box
    soft = SOFT * min(x1 - x0, y1 - y0)

    def rise(first: float, last: float, side: int) -> np.ndarray:
        at = np.arange(side) + 0.5
        before = at - first if first > 0 else np.full(side, math.inf)
        after = last - at if last < side else np.full(side, math.inf)
        return (np.minimum(before, after) / soft).clip(0, 1)

    return np.outer(rise(y0, y1, height), rise(x0, x1, width))[..., None].astype(np.float32)
