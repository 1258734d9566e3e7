"""The supervisor: workers that are killed, hang, or do not start; a killed server; no process is left running."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import numpy as np
import psutil
import pytest

from skyreels_v3.errors import UserError
from skyreels_v3.web import supervisor as module
from skyreels_v3.web.queue import Queue, State
from skyreels_v3.web.retention import Retention
from skyreels_v3.web.serve import workers_of
from skyreels_v3.web.supervisor import MAX_DELAY, Slot, Supervisor, group_size, reason_of_end
from tests.conftest import ROOT, files_in
from tests.web.test_runner import FAULTY, TWO_PASSES, add, ended, frames_of, is_alive, log_of, set_faults, wait

SERVER = """
import sys, time
from pathlib import Path
from skyreels_v3.web.queue import Queue
from skyreels_v3.web.supervisor import Slot, Supervisor

queue = Queue(Path(sys.argv[1]), server=True)
with Supervisor(queue, [Slot("0"), Slot("1")], command=sys.argv[2:]) as supervisor:
    while True:
        running = [slot.process.pid for slot in supervisor.slots if slot.process is not None]
        if len(running) == 2:
            print(*running, flush=True)
            time.sleep(100)
        time.sleep(0.05)
"""


@pytest.fixture
def queue(tmp_path, cache, monkeypatch) -> Iterator[Queue]:
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    queue = Queue(tmp_path / "server")
    yield queue
    queue.close()


@pytest.fixture
def supervise(queue) -> Iterator[Callable[..., Supervisor]]:
    """Supervise workers that can have faults, until the test ends."""
    with ExitStack() as stack:
        yield lambda *names, command=FAULTY, **more: stack.enter_context(
            Supervisor(queue, [Slot(name) for name in names or ("w",)], command=command, **more)
        )


def script(text: str) -> tuple[str, ...]:
    """A command that runs a script in place of a worker."""
    return (sys.executable, "-c", f"import os, sys, time\nfrom pathlib import Path\n{text}")


@pytest.mark.extended
def test_a_job_whose_worker_is_killed_is_made_once_more(queue, supervise):
    """It resumes where it stopped; if its worker is killed again it fails, and the next one is made."""
    goes_on, fails, other = add(queue, TWO_PASSES), add(queue), add(queue, seed=9)
    set_faults(queue, ("denoising 2 2", "kill"), ("loading", "kill", fails), ("step 2", "kill", fails))
    supervise()
    job = ended(queue, goes_on)
    assert (job.state, job.losses) == (State.COMPLETED, 1)
    assert [log_of(queue, goes_on).count(place) for place in ("claimed", "denoising 1 3", "written")] == [2, 1, 1]
    job = ended(queue, fails)
    assert (job.state, job.losses) == (State.FAILED, 2)
    reason = "the worker was killed by SIGKILL, as happens when the host runs out of memory"
    assert job.error == ("internal_error", reason)
    assert ended(queue, other).state == State.COMPLETED


@pytest.mark.extended
def test_a_worker_that_hangs_is_killed(queue, supervise):
    set_faults(queue, ("denoising 1 2", "hang"))
    id = add(queue)
    supervise(hang_seconds=10)
    job = ended(queue, id)
    assert (job.state, job.losses) == (State.COMPLETED, 1)


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_job_that_is_ended_while_it_loads(queue, supervise, end, monkeypatch):
    """A loading worker may be in the middle of a long download: it is killed, and the next job is made."""
    monkeypatch.setattr(module, "GRACE", 0.5)  # for the other job, when the test ends
    id, other = add(queue), add(queue)
    claim = "from skyreels_v3.web.queue import *; from pathlib import Path; q = Queue(Path(sys.argv[1]))"
    loading = "q.report(job.id, sys.argv[2], Progress('loading'))"
    supervise(
        command=script(f"{claim}; job = q.claim(sys.argv[2]); job and {loading}; time.sleep(100)"), cancel_seconds=0.5
    )
    wait(lambda: queue.get(id).progress.stage == "loading")
    getattr(queue, end)(id)
    wait(lambda: queue.get(other).progress.stage == "loading")
    job = queue.get(id)
    assert job is None if end == "delete" else (job.state, job.error) == (State.CANCELLED, None)


def test_a_worker_that_does_not_start_is_started_later_and_later(queue, supervise, monkeypatch, caplog):
    clock = iter(range(0, 10**6, 10))  # seconds
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    supervise(command=script("sys.exit(3)"))
    delays = wait(lambda: len(caplog.records) > 7 and [record.args[-1] for record in caplog.records])
    assert delays[:7] == [2, 4, 8, 16, 32, MAX_DELAY, MAX_DELAY]
    assert caplog.records[0].getMessage() == "the worker ended with code 3 (w); restarting it in 2 s"


def test_a_worker_that_wants_to_is_started_again_at_once(queue, supervise, caplog):
    supervise(command=script("print('.', file=open(sys.argv[1] + '/starts', 'a'))"))
    starts = queue.folder / "starts"
    wait(lambda: starts.exists() and starts.read_text().count(".") > 2)
    assert not caplog.records


def test_all_end_with_the_server(queue, monkeypatch):
    """Workers exit when their stdin closes, and those that do not are killed; their jobs are queued again."""
    monkeypatch.setattr(module, "GRACE", 1.0)
    id = add(queue)
    queue.claim("deaf")
    heeding = script("sys.stdin.read()")
    deaf = script("time.sleep(100)")
    with (
        Supervisor(queue, [Slot("heeding")], command=heeding) as one,
        Supervisor(queue, [Slot("deaf"), Slot("heeding")], command=deaf) as other,
    ):
        slots = (*one.slots, *other.slots)
        processes = wait(lambda: all(slot.process for slot in slots) and [slot.process for slot in slots])
    assert [process.returncode for process in processes] == [0, -9, -9]
    assert queue.get(id).state == State.QUEUED and queue.get(id).losses == 0


@pytest.mark.slow
def test_a_killed_server(queue):
    """Its workers exit; the next server continues their jobs and leaves finished ones alone."""
    done = add(queue)
    queue.claim("x"), queue.complete(done, "x", {})
    queue.get(done).video.write_bytes(b"video")
    jobs = [add(queue, TWO_PASSES, num_inference_steps=20, seed=seed) for seed in (1, 2)]
    before = queue.get(done)
    with subprocess.Popen([sys.executable, "-c", SERVER, str(queue.folder), *FAULTY], stdout=subprocess.PIPE) as server:
        workers = [int(pid) for pid in server.stdout.readline().split()]
        for id in jobs:
            wait(lambda id=id: "denoising 1 3" in log_of(queue, id))
        server.kill()
    with Supervisor(queue, [Slot("0")], command=FAULTY):  # with fewer workers, before the old ones have exited
        made = [ended(queue, id) for id in jobs]
    assert [job.state for job in made] == [State.COMPLETED] * 2
    assert not any(map(is_alive, workers))
    assert [log_of(queue, id).count("written") for id in jobs] == [1, 1]
    assert all(files_in(job.folder) == {"video.mp4", "preview.png"} for job in made)
    assert queue.get(done) == before and before.video.read_bytes() == b"video"


def test_what_a_living_worker_has_is_left_to_it(queue, supervise):
    """It may belong to a server that has just been killed."""
    code = """
