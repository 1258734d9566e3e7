"""Schedules, against the official trajectories: exact."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.denoising.loop import euler, unipc


@pytest.mark.parametrize(("case", "shift"), [("flow_unipc_shift8", 8.0), ("diffusers_unipc_shift5", 5.0)])
def test_unipc(reference, case, shift):
    recorded = load_file(reference / "schedulers" / "cases.safetensors")
    scheduler = unipc(8, shift)
    assert torch.equal(scheduler.timesteps, recorded[f"{case}.timesteps"])
    torch.testing.assert_close(scheduler.sigmas, recorded[f"{case}.sigmas"], atol=1e-6, rtol=0)
    sample = recorded[f"{case}.x"]
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(recorded[f"{case}.model_outputs"][step], timestep, sample).prev_sample
        torch.testing.assert_close(sample, recorded[f"{case}.trajectory"][step], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_any_number_of_steps_ends_without_noise(steps):
    """For a velocity that points from the data to the noise, the last step gives the data."""
    data, noise = torch.full((1, 1, 1, 2, 2), 0.5), torch.ones(1, 1, 1, 2, 2)
    scheduler = unipc(steps, 8.0)
    sample = scheduler.sigmas[0] * noise + (1 - scheduler.sigmas[0]) * data
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - data, timestep, sample).prev_sample
    torch.testing.assert_close(sample, data, atol=1e-4, rtol=0)


def test_euler(reference):
    recorded = load_file(reference / "schedulers" / "cases.safetensors")
    case = "avatar_euler_shift11"
    scheduler = euler(4, 11.0)
    torch.testing.assert_close(scheduler.timesteps, recorded[f"{case}.timesteps"][:-1], atol=1e-3, rtol=0)
    sample = recorded[f"{case}.x"]
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(recorded[f"{case}.model_outputs"][step], timestep, sample).prev_sample
        torch.testing.assert_close(sample, recorded[f"{case}.trajectory"][step], atol=1e-5, rtol=0)
