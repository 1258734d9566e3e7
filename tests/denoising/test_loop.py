"""The denoising loop with a model of known predictions; schedulers against official trajectories."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from skyreels_v3.denoising.guidance import FULL, NO_TEXT, text_guidance
from skyreels_v3.denoising.loop import denoise, euler, unipc

SHAPE = (1, 16, 2, 4, 4)


class Constant:
    """A condition that predicts the same constant velocity everywhere."""

    def __init__(self, velocity: float) -> None:
        self.velocity = velocity

    def predict(self, model: object, latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(latents, self.velocity)


def test_guidance_reaches_the_scheduler():
    """On the straight path from noise to data, a guided velocity of 3 * 2 - 2 * 1 = 4 must end at noise - 4."""
    noise, scheduler = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), unipc(8, 5.0)
    steps = [*denoise(None, scheduler, noise, {FULL: Constant(2), NO_TEXT: Constant(1)}, text_guidance(3.0))]
    torch.testing.assert_close(steps[-1][1], noise - 4.0 * scheduler.sigmas[0], atol=1e-4, rtol=0)
    assert [number for number, _ in steps] == [*range(1, 9)]


def test_latents_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite after step 1 of 8"):
        next(denoise(None, unipc(8, 5.0), torch.zeros(SHAPE), {FULL: Constant(torch.nan)}, text_guidance(1.0)))


def test_the_constraint_reaches_every_step():
    """It is applied before the first step and after each one, with the latents' current noise level."""
    seen, levels = [], []

    class Noted(Constant):
        def predict(self, model: object, latents: Tensor, timestep: Tensor) -> Tensor:
            seen.append(float(latents.flatten()[0]))
            return super().predict(model, latents, timestep)

    def constraint(latents: Tensor, sigma: float) -> Tensor:
        levels.append(sigma)
        return torch.full_like(latents, len(levels))

    scheduler = euler(3, 11.0)
    steps = denoise(None, scheduler, torch.zeros(SHAPE), {FULL: Noted(0)}, text_guidance(1.0), constraint)
    assert float([*steps][-1][1].max()) == 4
    assert seen == [1, 2, 3]
    assert levels == scheduler.sigmas.tolist()


# Schedulers


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [
        ("flow_unipc_shift8", unipc(8, 8.0)),
        ("diffusers_unipc_shift5", unipc(8, 5.0)),
        ("avatar_euler_shift11", euler(4, 11.0)),
    ],
)
def test_official_trajectories(reference, case, scheduler):
    recorded = load_file(reference / "schedulers" / "cases.safetensors")
    steps = len(scheduler.timesteps)
    torch.testing.assert_close(scheduler.timesteps, recorded[f"{case}.timesteps"][:steps], atol=1e-3, rtol=0)
    if f"{case}.sigmas" in recorded:
        torch.testing.assert_close(scheduler.sigmas, recorded[f"{case}.sigmas"], atol=1e-6, rtol=0)
    sample = recorded[f"{case}.x"]
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(recorded[f"{case}.model_outputs"][step], timestep, sample).prev_sample
        torch.testing.assert_close(sample, recorded[f"{case}.trajectory"][step], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_any_number_of_steps_ends_without_noise(steps):
    """With a velocity that points from data to noise, the last step returns the data."""
    data, noise = torch.full((1, 1, 1, 2, 2), 0.5), torch.ones(1, 1, 1, 2, 2)
    scheduler = unipc(steps, 8.0)
    sample = scheduler.sigmas[0] * noise + (1 - scheduler.sigmas[0]) * data
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - data, timestep, sample).prev_sample
    torch.testing.assert_close(sample, data, atol=1e-4, rtol=0)
