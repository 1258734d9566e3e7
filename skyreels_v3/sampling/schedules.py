"""Noise schedules, over diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from skyreels_v3.errors import UserError

FIRST_SIGMA = 0.999
LAST_EULER_SIGMA = 0.001


def unipc(num_inference_steps: int, shift: float) -> UniPCMultistepScheduler:
    """UniPC (arXiv:2302.04867) of order 2 for a flow model, ready for its first step.

    Sigmas fall evenly from 0.999 to 0 and are shifted by s*x / (1 + (s-1)*x); timesteps are 1000 * sigma, cut to
    integers. The library's own sigmas start at 1.0, which the models were not made for, so they are given.
    """
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


def euler(num_inference_steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of a flow model, ready for the first one.

    Sigmas fall evenly from 1 to 0.001, are shifted as above, and end in 0; timesteps are 1000 * sigma, not integers.
    """
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
