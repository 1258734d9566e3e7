"""--concat: the videos of a jobs file joined into one film, in the order of its lines.

It is made from the frames that are kept for it (see story.py), so they are encoded once. Each is in it once, and the
sound of each video stays at its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import wave
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from skyreels_v3.errors import UserError, counted, format_value
from skyreels_v3.inputs import input_errors
from skyreels_v3.media.audio import MIX_FORMAT, MIX_RATE
from skyreels_v3.media.ffmpeg import AUDIO, find_track, read_track
from skyreels_v3.media.files import check_writable, run_folder
from skyreels_v3.media.video_reader import ClipInfo, probe_video, read_frames
from skyreels_v3.media.video_writer import read_comment, write_video
from skyreels_v3.story import Job, planned_sizes
from skyreels_v3.version import __version__

logger = logging.getLogger(__name__)

SOUND_FORMAT = (2, 3, MIX_RATE)  # channels, bytes per sample, Hz


class Format(NamedTuple):
    """What all shots of a film have in common."""

    height: int
    width: int
    fps: int


@dataclass(frozen=True)
class Shot:
    """A video of the film.

    Attributes:
        clip: its frames.
        video: its file, which has the sound.
    """

    job: Job
    clip: ClipInfo
    video: Path

    @property
    def skipped(self) -> int:
        """How many of its first frames the film has already."""
        assert self.job.request is not None
        return int(self.job.before is not None and self.job.request.image is not None)

    @property
    def frames(self) -> int:
        return self.clip.frames - self.skipped


def check_film(path: Path, order: Sequence[Job]) -> bool:
    """Whether the film of these jobs has been made already.

    Args:
        order: the jobs, each after those that it needs.

    Raises:
        UserError: their videos cannot be one film, or it cannot be written.
    """
    if path.suffix != ".mp4":
        raise UserError("--concat", f"{format_value(path)}: give a name ending in .mp4")
    sizes, jobs = planned_sizes(order), sorted(order, key=lambda job: job.number)
    formats = {}
    for job in jobs:
        if job.request is None:
            continue
        if job.request.output is not None and job.request.output.resolve() == path.resolve():
            raise UserError("--concat", f"{format_value(path)} is the output of line {job.number}; give another name")
        if job.request.include_input and job.before is not None:
            reason = f"line {job.number} would have the frames of line {job.before.number} in the film again"
            raise UserError("--concat", f"{reason}; leave its include_input out")
        if (size := sizes[job.id]) is not None:
            formats[job.number] = Format(*size, job.request.task.fps)
    check_formats(formats)
    if is_film(path, jobs):
        return True
    check_writable(path, "--concat")
    return False


def check_formats(formats: Mapping[int, Format]) -> None:
    """Raise UserError unless all shots, by the numbers of their lines, have the same size and rate."""
    first = next(iter(formats), 0)
    for number, own in formats.items():
        if own != formats[first]:
            mine, others = (f"{each.width} x {each.height} at {each.fps} fps" for each in (own, formats[first]))
            reason = f"line {number} makes {mine}, line {first} {others}"
            raise UserError(
                "--concat", f"{reason}; give all lines the same --height and --width, and tasks of one rate"
            )


def digest_of(jobs: Iterable[Job]) -> str:
    """A text that is the same for jobs whose film is the same."""
    return hashlib.sha256(" ".join(job.id for job in jobs).encode()).hexdigest()


def is_film(path: Path, jobs: Iterable[Job]) -> bool:
    """Whether a file is the film of these jobs, as its comment says."""
    try:
        return path.is_file() and json.loads(read_comment(path))["film"] == digest_of(jobs)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        return False


def make_film(path: Path, jobs: Sequence[Job], videos: Mapping[str, Path], check: bool) -> Path:
    """Join the videos of jobs.

    Args:
        videos: their files, by their ids.
        check: also measure the film, and log its figures.

    Returns:
        The path of the film: another than `path` where that has been taken meanwhile.

    Raises:
        UserError: a video cannot be read, or they differ in size or rate.
    """
    shots = [open_shot(job, videos[job.id]) for job in jobs]
    formats = {shot.job.number: Format(shot.clip.height, shot.clip.width, fps_of(shot.job)) for shot in shots}
    check_formats(formats)
    height, width, fps = formats[shots[0].job.number]
    count = sum(shot.frames for shot in shots)
    logger.info("joining %s, %s", counted(len(shots), "video"), counted(count, "frame"))
    frames = film_frames(shots, fps)
    if check:
        frames = measured(frames, shots, fps)
    comment = json.dumps({"skyreels_v3": __version__, "film": digest_of(jobs)})
    with run_folder() as folder:
        sound = write_sound(shots, fps, folder / "film.wav")
        return write_video(frames, path, height=height, width=width, fps=fps, comment=lambda: comment, audio=sound)


def fps_of(job: Job) -> int:
    assert job.request is not None
    return job.request.task.fps


def open_shot(job: Job, video: Path) -> Shot:
    """The frames of a job's video: those that are kept, or else what is left of them in the video."""
    assert job.request is not None and job.request.frames_copy is not None
    kept = job.request.frames_copy
    if not kept.is_file():
        if video.is_dir():
            reason = f"line {job.number}: {format_value(video)} is a folder, and its frames were not kept as a clip"
            raise UserError("--concat", f"{reason}; move it away to have it made again")
        logger.warning("line %d: its frames were not kept; %s is encoded once more", job.number, video)
        kept = video
    with input_errors(str(kept), "--concat"):
        return Shot(job, probe_video(kept, fps_of(job)), video)


# Frames


def film_frames(shots: Iterable[Shot], fps: int) -> Iterator[np.ndarray]:
    """All frames, uint8 [H, W, 3]."""
    for shot in shots:
        yield from islice(read_frames(shot.clip.path, fps), shot.skipped, None)


def measured(frames: Iterator[np.ndarray], shots: Sequence[Shot], fps: int) -> Iterator[np.ndarray]:
    """The same frames; after the last one the figures of the film are logged, and those of seams without a cut."""
    from skyreels_v3.quality import Meter, report, report_seam, seam_of

    meter = Meter(fps)
    for frame in frames:
        meter.add(frame[None])
        yield frame
    quality, first = meter.quality(), 0
    for line in report(quality):
        logger.info("check: film: %s", line)
    for last, shot in pairwise(shots):
        first += last.frames
        before, request = shot.job.before, shot.job.request
        if before is not None and before.id == last.job.id and request is not None and not request.task.cut_at_seam:
            logger.info("check: film: %s", report_seam(seam_of(meter.rows, first, quality.cuts, 0)))


# Sound


def write_sound(shots: Sequence[Shot], fps: int, target: Path) -> Path | None:
    """Write a WAV file with the sound of each shot at its place, silence elsewhere; None if none has any."""
    with_sound = [shot for shot in shots if shot.video.is_file() and probe_video(shot.video, fps).has_sound]
    if not with_sound:
        return None
    channels, width, rate = SOUND_FORMAT
    frames = written = 0
    with wave.open(str(target), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        for shot in shots:
            frames += shot.frames
            size = channels * width * (round(frames / fps * rate) - written)
            options = ["-af", MIX_FORMAT, "-f", f"s{8 * width}le"]
            sound = read_track(find_track(shot.video, AUDIO), options) if shot in with_sound else b""
            file.writeframes(sound[:size].ljust(size, b"\0"))
            written = round(frames / fps * rate)
    return target
