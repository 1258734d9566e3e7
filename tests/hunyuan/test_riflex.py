"""RIFLEx against the paper's formula in plain float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skyreels_v3.hunyuan.riflex import intrinsic_component, riflex, riflex_frequencies
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

FRAMES = 73  # latent frames of 289 frames, 1.5 times the length after which the model repeats itself
THETA, CHANNELS = 256.0, 16
SMALL = {
    **{"num_attention_heads": 1, "attention_head_dim": 32, "num_layers": 1, "num_single_layers": 1},
    **{"num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (16, 8, 8)},
}


@pytest.fixture
def model() -> HunyuanTransformer3DModel:
    return HunyuanTransformer3DModel(**SMALL).eval()


def period(component: int) -> float:
    """The period of a rotary component in latent frames, by the definition of rotary embeddings."""
    return 2 * math.pi * THETA ** (2 * component / CHANNELS)


def test_the_intrinsic_component():
    """The fourth for HunyuanVideo, as in the paper: its period is closest to the 48 latent frames of a repetition."""
    assert intrinsic_component(CHANNELS, THETA) == 3
    assert period(3) == pytest.approx(50.3, abs=0.05)
    for repeats_after in (7.0, 30.0, 90.0, 1000.0):
        nearest = min(range(CHANNELS // 2), key=lambda one: abs(period(one) - repeats_after))
        assert intrinsic_component(CHANNELS, THETA, repeats_after) == nearest


@pytest.mark.parametrize("frames", [25, 51, FRAMES, 129])
def test_frequencies(frames):
    """Only the intrinsic component changes, and only if its period is too short for the video."""
    made = riflex_frequencies(CHANNELS, THETA, frames)
    assert made.dtype == torch.float64 and made.shape == (CHANNELS // 2,)
    for component, frequency in enumerate(made.tolist()):
        lowered = component == 3 and frames > 25
        expected = 0.9 * 2 * math.pi / frames if lowered else 2 * math.pi / period(component)
        assert frequency == pytest.approx(expected, rel=1e-12)


def test_tables_of_the_model(model):
    """The (cos, sin) tables of all tokens: the formula for the intrinsic component, bit-identical otherwise."""
    latents = torch.zeros(1, 16, FRAMES, 4, 6)
    stock = model.rope(latents)
    with riflex(model, FRAMES):
        tables = model.rope(latents)
    angles = np.repeat(np.arange(FRAMES) * 0.9 * 2 * np.pi / FRAMES, 2 * 3)  # frame by frame, 6 tokens per frame
    others = [*range(6), *range(8, 32)]
    for table, before, function in zip(tables, stock, (np.cos, np.sin), strict=True):
        assert table.dtype == torch.float32 and table.shape == (FRAMES * 6, 32)
        for channel in (6, 7):
            np.testing.assert_allclose(table[:, channel], function(angles), atol=1e-6)
        assert torch.equal(table[:, others], before[:, others])
    with riflex(model, None):
        after = model.rope(latents)
    assert all(torch.equal(one, other) for one, other in zip(after, stock, strict=True))


def test_ahead_of_existing_hooks(model):
    """Existing hooks, which select some of the tokens, receive the changed tables."""
    model.rope.register_forward_hook(lambda _, __, tables: tuple(table[3:9] for table in tables))
    latents = torch.zeros(1, 16, 5, 4, 4)
    with riflex(model, 60):
        cos, sin = model.rope(latents)
    assert cos.shape == (6, 32)
    expected = np.array([0, 1, 1, 1, 1, 2]) * 0.9 * 2 * np.pi / 60
    np.testing.assert_allclose(cos[:, 6], np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(sin[:, 7], np.sin(expected), atol=1e-6)
    with pytest.raises(ValueError, match="here"), riflex(model, 60):
        raise ValueError("here")
    assert len(model.rope._forward_hooks) == 1  # the hook is removed even after an error
