"""Clips: quick checks, and reading frames as 8-bit RGB with BT.709 colors, one in memory at a time."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from subprocess import PIPE
from typing import IO

import numpy as np
from PIL import Image

from skyreels_v3.errors import format_value
from skyreels_v3.media.ffmpeg import (
    AUDIO,
    MAX_FRAME_PIXELS,
    TRACK,
    VIDEO,
    Track,
    ffmpeg_process,
    find_track,
    read_packets,
)
from skyreels_v3.media.files import MediaError
from skyreels_v3.media.image import cover_crop

PICTURE = re.compile(r", (\w+)(?:\((.*?)\))?, (\d+)x(\d+)(?:,? \[?SAR (\d+):(\d+))?")  # pixel format, details, size
COLORS = re.compile(r"([\w-]+)/([\w-]+)/([\w-]+)")  # matrix, primaries, transfer function

# Non-square pixels are stretched to square ones. If they are square, only the pixel format changes.
SCALE = "scale=w='max(1,round(iw*sar))':h=ih:flags=bicubic+accurate_rnd+full_chroma_int"
TO_RGB = f"{SCALE},setsar=1,format=rgb24"
TO_RGB_ON_WHITE = (
    f"{SCALE},setsar=1,format=rgba,split[a][b];[a]lutrgb=r=255:g=255:b=255:a=255[white];[white][b]overlay=format=rgb,"
    "format=rgb24"
)
WITH_ALPHA = re.compile(r"yuva|gbrap|rgba|bgra|argb|abgr|ya\d|pal8|ayuv|vuya")  # pixel formats
HD_HEIGHT = 720  # from here on an unknown matrix is assumed to be BT.709, as in players
INTERLACED = re.compile("top first|bottom first|top coded first|bottom coded first")
HDR = {"arib-std-b67": "HLG", "smpte2084": "PQ"}
WIDE_PRIMARIES = ("bt2020", "smpte431", "smpte432")
# Converts via linear light to BT.709's primaries and transfer function. In linear light, 1 is SDR white at 203 cd/m2
# (ITU-R BT.2408). HDR highlights, up to 1000 cd/m2, are compressed into the top fifth; nothing changes below it.
TO_LINEAR = "zscale=transfer=linear:npl=203,format={planes}f32le,zscale=primaries=bt709"
TONE_MAP = "tonemap=mobius:param=0.8:desat=0:peak=4.926"
TO_SDR = "zscale=transfer=bt709,format={planes}"
UNKNOWN = "unknown"  # what ffmpeg prints for properties that are not set
MAX_SECONDS = 4 * 3600  # the whole clip is decoded to reach its end


@dataclass(frozen=True)
class ClipInfo:
    """A clip that can be decoded.

    Attributes:
        width, height: as displayed: after rotation, in square pixels.
        fps: the clip's own average rate.
        seconds: length of the video track.
        frames: number of frames that `read_frames` yields at the requested rate. It can be off by one if the container
            does not say how long the last frame is shown.
        start: time of the first frame in the file, in seconds.
        notes: warnings for the user, printed after the file's name.
    """

    path: Path
    width: int
    height: int
    fps: float
    seconds: float
    frames: int
    start: float = 0.0
    has_sound: bool = False
    notes: tuple[str, ...] = ()


def probe_video(path: Path, fps: int) -> ClipInfo:
    """Check a clip by reading the timestamps of its packets and decoding one frame.

    Args:
        fps: the rate at which its frames will be read.

    Raises:
        MediaError: `path` is not a complete, decodable video file.
    """
    track = find_track(path, VIDEO)
    filters, notes = rgb_filters(track)
    tick, packets = read_packets(track)
    if not packets:
        raise MediaError(path, VIDEO.damaged)
    last, duration = packets[-1]
    gap = last - packets[-2][0] if len(packets) > 1 else 0
    if duration <= 1 and gap > 2:  # made up by the demuxer; ffmpeg shows the last frame as long as the previous one
        duration = gap
    start, end = packets[0][0] * tick, (last + duration) * tick
    seconds = float(end - start)
    if seconds > MAX_SECONDS:
        raise MediaError(path, f"is {seconds:.0f} s long; cut it to {MAX_SECONDS} s at most")
    try:
        height, width, _ = next(decode(track, filters)).shape
    except (RuntimeError, StopIteration) as error:
        # also raised for HDR if IMAGEIO_FFMPEG_EXE names an ffmpeg without the zscale filter
        reason = f"has no frame that can be decoded ({format_value(error)})"
        raise MediaError(path, f"{reason}; convert it to an H.264 mp4 file in SDR") from error
    return ClipInfo(
        path=path,
        width=width,
        height=height,
        fps=len(packets) / seconds if seconds else 0.0,
        seconds=seconds,
        frames=max(0, round_half_up(end * fps) - round_half_up(start * fps)),
        start=float(start),
        has_sound=any(kind == AUDIO.name for _, kind, _ in TRACK.findall(track.log)),
        notes=tuple(notes),
    )


def round_half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def read_frames(path: Path, fps: int) -> Iterator[np.ndarray]:
    """The frames of a clip at `fps` frames per second, each uint8 [H, W, 3] as displayed.

    Output frame n is the last source frame whose timestamp, in units of 1/fps and rounded, is not after n. So a clip of
    that rate is read frame by frame; others drop or repeat frames to keep their speed. Colors are converted to BT.709,
    interlaced fields are combined into frames, transparent areas become white.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    track = find_track(path, VIDEO)
    # fps comes last: filters after it would process all repetitions of a long still before the first is read.
    return decode(track, f"{rgb_filters(track)[0]},fps={fps}")


