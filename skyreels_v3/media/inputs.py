"""A request's input files: found, looked at, and the output's size chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.audio import AudioInfo, probe_audio
from skyreels_v3.media.image import open_image
from skyreels_v3.media.sources import MAX_IMAGE_BYTES, localise
from skyreels_v3.media.video import ClipInfo, last_frames, probe, resized, too_short
from skyreels_v3.tasks import GenerationRequest, choose_size


@dataclass(frozen=True)
class Inputs:
    """What a task starts from: pictures as they are; a clip and a sound that have been looked at but not decoded."""

    images: tuple[Image.Image, ...] = ()
    clip: ClipInfo | None = None
    audio: AudioInfo | None = None


def open_inputs(request: GenerationRequest, folder: Path) -> tuple[GenerationRequest, Inputs]:
    """Open all inputs, and return the request with its height and width and the length of its sound filled in.

    Args:
        folder: where downloads go.

    Raises:
        UserError: an input that cannot be used.
    """
    images = [open_picture(source, "--ref_imgs", request, folder) for source in request.ref_imgs]
    if request.input_image is not None:
        images.append(open_picture(request.input_image, "--input_image", request, folder))
    clip = None if request.input_video is None else open_clip(request.input_video, request, folder)
    audio = None if request.input_audio is None else open_sound(request.input_audio, request, folder)
    if audio is not None:
        request = replace(request, audio_seconds=audio.seconds)
    if request.height is None:
        width, height = (clip.width, clip.height) if clip is not None else images[0].size
        height, width = choose_size(request.task, request.resolution, height, width)
        request = replace(request, height=height, width=width)
    return request, Inputs(tuple(images), clip, audio)


def open_picture(source: str, flag: str, request: GenerationRequest, folder: Path) -> Image.Image:
    """A picture, from a path or an address."""
    path = localise(source, flag, folder, request.url_timeout, MAX_IMAGE_BYTES, request.verbosity >= 0)
    with naming(source, path):
        return open_image(path, flag)


def open_clip(source: str, request: GenerationRequest, folder: Path) -> ClipInfo:
    """A clip that is long enough for the task."""
    flag = "--input_video"
    path = localise(source, flag, folder, request.url_timeout, progress=request.verbosity >= 0)
    with naming(source, path):
        clip = probe(path, flag, request.task.fps)
        if clip.frames < request.condition_frames:
            raise too_short(path, flag, request.task.fps, request.condition_frames, clip.frames)
    return clip


def open_sound(source: str, request: GenerationRequest, folder: Path) -> AudioInfo:
    """A recording of a length that the models take."""
    flag = "--input_audio"
    path = localise(source, flag, folder, request.url_timeout, progress=request.verbosity >= 0)
    with naming(source, path):
        return probe_audio(path, flag)


@contextmanager
def naming(source: str, path: Path) -> Iterator[None]:
    """Have errors about a downloaded file name what the user gave, not the temporary file."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix(f"{error.flag}: ")
        raise UserError(error.flag, message.replace(shown(path), shown(source))) from error


def condition_clip(
    request: GenerationRequest, inputs: Inputs, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """The last frames of the input clip that the model sees, uint8 [F, H, W, 3] of the output's size."""
    assert inputs.clip is not None and request.height is not None and request.width is not None
    path = inputs.clip.path
    with naming(request.input_video or "", path):
        frames = last_frames(path, request.task.fps, request.condition_frames, "--input_video", progress)
    return np.stack(list(resized(frames, request.height, request.width)))
