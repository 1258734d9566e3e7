"""The denoising loop of all tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from skyreels_v3.denoising.guidance import Guidance
from skyreels_v3.errors import UserError


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


FIRST_SIGMA = 0.999
LAST_EULER_SIGMA = 0.001


def unipc(num_inference_steps: int, shift: float | None) -> UniPCMultistepScheduler:
    """UniPC (arXiv:2302.04867) of order 2 for a flow model, ready for its first step.

    Sigmas fall evenly from 0.999 to 0 and are shifted by s*x / (1 + (s-1)*x); timesteps are 1000 * sigma, cut to
    integers. The library's own sigmas start at 1.0, which the models were not made for, so they are given.
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
    scheduler.set_timesteps(sigmas=np.linspace(FIRST_SIGMA, 0.0, num_inference_steps + 1)[:-1])
    scheduler.set_begin_index(0)  # many steps repeat a timestep, and a timestep could then not tell its own index
    return scheduler


def euler(num_inference_steps: int, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of a flow model, ready for the first one.

    Sigmas fall evenly from 1 to 0.001, are shifted as above, and end in 0; timesteps are 1000 * sigma, not integers.
    """
    assert shift is not None, "only V1's presets leave it to the checkpoint"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, LAST_EULER_SIGMA, num_inference_steps))
    scheduler.set_begin_index(0)
    return scheduler


def euler_of(
    config: Mapping[str, Any], num_inference_steps: int, shift: float | None
) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps as a checkpoint's scheduler config says, ready for the first one.

    Sigmas fall evenly from 1 to 1 / steps, are shifted, and end in 0.

    Args:
        shift: another one than the config's.
    """
    if (name := config.get("_class_name")) != FlowMatchEulerDiscreteScheduler.__name__:
        only = FlowMatchEulerDiscreteScheduler.__name__
        raise UserError("--base_model_id", f"scheduler_config.json: {name} is not supported, only {only}; give another")
    changes = {} if shift is None else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config), **changes)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])
    scheduler.set_begin_index(0)
    return scheduler


CONFIG = "_internal_dict"  # where diffusers' schedulers keep theirs
ATTRIBUTES = "attributes"  # the name of the tensor that says which attributes the others are


def scheduler_state(scheduler: Any) -> dict[str, Tensor]:
    """All that a scheduler knows besides its config, between two steps, as tensors for a file.

    Multistep schedulers go on from what earlier steps predicted. What is no tensor, and which tensor is what, is JSON
    in one more.
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
    """Have a scheduler made for the same steps know what `scheduler_state` says; tensors go back to `device`."""

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return state[value["tensor"]].to("cpu" if value["cpu"] else device)

    attributes = json.loads(bytes(state[ATTRIBUTES].tolist()))
    vars(scheduler).update({name: unpacked(value) for name, value in attributes.items()})
