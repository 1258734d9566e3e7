"""--concat: joins the videos of a jobs file into one film, in the order of its lines.

It uses the losslessly kept frames (see story.py), so they are encoded only once. No frame is repeated, and each video's
sound stays in sync.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import wave
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from skyreels_v3.errors import UserError, counted, format_value
from skyreels_v3.inputs import digest_of as digest_of_file
from skyreels_v3.inputs import input_errors
from skyreels_v3.media.audio import MIX_FORMAT, MIX_RATE
from skyreels_v3.media.ffmpeg import AUDIO, VIDEO, find_track, input_options, read_track, run
from skyreels_v3.media.files import check_writable, run_folder
from skyreels_v3.media.video_reader import ClipInfo, probe_video, read_frames
from skyreels_v3.media.video_writer import read_comment, write_video
from skyreels_v3.story import Job, planned_sizes
from skyreels_v3.version import __version__

logger = logging.getLogger(__name__)

CONTENT_DIGITS = 16  # hex digits recorded per video
SOUND_FORMAT = (2, 3, MIX_RATE)  # channels, bytes per sample, Hz


@dataclass(frozen=True)
class Shot:
    """One video of the film.

    Attributes:
        clip: the frames to use.
        video: the finished video, for its sound.
    """

    job: Job
    clip: ClipInfo
    video: Path

    @property
    def skipped(self) -> int:
        """The number of its first frames that the film already has."""
        assert self.job.request is not None
        return int(self.job.before is not None and self.job.request.image is not None)

    @property
    def frames(self) -> int:
        return self.clip.frames - self.skipped


def check_film(path: Path, order: Sequence[Job], videos: Mapping[str, Path]) -> bool:
    """Check that the film can be made; returns whether it already exists.

    Args:
        order: the jobs, each after those that it needs.
        videos: finished videos by job id; their files may be gone.

    Raises:
        UserError: the videos do not fit together, the film cannot be written, or it has outdated videos of these jobs.
    """
    if path.suffix != ".mp4":
        raise UserError("--concat", f"{format_value(path)}: give a name ending in .mp4")
    sizes, jobs = planned_sizes(order), sorted(order, key=lambda job: job.number)
    known = {}
    for job in jobs:
        if job.request is None:
            continue
        if job.request.output is not None and job.request.output.resolve() == path.resolve():
            raise UserError("--concat", f"{format_value(path)} is the output of line {job.number}; give another name")
        if job.request.include_input and job.before is not None:
            reason = f"line {job.number} would repeat the frames of line {job.before.number} in the film"
            raise UserError("--concat", f"{reason}; leave its include_input out")
        if (size := sizes[job.id]) is not None:
            known[job.number] = size
    check_sizes(known)
    if is_film(path, jobs, videos):
        return True
    check_writable(path, "--concat")
    rates = {job.number: fps_of(job) for job in jobs if job.request is not None}
    first = next(iter(rates.values()), 0)
    if other := [number for number, fps in rates.items() if fps != first]:
        logger.info("the film has its first video's %d frames per second; converting %s to that", first, lines(other))
    return False


def check_sizes(sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raise UserError unless all shots have the same height and width; `sizes` is by line number."""
    first = next(iter(sizes), 0)
    for number, size in sizes.items():
        if size != sizes[first]:
            mine, others = (f"{width} x {height}" for height, width in (size, sizes[first]))
            reason = f"line {number} makes {mine}, line {first} {others}"
            raise UserError("--concat", f"{reason}; give all lines the same --height and --width")


def digest_of(jobs: Iterable[Job]) -> str:
    """A digest that is equal for jobs whose film is the same."""
    return hashlib.sha256(" ".join(job.id for job in jobs).encode()).hexdigest()


