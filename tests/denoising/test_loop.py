"""The loop and what it hands to the model."""

from __future__ import annotations

import pytest
import torch

from skyreels_v3.denoising.guidance import FULL, NO_TEXT, text_guidance
from skyreels_v3.denoising.loop import Conditioning, denoise, spread_timestep
from skyreels_v3.denoising.schedules import euler, unipc
from skyreels_v3.wan.transformer import Segment

SHAPE = (1, 16, 2, 4, 4)


class Model:
    """A stand-in for the transformer: its forward is the function given, and sees no condition but the text."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, segments, timestep, text, *others):
        return self.forward(segments, timestep, text)


def latents(frames: int) -> torch.Tensor:
    return torch.zeros(1, 16, frames, 4, 4)


def test_clean_segments_stand_at_timestep_zero():
    segments = (Segment(latents(2), clean=True), Segment(latents(3), 2))
    assert spread_timestep(torch.tensor(875), segments).tolist() == [[0, 0, 875, 875, 875]]
    assert spread_timestep(torch.tensor(875), segments[1:]).tolist() == [875]


def test_the_latents_own_prediction_is_taken():
    seen = []

    def model(segments, timestep, text):
        seen.append(([segment.start_frame for segment in segments], timestep.tolist()))
        return tuple(segment.latents + number for number, segment in enumerate(segments))

    condition = Conditioning(torch.zeros(1), 2, (Segment(latents(2), clean=True),), (Segment(latents(1), 9),))
    out = condition.predict(Model(model), latents(3), torch.tensor(7))
    assert torch.equal(out, latents(3) + 1)
    assert seen == [([0, 2, 9], [[0, 0, 7, 7, 7, 7]])]


def test_guidance_reaches_the_scheduler():
    """The straight line from noise to data: guided velocity 3 * 2 - 2 * 1 = 4, so the loop ends at noise - 4."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def model(segments, timestep, text):
        return (torch.full_like(segments[0].latents, text.item()),)

    conditions = {FULL: Conditioning(torch.tensor(2.0)), NO_TEXT: Conditioning(torch.tensor(1.0))}
    scheduler = unipc(8, 5.0)
    steps, made = zip(*denoise(Model(model), scheduler, noise, conditions, text_guidance(3.0)), strict=True)
    out = made[-1]
    torch.testing.assert_close(out, noise - 4.0 * scheduler.sigmas[0], atol=1e-4, rtol=0)
    assert steps == (*range(1, 9),)


def test_latents_that_are_not_finite_are_an_error():
    def model(segments, timestep, text):
        return (torch.full_like(segments[0].latents, float("nan")),)

    with pytest.raises(FloatingPointError, match="not finite after step 1 of 8"):
        conditions = {FULL: Conditioning(torch.zeros(1))}
        next(denoise(Model(model), unipc(8, 5.0), latents(2), conditions, text_guidance(1.0)))


def test_pinned_latents_reach_every_step():
    """Called before the first step and after each, with the noise level that the latents then have."""
    seen, levels = [], []

    def model(segments, timestep, text):
        seen.append(float(segments[0].latents[0, 0, 0, 0, 0]))
        return (torch.zeros_like(segments[0].latents),)

    def pin(latents, sigma):
        levels.append(sigma)
        return torch.full_like(latents, len(levels))

    scheduler = euler(3, 11.0)
    *_, (_, out) = denoise(
        Model(model), scheduler, latents(2), {FULL: Conditioning(torch.zeros(1))}, text_guidance(1.0), pin=pin
    )
    assert seen == [1, 2, 3]
    assert levels == scheduler.sigmas.tolist()
    assert float(out.max()) == 4


def test_channels_are_joined_to_the_latents():
    condition = Conditioning(torch.zeros(1), channels=torch.ones(1, 20, 3, 4, 4))
    out = condition.predict(lambda s, *more: (s[0].latents,), latents(3), torch.tensor(7))
    assert out.shape[1] == 36
    assert torch.equal(out[:, 16:], condition.channels)
