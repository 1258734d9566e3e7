"""Opens and checks a request's input files, and chooses the output size from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.media.audio import AudioInfo, probe_audio
from skyreels_v3.media.diarization import read_turns
from skyreels_v3.media.faces import PACKAGE as FACES
from skyreels_v3.media.faces import can_find_faces, check_faces, divide, largest_face
from skyreels_v3.media.files import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, MediaError, local_file
from skyreels_v3.media.image import NOTES, open_image
from skyreels_v3.media.video_reader import ClipInfo, check_length, last_frames, probe_video, resize_frames
from skyreels_v3.media.voice import Spans, check_detectable, check_separable, check_speakable, speak
from skyreels_v3.prompts import AUTO, NO_WORD, says_transition, with_transition
from skyreels_v3.request import GenerationRequest, check_pixels
from skyreels_v3.tasks import choose_size, complete_size

T = TypeVar("T")

LAST_PICTURES = 3  # frames sampled from the end of the clip to look for faces


@dataclass(frozen=True)
class Inputs:
    """A task's inputs: decoded images, and a clip and sounds that were checked but not decoded.

    Attributes:
        keyframes: images with their times in seconds.
        turns: when each of two speakers in one recording speaks; otherwise empty.
        notes: warnings for the user.
        files: flag, source as given, and local file of every input.
    """

    images: tuple[Image.Image, ...] = ()
    clip: ClipInfo | None = None
    audio: tuple[AudioInfo, ...] = ()
    keyframes: tuple[tuple[Image.Image, float], ...] = ()
    turns: tuple[Spans, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, str, Path], ...] = ()

    @cached_property
    def digests(self) -> tuple[tuple[str, str, str], ...]:
        """Flag, source as given, and SHA-256 of the content of every input; computed once."""
        return tuple((flag, source, digest_of(path)) for flag, source, path in self.files)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class InputFiles:
    """Opens a request's input files.

    Attributes:
        folder: for downloads.
        notes: warnings about the files that were opened.
    """

    request: GenerationRequest
    folder: Path
    notes: list[str] = field(default_factory=list)

    def fetch(self, source: str, flag: str, max_bytes: int = MAX_VIDEO_BYTES) -> Path:
        """Fetch an input; returns its local file, see `local_file`."""
        request = self.request
        progress, allow_private = request.verbosity >= 0, request.allow_private_urls
        return local_file(source, flag, self.folder, request.url_timeout, max_bytes, progress, allow_private)

    def picture(self, source: str, flag: str) -> Image.Image:
        image = self.open(source, flag, open_image, MAX_IMAGE_BYTES)
        self.note(source, image.info[NOTES])
        return image

    def clip(self, source: str) -> ClipInfo:
        """Open a clip and check that it is long enough for the task."""
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

    def spoken(self) -> AudioInfo:
        """Synthesize --text as speech."""
        with input_errors("the text", "--text"):
            return probe_audio(speak(self.request.text, self.request.voice, self.folder))

    def turns(self, sound: AudioInfo) -> tuple[Spans, ...]:
        """Read --diarization: when each speaker of a recording speaks; empty without it."""
        if (source := self.request.diarization) is None:
            return ()
        return self.open(source, "--diarization", lambda path: read_turns(path, self.request.speakers, sound.seconds))

    def open(self, source: str, flag: str, opener: Callable[[Path], T], max_bytes: int = MAX_VIDEO_BYTES) -> T:
        path = self.fetch(source, flag, max_bytes)
        with input_errors(source, flag):
            return opener(path)

    def note(self, source: str, notes: Iterable[str]) -> None:
        self.notes += [f"{format_value(source)} {note}" for note in notes]


@contextmanager
def input_errors(source: str, flag: str) -> Iterator[None]:
    """Report an unusable file under its flag and the source as given, which may be a URL."""
    try:
        yield
    except MediaError as error:
        raise UserError(flag, f"{format_value(source)} {error.reason}") from error


def check_voice(request: GenerationRequest) -> None:
    """Raise UserError if a package or program for voices or speakers is missing."""
    if request.text:
        check_speakable()
    if request.vocals:
        check_separable()
    if request.speech_only:
        check_detectable()
    if request.find_speakers:
        check_faces()


def open_inputs(request: GenerationRequest, folder: Path) -> tuple[GenerationRequest, Inputs]:
    """Open all inputs; also returns the request with its height, width and length of sound filled in.

    Args:
        folder: for downloads.

    Raises:
        UserError: an input that cannot be used.
    """
    check_voice(request)
    files = InputFiles(request, folder)
    pictures: list[tuple[str, str | None]] = [("--ref_imgs", source) for source in request.ref_imgs]
    pictures += [("--image", request.image), ("--input_image", request.input_image)]
    images = tuple(files.picture(source, flag) for flag, source in pictures if source is not None)
    clip = None if request.input_video is None else files.clip(request.input_video)
    audio = (files.spoken(),) if request.text else tuple(files.sound(source) for source in request.input_audio)
    turns = files.turns(audio[0]) if audio else ()
    if audio:
        lengths = [sound.seconds for sound in audio]
        request = replace(request, audio_seconds=sum(lengths) if request.audio_type == "sequential" else max(lengths))
    if request.find_speakers:
        request = replace(request, speaker_boxes=divide(images[0]))
    keyframes = tuple((files.picture(source, "--keyframes"), seconds) for source, seconds in request.keyframes)
    if request.height is None or request.width is None:
        width, height = (clip.width, clip.height) if clip is not None else images[0].size
        if request.height is None and request.width is None:
            height, width = choose_size(request.task, request.resolution, height, width)
        else:
            side = "height" if request.height is None else "width"
            height, width = complete_size(request.height, request.width, (height, width))
            check_pixels(height, width)
            made = height if side == "height" else width
            note = f"--{side} is not given: using {made}, for the aspect ratio of the picture"
            request = replace(request, notes=(*request.notes, note))
        request = replace(request, height=height, width=width)
    paths = tuple((name, source, files.fetch(source, f"--{name}")) for name, source in request.sources)
    inputs = Inputs(images, clip, audio, keyframes, turns, tuple(files.notes), paths)
    return suit_clip(request, inputs), inputs


def suit_clip(request: GenerationRequest, inputs: Inputs) -> GenerationRequest:
    """Choose the transition for --transition auto by the clip's end, unless the prompt implies one.

    The camera cuts out from a face that fills the frame, and in to anything else.
    """
    if request.transition != AUTO or request.to_enhance or says_transition(request.prompt):
        return request
    notes = tuple(note for note in request.notes if note != NO_WORD)
    if not can_find_faces():
        note = f"{NO_WORD}, and {FACES}, which finds faces in the clip, is not installed; the prompt stays as it is"
        return replace(request, notes=(*notes, note))
    share = largest_face(last_pictures(request, inputs))
    name = "cut_out" if share else "cut_in"
    reason = f"a face takes {100 * share:.0f} % of the frame's side" if share else "no face is large"
    prompt, note = with_transition(request.prompt, name, f"{NO_WORD}: {name}, since {reason} at the clip's end")
    given = {"transition": AUTO, "prompt": request.prompt}
    return replace(request.with_prompt(prompt), given=given, notes=(*notes, note))


def last_pictures(request: GenerationRequest, inputs: Inputs) -> list[Image.Image]:
    """A few of the condition frames at the end of the input clip."""
    frames = condition_clip(request, inputs)
    return [Image.fromarray(frames[int(index)]) for index in np.linspace(0, len(frames) - 1, LAST_PICTURES)]


def condition_clip(
    request: GenerationRequest, inputs: Inputs, progress: Callable[[int], object] = lambda frames: None
) -> np.ndarray:
    """The input clip's last frames, which condition the model, uint8 [F, H, W, 3] in the output's size."""
    assert inputs.clip is not None and request.height is not None and request.width is not None
    with input_errors(request.input_video or "", "--input_video"):
        frames = last_frames(inputs.clip.path, request.task.fps, request.condition_frames, progress)
    return np.stack(list(resize_frames(frames, request.height, request.width)))
