"""Classifier-free guidance as a weighted sum of predictions under different conditions.

Every published form is such a sum. With v the prediction under all conditions and weaker ones beside it,
v_weak + g * (v - v_weak) = g * v + (1 - g) * v_weak, and so on for three terms. A `Guidance` is its list of terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FULL = "full"  # all conditions
NO_TEXT = "no_text"  # the negative prompt in place of the prompt
NO_TEXT_NO_IMAGE = "no_text_no_image"  # moreover without the reference images


@dataclass(frozen=True)
class Guidance:
    """Names of the conditions to predict under, and the weights of the predictions."""

    terms: tuple[tuple[str, float], ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def __call__(self, predict: Callable[[str], Tensor]) -> Tensor:
        """The guided prediction; `predict` gives the one under a named condition."""
        total: Tensor | None = None
        for name, weight in self.terms:
            term = weight * predict(name)
            total = term if total is None else total + term
        assert total is not None
        return total


def text_guidance(scale: float) -> Guidance:
    """no_text + scale * (full - no_text); scale <= 1 means none."""
    if scale <= 1.0:
        return Guidance(((FULL, 1.0),))
    return Guidance(((FULL, scale), (NO_TEXT, 1.0 - scale)))


def dual_guidance(text_scale: float, image_scale: float) -> Guidance:
    """no_text_no_image + image_scale * (no_text - no_text_no_image) + text_scale * (full - no_text).

    text_scale <= 1 means no guidance at all, as in the published model. Terms of weight 0 are not evaluated.
    """
    if text_scale <= 1.0:
        return text_guidance(text_scale)
    terms = ((FULL, text_scale), (NO_TEXT, image_scale - text_scale), (NO_TEXT_NO_IMAGE, 1.0 - image_scale))
    return Guidance(tuple(term for term in terms if term[1] != 0.0))
