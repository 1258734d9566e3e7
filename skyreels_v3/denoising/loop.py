"""The denoising loop of all tasks, its schedulers, and saving their state for interrupted runs.

Schedulers are diffusers', set to their first step, with the sigmas that the models expect: ending at 0, and shifted by
s * x / (1 + (s - 1) * x).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from skyreels_v3.denoising.guidance import Guidance
from skyreels_v3.errors import UserError

FIRST_UNIPC_SIGMA = 0.999
LAST_EULER_SIGMA = 0.001
CONFIG = "_internal_dict"  # the attribute with the config of diffusers' schedulers
ATTRIBUTES = "attributes"  # the tensor of a saved state that maps attributes to the other tensors


class Condition(Protocol):
    """What a model is conditioned on."""

    def predict(self, model: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, F, H, W) of the latents at `timestep`, a scalar."""


LatentConstraint = Callable[[Tensor, float], Tensor]  # latents and their noise level -> the latents to continue with
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
    """Denoise latents (B, C, F, H, W), yielding the number of each step, from 1, and its latents.

    Args:
        model: predicts velocities.
        scheduler: from diffusers, set to its next step.
        latents: noise, float32, on the model's device; or the latents after the first `done` steps.
        conditions: by their names in `guidance`.
        constraint: applied before the first step and after every step, to keep known frames.
        predictions: computes the predictions under several conditions.
        done: number of steps that an interrupted run has completed.

    Raises:
        FloatingPointError: latents became infinite or NaN.
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


Scheduler = TypeVar("Scheduler", UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler)


def started(scheduler: Scheduler, sigmas: Any) -> Scheduler:
    """Set a scheduler to its first step."""
    scheduler.set_timesteps(sigmas=sigmas)
    scheduler.set_begin_index(0)  # steps can share a timestep, which then does not determine the index
    return scheduler


def unipc(steps: int, shift: float | None) -> UniPCMultistepScheduler:
    """UniPC (arXiv:2302.04867) of order 2 for a flow model; timesteps are 1000 * sigma, truncated to integers.

    Before shifting, sigmas fall linearly from 0.999, while diffusers' own start at 1.
    """
    assert shift is not None, "only V1's presets leave it to the checkpoint"
    scheduler = UniPCMultistepScheduler(
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    return started(scheduler, np.linspace(FIRST_UNIPC_SIGMA, 0.0, steps + 1)[:-1])


def euler(steps: int, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """Euler scheduler for a flow model; before shifting, sigmas fall linearly from 1 to 0.001."""
    assert shift is not None, "only V1's presets leave it to the checkpoint"
    return started(FlowMatchEulerDiscreteScheduler(shift=shift), np.linspace(1.0, LAST_EULER_SIGMA, steps))


def euler_of(config: Mapping[str, Any], steps: int, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """Euler scheduler with a checkpoint's config; before shifting, sigmas fall linearly from 1 to 1 / steps.

    Args:
        shift: replaces the config's, unless None.
    """
    if (name := config.get("_class_name")) != (only := FlowMatchEulerDiscreteScheduler.__name__):
        raise UserError("--base_model_id", f"scheduler_config.json: {name} is not supported, only {only}; give another")
    changes = {} if shift is None else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config), **changes)
    return started(scheduler, np.linspace(1.0, 0.0, steps + 1)[:-1])


def scheduler_state(scheduler: Any) -> dict[str, Tensor]:
    """A scheduler's state between two steps, without its config, as tensors for a file.

    Multistep schedulers keep the predictions of earlier steps. Other attributes, and which tensor is which, are stored
    as JSON in one more tensor.
    """
    tensors: dict[str, Tensor] = {}

    def packed(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [packed(entry, f"{name}.{place}") for place, entry in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        tensors[name] = value
        return {"tensor": name, "cpu": value.device.type == "cpu"}

    attributes = {name: packed(value, name) for name, value in vars(scheduler).items() if name != CONFIG}
    return {**tensors, ATTRIBUTES: torch.frombuffer(bytearray(json.dumps(attributes).encode()), dtype=torch.uint8)}


def restore_scheduler(scheduler: Any, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore a `scheduler_state` in a scheduler for the same steps; tensors not from the CPU go to `device`.

    Raises:
        KeyError, TypeError, ValueError: the state is damaged or of another scheduler; `scheduler` is unchanged.
    """

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return state[value["tensor"]].to("cpu" if value["cpu"] else device)

    attributes = json.loads(bytes(state[ATTRIBUTES].tolist()))
    restored = {name: unpacked(value) for name, value in attributes.items()}
    known = vars(scheduler).keys() - {CONFIG}
    if known - restored.keys() or any(hasattr(scheduler, name) for name in restored.keys() - known):
        raise ValueError("it is another scheduler's")
    vars(scheduler).update(restored)
