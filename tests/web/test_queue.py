"""The queue: states, order, limits, several processes, kills, a damaged database, a full disk, clock jumps."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skyreels_v3.errors import UserError
from skyreels_v3.web.queue import DATABASE, Job, Progress, Queue, QueueFull, State, lock_server
from skyreels_v3.web.retention import DAY_SECONDS, Retention
from tests.conftest import ROOT

FLAGS = {"task_type": "reference_to_video", "prompt": "a fox"}


@pytest.fixture
def queue(tmp_path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "server")
    yield queue
    queue.close()


def add(queue: Queue, **more: object) -> str:
    id, folder = queue.new_id()
    assert folder.is_dir()
    return queue.add(id, FLAGS, **more).id


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def state_of(queue: Queue, id: str) -> State | None:
    job = queue.get(id)
    return None if job is None else job.state


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that runs `code`, with `queue` opened in the folder given as the first argument."""
    begin = "import sys, time\nfrom pathlib import Path\nfrom skyreels_v3.web.queue import *\n"
    command = [sys.executable, "-c", f"{begin}queue = Queue(Path(sys.argv[1]))\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_job_from_its_id_to_its_end(queue):
    id, folder = queue.new_id()
    assert queue.get(id) is None and queue.list() == ([], False)
    job = queue.add(id, FLAGS | {"ref_imgs": ["a.png"]}, owner="o", parent="p", priority=2)
    assert queue.get(id) == job and job.state == State.QUEUED and job.started is None
    assert (job.flags["ref_imgs"], job.owner, job.parent, job.priority) == (["a.png"], "o", "p", 2)
    assert job.folder == folder and job.video == folder / "video.mp4"
    assert queue.folder.stat().st_mode & 0o77 == 0  # no access for others
    claimed = queue.claim("w")
    assert claimed is not None and (claimed.id, claimed.state, claimed.worker) == (id, State.IN_PROGRESS, "w")
    assert queue.claim("w") is None
    progress = Progress("denoising", 0.5, 1, 2, 3, 4, 5.0, 6)
    assert queue.report(id, "w", progress, {"seed": 1}) and not queue.report(id, "other", progress)
    assert (queue.get(id).progress, queue.get(id).facts, queue.get(id).reports) == (progress, {"seed": 1}, 1)
    assert not queue.complete(id, "other", {})
    assert queue.complete(id, "w", {"frames": 5})
    done = queue.get(id)
    assert (done.state, done.facts, done.progress.part) == (State.COMPLETED, {"seed": 1, "frames": 5}, 1.0)
    assert done.created <= done.started <= done.ended
    for late in (queue.complete(id, "w", {}), queue.fail(id, "w", "a", "b"), queue.report(id, "w", progress)):
        assert not late
    assert queue.cancel(id).state == State.COMPLETED
    queue.release("w")
    assert queue.get(id) == done


def test_a_failed_job_says_why(queue):
    id = add(queue)
    queue.claim("w")
    assert queue.fail(id, "w", "invalid_request", "--seed: wrong")
    assert (queue.get(id).state, queue.get(id).error) == (State.FAILED, ("invalid_request", "--seed: wrong"))


def test_order_priority_and_moving(queue):
    a, b, c = (add(queue) for _ in range(3))
    urgent = add(queue, priority=1)
    assert [queue.place(id) for id in (urgent, a, b, c)] == [0, 1, 2, 3]
    assert queue.move(c, a) and queue.move(a, None) and queue.move(b, b)
    assert [queue.place(id) for id in (urgent, c, b, a)] == [0, 1, 2, 3]
    assert queue.move(b, urgent) and queue.get(b).priority == 1
    later = add(queue)
    assert not queue.move(a, "video_none") and not queue.move("video_none", None)
    assert [queue.claim("w").id for _ in range(5)] == [b, urgent, c, a, later]
    assert not queue.move(a, None) and queue.place(a) == 0


def test_pages_of_the_list(queue):
    made = [add(queue, owner="xy"[number % 2]) for number in range(5)]
    first, more = queue.list(limit=2)
    assert (ids(first), more) == (made[:2:-1], True)
    rest, more = queue.list(after=first[-1].id)
    assert (ids(rest), more) == (made[2::-1], False)
    assert ids(queue.list(owner="y", newest_first=False)[0]) == made[1::2]
    assert ids(queue.list(after=made[3], newest_first=False)[0]) == made[4:]
    queue.claim("w")
    assert ids(queue.list(states=[State.IN_PROGRESS])[0]) == made[:1]
    assert queue.counts() == dict.fromkeys(State, 0) | {State.QUEUED: 4, State.IN_PROGRESS: 1}


def test_limits(tmp_path):
    queue = Queue(tmp_path, max_jobs=3, max_owner_jobs=2)
    add(queue, owner="x"), add(queue, owner="x")
    with pytest.raises(QueueFull, match="2 of your jobs are waiting or running"):
        add(queue, owner="x")
    id = add(queue, owner="y")
    with pytest.raises(QueueFull, match="3 jobs are waiting or running"):
        add(queue, owner="y")
    queue.cancel(id)
    add(queue, owner="z")


# Cancel and delete


def test_cancel(queue):
    waiting, running = add(queue), add(queue, priority=1)
    assert queue.cancel("video_none") is None
    assert queue.cancel(waiting).state == State.CANCELLED
    queue.claim("w")
    job = queue.cancel(running)
    assert (job.state, job.cancelling) == (State.IN_PROGRESS, True)
    assert not queue.report(running, "w", Progress())
    assert not queue.complete(running, "w", {}) and state_of(queue, running) == State.CANCELLED
    assert queue.claim("w") is None


@pytest.mark.parametrize("end", ["fail", "release", "lose"])
def test_a_cancelled_job_ends_as_cancelled(queue, end):
    id = add(queue)
    queue.claim("w")
    queue.cancel(id)
    if end == "fail":
        assert not queue.fail(id, "w", "code", "message")
    elif end == "lose":
        queue.lose("w", "killed")
    else:
        queue.release("w")
    job = queue.get(id)
    assert (job.state, job.cancelling, job.error) == (State.CANCELLED, False, None)


def test_delete(queue):
    waiting, running, upload = add(queue), add(queue, priority=1), queue.new_id()[0]
    folders = {id: queue.folder / "jobs" / id for id in (waiting, running, upload)}
    queue.claim("w")
    for id in folders:
        assert queue.delete(id) and not queue.delete(id) and queue.get(id) is None
    assert not folders[waiting].exists() and not folders[upload].exists()
    assert folders[running].exists() and not queue.report(running, "w", Progress())
    assert queue.list() == ([], False)
    queue.fail(running, "w", "cancelled", "")
    assert not folders[running].exists() and queue.list() == ([], False)


def test_cancel_and_complete_at_once(queue):
    """Whichever comes first wins, and both return values agree with it."""
    for _ in range(20):
        id = add(queue)
        queue.claim("w")
        with ThreadPoolExecutor(2) as pool:
            completed, cancelled = pool.submit(queue.complete, id, "w", {}), pool.submit(queue.cancel, id)
        assert state_of(queue, id) == (State.COMPLETED if completed.result() else State.CANCELLED)
        assert cancelled.result() is not None


# Lost workers


def test_a_released_job_comes_first(queue):
    first, urgent = add(queue), add(queue, priority=5)
    queue.claim("v"), queue.claim("w")
    other = add(queue, priority=9)
    queue.release("w")
    assert [queue.claim("x").id for _ in range(2)] == [first, other]
    assert queue.get(urgent).worker == "v"


def test_a_job_that_loses_two_workers_fails(queue):
    id = add(queue)
    for state in (State.QUEUED, State.FAILED):
        queue.claim("w")
        assert queue.lose("w", "ended by SIGKILL") and not queue.lose("w", "again")
        assert state_of(queue, id) == state
    assert (queue.get(id).error, queue.get(id).losses) == (("internal_error", "ended by SIGKILL"), 2)


# Several processes


@pytest.mark.slow
def test_nothing_is_claimed_twice(queue):
    made = {add(queue) for _ in range(60)}
    code = (
        "while job := queue.claim(sys.argv[2]):\n    print(job.id)\n    assert queue.complete(job.id, sys.argv[2], {})"
    )
    workers = [python(code, queue.folder, name) for name in range(3)]
    claimed = [line for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert not any(worker.returncode for worker in workers)
    assert Counter(claimed) == dict.fromkeys(made, 1)
    assert queue.counts()[State.COMPLETED] == 60


@pytest.mark.slow
def test_what_was_returned_from_survives_a_kill(queue):
    """Processes are killed at arbitrary points: every change that they reported is in the queue, which is intact."""
    code = """
while True:
    id, _ = queue.new_id()
    queue.add(id, {})
    print("added", id, flush=True)
    job = queue.claim("w")
    print("claimed", job.id, flush=True)
    queue.complete(job.id, "w", {})
    print("completed", job.id, flush=True)
    queue.release("w")
"""
    said: dict[str, str] = {}
    for seed in range(6):
        worker = python(code, queue.folder)
        lines = [worker.stdout.readline() for _ in range(10)]
        time.sleep(random.Random(seed).random() / 50)
        worker.kill()
        lines += worker.communicate()[0].splitlines(keepends=True)
        said |= {id: what for what, id in (line.split() for line in lines if line.endswith("\n"))}
        queue.release("w")
    assert len(said) >= 18
    for id, what in said.items():
        state = state_of(queue, id)
        assert state == State.COMPLETED if what == "completed" else state in (State.QUEUED, State.COMPLETED)
    queue.close()
    Queue(queue.folder, server=True).close()  # the integrity check finds no damage


def test_two_servers_for_one_folder(tmp_path):
    folder = tmp_path / "server"
    first = Queue(folder, server=True)
    with pytest.raises(UserError, match=f"^--outdir: {folder} is in use by another server; stop it, or give another"):
        Queue(folder, server=True)
    worker = Queue(folder)  # not a server
    first.close()
    Queue(folder, server=True).close()
    worker.close()


@pytest.mark.slow
def test_a_killed_server_leaves_no_lock_and_no_uploads(tmp_path):
    code = "server = Queue(Path(sys.argv[1]), server=True)\nserver.new_id()\nprint('ready', flush=True)\ntime.sleep(60)"
    server = python(code, tmp_path)
    assert server.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="in use by another server"):
        Queue(tmp_path, server=True)
    assert any((tmp_path / "jobs").iterdir())
    server.send_signal(signal.SIGKILL)
    server.wait()
    server.stdout.close()
    Queue(tmp_path, server=True).close()
    assert not any((tmp_path / "jobs").iterdir())


# Disk failures


@pytest.mark.parametrize("damage", ["header", "pages", "other file", "empty folder in its place"])
def test_a_damaged_database_is_put_aside(tmp_path, damage):
    queue = Queue(tmp_path, server=True)
    made = [add(queue) for _ in range(100)]
    video = queue.get(made[0]).video
    video.touch()
    queue.close()
    file = tmp_path / DATABASE
    content = bytearray(file.read_bytes())
    if damage == "empty folder in its place":
        file.unlink()
        file.mkdir()
        with pytest.raises(UserError, match=f"^--outdir: {tmp_path} cannot be used .unable to open"):
            Queue(tmp_path, server=True)
        return
    if damage == "header":
        content[:16] = b"\0" * 16
    elif damage == "pages":
        content[4096:] = b"\xff" * (len(content) - 4096)
    else:
        content = bytearray(b"hello " * 1000)
    file.write_bytes(content)
    for number in (1, 2):
        aside = tmp_path / f"{DATABASE}.damaged-{number}"
        with pytest.raises(
            UserError, match=f"^--outdir: .*{DATABASE} is damaged .*; it was moved to .*{aside.name}; start"
        ):
            Queue(tmp_path, server=True)
        assert aside.read_bytes() == content and not file.exists()
        file.write_bytes(content)
    file.unlink()
    queue = Queue(tmp_path, server=True)
    assert queue.list() == ([], False) and video.exists()
    add(queue)
    queue.close()


def test_a_worker_leaves_a_servers_database_in_its_place(tmp_path):
    Queue(tmp_path).close()
    file = tmp_path / DATABASE
    file.write_bytes(b"hello " * 1000)
    with (
        lock_server(tmp_path),
        pytest.raises(UserError, match=r"is damaged \(.*\); stop the server, and start it again"),
    ):
        Queue(tmp_path)
    assert file.exists()


def test_a_database_of_another_version(tmp_path):
    Queue(tmp_path).close()
    database = sqlite3.connect(tmp_path / DATABASE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(UserError, match="is from another version; give another folder"):
        Queue(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--outdir: .*/file cannot be used \(Not a directory\); give another folder"):
        Queue(tmp_path / "file")


@pytest.mark.slow
def test_a_full_disk(small_disk):
    """Acknowledged changes persist; others fail and change nothing; once there is space the queue continues."""
    disk = small_disk(400)
    queue = Queue(disk / "server", server=True)
    running = add(queue)
    queue.claim("w")
    filler = disk / "filler"
    filler.write_bytes(bytes(100 << 10))
    made: list[str] = [running]
    with pytest.raises(OSError, match="No space left on device"):
        while True:
            id, _ = queue.new_id()
            made.append(queue.add(id, FLAGS | {"prompt": "a" * 2000}).id)
    with pytest.raises(OSError, match="No space left on device"):
        while True:
            queue.report(running, "w", Progress("denoising" * 1000))
    assert set(ids(queue.list(limit=1000)[0])) == set(made)
    filler.unlink()
    assert queue.complete(running, "w", {})
    add(queue)
    queue.close()
    queue = Queue(disk / "server", server=True)
    assert set(made) < set(ids(queue.list(limit=1000)[0])) and state_of(queue, running) == State.COMPLETED
    queue.close()


def test_a_clock_that_jumps(queue, monkeypatch):
    clock = iter([5e9, 1e9, 7e9, 0.0, 3e9, 2e9, 1.0, 9e9, 4e9] * 3)
    monkeypatch.setattr("skyreels_v3.web.queue.time.time", lambda: next(clock))
    made = [add(queue) for _ in range(4)]
    assert ids(queue.list(newest_first=False)[0]) == made
    assert [queue.claim("w").id for _ in range(2)] == made[:2]
    assert queue.complete(made[1], "w", {})
    queue.release("w")
    assert [queue.claim("w").id for _ in range(3)] == [made[0], *made[2:]]


# Retention


def test_expire(queue, monkeypatch):
    made = [add(queue) for _ in range(5)]
    for id in made[:4]:
        queue.claim("w")
        queue.get(id).video.write_bytes(bytes(1000))
        if id != made[0]:
            queue.complete(id, "w", {})
    assert queue.expire() == [] and queue.expire(max_age=100, max_bytes=4000) == []
    assert queue.expire(max_bytes=3500) == [made[1]]  # the oldest job is still in progress
    assert not (queue.folder / "jobs" / made[1]).exists()
    now = time.time()
    monkeypatch.setattr("skyreels_v3.web.queue.time.time", lambda: now - 1e6)
    assert queue.expire(max_age=100) == []
    monkeypatch.setattr("skyreels_v3.web.queue.time.time", lambda: now + 101)
    assert queue.expire(max_age=100) == made[2:4]
    assert queue.expire(max_bytes=0) == []
    assert ids(queue.list(newest_first=False)[0]) == [made[0], made[4]]


class Clock:
    """Wall-clock time and monotonic time, both set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.running = time.time(), 1000.0
        monkeypatch.setattr("skyreels_v3.web.queue.time.time", lambda: self.now)  # replaced in all modules
        monkeypatch.setattr("skyreels_v3.web.retention.monotonic", lambda: self.running)

    def advance(self, seconds: float) -> None:
        self.now, self.running = self.now + seconds, self.running + seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def one_of_each(queue: Queue) -> dict[State, str]:
    """A job in each state, with 1000 bytes of files each."""
    made: dict[State, str] = {}
    for state in reversed(State):  # the queued job last: the others must be claimed
        id = made[state] = add(queue)
        (queue.folder / "jobs" / id / "file").write_bytes(bytes(1000))
        if state == State.CANCELLED:
            queue.cancel(id)
        elif state != State.QUEUED:
            assert queue.claim("w").id == id
        if state == State.COMPLETED:
            queue.complete(id, "w", {})
        elif state == State.FAILED:
            queue.fail(id, "w", "code", "message")
    assert {state: state_of(queue, id) for state, id in made.items()} == {state: state for state in made}
    return made


@pytest.mark.parametrize("limits", [{"days": 2}, {"gigabytes": 1e-9}])
def test_retention(queue, clock, limits):
    """Applied at the start and every ten minutes; unfinished jobs are never deleted."""
    retention = Retention(queue, **limits)
    retention.apply()
    made = one_of_each(queue)
    clock.advance(2 * DAY_SECONDS + 1 if "days" in limits else 599)
    if "days" not in limits:
        retention.apply()
        assert len(queue.list()[0]) == len(State)
        clock.advance(1)
    retention.apply()
    assert ids(queue.list()[0]) == [made[State.QUEUED], made[State.IN_PROGRESS]]
    assert {path.name for path in (queue.folder / "jobs").iterdir()} == {made[State.IN_PROGRESS], made[State.QUEUED]}
    again = Retention(queue, **limits)
    again.apply()
    assert len(queue.list()[0]) == 2


def test_no_retention_by_default(queue, clock):
    retention = Retention(queue)
    one_of_each(queue)
    clock.advance(1e9)
    retention.apply()
    assert len(queue.list()[0]) == len(State)


@pytest.mark.parametrize("years", [-60, -5, 5, 900])
def test_retention_when_the_clock_jumps(queue, clock, years, caplog):
    """While the server runs, and before it starts; after a day without jumps the clock is trusted."""
    retention = Retention(queue, days=2)
    retention.apply()
    one_of_each(queue)
    jump = years * 365 * DAY_SECONDS
    clock.now += jump
    for each in (retention, Retention(queue, days=2)):
        clock.advance(600)
        each.apply()
        assert len(queue.list()[0]) == len(State)
    assert "the clock jumped by" in caplog.text
    clock.advance(DAY_SECONDS)
    retention.apply()
    assert len(queue.list()[0]) == (2 if years > 0 else len(State))
    clock.now -= jump
    clock.advance(DAY_SECONDS)
    retention.apply()
    assert len(queue.list()[0]) == (2 if years > 0 else len(State))


def test_threads_share_a_queue(queue):
    with ThreadPoolExecutor(4) as pool:
        made = [*pool.map(lambda _: add(queue), range(40))]
    barrier = threading.Barrier(4)

    def work(name: int) -> list[str]:
        barrier.wait()
        claimed = []
        while (job := queue.claim(str(name))) is not None:
            claimed.append(job.id)
        return claimed

    with ThreadPoolExecutor(4) as pool:
        claimed = [id for claims in pool.map(work, range(4)) for id in claims]
    assert Counter(claimed) == dict.fromkeys(made, 1)


def test_a_folder_that_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queue = Queue(Path("server"))
    id, folder = queue.new_id()
    os.chdir("/")
    assert folder == tmp_path / "server" / "jobs" / id and folder.is_dir()
    queue.close()
