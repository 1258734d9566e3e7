"""Color matching against the official implementation; color conversions against kornia's."""

from __future__ import annotations

import pytest
import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from skyreels_v3.media import color
from skyreels_v3.media.color import match_color


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_recorded(reference, strength):
    recorded = load_file(reference / "misc" / "cases.safetensors")
    out = match_color(recorded["color.source"], recorded["color.reference"], strength)
    torch.testing.assert_close(out, recorded[f"color.out_strength_{strength}"], atol=1e-4, rtol=0)


def test_off(reference):
    source = load_file(reference / "misc" / "cases.safetensors")["color.source"]
    assert match_color(source, source[:, :, :1], 0.0) is source


def test_conversions():
    """All corners, both sides of every threshold, and Lab values outside the gamut."""
    steps = torch.cat((torch.linspace(0, 0.05, 12), torch.linspace(0.05, 1, 12)))
    rgb = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 24, 576)
    lab = color.rgb_to_lab(rgb)
    torch.testing.assert_close(lab, rgb_to_lab(rgb), atol=2e-4, rtol=1e-5)
    wide = torch.cat((lab, 1.5 * lab - 20), dim=2)
    torch.testing.assert_close(color.lab_to_rgb(wide), lab_to_rgb(wide), atol=2e-5, rtol=0)
    torch.testing.assert_close(color.lab_to_rgb(lab), rgb, atol=1e-4, rtol=0)


def test_nothing_is_copied_to_the_device():
    """A copy to the device would start with a tensor built from Python numbers."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    video = torch.rand(1, 3, 4, 8, 8) * 2 - 1
    with Watch():
        match_color(video, video[:, :, :1], 1.0)
    assert "where" in made and not {"_to_copy", "lift_fresh", "_local_scalar_dense"} & {*made}


def test_one_change_for_all():
    """The color change that maps the sample to the reference is applied to all frames, although they differ."""
    torch.manual_seed(0)
    scene = torch.rand(1, 3, 12, 16, 16) * 0.6 + 0.1
    scene = scene * torch.linspace(1, 0.7, 12)[:, None, None]
    lab = color.rgb_to_lab(scene)
    off = color.lab_to_rgb(0.95 * lab + torch.tensor([2.0, -3.0, 4.0])[:, None, None, None])
    made = match_color(off * 2 - 1, scene[:, :, :4] * 2 - 1, 1.0, sample=off[:, :, :4] * 2 - 1) / 2 + 0.5
    assert (off - scene).abs().mean() > 0.015 and (made - scene).abs().mean() < 0.003


def test_a_black_sample_changes_nothing():
    video, black = torch.rand(1, 3, 4, 8, 8) * 2 - 1, torch.full((1, 3, 4, 8, 8), -1.0)
    torch.testing.assert_close(match_color(video, black, 1.0, sample=black), video, atol=1e-4, rtol=0)