def last_frames(
    path: Path, fps: int, count: int, progress: Callable[[int], object] = lambda frames: None
) -> np.ndarray:
    """The last `count` frames of a clip at `fps` frames per second, uint8 [count, H, W, 3].

    Only these are held in memory. `progress(1)` is called for each frame that is read.

    Raises:
        MediaError: the clip has fewer frames, or their size changes.
    """
    last: deque[np.ndarray] = deque(maxlen=count)
    for frame in read_frames(path, fps):
        last.append(frame)
        progress(1)
    check_length(path, fps, count, len(last))
    if len({frame.shape for frame in last}) > 1:
        raise MediaError(path, "changes its frame size midway; convert it to one size first")
    return np.stack(last)


def check_length(path: Path, fps: int, needed: int, frames: int) -> None:
    """Raise MediaError if a clip has fewer frames at `fps` frames per second than are needed."""
    if frames < needed:
        reason = f"is too short: {needed} frames at {fps} frames per second ({needed / fps:.2f} s) are needed"
        raise MediaError(path, f"{reason}, it has {frames}; give a longer clip")


def resize_frames(frames: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Frames scaled to cover `height` x `width` and cropped to it, uint8 [height, width, 3]."""
    for frame in frames:
        if frame.shape[:2] == (height, width):
            yield frame
        else:
            yield np.asarray(cover_crop(Image.fromarray(frame), height, width))


def rgb_filters(track: Track) -> tuple[str, list[str]]:
    """ffmpeg filters that convert a track's frames to RGB pictures, and warnings about the track.

    Raises:
        MediaError: the frames are too large.
    """
    picture = PICTURE.search(track.description)
    if picture is None and "exceeds specified max pixel count" not in track.log:
        return TO_RGB, []
    pixel_format, details, width, height, across, down = picture.groups("") if picture else ("",) * 6
    if not picture or int(width) * int(height) * int(across or 1) > MAX_FRAME_PIXELS * int(down or 1):
        limit = f"{MAX_FRAME_PIXELS // 10**6} million pixels"
        raise MediaError(track.path, f"has frames of more than {limit}; scale it down to 3840 x 2160 at most")
    is_yuv, alpha = pixel_format.startswith("yuv"), WITH_ALPHA.match(pixel_format) is not None
    found = COLORS.search(details)
    matrix, primaries, transfer = found.groups() if found else (UNKNOWN, UNKNOWN, UNKNOWN)
    filters = TO_RGB_ON_WHITE if alpha else TO_RGB
    notes: list[str] = []
    if transfer in HDR or primaries in WIDE_PRIMARIES:
        filters = f"{to_sdr(matrix, primaries, transfer, alpha)},{filters}"
        if transfer in HDR:
            notes.append(f"is HDR ({HDR[transfer]}); it is tone-mapped to SDR")
    elif matrix == UNKNOWN and "bt709" not in details and is_yuv and int(height) >= HD_HEIGHT:
        filters = filters.replace("scale=", "scale=in_color_matrix=bt709:", 1)
    if INTERLACED.search(details):
        notes.append("is interlaced; its fields are combined into whole frames")
    if "progressive" not in details and is_yuv:
        # if not stated for the whole track, each frame states it; progressive ones pass unchanged
        filters = f"bwdif=deint=interlaced,{filters}"
    return filters, notes


def to_sdr(matrix: str, primaries: str, transfer: str, alpha: bool) -> str:
    """Filters that convert wide-gamut or HDR frames to SDR BT.709. Unknown properties are assumed to be BT.2020."""
    defaults = {"colorspace=bt2020nc": matrix, "color_primaries=bt2020": primaries, "color_trc=bt709": transfer}
    missing = ":".join(option for option, value in defaults.items() if value == UNKNOWN)
    steps = [f"setparams={missing}" if missing else "", TO_LINEAR, TONE_MAP if transfer in HDR else "", TO_SDR]
    return ",".join(filter(None, steps)).format(planes="gbrap" if alpha else "gbrp")


def decode(track: Track, filters: str) -> Iterator[np.ndarray]:
    """Yield frames, uint8 [H, W, 3], of a track after ffmpeg's filters.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    output = ["-fps_mode", "passthrough", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    arguments = [*track.source, "-vf", filters, *output]
    with ffmpeg_process(arguments, f"read {track.path.name}", stdout=PIPE) as process:
        assert process.stdout is not None
        while (frame := read_ppm(process.stdout)) is not None:
            yield frame


def read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next picture of a stream of binary PPM pictures, uint8 [H, W, 3]; None at its end."""
    if not stream.readline():  # P6
        return None
    width, height = (int(word) for word in stream.readline().split())
    stream.readline()  # 255
    data = bytearray(height * width * 3)
    if stream.readinto(data) < len(data):  # type: ignore[attr-defined]  # buffered readers have it
        return None  # ffmpeg has failed, as its exit status will show
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)
