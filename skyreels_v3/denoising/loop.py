"""The denoising loop of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skyreels_v3.denoising.guidance import Guidance


class Condition(Protocol):
    """What a model is conditioned on."""

    def predict(self, model: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, F, H, W) of the latents at `timestep`, one number."""


LatentConstraint = Callable[[Tensor, float], Tensor]  # of latents and their noise level, to the latents to go on with
Predictions = Callable[[Sequence[str], Callable[[str], Tensor]], Mapping[str, Tensor]]


def unconstrained(latents: Tensor, sigma: float) -> Tensor:
    return latents


def predict_each(names: Sequence[str], predict: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The prediction under each condition."""
    return {name: predict(name) for name in names}


@torch.no_grad()  # FSDP does not work in inference mode
def denoise(
    model: nn.Module,
    scheduler: Any,
    latents: Tensor,
    conditions: Mapping[str, Condition],
    guidance: Guidance,
    constraint: LatentConstraint = unconstrained,
    predictions: Predictions = predict_each,
    done: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Turn noise (B, C, F, H, W) into latents, step by step: the number of each step, from 1, and its latents.

    Args:
        model: predicts velocities.
        scheduler: of diffusers, set to its next step.
        latents: noise, float32, on the model's device; or the latents after the first `done` steps.
        conditions: by the names that `guidance` uses.
        constraint: applied before the first step and after each, to keep frames that are known.
        predictions: computes the predictions under several conditions.
        done: steps that an interrupted loop has made.

    Raises:
        FloatingPointError: latents became infinite or not a number.
    """

    def predict(name: str) -> Tensor:
        return conditions[name].predict(model, latents, timestep)

    if done == 0:
        latents = constraint(latents, float(scheduler.sigmas[0]))
    for step, timestep in enumerate(scheduler.timesteps[done:], start=done + 1):
        velocity = guidance(predictions(guidance.conditions, predict).__getitem__)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        latents = constraint(latents, float(scheduler.sigmas[step]))
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the latents are not finite after step {step} of {len(scheduler.timesteps)}; "
                "the checkpoint or the inputs are damaged, or --dtype float32 is needed"
            )
        yield step, latents
