"""Colour matching: frames take on the colours of a reference picture.

Reinhard's transfer (doi:10.1109/38.946629): in CIE Lab, each channel of each frame is given the mean and the standard
deviation of the reference's. Windows of a long video drift in colour; matched to the portrait, they do not.
"""

from __future__ import annotations

from kornia.color import lab_to_rgb, rgb_to_lab
from torch import Tensor

STD_FLOOR = 1e-6


def match_color(video: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1] with the colours of reference (B, 3, 1, H', W').

    Args:
        strength: 0 leaves the video alone, 1 takes the matched colours, between them is a blend.
    """
    if strength == 0:
        return video
    target = rgb_to_lab(reference[:, :, 0] / 2 + 0.5)
    mean, std = target.mean((2, 3), keepdim=True), target.std((2, 3), keepdim=True, correction=0)
    matched = video.clone()
    for frame in range(video.shape[2]):
        lab = rgb_to_lab(video[:, :, frame] / 2 + 0.5)
        own = lab.std((2, 3), keepdim=True, correction=0).clamp(min=STD_FLOOR)
        lab = (lab - lab.mean((2, 3), keepdim=True)) / own * std + mean
        matched[:, :, frame] = lab_to_rgb(lab) * 2 - 1
    return video.lerp(matched, strength)
