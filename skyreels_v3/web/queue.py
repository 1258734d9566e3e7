"""A server's durable queue: jobs in an SQLite database in the server's folder, and a folder for each job's files.

Several processes use it at once: the web process adds, lists, cancels and deletes jobs; workers claim them, report
progress and end them. Each change is one transaction, and is on the disk when the method returns.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from typing import IO, Any

from skyreels_v3.errors import UserError, counted, format_value
from skyreels_v3.media.files import lock, reason_of
from skyreels_v3.resume import state_folders

DATABASE = "queue.sqlite"
SERVER_LOCK = "server.lock"
JOBS = "jobs"  # folder of the jobs' folders
WORKERS = "workers"  # folder of the workers' lock files
VERSION = 1  # of the schema
BUSY_SECONDS = 30.0  # to wait for another process's transaction
MAX_JOBS = 1000  # not yet ended, of all owners
MAX_OWNER_JOBS = 100
UPLOADING = ""  # the state of an id that is not a job yet
# Times are only for display and `expire`. Jobs are ordered by counters, and belong to a worker until it gives them up
# or its process is known to have ended, so clock jumps do not matter.
SCHEMA = """CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
    flags TEXT NOT NULL DEFAULT '{}', owner TEXT NOT NULL DEFAULT '', parent TEXT NOT NULL DEFAULT '',
    priority INTEGER NOT NULL DEFAULT 0, place REAL NOT NULL DEFAULT 0, worker TEXT NOT NULL DEFAULT '',
    progress TEXT NOT NULL DEFAULT '{}', reports INTEGER NOT NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0,
    cancelling INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0, error TEXT, facts TEXT,
    created REAL NOT NULL DEFAULT 0, started REAL, ended REAL
)"""
VISIBLE = f"NOT deleted AND state != '{UPLOADING}'"
ORDERED = "FROM jobs WHERE state = 'queued' ORDER BY priority DESC, place, number"
IN_ORDER = f"SELECT * {ORDERED}"
OF_WORKER = "worker = ? AND state = 'in_progress'"
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class State(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = (State.COMPLETED, State.FAILED, State.CANCELLED)
STATES = {  # for messages, after a job's id
    State.QUEUED: "is queued",
    State.IN_PROGRESS: "is being made",
    State.COMPLETED: "is completed",
    State.FAILED: "has failed",
    State.CANCELLED: "was cancelled",
}


@dataclass(frozen=True)
class Progress:
    """How far a job has got.

    Attributes:
        stage: "loading", "encoding", "denoising", "decoding" or "writing".
        part: share of the whole job, 0 to 1.
        window, windows: current pass, from 1 (0 before the first), and number of passes.
        step, steps: current denoising step of that pass, from 1, and number of steps.
        seconds_left: an estimate, or None.
        preview: number of the newest preview, from 1; 0 for none. Its file is `Job.preview`.
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
    """The job of making one video, in any state.

    Attributes:
        id: "video_" and 32 hexadecimal digits, random.
        flags: as in a line of --jobs, including `task_type`; paths are relative to the job's folder.
        owner: owner id, see `security.owner_of`; "" where no key is needed.
        parent: id of the job that it extends or repeats.
        priority: higher first; among equals, lower `order` first.
        cancelling: cancelled, but still running.
        error: (code, message) of a failed job.
        facts: about the result: seed, width, height, frames, fps, seconds taken, peak memory, quality.
        created, started, ended: seconds since the epoch.
        folder: holds its uploaded files, `video.mp4` once completed, thumbnails and previews.
        worker: name of the worker that runs it; "" for none.
        losses: number of workers that were killed while running it.
        reports: number of progress reports.
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
    worker: str = ""
    losses: int = 0
    reports: int = 0

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def partial(self) -> Path:
        """The windows that were finished before the job failed or was cancelled, if any."""
        return self.folder / "video.partial.mp4"

    @property
    def preview(self) -> Path:
        """The newest preview, if any."""
        return self.folder / "preview.png"


class Queue:
    """The queue in a folder. Threads may share an instance.

    Args:
        server: this process serves the folder, and no other server can while it runs.
        max_jobs, max_owner_jobs: limits on jobs that have not ended, of all owners and per owner.

    Raises:
        UserError: (on opening) the folder cannot be used, another server has it, or its database is damaged and has
            been renamed; the message gives the new name.
        OSError: (from any method) the disk is full or fails; nothing has changed then.
    """

    def __init__(
        self, folder: Path, server: bool = False, max_jobs: int = MAX_JOBS, max_owner_jobs: int = MAX_OWNER_JOBS
    ) -> None:
        self.folder = folder.absolute()
        self.max_jobs, self.max_owner_jobs = max_jobs, max_owner_jobs
        self._mutex, self._reading = RLock(), Lock()
        self._lock: IO[str] | None = None
        try:
            with suppress(FileExistsError):
                self.folder.mkdir(0o700, parents=True)  # it holds copies of files that other users may not read
            (self.folder / JOBS).mkdir(exist_ok=True)
            if server:
                self._lock = lock_server(self.folder)
            self._db = self._open()
            self._reader = self._connect()  # so that reads do not wait until a change is on the disk
        except OSError as error:
            reason = f"{format_value(folder)} cannot be used ({reason_of(error, self.folder / DATABASE)})"
            raise UserError("--outdir", f"{reason}; give another folder") from error
        if server:
            with self._change() as db:  # unfinished uploads of an earlier server
                db.execute("UPDATE jobs SET deleted = 1 WHERE state = ?", (UPLOADING,))
            self._purge()

    def take_over(self) -> bool:
        """Become the folder's server unless another process is; returns whether this process is the server."""
        if self._lock is None:
            with suppress(FolderInUse):
                self._lock = lock_server(self.folder)
        return self._lock is not None

    def close(self) -> None:
        self._reader.close()
        self._db.close()
        if self._lock is not None:
            self._lock.close()

    # The web process

    def new_id(self) -> tuple[str, Path]:
        """Reserve a job id and create its folder, for uploads; the job does not exist until `add`."""
        id = f"video_{secrets.token_hex(16)}"
        with self._change() as db:
            db.execute("INSERT INTO jobs (id, state) VALUES (?, ?)", (id, UPLOADING))
            self.folder_of(id).mkdir(parents=True)
        return id, self.folder_of(id)

    def add(self, id: str, flags: Mapping[str, Any], owner: str = "", parent: str = "", priority: int = 0) -> Job:
        """Queue a job; raises QueueFull beyond the limit on all jobs or on its owner's."""
        with self._change() as db:
            self._check_limits(db, owner)
            db.execute("DELETE FROM jobs WHERE id = ? AND state = ?", (id, UPLOADING))
            (last,) = db.execute("SELECT COALESCE(MAX(place), 0) FROM jobs WHERE state = 'queued'").fetchone()
            values = (id, State.QUEUED, json.dumps(dict(flags)), owner, parent, priority, last + 1, time.time())
            columns = "id, state, flags, owner, parent, priority, place, created"
            db.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * len(values))})", values)
            return self._job(db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone())

    def get(self, id: str) -> Job | None:
        rows = self._rows(f"SELECT * FROM jobs WHERE id = ? AND {VISIBLE}", id)
        return self._job(rows[0]) if rows else None

    def list(
        self,
        owner: str | None = None,
        states: Sequence[State] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        """Jobs in order of creation, starting behind the job `after`, and whether there are more."""
        where, values = [VISIBLE], list[Any]()
        if owner is not None:
            where, values = [*where, "owner = ?"], [*values, owner]
        if states:
            where, values = [*where, f"state IN ({', '.join('?' * len(states))})"], [*values, *states]
        if after is not None:
            beyond = "<" if newest_first else ">"
            where, values = [*where, f"number {beyond} (SELECT number FROM jobs WHERE id = ?)"], [*values, after]
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number {order} LIMIT ?"
        rows = self._rows(query, *values, limit + 1)
        return [self._job(row) for row in rows[:limit]], len(rows) > limit

    def running(self) -> dict[str, Job]:
        """The job that each worker runs, by the worker's name, including deleted jobs."""
        return {row["worker"]: self._job(row) for row in self._rows("SELECT * FROM jobs WHERE state = 'in_progress'")}

    def counts(self) -> dict[State, int]:
        rows = self._rows(f"SELECT state, COUNT(*) AS jobs FROM jobs WHERE {VISIBLE} GROUP BY state")
        return dict.fromkeys(State, 0) | {State(row["state"]): row["jobs"] for row in rows}

    def place(self, id: str) -> int:
        """The number of queued jobs ahead of a queued one; 0 for any other job."""
        ids = [*self.order()]
        return ids.index(id) if id in ids else 0

    def order(self) -> dict[str, str]:
        """The ids of the queued jobs in queue order, and the owner of each."""
        return {row["id"]: row["owner"] for row in self._rows(f"SELECT id, owner {ORDERED}")}

    def move(self, id: str, before: str | None) -> bool:
        """Move a queued job before another queued one, or to the end; it gets its new neighbor's priority.

        Returns:
            False if one of them is not queued.
        """
        with self._change() as db:
            queued = {row["id"]: row["priority"] for row in db.execute(IN_ORDER)}
            if id not in queued or (before is not None and before not in queued):
                return False
            others = [each for each in queued if each != id]
            if before != id:
                index = len(others) if before is None else others.index(before)
                neighbor = others[-1] if before is None and others else before or id
                order = [*others[:index], id, *others[index:]]
                db.execute("UPDATE jobs SET priority = ? WHERE id = ?", (queued[neighbor], id))
                db.executemany("UPDATE jobs SET place = ? WHERE id = ?", enumerate(order, start=1))
            return True

    def cancel(self, id: str) -> Job | None:
        """Cancel a job: at once if queued, within a step's time if running; a job that has ended stays as it is."""
        with self._change() as db:
            self._cancel(db, id)
        self._tidy(id)
        return self.get(id)

    def delete(self, id: str) -> bool:
        """Delete a job, cancelling it if need be; its files are removed once no worker has it."""
        with self._change() as db:
            self._cancel(db, id)
            found = db.execute("UPDATE jobs SET deleted = 1 WHERE id = ? AND NOT deleted", (id,)).rowcount == 1
        self._purge()
        return found

    def expire(self, max_age: float | None = None, max_bytes: int | None = None) -> Sequence[str]:
        """Delete finished jobs, oldest first; returns their ids.

        Args:
            max_age: seconds to keep a job after it has ended.
            max_bytes: maximum total size of all jobs' folders.
        """
        rows = self._rows(f"SELECT * FROM jobs WHERE {VISIBLE} ORDER BY number")
        sizes = {row["id"]: folder_bytes(self.folder_of(row["id"])) for row in rows} if max_bytes is not None else {}
        total, deleted = sum(sizes.values()), []
        for row in rows:
            if row["state"] not in FINAL:
                continue
            too_old = max_age is not None and time.time() - row["ended"] > max_age
            if (too_old or (max_bytes is not None and total > max_bytes)) and self.delete(row["id"]):
                total -= sizes.get(row["id"], 0)
                deleted.append(row["id"])
        return deleted

    def folder_of(self, id: str) -> Path:
        """The folder of a job's files."""
        return self.folder / JOBS / id

    # Workers

    def claim(self, worker: str) -> Job | None:
        """Claim the next job for a worker, which puts it in progress; None if there is none."""
        if not self._rows(f"{IN_ORDER} LIMIT 1"):  # without a transaction: idle workers poll often
            return None
        with self._change() as db:
            row = db.execute(f"{IN_ORDER} LIMIT 1").fetchone()
            if row is None:
                return None
            started = time.time() if row["started"] is None else row["started"]
            self._update(db, row["id"], state=State.IN_PROGRESS, worker=worker, started=started)
            return self._job(db.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone())

    def report(self, id: str, worker: str, progress: Progress, facts: Mapping[str, Any] | None = None) -> bool:
        """Record progress; returns False if the job must end: it was cancelled, or no longer belongs to this worker.

        Args:
            facts: what is already known about the result.
        """
        known = None if facts is None else json.dumps(dict(facts))
        with self._change() as db:
            change = "UPDATE jobs SET progress = ?, facts = COALESCE(?, facts), reports = reports + 1"
            values = (json.dumps(asdict(progress)), known, id, worker)
            return db.execute(f"{change} WHERE id = ? AND {OF_WORKER} AND NOT cancelling", values).rowcount == 1

    def complete(self, id: str, worker: str, facts: Mapping[str, Any]) -> bool:
        """Complete a job whose video is in place; `facts` are added to those reported before.

        Returns:
            False if the job no longer belongs to this worker, or was cancelled before and so ends as cancelled.
        """
        return self._end(id, worker, State.COMPLETED, facts=facts)

    def fail(self, id: str, worker: str, code: str, message: str) -> bool:
        """Mark a job as failed.

        Returns:
            False if the job no longer belongs to this worker, or was cancelled before and so ends as cancelled.
        """
        return self._end(id, worker, State.FAILED, error=(code, message))

    def release(self, worker: str) -> None:
        """Take a stopped worker's job from it and requeue it ahead of all others."""
        with self._change() as db:
            rows = db.execute(f"SELECT * FROM jobs WHERE {OF_WORKER}", (worker,)).fetchall()
            for row in rows:
                self._let_go(db, row)
        self._tidy(*(row["id"] for row in rows))

    def lose(self, worker: str, reason: str) -> bool:
        """Take a killed worker's job from it: requeue it the first time, fail it with the reason the second time.

        Returns:
            Whether the worker had a job.
        """
        with self._change() as db:
            rows = db.execute(f"SELECT * FROM jobs WHERE {OF_WORKER}", (worker,)).fetchall()
            for row in rows:
                self._let_go(db, row, reason if row["losses"] else "")
                self._update(db, row["id"], losses=row["losses"] + 1)
        self._tidy(*(row["id"] for row in rows))
        return bool(rows)

    # The database

    def _open(self) -> sqlite3.Connection:
        """Open the database, creating it if need be; raises UserError if it is damaged or of another version."""
        path, db = self.folder / DATABASE, self._connect()
        try:
            with explain_errors(path):
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise Damaged(path, found)
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version not in (0, VERSION):
                    raise UserError("--outdir", f"{format_value(path)} is from another version; give another folder")
                db.execute(SCHEMA)
                db.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException as error:
            db.close()
            if isinstance(error, Damaged):
                self._put_aside(path, error)
            raise
        return db

    def _connect(self) -> sqlite3.Connection:
        """A connection in autocommit mode; `_change` and `_rows` hold locks, and only `_change` uses transactions."""
        path = self.folder / DATABASE
        with explain_errors(path):
            db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        return db

    def _put_aside(self, path: Path, damage: Damaged) -> None:
        """Rename a damaged database and raise UserError; does nothing while another server has the folder."""
        if self._lock is None:
            try:
                self._lock = lock_server(self.folder)
            except UserError:
                return
        names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
        self._lock.close()
        remedy = f"it was moved to {format_value(aside)}; start again with an empty queue (videos stay in {JOBS}/)"
        raise UserError("--outdir", f"{format_value(path)} is damaged ({damage.reason}); {remedy}") from damage

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A `with` block as one transaction: committed at its end, rolled back after an error."""
        with self._mutex, explain_errors(self.folder / DATABASE):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> Sequence[sqlite3.Row]:
        with self._reading, explain_errors(self.folder / DATABASE):
            return self._reader.execute(query, values).fetchall()

    def _update(self, db: sqlite3.Connection, id: str, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        db.execute(f"UPDATE jobs SET {columns} WHERE id = ?", (*values.values(), id))

    def _job(self, row: sqlite3.Row) -> Job:
        names = ("id", "owner", "parent", "priority", "created", "started", "ended", "worker", "losses", "reports")
        return Job(
            **{name: row[name] for name in names},
            flags=json.loads(row["flags"]),
            state=State(row["state"]),
            folder=self.folder_of(row["id"]),
            order=row["place"],
            progress=Progress(**json.loads(row["progress"])),
            cancelling=bool(row["cancelling"]) and row["state"] == State.IN_PROGRESS,
            error=None if row["error"] is None else tuple(json.loads(row["error"])),
            facts=None if row["facts"] is None else json.loads(row["facts"]),
        )

    def _check_limits(self, db: sqlite3.Connection, owner: str) -> None:
        waiting = "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'in_progress')"
        if db.execute(waiting).fetchone()[0] >= self.max_jobs:
            raise QueueFull(f"{counted(self.max_jobs, 'job is', 'jobs are')} waiting or running; try again later")
        if db.execute(f"{waiting} AND owner = ?", (owner,)).fetchone()[0] >= self.max_owner_jobs:
            jobs = counted(self.max_owner_jobs, "of your jobs is", "of your jobs are")
            raise QueueFull(f"{jobs} waiting or running; wait for one to end")

    def _cancel(self, db: sqlite3.Connection, id: str) -> None:
        ended = f"state = '{State.CANCELLED}', ended = ?"
        db.execute(f"UPDATE jobs SET {ended} WHERE id = ? AND state = 'queued'", (time.time(), id))
        db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ? AND state = 'in_progress'", (id,))

    def _end(self, id: str, worker: str, state: State, facts: Mapping[str, Any] | None = None, **values: Any) -> bool:
        with self._change() as db:
            row = db.execute(f"SELECT * FROM jobs WHERE id = ? AND {OF_WORKER}", (id, worker)).fetchone()
            if row is None:
                return False
            if row["cancelling"]:
                state, values = State.CANCELLED, {}
            if state == State.COMPLETED:
                known, progress = json.loads(row["facts"] or "{}"), Progress(**json.loads(row["progress"]))
                values["facts"] = known | dict(facts or {})
                values["progress"] = asdict(replace(progress, part=1.0, seconds_left=0.0))
            texts = {name: json.dumps(value) for name, value in values.items()}
            self._update(db, id, state=state, worker="", ended=time.time(), **texts)
        self._tidy(id)
        return not row["cancelling"]

    def _let_go(self, db: sqlite3.Connection, row: sqlite3.Row, reason: str = "") -> None:
        """End a cancelled job, fail one with a `reason`, or requeue it ahead of all others."""
        values: dict[str, Any] = {"worker": "", "state": State.QUEUED}
        if row["cancelling"] or reason:
            error = None if row["cancelling"] else json.dumps(("internal_error", reason))
            state = State.CANCELLED if row["cancelling"] else State.FAILED
            values |= {"state": state, "ended": time.time(), "error": error}
        elif (first := db.execute(f"{IN_ORDER} LIMIT 1").fetchone()) is not None:
            values |= {"priority": max(row["priority"], first["priority"]), "place": first["place"] - 1}
        self._update(db, row["id"], **values)

    def _tidy(self, *ids: str) -> None:
        """Remove the resume state of jobs that have ended, and purge."""
        for job in filter(None, map(self.get, ids)):
            for folder in state_folders(job.video) if job.state in FINAL else ():
                shutil.rmtree(folder, ignore_errors=True)
        self._purge()

    def _purge(self) -> None:
        """Remove the files, then the rows, of deleted jobs that no worker has; after a crash the next purge goes on."""
        for row in self._rows("SELECT id FROM jobs WHERE deleted AND worker = ''"):
            shutil.rmtree(self.folder_of(row["id"]), ignore_errors=True)
            if not self.folder_of(row["id"]).exists():
                with self._change() as db:
                    db.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))


def lock_server(folder: Path) -> IO[str]:
    """The lock of a folder's server, see `open_locked`.

    Raises:
        FolderInUse: another server has it.
    """
    try:
        return open_locked(folder / SERVER_LOCK)
    except BlockingIOError as error:
        reason = f"{format_value(folder)} is in use by another server"
        raise FolderInUse("--outdir", f"{reason}; stop it, or give another folder") from error


def lock_worker(folder: Path, worker: str) -> IO[str]:
    """The lock of a worker, see `open_locked`; while it is held, the worker's job must not be released.

    Raises:
        BlockingIOError: a worker of that name is alive.
    """
    (folder / WORKERS).mkdir(exist_ok=True)
    return open_locked(folder / WORKERS / f"{worker}.lock")


def open_locked(path: Path) -> IO[str]:
    """A lock file, locked until it is closed or the process ends, however it ends.

    Raises:
        BlockingIOError: another process, or another part of this one, has locked it.
    """
    file = path.open("a", encoding="utf-8")
    try:
        lock(file)
    except BlockingIOError:
        file.close()
        raise
    return file


class FolderInUse(UserError):
    """Another server has the folder."""


class Damaged(UserError):
    """The database is damaged."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__("--outdir", f"{format_value(path)} is damaged ({reason}); stop the server, and start it again")
        self.reason = reason


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors within a `with` block into OSError or `Damaged`, but let programming errors pass."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code
        if code in DAMAGE:
            raise Damaged(path, str(error)) from error
        if code == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if not isinstance(error, sqlite3.OperationalError) or code == sqlite3.SQLITE_ERROR:
            raise
        raise OSError(errno.EIO, str(error), str(path)) from error


def folder_bytes(folder: Path) -> int:
    """The total size in bytes of the files in a folder; files that vanish meanwhile count as 0."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


class QueueFull(Exception):
    """A limit on jobs that have not ended is reached; the message says which."""
