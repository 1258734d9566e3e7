"""talking_avatar: the person in a portrait speaks the words of an audio file, window by window.

`windows.plan_windows` plans the passes, `avatar.Avatar` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyreels_v3.denoising.guidance import Guidance, text_audio_guidance
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import Pipeline
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.audio import MAX_SECONDS
from skyreels_v3.media.image import covered_box, full_size
from skyreels_v3.media.video_reader import ClipInfo
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import latent_frames
from skyreels_v3.wan.windows import WINDOW_FRAMES, plan_windows

if TYPE_CHECKING:
    from skyreels_v3.stages import Event, Stages


class TalkingAvatar(Pipeline):
    """Runs a key-frame pass, then windows, each from the last frames of the one before to its own key frame."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        return text_audio_guidance(request.text_guidance_scale, request.audio_guidance_scale)

    def check_inputs(self, request: ResolvedRequest, inputs: Inputs) -> None:
        check_times(request, inputs.clip)
        check_boxes(request, inputs)

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        windows = len(plan_windows(request.frames_out).windows)
        for _ in range(max(1, windows) if request.input_video else 1 + windows):  # a dubbed clip needs no key frames
            yield latent_frames(WINDOW_FRAMES), 0

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.wan.avatar import Avatar

        return Avatar(stages, self.guidance(stages.request)).run()


def check_times(request: ResolvedRequest, clip: ClipInfo | None) -> None:
    """Raise UserError if the times of audio, key frames and a dubbed clip do not fit together."""
    seconds = request.audio_seconds or 0.0
    if seconds > MAX_SECONDS:
        reason = f"{seconds:.2f} s one after the other is too long"
        raise UserError("--input_audio", f"{reason}; give {MAX_SECONDS:g} s at most")
    if clip is not None and clip.seconds + 1 / request.task.fps < seconds:
        reason = f"{format_value(request.input_video)} is {clip.seconds:.2f} s long, the sound {seconds:.2f} s"
        raise UserError("--input_video", f"{reason}; give a longer clip or a shorter sound")
    for source, time in request.keyframes:
        if time > seconds or request.frames_out < WINDOW_FRAMES:
            reason = f"{format_value(source)} at {time:g} s, the sound is {seconds:.2f} s long"
            shortest = WINDOW_FRAMES / request.task.fps
            raise UserError("--keyframes", f"{reason}; give times within it, and sound of at least {shortest:g} s")


def check_boxes(request: ResolvedRequest, inputs: Inputs) -> None:
    """Raise UserError for a speaker's box that is outside the portrait or clip, or cropped away."""
    clip = inputs.clip
    for x0, y0, x1, y1 in request.speaker_boxes:
        kind, size = ("portrait", full_size(inputs.images[0])) if clip is None else ("clip", (clip.width, clip.height))
        width, height = size
        if x1 > width or y1 > height:
            reason = f"{x0},{y0},{x1},{y1} is not inside the {kind} of {width} x {height} pixels"
            raise UserError("--speaker_boxes", f"{reason}; give boxes inside it")
        left, top, right, bottom = covered_box((x0, y0, x1, y1), size, request.height, request.width)
        if left >= right or top >= bottom:
            reason = f"{x0},{y0},{x1},{y1} is cut off when the {kind} becomes {request.width} x {request.height}"
            raise UserError("--speaker_boxes", f"{reason}; give a box nearer to the middle, or another size")


PIPELINE = TalkingAvatar()
