"""single_shot_extension: the input clip goes on in the same shot, rolled out 5 seconds at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from skyreels_v3.denoising.guidance import text_guidance
from skyreels_v3.denoising.loop import Conditioning
from skyreels_v3.inputs import Inputs
from skyreels_v3.stages import Frame, Pass, Steps
from skyreels_v3.tasks import GenerationRequest, plan_roll_outs
from skyreels_v3.wan.transformer import Segment


class SingleShotExtension(Steps):
    """The last frames of the clip stand clean in front of the new ones; each roll-out goes on from the one before."""

    def __call__(self, request: GenerationRequest, inputs: Inputs) -> Iterator[Pass]:
        """A pass for each roll-out."""
        clip = self.read_condition(request, inputs)
        guidance = text_guidance(request.guidance_scale)
        (texts,) = self.contexts(guidance, request)
        missing = request.frames_out
        rolls = plan_roll_outs(request.duration)
        for number, frames in enumerate(rolls, start=1):
            prefix = self.encode_frames(clip)
            before = (Segment(prefix, clean=True),)
            conditions = {name: Conditioning(text, prefix.shape[2], before) for name, text in texts.items()}
            generator = self.runtime.generator(request.seed)  # the same noise in every roll-out
            noise = self.noise(request, frames, generator)
            name = f"denoising {number}/{len(rolls)}"
            latents = self.denoise(request, noise, lambda made=conditions: made, guidance, generator, name)
            tail: deque[Frame] = deque(maxlen=len(clip))
            last, wanted = number == len(rolls), max(0, missing)
            new = self.new_frames(prefix, latents, tail, wanted if last else None)
            yield Pass(latents.cpu(), new if last else islice(new, wanted))
            missing -= 4 * frames
            if not last:
                deque(new, maxlen=0)  # roll-outs can make too much before the last one; it conditions that all the same
                clip = np.stack(tail)

    def new_frames(self, prefix: Tensor, latents: Tensor, tail: deque[Frame], wanted: int | None) -> Iterator[Frame]:
        """Decode condition and new frames together and give the new ones; `tail` ends up with the last of them.

        `wanted`: how many new ones, None for all.
        """
        condition_frames = 4 * (prefix.shape[2] - 1) + 1
        frames = None if wanted is None else condition_frames + wanted
        decoded = self.decode(torch.cat((prefix, latents), dim=2), rounding=False, frames=frames)
        for frame in islice(decoded, condition_frames, None):
            tail.append(frame)
            yield frame
