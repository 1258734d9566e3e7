"""Classifier-free guidance as a weighted sum of predictions under different conditions.

Every published form is such a sum: v_weak + g * (v - v_weak) = g * v + (1 - g) * v_weak, and likewise with three terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FULL = "full"  # all conditions
NO_TEXT = "no_text"  # the negative prompt in place of the prompt
NO_TEXT_NO_IMAGE = "no_text_no_image"  # and no reference images
NO_AUDIO = "no_audio"  # silence in place of the audio
NO_TEXT_NO_AUDIO = "no_text_no_audio"
NEGATIVE_PROMPT = (NO_TEXT, NO_TEXT_NO_IMAGE, NO_TEXT_NO_AUDIO)  # conditions that use it in place of the prompt


@dataclass(frozen=True)
class Guidance:
    """The conditions to predict under, by name, and the weights of the predictions."""

    terms: tuple[tuple[str, float], ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def __call__(self, predict: Callable[[str], Tensor]) -> Tensor:
        """The guided prediction; `predict` returns the prediction under a named condition."""
        first, *others = (weight * predict(name) for name, weight in self.terms)
        return sum(others, first)


def one_condition(scale: float, weaker: str) -> Guidance:
    """Guidance weaker + scale * (full - weaker); none if scale <= 1."""
    if scale <= 1.0:
        return Guidance(((FULL, 1.0),))
    return Guidance(((FULL, scale), (weaker, 1.0 - scale)))


def two_conditions(text_scale: float, other_scale: float, weakest: str) -> Guidance:
    """Guidance weakest + other_scale * (no_text - weakest) + text_scale * (full - no_text), without zero terms."""
    terms = ((FULL, text_scale), (NO_TEXT, other_scale - text_scale), (weakest, 1.0 - other_scale))
    return Guidance(tuple(term for term in terms if term[1] != 0.0))


def text_guidance(scale: float) -> Guidance:
    """Guidance by text alone."""
    return one_condition(scale, NO_TEXT)


def text_image_guidance(text_scale: float, image_scale: float) -> Guidance:
    """Guidance by text and reference images; none at all if text_scale <= 1, as in the published model."""
    if text_scale <= 1.0:
        return text_guidance(text_scale)
    return two_conditions(text_scale, image_scale, NO_TEXT_NO_IMAGE)


def text_audio_guidance(text_scale: float, audio_scale: float) -> Guidance:
    """Guidance by text and audio; if only one scale is above 1, by that condition alone."""
    if text_scale > 1.0 and audio_scale > 1.0:
        return two_conditions(text_scale, audio_scale, NO_TEXT_NO_AUDIO)
    return one_condition(audio_scale, NO_AUDIO) if audio_scale > 1.0 else text_guidance(text_scale)
