"""Checking a clip before anything long starts: its size, rate and length, without decoding more than a frame."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

from skyreels_v3.errors import shown
from skyreels_v3.media.ffmpeg import AUDIO, TRACK, VIDEO, find_track, read_packets
from skyreels_v3.media.files import MediaError
from skyreels_v3.media.video_reader import decode, rgb_filters

MAX_SECONDS = 4 * 3600  # the whole clip is decoded to get at its end


@dataclass(frozen=True)
class ClipInfo:
    """A clip that can be decoded.

    Attributes:
        width, height: as displayed: after rotation, in square pixels.
        fps: the clip's own mean rate.
        seconds: length of the video track.
        frames: number of frames that `read_frames` yields at the requested rate. It can be off by one where a container
            does not say how long the last frame is shown.
        start: time of the first frame in the file, in seconds.
        notes: what the user should know about it, to be said after its name.
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
    if duration <= 1 and gap > 2:  # made up by the demuxer; ffmpeg shows the last frame as long as the one before
        duration = gap
    start, end = packets[0][0] * tick, (last + duration) * tick
    seconds = float(end - start)
    if seconds > MAX_SECONDS:
        raise MediaError(path, f"is {seconds:.0f} s long; cut it to {MAX_SECONDS} s at most")
    try:
        height, width, _ = next(decode(track, filters)).shape
    except (RuntimeError, StopIteration) as error:
        # also for HDR where IMAGEIO_FFMPEG_EXE names a program without the zscale filter
        reason = f"has no frame that can be decoded ({shown(error)})"
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
