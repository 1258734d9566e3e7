"""The denoising loop, and what a model is conditioned on. No task has a loop of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skyreels_v3.denoising.guidance import Guidance
from skyreels_v3.wan.transformer import Segment, SkyReelsTransformer3DModel


class Condition(Protocol):
    """What a model is conditioned on, in the way that it takes it."""

    def predict(self, model: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, F, H, W) of the latents at `timestep`, one number."""


@dataclass(frozen=True)
class Conditioning:
    """What `SkyReelsTransformer3DModel` sees besides the latents.

    Attributes:
        text: (B, 512, text_dim).
        start_frame: place of the latents on the time axis.
        before, after: segments in front of the latents in the sequence, and behind them.
        channels: (B, C', F, H, W) joined to the latents' channels, for models that take more than they predict.
        image, audio, speaker_masks: as the transformer takes them.
    """

    text: Tensor
    start_frame: int = 0
    before: tuple[Segment, ...] = ()
    after: tuple[Segment, ...] = ()
    channels: Tensor | None = None
    image: Tensor | None = None
    audio: Tensor | None = None
    speaker_masks: Tensor | None = None

    def predict(self, model: SkyReelsTransformer3DModel, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, F, H, W) of the latents at `timestep`, one number."""
        seen = latents if self.channels is None else torch.cat((latents, self.channels), dim=1)
        segments = (*self.before, Segment(seen, self.start_frame), *self.after)
        velocities = model(
            segments, spread_timestep(timestep, segments), self.text, self.image, self.audio, self.speaker_masks
        )
        return velocities[len(self.before)]


def spread_timestep(timestep: Tensor, segments: Iterable[Segment]) -> Tensor:
    """One timestep for the sample (1,), or (1, F) for every latent frame where some are clean and stand at 0."""
    segments = tuple(segments)
    if not any(segment.clean for segment in segments):
        return timestep.reshape(1)
    return torch.cat(
        [timestep.new_full((1, s.latents.shape[2]), 0 if s.clean else timestep.item()) for s in segments], 1
    )


Pin = Callable[[Tensor, float], Tensor]


def leave(latents: Tensor, sigma: float) -> Tensor:
    """The pin that holds nothing."""
    return latents


Predictions = Callable[[Sequence[str], Callable[[str], Tensor]], Mapping[str, Tensor]]


def one_by_one(names: Sequence[str], predict: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The prediction under each condition, by one process."""
    return {name: predict(name) for name in names}


@torch.no_grad()  # not inference mode, which FSDP's sharded weights do not work in
def denoise(
    model: nn.Module,
    scheduler: Any,
    latents: Tensor,
    conditions: Mapping[str, Condition],
    guidance: Guidance,
    pin: Pin = leave,
    predictions: Predictions = one_by_one,
    done: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Turn noise (B, C, F, H, W) into latents, step by step: the number of each step, from 1, and its latents.

    Args:
        model: predicts velocities.
        scheduler: a diffusers scheduler, set to its next step.
        latents: noise, float32, on the model's device; or what became of it in the first `done` steps.
        conditions: by the names that `guidance` asks for.
        pin: called with the latents and their noise level before the first step and after each; gives the latents to
            go on with, such as ones whose first frames are known.
        predictions: computes the predictions under the conditions.
        done: steps that an interrupted loop has made.

    Raises:
        FloatingPointError: latents became infinite or not a number.
    """

    def predict(name: str) -> Tensor:
        return conditions[name].predict(model, latents, timestep)

    if done == 0:
        latents = pin(latents, float(scheduler.sigmas[0]))
    for step, timestep in enumerate(scheduler.timesteps[done:], start=done + 1):
        velocity = guidance(predictions(guidance.conditions, predict).__getitem__)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        latents = pin(latents, float(scheduler.sigmas[step]))
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the latents are not finite after step {step} of {len(scheduler.timesteps)}; "
                "the checkpoint or the inputs are damaged, or --dtype float32 is needed"
            )
        yield step, latents
