"""This machine's denoising speed, measured in earlier runs to estimate the time in a dry run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from skyreels_v3.cache import cache_folder
from skyreels_v3.media.files import replace_file
from skyreels_v3.plan import Plan

logger = logging.getLogger(__name__)


def store(plan: Plan, latent_frames: int, seconds: float) -> None:
    """Record the speed of a pass of `latent_frames`, replacing an earlier measurement."""
    flop = next((made.flop for made in plan.passes if made.latents[2] == latent_frames), 0)
    if plan.request.no_cache or not flop or not seconds:
        return
    try:
        replace_file(path(), json.dumps(measured() | {key_of(plan): flop / seconds}).encode())
    except OSError as error:
        logger.debug("the throughput cannot be stored: %s", error)


def seconds_of(plan: Plan) -> float | None:
    """The estimated denoising time of a plan, None if nothing similar has run here."""
    speed = measured().get(key_of(plan))
    return sum(made.flop for made in plan.passes) / speed if isinstance(speed, float) and speed > 0 else None


def key_of(plan: Plan) -> str:
    """A key that is equal for runs of about the same FLOP/s."""
    request = plan.request
    model = (request.model_id, request.transformer, request.task.name, plan.device.partition(":")[0], plan.dtype)
    return " ".join(map(str, (*model, request.quant, request.memory, request.attention, plan.compiles, plan.degrees)))


def measured() -> dict[str, Any]:
    """The stored FLOP/s by `key_of`."""
    try:
        known = json.loads(path().read_text())
    except (OSError, ValueError):
        known = None
    return known if isinstance(known, dict) else {}


def path() -> Path:
    return cache_folder() / "throughput.json"
