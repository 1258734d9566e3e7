"""Stories: lines of a jobs file that continue the videos of other lines.

`{prev}` as an input stands for the video of the previous line, `{job:NAME}` for that of the line with `"name": "NAME"`.
As `input_video` it is the whole clip; as `image`, `input_image` or one of `ref_imgs` its last frame. The frames of a
video that others need are kept losslessly beside the jobs file, in `<stem>.frames/`, under the id of its job, because
continuing from an mp4 loses a little quality each time.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from skyreels_v3.checks import REFERENCE, describe_value
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.inputs import input_errors, open_inputs
from skyreels_v3.media.files import is_url, replace_file
from skyreels_v3.media.image import encode_image
from skyreels_v3.media.video_reader import last_frames, probe_video
from skyreels_v3.media.video_writer import copy_frames
from skyreels_v3.parallel.ranks import Ranks
from skyreels_v3.request import BY_NAME, GenerationRequest
from skyreels_v3.resolve import preflight
from skyreels_v3.tasks import choose_size

PREVIOUS = "{prev}"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PICTURES = ("image", "input_image", "ref_imgs")  # flags that take the last frame
SIZES = ("height", "width", "resolution")
ID_IN_NAME = 16  # hex digits


@dataclass
class Line:
    """A line of a jobs file with unchecked flags.

    Attributes:
        flags: as written; `link_lines` removes the name.
        problem: why the line is not a valid job; "" if it is.
        needs: the numbers of the lines whose videos it uses, by reference.
    """

    number: int
    text: str
    flags: dict[str, Any] | None = None
    problem: str = ""
    needs: dict[str, int] = field(default_factory=dict)


class Need(NamedTuple):
    """A job whose video another one uses: the number of its line, its id, and the clip of its frames."""

    number: int
    id: str
    frames: Path

    @property
    def picture(self) -> Path:
        """The file for its last frame, if that is needed."""
        return self.frames.with_suffix(".png")

    def input(self, flag: str) -> str:
        """The value of a flag that takes this video or its last frame."""
        return str(self.picture if flag in PICTURES else self.frames)


@dataclass(frozen=True)
class Job:
    """A line of the file: a request, or its error.

    Attributes:
        number: the number of the line.
        id: depends on the flags and on the jobs that it needs, not on the line number.
        needs: the jobs whose videos are its inputs; the first decides the size if `follows_size`.
    """

    number: int
    id: str
    request: GenerationRequest | None
    problem: str = ""
    needs: tuple[Need, ...] = ()
    follows_size: bool = False

    @property
    def before(self) -> Need | None:
        """The job whose video it continues in time, by extending it or by --image with its last frame."""
        request = self.request
        given = request and (request.image or (request.input_video if request.task.condition_frames else None))
        return next((need for need in self.needs if given in (str(need.frames), str(need.picture))), None)


# Lines


def link_lines(lines: Sequence[Line]) -> list[Line]:
    """Sort lines so that each comes after those that it needs; fills in `needs` and `problem`."""
    names: dict[str, int] = {}
    for line in filter(lambda line: line.flags and "name" in line.flags, lines):
        assert line.flags is not None
        name = line.flags.pop("name")
        shown = describe_value(name)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            line.problem = f"--jobs: name {shown}: give 1 to 64 letters, digits, dots, dashes or underscores"
        elif names.setdefault(name, line.number) != line.number:
            line.problem = f"--jobs: name {shown} is already that of line {names[name]}; give another one"
    for line, before in zip(lines, (0, *(line.number for line in lines)), strict=False):
        try:
            for flag, reference in references_in(line.flags or {}):
                line.needs[reference] = find_line(flag, reference, before, names)
        except UserError as error:
            line.problem, line.needs = line.problem or str(error), {}
    known = {line.number: line for line in lines}
    while True:
        try:
            order = TopologicalSorter({line.number: [*line.needs.values()] for line in lines}).static_order()
            return [known[number] for number in order]
        except CycleError as error:
            circle = sorted({*error.args[1]})
            reason = "is this line itself; give a file"
            if len(circle) > 1:
                reason = f"lines {', '.join(map(str, circle))} need each other's videos; give one of them a file"
            for line in (known[number] for number in circle):
                reference = next(text for text, number in line.needs.items() if number in circle)
                line.problem, line.needs = f"--jobs: {reference}: {reason}", {}


def find_line(flag: str, reference: str, before: int, names: Mapping[str, int]) -> int:
    """The number of the line that an input refers to; raises UserError if there is none, or for a wrong flag."""
    if flag != "input_video" and flag not in PICTURES:
        remedy = "give it as --input_video, or its last frame as --image, --input_image or one of --ref_imgs"
        raise UserError(f"--{flag}", f"{reference}: cannot take another line's video; {remedy}")
    if reference == PREVIOUS:
        if not before:
            raise UserError(f"--{flag}", f"{reference}: there is no line before this one; give a file")
        return before
    name = reference[len("{job:") : -1]
    if name not in names:
        there = f"names here: {format_value(', '.join(names))}" if names else 'give that line a "name"'
        raise UserError(f"--{flag}", f"{format_value(reference)}: no line has that name; {there}")
    return names[name]


def references_in(flags: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The references in a line's inputs, as pairs of flag and reference."""
    found: list[tuple[str, str]] = []

    def note(flag: str, reference: str) -> str:
        found.append((flag, reference))
        return reference

    replace_references(flags, note)
    return found


