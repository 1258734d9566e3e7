"""The contents of a video as MCP resources, each under its own URI: skyreels://ID/NAME."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import NamedTuple

from skyreels_v3.errors import format_value
from skyreels_v3.web.api import ID
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.pictures import picture_of
from skyreels_v3.web.queue import STATES, Job, State

CLIP, FRAMES, LAST, PREVIEW, PARTIAL = "video.mp4", "frames.jpg", "last.png", "preview.png", "partial.mp4"
URI = re.compile(rf"skyreels://({ID.pattern})/([a-z.0-9]+)")
MAX_BYTES = 64 << 20  # of a resource: it is sent as one line of text


class Content(NamedTuple):
    """A content of a video: its MIME type, its title, and the states of a job in which it may exist."""

    kind: str
    title: str
    states: tuple[State, ...] = (State.COMPLETED,)


CONTENTS = {
    CLIP: Content("video/mp4", "the video"),
    FRAMES: Content("image/jpeg", "frames of the video, row by row"),
    LAST: Content("image/png", "the video's last frame"),
    PREVIEW: Content("image/png", "the newest picture of a video that is being made", (State.IN_PROGRESS,)),
    PARTIAL: Content("video/mp4", "what was finished of a video that ended early", (State.FAILED, State.CANCELLED)),
}


def uri_of(id: str, name: str) -> str:
    return f"skyreels://{id}/{name}"


def file_of(job: Job, name: str) -> Path:
    """The file of one of a video's CONTENTS, made if need be; raises ApiError."""
    if name not in CONTENTS:
        raise ApiError(404, f"there is no {format_value(name)} of a video; choose one of {', '.join(CONTENTS)}", "uri")
    path = {CLIP: job.video, PREVIEW: job.preview, PARTIAL: job.partial}.get(name)
    try:
        if job.state not in CONTENTS[name].states:
            raise FileNotFoundError
        if path is None:
            path = picture_of(job.video, "spritesheet" if name == FRAMES else "last")
        path.stat()
    except (FileNotFoundError, RuntimeError):  # RuntimeError: deleted while it was read
        raise ApiError(404, f"there is no {name} of {job.id}, which {STATES[job.state]}", "uri") from None
    return path


def read_base64(path: Path) -> str:
    """A file's content as base64 text; raises ApiError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ApiError(404, f"{path.name} was deleted", "uri") from None
    if len(content) > MAX_BYTES:
        raise ApiError(413, f"{path.name} is larger than {MAX_BYTES >> 20} MiB, the most that is sent this way", "uri")
    return base64.b64encode(content).decode()
