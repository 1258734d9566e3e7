"""What V3's transformer is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel


@dataclass(frozen=True)
class Conditioning:
    """What the transformer sees besides the latents.

    Attributes:
        text: (B, 512, text_dim).
        start_frame: position of the latents on the time axis.
        before, after: segments in front of the latents in the sequence, and behind them.
        channels: (B, C', F, H, W) concatenated to the latents' channels, for models with more channels in than out.
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
        timestep = expand_timestep(timestep, segments)
        return model(segments, timestep, self.text, self.image, self.audio, self.speaker_masks)[len(self.before)]


def expand_timestep(timestep: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The timestep of the sample (1,), or where some segments are clean (1, F): one per latent frame, 0 for those."""
    if not any(segment.clean for segment in segments):
        return timestep.reshape(1)
    frames = [(segment.latents.shape[2], 0 if segment.clean else timestep.item()) for segment in segments]
    return torch.cat([timestep.new_full((1, count), value) for count, value in frames], dim=1)
