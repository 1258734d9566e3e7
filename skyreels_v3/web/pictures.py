"""Pictures of a finished video: a thumbnail of its first frame, its last frame, and a sprite sheet.

Each is made on the first request and then kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Lock

from PIL import Image

from skyreels_v3.media.files import temporary_name
from skyreels_v3.media.video_reader import last_frames, probe_video, read_frames

THUMBNAIL_SIDE = 512  # pixels, at most
SHEET_COLUMNS, SHEET_FRAMES, SHEET_SIDE = 5, 25, 320
SHEET_FPS = 4  # at which videos are sampled

_lock = Lock()  # one at a time: ffmpeg uses a whole core


def picture_of(video: Path, variant: str) -> Path:
    """The file of one of a video's `PICTURES`, made if it does not exist.

    Raises:
        OSError, RuntimeError: the video is gone, or the disk is full.
    """
    name, make = PICTURES[variant]
    path = video.with_name(name)
    with _lock:
        if not path.exists():
            temporary = temporary_name(path)
            try:
                make(video).save(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    return path


def thumbnail(video: Path) -> Image.Image:
    """The first frame."""
    return next(small_frames(video, THUMBNAIL_SIDE))


def last_frame(video: Path) -> Image.Image:
    """The last frame at full size."""
    fps = round(probe_video(video, SHEET_FPS).fps)
    return Image.fromarray(last_frames(video, fps, 1)[0])


def spritesheet(video: Path) -> Image.Image:
    """Evenly spaced frames of the whole video, row by row."""
    step = max(1, math.ceil(probe_video(video, SHEET_FPS).frames / SHEET_FRAMES))
    frames = [frame for number, frame in enumerate(small_frames(video, SHEET_SIDE)) if number % step == 0]
    width, height = frames[0].size
    columns = min(SHEET_COLUMNS, len(frames))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        sheet.paste(frame, (column * width, row * height))
    return sheet


def small_frames(video: Path, side: int) -> Iterator[Image.Image]:
    """Frames at `SHEET_FPS`, scaled down to at most `side` pixels per side."""
    with closing(read_frames(video, SHEET_FPS)) as frames:  # type: ignore[type-var]  # generators have `close`
        for frame in frames:
            image = Image.fromarray(frame)
            image.thumbnail((side, side))
            yield image


PICTURES = {  # file names, and the functions that make the pictures
    "thumbnail": ("thumbnail.webp", thumbnail),
    "spritesheet": ("spritesheet.jpg", spritesheet),
    "last": ("last.png", last_frame),
}
