"""talking_avatar: the person in a portrait speaks what is in a sound file, window by window.

`windows.plan_windows` says which passes there are, `avatar.Avatar` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyreels_v3.denoising.guidance import Guidance, text_audio_guidance
from skyreels_v3.families import Pipeline
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import latent_frames
from skyreels_v3.wan.windows import WINDOW_FRAMES, plan_windows

if TYPE_CHECKING:
    from skyreels_v3.stages import Event, Stages


class TalkingAvatar(Pipeline):
    """A key-frame pass over the first frames; then windows from the last frames of one to the key frame of the next."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        return text_audio_guidance(request.text_guidance_scale, request.audio_guidance_scale)

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        windows = len(plan_windows(request.frames_out).windows)
        for _ in range(max(1, windows) if request.input_video else 1 + windows):  # a dubbed clip needs no key frames
            yield latent_frames(WINDOW_FRAMES), 0

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.wan.avatar import Avatar

        return Avatar(stages, self.guidance(stages.request)).run()


PIPELINE = TalkingAvatar()
