"""single_shot_extension: continues the input clip in the same shot, 5 seconds per roll-out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from skyreels_v3.families import Pipeline
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import latent_frames, plan_roll_outs

if TYPE_CHECKING:
    from torch import Tensor

    from skyreels_v3.stages import Event, Frame, Stages


class SingleShotExtension(Pipeline):
    """Prepends the clip's last frames as clean frames; each roll-out continues the one before."""

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        for new in plan_roll_outs(request.duration):
            yield new, latent_frames(request.condition_frames)

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.denoising.loop import unipc
        from skyreels_v3.stages import Pass
        from skyreels_v3.wan.conditioning import Conditioning
        from skyreels_v3.wan.rope import Segment

        request, guidance = stages.request, self.guidance(stages.request)
        clip = stages.read_condition()
        (texts,) = stages.encode_prompts(guidance, request.prompt)
        missing = request.frames_out
        rolls = plan_roll_outs(request.duration)
        for number, frames in enumerate(rolls, start=1):
            prefix = stages.encode_frames(clip)
            before = (Segment(prefix, clean=True),)
            conditions = {
                name: Conditioning(parts["context"], prefix.shape[2], before) for name, parts in texts.items()
            }
            generator = stages.runtime.generator(request.seed)  # the same noise in every roll-out
            noise = stages.noise(frames, generator)
            scheduler = unipc(request.num_inference_steps, request.shift)
            name = f"denoising {number}/{len(rolls)}"
            latents = yield from stages.denoise(noise, partial(dict, conditions), guidance, generator, scheduler, name)
            tail: deque[Frame] = deque(maxlen=len(clip))
            last, wanted = number == len(rolls), max(0, missing)
            new = new_frames(stages, clip, prefix, latents, tail, wanted if last else None)
            yield Pass(latents.cpu(), new if last else islice(new, wanted), clip)
            missing -= 4 * frames
            if not last:
                deque(new, maxlen=0)  # frames beyond the wanted ones are not written, but condition the next roll-out
                clip = np.stack(tail)


def new_frames(
    stages: Stages, clip: np.ndarray, prefix: Tensor, latents: Tensor, tail: deque[Frame], wanted: int | None
) -> Iterator[Frame]:
    """Decode condition and new frames together and yield the new ones; leaves the last of them in `tail`.

    Args:
        clip: uint8 [F, H, W, 3], the condition frames before they were encoded.
        wanted: how many new frames, None for all.
    """
    condition_frames = 4 * (prefix.shape[2] - 1) + 1
    frames = None if wanted is None else condition_frames + wanted
    joined = latents.new_empty((*latents.shape[:2], prefix.shape[2] + latents.shape[2], *latents.shape[3:]))
    joined[:, :, : prefix.shape[2]], joined[:, :, prefix.shape[2] :] = prefix, latents
    strength = stages.request.color_correction_strength
    video = in_colors_of(clip, stages.decode_video(joined, frames), strength)
    for frame in islice(stages.frames_of(video, rounding=strength > 0), condition_frames, None):
        tail.append(frame)
        yield frame


def in_colors_of(clip: np.ndarray, video: Iterator[Tensor], strength: float) -> Iterator[Tensor]:
    """The pieces of a video that begins with `clip`; those after it are matched to the colors that the clip ends in."""
    from skyreels_v3.media.color import match_color
    from skyreels_v3.stages import frames_to_video

    sample, decoded = None, 0
    for piece in video:
        if decoded >= len(clip) and strength > 0:
            sample = piece if sample is None else sample
            end = frames_to_video(clip[-sample.shape[2] :]).to(piece)
            yield match_color(piece, end, strength, sample)
        else:
            yield piece
        decoded += piece.shape[2]


PIPELINE = SingleShotExtension()
