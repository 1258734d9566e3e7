"""The durable queue of a server: jobs in SQLite, in the server's folder, and a folder for each job's files.

Several processes use it at once: the web process adds, lists, cancels and deletes; each worker claims, reports and ends
jobs. A change is one transaction; what a method has returned from is on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class State(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Progress:
    """Where a job is.

    Attributes:
        stage: "loading", "encoding", "denoising", "decoding" or "writing".
        part: of all, 0 to 1.
        window, windows: which pass of how many, from 1; 0 before the first.
        step, steps: of that pass, from 1.
        seconds_left: an estimate, or None.
        preview: number of the newest preview, from 1; 0 for none. It is `preview.png` in the job's folder.
    """

    stage: str = ""
    part: float = 0.0
    window: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    preview: int = 0


@dataclass(frozen=True)
class Job:
    """A video to make, being made, or made.

    Attributes:
        id: "video_" and 32 hexadecimal digits, random.
        flags: as in a line of --jobs, `task_type` among them; paths are within the job's folder.
        owner: whose it is; "" where nobody needs a key.
        parent: id of the job that it extends or repeats.
        priority: higher ones first; `order` decides among equals, lower ones first.
        cancelling: it is to end, and has not yet.
        error: (code, message) of a failed one.
        facts: of the result: seed, width, height, frames, fps, seconds taken, peak memory, quality.
        created, started, ended: seconds since the epoch.
        folder: with the files uploaded for it, `video.mp4` once completed, thumbnails and previews.
    """

    id: str
    flags: Mapping[str, Any]
    state: State
    folder: Path
    owner: str = ""
    parent: str = ""
    priority: int = 0
    order: float = 0.0
    progress: Progress = Progress()
    cancelling: bool = False
    error: tuple[str, str] | None = None
    facts: Mapping[str, Any] | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"


class Queue:
    """The queue in a folder.

    Raises:
        UserError: (when opened) the folder cannot be used, or its database is damaged: it has been put aside, and the
            message says where.
    """

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    # The web process

    def new_id(self) -> tuple[str, Path]:
        """An id for a job, and its folder, made, for uploads; the job does not exist before `add`."""
        raise NotImplementedError

    def add(self, id: str, flags: Mapping[str, Any], owner: str = "", parent: str = "", priority: int = 0) -> Job:
        """Queue a job. Raises QueueFull beyond the limits of all jobs or of its owner's."""
        raise NotImplementedError

    def get(self, id: str) -> Job | None:
        raise NotImplementedError

    def list(
        self,
        owner: str | None = None,
        states: Sequence[State] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        """Jobs by the time they were created, those behind the job `after`, and whether there are more."""
        raise NotImplementedError

    def counts(self) -> dict[State, int]:
        raise NotImplementedError

    def place(self, id: str) -> int:
        """How many queued jobs are before a queued one."""
        raise NotImplementedError

    def move(self, id: str, before: str | None) -> bool:
        """Put a queued job before another queued one, or last."""
        raise NotImplementedError

    def cancel(self, id: str) -> Job | None:
        """Cancel: a queued one at once, a running one within a step's time; a finished one stays as it is."""
        raise NotImplementedError

    def delete(self, id: str) -> bool:
        """Cancel it if need be, and forget it and its files once no worker has it."""
        raise NotImplementedError

    # Workers

    def claim(self, worker: str) -> Job | None:
        """The next job, now in progress and this worker's; None if there is none."""
        raise NotImplementedError

    def report(self, id: str, worker: str, progress: Progress) -> bool:
        """Record progress; False if the job is to end: it was cancelled, or is not this worker's any more."""
        raise NotImplementedError

    def complete(self, id: str, worker: str, facts: Mapping[str, Any]) -> bool:
        """Its video is at its place. False if the job is not this worker's any more, or was cancelled before."""
        raise NotImplementedError

    def fail(self, id: str, worker: str, code: str, message: str) -> bool:
        raise NotImplementedError

    def release(self, worker: str, reason: str = "") -> None:
        """What a lost worker had: with a reason it failed for it, otherwise it is queued again, first of all."""
        raise NotImplementedError


class QueueFull(Exception):
    """There are as many jobs as may be; the message says of whom and how many."""
