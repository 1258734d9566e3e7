"""Color matching: frames take on the colors of a reference picture.

Reinhard's transfer (doi:10.1109/38.946629): in CIE Lab, each channel of each frame gets the mean and the standard
deviation of the reference's channel. Windows of a long video drift in color, unless matched to the portrait. A changing
scene must not be held to one picture: all its frames get the same change, the one that makes the first frames match
those before.

The conversions agree with kornia's, but use no constant tensors: each would be copied to the GPU, and the copy would
wait until the GPU is idle.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STD_FLOOR = 1e-6
SAMPLE_STD = 1.0  # added to both standard deviations
# sRGB's primaries in CIE XYZ, with the white point D65 at 1
WHITE = np.array([0.95047, 1.0, 1.08883])
RGB_IN_XYZ = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
TO_XYZ = (RGB_IN_XYZ / WHITE[:, None]).tolist()
FROM_XYZ = (np.linalg.inv(RGB_IN_XYZ) * WHITE).tolist()
# where the linear part of a curve ends and the power begins
SRGB_KNEE, LINEAR_KNEE, XYZ_KNEE, LAB_KNEE = 0.04045, 0.0031308, 0.008856, 0.2068966


def match_color(video: Tensor, reference: Tensor, strength: float, sample: Tensor | None = None) -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1] with the colors of reference (B, 3, N, H', W').

    Args:
        strength: 0 leaves the video alone, 1 takes the matched colors, values in between blend them.
        sample: frames (B, 3, N, H, W) that determine one change for all frames; by default each frame has its own.
    """
    if strength == 0:
        return video
    target, lab = rgb_to_lab(reference / 2 + 0.5), rgb_to_lab(video / 2 + 0.5)
    own = lab if sample is None else rgb_to_lab(sample / 2 + 0.5)
    mean, std = (each.mean(2, keepdim=True) for each in statistics(target))
    own_mean, own_std = statistics(own)
    if sample is not None:  # a gray sample says nothing about the spread of colors
        own_mean, own_std = (each.mean(2, keepdim=True) for each in (own_mean, own_std + SAMPLE_STD))
        std = std + SAMPLE_STD
    lab = (lab - own_mean) / own_std.clamp(min=STD_FLOOR) * std + mean
    return video.lerp(lab_to_rgb(lab) * 2 - 1, strength)


def statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, 3, F, 1, 1) of each channel of each frame (B, 3, F, H, W)."""
    return frames.mean((3, 4), keepdim=True), frames.std((3, 4), keepdim=True, correction=0)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (B, 3, ...) in [0, 1] -> CIE Lab: L in 0..100, a and b around 0."""
    linear = torch.where(rgb > SRGB_KNEE, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = mix_channels(linear, TO_XYZ)
    x, y, z = torch.where(xyz > XYZ_KNEE, xyz.clamp(min=XYZ_KNEE) ** (1 / 3), 7.787 * xyz + 4 / 29).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIE Lab (B, 3, ...) -> sRGB, clamped to [0, 1]."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack((y + a / 500, y, (y - b / 200).clamp(min=0)), dim=1)
    linear = mix_channels(torch.where(roots > LAB_KNEE, roots**3, (roots - 4 / 29) / 7.787), FROM_XYZ)
    curved = 1.055 * linear.clamp(min=LINEAR_KNEE) ** (1 / 2.4) - 0.055
    return torch.where(linear > LINEAR_KNEE, curved, 12.92 * linear).clamp(0, 1)


def mix_channels(planes: Tensor, matrix: list[list[float]]) -> Tensor:
    """`matrix` times the channels (B, 3, ...); its numbers are kernel arguments, so nothing is copied."""
    one, two, three = planes.unbind(1)
    return torch.stack([a * one + b * two + c * three for a, b, c in matrix], dim=1)