def replace_references(flags: Mapping[str, Any], put: Callable[[str, str], str]) -> dict[str, Any]:
    """Replace each reference in a line's inputs by `put(flag, reference)`; returns the new flags."""
    replaced = dict(flags)
    for name, value in flags.items():
        flag = BY_NAME.get(name)
        if flag is None or flag.path != "input" or not isinstance(value, str | list):
            continue
        entries = value if isinstance(value, list) else value.split(",") if flag.several else [value]
        texts = [
            put(name, entry.strip()) if isinstance(entry, str) and REFERENCE.fullmatch(entry.strip()) else entry
            for entry in entries
        ]
        replaced[name] = texts if isinstance(value, list) else ",".join(texts)
    return replaced


def frames_file(path: Path, id: str) -> Path:
    """The file in which the frames of a job of the jobs file `path` are kept."""
    return path.with_name(f"{path.stem}.frames") / f"{id[:ID_IN_NAME]}.mp4"


# Inputs


def inputs_from(job: Job, clips: Mapping[Need, Path], pictures: Path | None = None) -> dict[str, Any]:
    """The changes to a job's request once the videos that it needs exist; in JSON types.

    Args:
        clips: the videos.
        pictures: a folder for their last frames; by default beside the kept frames.

    Raises:
        UserError: a video cannot be read.
    """
    request = job.request
    assert request is not None
    there: dict[str, str] = {}
    sizes = []
    for need, clip in clips.items():
        target = need.picture if pictures is None else pictures / need.picture.name
        flag = next(name for name, source in request.sources if source == need.input(name))
        with input_errors(str(clip), f"--{flag}"):
            info = probe_video(clip, request.task.fps)
            if flag in PICTURES:  # overwritten, since the video may have been made again
                replace_file(target, encode_image(Image.fromarray(last_frames(clip, round(info.fps), 1)[0]), "PNG"))
        sizes.append({"height": info.height, "width": info.width})
        there |= {str(need.frames): str(clip), str(need.picture): str(target)}
    changes: dict[str, Any] = sizes[0] if job.follows_size else {}
    for flag in ("input_video", *PICTURES):
        given = getattr(request, flag)
        if isinstance(given, str) and given in there:
            changes[flag] = there[given]
        elif isinstance(given, tuple) and not there.keys().isdisjoint(given):
            changes[flag] = [there.get(each, each) for each in given]
    return changes


def with_inputs(job: Job, changes: Mapping[str, Any]) -> Job:
    """The job with the changes from `inputs_from`, or with their `problem`."""
    if "problem" in changes or job.request is None:
        return replace(job, request=None, problem=changes.get("problem", job.problem))
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return replace(job, request=replace(job.request, **fields, flags={**job.request.flags, **changes}))


def planned_sizes(jobs: Iterable[Job]) -> dict[str, tuple[int, int] | None]:
    """Height and width of each job's video by job id, before any is made; None if not yet known.

    Args:
        jobs: each after those that it needs.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    for job in jobs:
        request, size = job.request, None
        if job.follows_size:
            size = sizes.get(job.needs[0].id)
        elif request is not None and request.height is not None and request.width is not None:
            size = request.height, request.width
        elif request is not None and request.input_video and job.needs:
            before = sizes.get(job.needs[0].id)
            size = before and choose_size(request.task, request.resolution, *before)
        elif request is not None and not job.needs and not any(is_url(source) for _, source in request.sources):
            with suppress(UserError):  # the job itself reports it
                opened, _ = open_inputs(request, Path())
                assert opened.height is not None and opened.width is not None
                size = opened.height, opened.width
        sizes[job.id] = size
    return sizes


def failure_of(number: int) -> str:
    """The error of a job that needs the video of a failed line."""
    return f"line {number} failed"


def plan_job(job: Job, clips: Mapping[str, Path], folder: Path, downloads: Path, ranks: Ranks) -> tuple[str, Path]:
    """Plan a job; returns the plan as text, and a black clip like its video for the plans of other jobs.

    Args:
        clips: the clips of the jobs that it needs.
        folder: for black clips and their last frames.

    Raises:
        UserError: the job cannot work.
    """
    from skyreels_v3.dry_run import describe_checked

    there = {need: need.frames if need.frames.is_file() else clips[need.id] for need in job.needs}
    request = with_inputs(job, inputs_from(job, there, folder)).request
    assert request is not None
    checked = preflight(request, downloads, ranks)
    clip = folder / f"{job.id}.mp4"
    if request.frames_copy is not None:
        made, before = checked.request, checked.inputs.clip
        count = made.frames_out + (before.frames if made.include_input and before is not None else 0)
        black = np.zeros((made.height, made.width, 3), np.uint8)
        deque(copy_frames((black for _ in range(count)), clip, made.task.fps), maxlen=0)
    return describe_checked(checked, downloads, ranks), clip