import sys
from pathlib import Path
from skyreels_v3.web.queue import lock_worker
with lock_worker(Path(sys.argv[1]), "old"):
    print("ready", flush=True)
    sys.stdin.read()
"""
    id = add(queue)
    queue.claim("old")
    command = [sys.executable, "-c", code, str(queue.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as old:
        old.stdout.readline()
        one = supervise(command=script("sys.stdin.read()"))
        wait(lambda: one.slots[0].process)
        one.look_after()
        assert queue.get(id).state == State.IN_PROGRESS
        old.stdin.close()
        wait(lambda: queue.get(id).state == State.QUEUED)


@pytest.mark.slow
def test_a_full_disk(small_disk, cache, monkeypatch):
    """A job does not end until that can be recorded; once there is space, everything continues."""
    for name, value in {"SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    disk = small_disk(1000)
    queue = Queue(disk / "server")
    id = add(queue)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with Supervisor(queue, [Slot("w")], command=FAULTY) as supervisor:
        wait(lambda: supervisor.slots[0].failures > 0)
        assert queue.get(id).state == State.QUEUED
        filler.unlink()
        assert ended(queue, id).state == State.COMPLETED
    queue.close()


@pytest.mark.parametrize(
    ("visible", "gpus", "flags", "expected"),
    [
        (None, 0, {}, [None]),
        (None, 0, {"workers": 2}, [None, None]),
        (None, 2, {}, ["0", "1"]),
        ("3,5", 2, {}, ["3", "5"]),
        ("GPU-8a,GPU-9b", 2, {"workers": 3}, ["GPU-8a", "GPU-9b", "GPU-8a"]),
        (None, 8, {"workers": 2}, ["0", "1"]),
        (None, 8, {"device": "cpu"}, [None]),
        ("3,5,7", 3, {"use_usp": True}, ["3,5,7"]),
        (None, 4, {"use_usp": True, "gpu_num": 2, "ring_degree": 2}, ["0,1"]),
        (None, 0, {"use_usp": True, "gpu_num": 2}, [None]),
    ],
)
def test_slots(monkeypatch, visible, gpus, flags, expected):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: gpus)
    monkeypatch.setattr("skyreels_v3.runtime.has_library", lambda name: True)  # of a GPU driver
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots, shared = workers_of(flags)
    assert [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in slots] == expected
    assert [slot.name for slot in slots] == [*map(str, range(len(expected)))]
    size = flags.get("gpu_num", gpus)
    assert shared == (flags | {"gpu_num": size, "device": "cuda"} if "use_usp" in flags else {})


def test_a_group_without_gpus():
    with pytest.raises(UserError, match=r"^--use_usp: this machine has no GPUs .*; give --gpu_num as well"):
        group_size([], None)
    with pytest.raises(UserError, match=r"^--gpu_num: 3: this machine has 2 GPUs; give 2 at most"):
        group_size(["0", "1"], 3)


GROUP = {"use_usp": True, "gpu_num": 2, "device": "cpu"}


def ranks_of(supervisor: Supervisor) -> list[psutil.Process]:
    """The processes of a group, rank 0 first."""
    launcher = supervisor.slots[0].process
    assert launcher is not None
    return sorted(psutil.Process(launcher.pid).children(), key=lambda each: each.environ()["RANK"])


@pytest.mark.slow
def test_a_group_makes_each_video_together(queue, supervise):
    """The video is what one process makes; canceling stops all ranks in the same step, then they do the next job."""
    with Supervisor(queue, [Slot("w")], command=FAULTY):
        alone = ended(queue, add(queue))
    group = supervise(flags=GROUP)
    together = ended(queue, add(queue))
    assert (alone.state, together.state) == (State.COMPLETED, State.COMPLETED)
    difference = frames_of(alone.video).astype(int) - frames_of(together.video)
    assert np.abs(difference).mean() < 0.5  # before encoding they differ by at most one level
    ranks = ranks_of(group)
    assert log_of(queue, together.id).count("rank 1 step 3") == 1 and len(ranks) == 2
    id = add(queue, TWO_PASSES, num_inference_steps=200)
    wait(lambda: "denoising 2 3" in log_of(queue, id))
    queue.cancel(id)
    begun = time.monotonic()
    job = ended(queue, id)
    assert job.state == State.CANCELLED and len(frames_of(job.folder / "video.partial.mp4")) >= 48
    steps = log_of(queue, id)
    assert [place for place in steps if place[:4] == "step"] == [place[7:] for place in steps if place[:4] == "rank"]
    refused = ended(queue, add(queue, num_inference_steps=0))  # on all ranks
    assert refused.error[0] == "invalid_request"
    again = ended(queue, add(queue))
    assert again.state == State.COMPLETED and time.monotonic() - begun < 30
    np.testing.assert_array_equal(frames_of(again.video), frames_of(together.video))
    assert ranks_of(group) == ranks


@pytest.mark.extended
def test_a_group_whose_ranks_fail(queue, supervise):
    """All its processes are ended, a job that did not fail itself is retried once, and the next one is made."""
    group = supervise(flags=GROUP, hang_seconds=5)
    for signal, reason in ((SIGKILL, "rank 1 was killed by SIGKILL"), (SIGSTOP, "the worker made no progress for 5 s")):
        id = add(queue, TWO_PASSES, num_inference_steps=30)
        wait(lambda id=id: "denoising 2 3" in log_of(queue, id))
        ranks = ranks_of(group)
        ranks[1].send_signal(signal)
        job = ended(queue, id)
        assert (job.state, job.losses) == (State.COMPLETED, 1), reason
        assert log_of(queue, id).count("denoising 1 3") == 1 and files_in(job.folder) == {"video.mp4", "preview.png"}
        assert not any(is_alive(rank.pid) for rank in ranks)
    set_faults(queue, ("rank 1 step 2", "device oom"))
    ranks = ranks_of(group)
    failed, other = ended(queue, add(queue)), ended(queue, add(queue))
    assert failed.error[0] == "out_of_memory" and failed.error[1].startswith("out of memory while denoising")
    assert other.state == State.COMPLETED and not any(is_alive(rank.pid) for rank in ranks)


@pytest.mark.extended
def test_no_rank_without_the_launcher(queue, supervise):
    """A job that loses two groups fails, says why, and leaves no state."""
    group = supervise(flags=GROUP)
    set_faults(queue, ("rank 1 step 2", "kill"))
    id = add(queue, TWO_PASSES, num_inference_steps=200)
    wait(lambda: "denoising 1 3" in log_of(queue, id))
    assert queue.get(id).losses == 1
    ranks = ranks_of(group)
    group.slots[0].process.kill()
    job = ended(queue, id)
    assert (job.state, job.losses) == (State.FAILED, 2) and "SIGKILL" in job.error[1]
    wait(lambda: not any(is_alive(rank.pid) for rank in ranks), 20)
    assert files_in(job.folder) == {"preview.png"}


def test_retention_is_applied(queue, supervise, monkeypatch):
    """Repeatedly; waiting jobs stay."""
    monkeypatch.setattr("skyreels_v3.web.retention.LOOK_SECONDS", 0.1)
    waiting, first, second = add(queue), add(queue), add(queue)
    supervise(command=script("sys.stdin.read()"), retention=Retention(queue, gigabytes=1e-9))
    for id in (first, second):
        (queue.folder_of(id) / "file").write_bytes(bytes(1000))
        queue.cancel(id)
        wait(lambda id=id: queue.get(id) is None, 20)
    assert queue.get(waiting).state == State.QUEUED


def test_flags_for_all_jobs_reach_the_workers(queue, supervise):
    supervise(command=script("Path(sys.argv[1], 'seen').write_text(sys.argv[3])"), flags={"allow_private_urls": True})
    seen: Path = queue.folder / "seen"
    assert json.loads(wait(lambda: seen.exists() and seen.read_text())) == {"allow_private_urls": True}


def test_reasons():
    assert reason_of_end(-11) == "the worker was killed by SIGSEGV"
