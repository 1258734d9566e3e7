"""A request's input files: opened and checked, and the output size chosen from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.audio import MAX_SECONDS, AudioInfo, probe_audio
from skyreels_v3.media.image import covered_box, full_size, open_image
from skyreels_v3.media.sources import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, localise
from skyreels_v3.media.video import ClipInfo, last_frames, probe, resized, too_short
from skyreels_v3.tasks import GenerationRequest, choose_size
from skyreels_v3.wan.windows import WINDOW_FRAMES


@dataclass(frozen=True)
class Inputs:
    """What a task starts from: pictures as they are; a clip and a sound that have been looked at but not decoded."""

    images: tuple[Image.Image, ...] = ()
    clip: ClipInfo | None = None
    audio: tuple[AudioInfo, ...] = ()
    keyframes: tuple[tuple[Image.Image, float], ...] = ()  # with their times in seconds
    notes: tuple[str, ...] = ()  # what the user should know of them
    files: tuple[tuple[str, str, Path], ...] = ()  # of all inputs: flag, what was given, where that is

    @cached_property
    def digests(self) -> tuple[tuple[str, str, str], ...]:
        """Flag, what was given and SHA-256 of its content, of all inputs; a clip is read for it once."""
        return tuple((flag, source, digest_of(path)) for flag, source, path in self.files)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_inputs(request: GenerationRequest, folder: Path) -> tuple[GenerationRequest, Inputs]:
    """Open all inputs, and return the request with its height and width and the length of its sound filled in.

    Args:
        folder: where downloads go.

    Raises:
        UserError: an input that cannot be used.
    """
    notes: list[str] = []
    images = [open_picture(source, "--ref_imgs", request, folder, notes) for source in request.ref_imgs]
    if request.image is not None:
        images.append(open_picture(request.image, "--image", request, folder, notes))
    if request.input_image is not None:
        images.append(open_picture(request.input_image, "--input_image", request, folder, notes))
    clip = None if request.input_video is None else open_clip(request.input_video, request, folder, notes)
    audio = tuple(open_sound(source, request, folder, notes) for source in request.input_audio)
    if audio:
        lengths = [sound.seconds for sound in audio]
        request = replace(request, audio_seconds=sum(lengths) if request.audio_type == "sequential" else max(lengths))
        check_times(request, clip)
    keyframes = tuple(
        (open_picture(source, "--keyframes", request, folder, notes), seconds) for source, seconds in request.keyframes
    )
    if request.height is None:
        width, height = (clip.width, clip.height) if clip is not None else images[0].size
        height, width = choose_size(request.task, request.resolution, height, width)
        request = replace(request, height=height, width=width)
    check_boxes(request, images)
    # what was fetched is in the folder by now
    files = tuple((name, given, fetched(given, f"--{name}", request, folder)) for name, given in request.sources)
    return request, Inputs(tuple(images), clip, audio, keyframes, tuple(notes), files)


def check_times(request: GenerationRequest, clip: ClipInfo | None) -> None:
    """Raise UserError for sound, key frames and a dubbed clip whose lengths do not go together."""
    seconds = request.audio_seconds or 0.0
    if seconds > MAX_SECONDS:
        raise UserError(
            "--input_audio", f"{seconds:.2f} s one after the other are too long; give {MAX_SECONDS:g} s at most"
        )
    if clip is not None and clip.seconds + 1 / request.task.fps < seconds:
        reason = f"{shown(request.input_video)} is {clip.seconds:.2f} s long, the sound {seconds:.2f} s"
        raise UserError("--input_video", f"{reason}; give a longer clip or a shorter sound")
    for source, time in request.keyframes:
        if time > seconds or request.frames_out < WINDOW_FRAMES:
            reason = f"{shown(source)} at {time:g} s, the sound is {seconds:.2f} s long"
            shortest = WINDOW_FRAMES / request.task.fps
            raise UserError("--keyframes", f"{reason}; give times within it, and sound of at least {shortest:g} s")


def check_boxes(request: GenerationRequest, images: Sequence[Image.Image]) -> None:
    """Raise UserError for a speaker's box that is not inside the portrait, or not in the picture after its crop."""
    for x0, y0, x1, y1 in request.speaker_boxes:
        width, height = size = full_size(images[0])
        if x1 > width or y1 > height:
            reason = f"{x0},{y0},{x1},{y1} is not inside the portrait of {width} x {height} pixels"
            raise UserError("--speaker_boxes", f"{reason}; give boxes inside it")
        assert request.height is not None and request.width is not None
        left, top, right, bottom = covered_box((x0, y0, x1, y1), size, request.height, request.width)
        if left >= right or top >= bottom:
            reason = f"{x0},{y0},{x1},{y1} is cut off when the portrait becomes {request.width} x {request.height}"
            raise UserError("--speaker_boxes", f"{reason}; give a box nearer to the middle, or another size")


def fetched(source: str, flag: str, request: GenerationRequest, folder: Path, max_bytes: int = MAX_VIDEO_BYTES) -> Path:
    """The file of an input, see `localise`."""
    progress = request.verbosity >= 0
    return localise(source, flag, folder, request.url_timeout, max_bytes, progress, request.allow_private_urls)


def open_picture(source: str, flag: str, request: GenerationRequest, folder: Path, notes: list[str]) -> Image.Image:
    """A picture, from a path or an address; `notes` gets what is to be said of it, as in the other two."""
    path = fetched(source, flag, request, folder, MAX_IMAGE_BYTES)
    with naming(source, path, notes) as say:
        return open_image(path, flag, say)


def open_clip(source: str, request: GenerationRequest, folder: Path, notes: list[str]) -> ClipInfo:
    """A clip that is long enough for the task."""
    flag = "--input_video"
    path = fetched(source, flag, request, folder)
    with naming(source, path, notes) as say:
        clip = probe(path, flag, request.task.fps, say)
        if clip.frames < request.condition_frames:
            raise too_short(path, flag, request.task.fps, request.condition_frames, clip.frames)
        if request.include_input and request.frame_folder and clip.has_sound:
            say(f"{shown(path)} has sound, which PNG frames cannot have; give an mp4 as --output to keep it")
    return clip


def open_sound(source: str, request: GenerationRequest, folder: Path, notes: list[str]) -> AudioInfo:
    """A recording of a length that the models take."""
    flag = "--input_audio"
    path = fetched(source, flag, request, folder)
    with naming(source, path, notes) as say:
        return probe_audio(path, flag, say)


@contextmanager
def naming(source: str, path: Path, notes: list[str]) -> Iterator[Callable[[str], None]]:
    """Have errors and notes about a downloaded file name what the user gave, not the temporary file."""

    def named(text: str) -> str:
        return text.replace(shown(path), shown(source))

    try:
        yield lambda note: notes.append(named(note))
    except UserError as error:
        raise UserError(error.flag, named(error.message)) from error


def condition_clip(
    request: GenerationRequest, inputs: Inputs, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """The last frames of the input clip that the model sees, uint8 [F, H, W, 3] of the output's size."""
    assert inputs.clip is not None and request.height is not None and request.width is not None
    path = inputs.clip.path
    with naming(request.input_video or "", path, []):
        frames = last_frames(path, request.task.fps, request.condition_frames, "--input_video", progress)
    return np.stack(list(resized(frames, request.height, request.width)))
