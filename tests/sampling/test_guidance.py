"""Guidance, against the published formulas and recorded predictions."""

from __future__ import annotations

import pytest
import torch

from skyreels_v3.sampling.guidance import FULL, NO_TEXT, NO_TEXT_NO_IMAGE, dual_guidance, text_guidance

PREDICTIONS = {
    name: torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate((FULL, NO_TEXT, NO_TEXT_NO_IMAGE))
}


def test_text_guidance():
    full, no_text = PREDICTIONS[FULL], PREDICTIONS[NO_TEXT]
    torch.testing.assert_close(text_guidance(4.0)(PREDICTIONS.__getitem__), no_text + 4.0 * (full - no_text))


@pytest.mark.parametrize(("text", "image"), [(2.5, 1.5), (2.5, 1.0), (3.0, 0.0), (2.0, 2.0)])
def test_dual_guidance(text, image):
    full, no_text, nothing = PREDICTIONS.values()
    expected = nothing + image * (no_text - nothing) + text * (full - no_text)
    torch.testing.assert_close(dual_guidance(text, image)(PREDICTIONS.__getitem__), expected)


def test_terms_of_no_weight_are_not_evaluated():
    assert dual_guidance(2.5, 1.0).conditions == (FULL, NO_TEXT)
    assert dual_guidance(2.5, 2.5).conditions == (FULL, NO_TEXT_NO_IMAGE)


@pytest.mark.parametrize("guidance", [text_guidance(1.0), text_guidance(0.0), dual_guidance(1.0, 3.0)])
def test_no_guidance(guidance):
    assert guidance.terms == ((FULL, 1.0),)
