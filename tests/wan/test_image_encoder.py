"""The CLIP image encoder, against the official one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.wan.checkpoint import load_image_encoder


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_states(reference, case):
    encoder = load_image_encoder(reference / "clip", torch.float32, heads=4)
    recorded = load_file(reference / "clip" / "cases.safetensors")
    out = encoder(recorded[f"{case}.image"][:, :, 0])
    torch.testing.assert_close(out, recorded[f"{case}.out"], atol=1e-4, rtol=0)


def test_the_checkpoint_of_a_run(reference):
    """Full width, 16 heads."""
    root = reference / "pipelines" / "checkpoints" / "talking_avatar"
    encoder = load_image_encoder(root, torch.float32)
    assert encoder.module.config.num_attention_heads == 16
    assert encoder(torch.zeros(1, 3, 64, 48)).shape == (1, 257, 1280)