def is_film(path: Path, jobs: Sequence[Job], videos: Mapping[str, Path]) -> bool:
    """Whether a file is the film of these jobs, according to its comment; warns of videos that are gone.

    Raises:
        UserError: some of its videos were made again since.
    """
    try:
        comment = json.loads(read_comment(path)) if path.is_file() else {}
        contents = {job.id: str(each) for job, each in zip(jobs, comment["videos"], strict=True)}
        if comment["film"] != digest_of(jobs):
            return False
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        return False
    there = {job.id for job in jobs if job.id in videos and os.path.lexists(videos[job.id])}
    other = [job.number for job in jobs if job.id in there and content_of(videos[job.id]) != contents[job.id]]
    if other:
        reason = f"{format_value(path)} was joined before {lines(other)} had the video that is there now"
        raise UserError("--concat", f"{reason}; move it away, or give another name")
    if gone := [job.number for job in jobs if job.id not in there]:
        logger.warning("%s is done; what %s made is gone, but is not needed for it", path, lines(gone))
    return True


def lines(numbers: Sequence[int]) -> str:
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def content_of(video: Path) -> str:
    """A digest of a video's frames and sound, independent of its comment; "" if the video is damaged."""
    if video.is_dir():
        found = hashlib.sha256("".join(map(digest_of_file, sorted(video.iterdir()))).encode()).hexdigest()
    else:
        code, output, _ = run([*input_options(video, VIDEO), "-map", "0", "-c", "copy", "-f", "hash", "pipe:1"])
        found = "" if code else output.decode().strip().rpartition("=")[2]
    return found[:CONTENT_DIGITS]


def make_film(path: Path, jobs: Sequence[Job], videos: Mapping[str, Path], check: bool) -> Path:
    """Join the videos of jobs into a film.

    Args:
        videos: their files by job id.
        check: also measure the film and log its figures.

    Returns:
        The path of the film, which differs from `path` if that has been taken in the meantime.

    Raises:
        UserError: a video cannot be read, or they differ in size.
    """
    shots = [open_shot(job, videos[job.id], fps_of(jobs[0])) for job in jobs]
    check_sizes({shot.job.number: (shot.clip.height, shot.clip.width) for shot in shots})
    height, width, fps = shots[0].clip.height, shots[0].clip.width, fps_of(jobs[0])
    count = sum(shot.frames for shot in shots)
    logger.info("joining %s, %s", counted(len(shots), "video"), counted(count, "frame"))
    frames = film_frames(shots, fps)
    if check:
        frames = measured(frames, shots, fps)
    contents = [content_of(shot.video) for shot in shots]
    comment = json.dumps({"skyreels_v3": __version__, "film": digest_of(jobs), "videos": contents})
    with run_folder() as folder:
        sound = write_sound(shots, fps, folder / "film.wav")
        return write_video(frames, path, height=height, width=width, fps=fps, comment=lambda: comment, audio=sound)


def fps_of(job: Job) -> int:
    assert job.request is not None
    return job.request.task.fps


def open_shot(job: Job, video: Path, fps: int) -> Shot:
    """Open the frames of a job's video at `fps`: the lossless copy, or else the encoded video itself."""
    assert job.request is not None and job.request.frames_copy is not None
    kept = job.request.frames_copy
    if not kept.is_file():
        if video.is_dir():
            reason = f"line {job.number}: {format_value(video)} is a folder, and its frames were not kept as a clip"
            raise UserError("--concat", f"{reason}; move it away to have it made again")
        logger.warning("line %d: its frames were not kept; re-encoding %s", job.number, video)
        kept = video
    with input_errors(str(kept), "--concat"):
        return Shot(job, probe_video(kept, fps), video)


# Frames


def film_frames(shots: Iterable[Shot], fps: int) -> Iterator[np.ndarray]:
    """Yield all frames of the film, uint8 [H, W, 3]."""
    for shot in shots:
        yield from islice(read_frames(shot.clip.path, fps), shot.skipped, None)


def measured(frames: Iterator[np.ndarray], shots: Sequence[Shot], fps: int) -> Iterator[np.ndarray]:
    """Pass frames through; after the last, log the figures of the film and of its seams without a cut."""
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
    """Write a WAV file with each shot's sound at its position, silence elsewhere; returns None if no shot has sound."""
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
