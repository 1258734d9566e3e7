"""Guidance against the published formulas and recorded predictions."""

from __future__ import annotations

import pytest
import torch

from skyreels_v3.denoising.guidance import (
    FULL,
    NO_AUDIO,
    NO_TEXT,
    NO_TEXT_NO_AUDIO,
    NO_TEXT_NO_IMAGE,
    text_audio_guidance,
    text_guidance,
    text_image_guidance,
)

PREDICTIONS = {
    name: torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate((FULL, NO_TEXT, NO_TEXT_NO_IMAGE, NO_AUDIO, NO_TEXT_NO_AUDIO))
}


def test_text_guidance():
    full, no_text = PREDICTIONS[FULL], PREDICTIONS[NO_TEXT]
    torch.testing.assert_close(text_guidance(4.0)(PREDICTIONS.__getitem__), no_text + 4.0 * (full - no_text))


@pytest.mark.parametrize(("text", "image"), [(2.5, 1.5), (2.5, 1.0), (3.0, 0.0), (2.0, 2.0)])
def test_text_image_guidance(text, image):
    full, no_text, nothing = (PREDICTIONS[name] for name in (FULL, NO_TEXT, NO_TEXT_NO_IMAGE))
    expected = nothing + image * (no_text - nothing) + text * (full - no_text)
    torch.testing.assert_close(text_image_guidance(text, image)(PREDICTIONS.__getitem__), expected)


def test_terms_of_no_weight_are_not_evaluated():
    assert text_image_guidance(2.5, 1.0).conditions == (FULL, NO_TEXT)
    assert text_image_guidance(2.5, 2.5).conditions == (FULL, NO_TEXT_NO_IMAGE)


@pytest.mark.parametrize("guidance", [text_guidance(1.0), text_guidance(0.0), text_image_guidance(1.0, 3.0)])
def test_no_guidance(guidance):
    assert guidance.terms == ((FULL, 1.0),)


def test_text_audio_guidance():
    """The three published forms: both guidances, text only, audio only."""
    full, no_text, _, silent, nothing = PREDICTIONS.values()
    both = text_audio_guidance(2.0, 3.0)(PREDICTIONS.__getitem__)
    torch.testing.assert_close(both, nothing + 2.0 * (full - no_text) + 3.0 * (no_text - nothing))
    text = text_audio_guidance(2.0, 1.0)(PREDICTIONS.__getitem__)
    torch.testing.assert_close(text, no_text + 2.0 * (full - no_text))
    audio = text_audio_guidance(1.0, 3.0)(PREDICTIONS.__getitem__)
    torch.testing.assert_close(audio, silent + 3.0 * (full - silent))
    assert text_audio_guidance(1.0, 1.0).terms == ((FULL, 1.0),)
