"""A request's input files: opened and checked, and the output size chosen from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.audio import MAX_SECONDS, AudioInfo, probe_audio
from skyreels_v3.media.files import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, MediaError, local_file
from skyreels_v3.media.image import NOTES, covered_box, full_size, open_image
from skyreels_v3.media.video_reader import ClipInfo, check_length, last_frames, probe_video, resize_frames
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import choose_size
from skyreels_v3.wan.windows import WINDOW_FRAMES

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a task starts from: decoded pictures; a clip and sounds that have been checked but not decoded.

    Attributes:
        keyframes: pictures with their times in seconds.
        notes: what the user should know about the inputs.
        files: for every input its flag, what the user gave, and the local file.
    """

    images: tuple[Image.Image, ...] = ()
    clip: ClipInfo | None = None
    audio: tuple[AudioInfo, ...] = ()
    keyframes: tuple[tuple[Image.Image, float], ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, str, Path], ...] = ()

    @cached_property
    def digests(self) -> tuple[tuple[str, str, str], ...]:
        """For every input its flag, what the user gave, and the SHA-256 of its content; read once."""
        return tuple((flag, source, digest_of(path)) for flag, source, path in self.files)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class InputFiles:
    """Opens a request's input files.

    Attributes:
        folder: where downloads go.
        notes: what the user should know about the files that were opened.
    """

    request: GenerationRequest
    folder: Path
    notes: list[str] = field(default_factory=list)

    def fetch(self, source: str, flag: str, max_bytes: int = MAX_VIDEO_BYTES) -> Path:
        """The local file of an input; see `local_file`."""
        request = self.request
        progress, allow_private = request.verbosity >= 0, request.allow_private_urls
        return local_file(source, flag, self.folder, request.url_timeout, max_bytes, progress, allow_private)

    def picture(self, source: str, flag: str) -> Image.Image:
        image = self.open(source, flag, open_image, MAX_IMAGE_BYTES)
        self.note(source, image.info[NOTES])
        return image

    def clip(self, source: str) -> ClipInfo:
        """A clip that is long enough for the task."""
        request, fps = self.request, self.request.task.fps
        clip = self.open(source, "--input_video", lambda path: probe_video(path, fps))
        with input_errors(source, "--input_video"):
            check_length(clip.path, fps, request.condition_frames, clip.frames)
        self.note(source, clip.notes)
        if request.include_input and request.frame_folder and clip.has_sound:
            self.note(source, ["has sound, which PNG frames cannot have; give an mp4 as --output to keep it"])
        return clip

    def sound(self, source: str) -> AudioInfo:
        sound = self.open(source, "--input_audio", probe_audio)
        self.note(source, sound.notes)
        return sound

    def open(self, source: str, flag: str, opener: Callable[[Path], T], max_bytes: int = MAX_VIDEO_BYTES) -> T:
        path = self.fetch(source, flag, max_bytes)
        with input_errors(source, flag):
            return opener(path)

    def note(self, source: str, notes: Iterable[str]) -> None:
        self.notes += [f"{shown(source)} {note}" for note in notes]


@contextmanager
def input_errors(source: str, flag: str) -> Iterator[None]:
    """Report an unusable file under its flag and the name that the user gave, which may be a URL."""
    try:
        yield
    except MediaError as error:
        raise UserError(flag, f"{shown(source)} {error.reason}") from error


def open_inputs(request: GenerationRequest, folder: Path) -> tuple[GenerationRequest, Inputs]:
    """Open all inputs, and fill in the request's height and width and the length of its sound.

    Args:
        folder: where downloads go.

    Raises:
        UserError: an input that cannot be used.
    """
    files = InputFiles(request, folder)
    pictures: list[tuple[str, str | None]] = [("--ref_imgs", source) for source in request.ref_imgs]
    pictures += [("--image", request.image), ("--input_image", request.input_image)]
    images = tuple(files.picture(source, flag) for flag, source in pictures if source is not None)
    clip = None if request.input_video is None else files.clip(request.input_video)
    audio = tuple(files.sound(source) for source in request.input_audio)
    if audio:
        lengths = [sound.seconds for sound in audio]
        request = replace(request, audio_seconds=sum(lengths) if request.audio_type == "sequential" else max(lengths))
        check_times(request, clip)
    keyframes = tuple((files.picture(source, "--keyframes"), seconds) for source, seconds in request.keyframes)
    if request.height is None:
        width, height = (clip.width, clip.height) if clip is not None else images[0].size
        height, width = choose_size(request.task, request.resolution, height, width)
        request = replace(request, height=height, width=width)
    check_boxes(request, images)
    paths = tuple((name, source, files.fetch(source, f"--{name}")) for name, source in request.sources)
    return request, Inputs(images, clip, audio, keyframes, tuple(files.notes), paths)


def check_times(request: GenerationRequest, clip: ClipInfo | None) -> None:
    """Raise UserError if the lengths of sound, key frames and a dubbed clip do not fit together."""
    seconds = request.audio_seconds or 0.0
    if seconds > MAX_SECONDS:
        reason = f"{seconds:.2f} s one after the other are too long"
        raise UserError("--input_audio", f"{reason}; give {MAX_SECONDS:g} s at most")
    if clip is not None and clip.seconds + 1 / request.task.fps < seconds:
        reason = f"{shown(request.input_video)} is {clip.seconds:.2f} s long, the sound {seconds:.2f} s"
        raise UserError("--input_video", f"{reason}; give a longer clip or a shorter sound")
    for source, time in request.keyframes:
        if time > seconds or request.frames_out < WINDOW_FRAMES:
            reason = f"{shown(source)} at {time:g} s, the sound is {seconds:.2f} s long"
            shortest = WINDOW_FRAMES / request.task.fps
            raise UserError("--keyframes", f"{reason}; give times within it, and sound of at least {shortest:g} s")


def check_boxes(request: GenerationRequest, images: Sequence[Image.Image]) -> None:
    """Raise UserError for a speaker's box that is not inside the portrait, or is cropped away."""
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


def condition_clip(
    request: GenerationRequest, inputs: Inputs, progress: Callable[[int], object] = lambda frames: None
) -> np.ndarray:
    """The last frames of the input clip that the model sees, uint8 [F, H, W, 3] in the output's size."""
    assert inputs.clip is not None and request.height is not None and request.width is not None
    with input_errors(request.input_video or "", "--input_video"):
        frames = last_frames(inputs.clip.path, request.task.fps, request.condition_frames, progress)
    return np.stack(list(resize_frames(frames, request.height, request.width)))
