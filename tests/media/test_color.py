"""Colour matching, against the official one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.media.color import match_color


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_recorded(reference, strength):
    recorded = load_file(reference / "misc" / "cases.safetensors")
    out = match_color(recorded["color.source"], recorded["color.reference"], strength)
    torch.testing.assert_close(out, recorded[f"color.out_strength_{strength}"], atol=1e-4, rtol=0)


def test_off(reference):
    source = load_file(reference / "misc" / "cases.safetensors")["color.source"]
    assert match_color(source, source[:, :, :1], 0.0) is source
