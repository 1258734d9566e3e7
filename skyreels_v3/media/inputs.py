"""A request's input files: found, looked at, and the output's size chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.image import open_image
from skyreels_v3.media.sources import MAX_IMAGE_BYTES, localise
from skyreels_v3.media.video import ClipInfo, last_frames, probe, resized, too_short
from skyreels_v3.tasks import GenerationRequest, choose_size


@dataclass(frozen=True)
class Inputs:
    """What a task starts from: reference images as they are, or a clip that has been looked at but not decoded."""

    images: tuple[Image.Image, ...] = ()
    clip: ClipInfo | None = None


def open_inputs(request: GenerationRequest, folder: Path) -> tuple[GenerationRequest, Inputs]:
    """Open all inputs, and return the request with its height and width filled in.

    Args:
        folder: where downloads go.

    Raises:
        UserError: an input that cannot be used.
    """
    progress = request.verbosity >= 0
    if request.input_video is None:
        flag = "--ref_imgs"
        paths = [
            localise(source, flag, folder, request.url_timeout, MAX_IMAGE_BYTES, progress)
            for source in request.ref_imgs
        ]
        inputs = Inputs(images=tuple(map(open_reference, request.ref_imgs, paths)))
        width, height = inputs.images[0].size
    else:
        flag = "--input_video"
        path = localise(request.input_video, flag, folder, request.url_timeout, progress=progress)
        with naming(request.input_video, path):
            clip = probe(path, flag, request.task.fps)
            if clip.frames < request.condition_frames:
                raise too_short(path, flag, request.task.fps, request.condition_frames, clip.frames)
        inputs, width, height = Inputs(clip=clip), clip.width, clip.height
    if request.height is None:
        height, width = choose_size(request.task, request.resolution, height, width)
        request = replace(request, height=height, width=width)
    return request, inputs


def open_reference(source: str, path: Path) -> Image.Image:
    with naming(source, path):
        return open_image(path, "--ref_imgs")


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
