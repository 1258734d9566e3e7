"""Starts a server's workers, one per GPU, restarts those that end, and stops all of them with the server.

A job whose worker was killed is resumed once; if its worker is killed again, it fails. With --use_usp there is one
worker: a group of processes that share each video.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from time import monotonic
from typing import Any

from skyreels_v3.errors import UserError, counted
from skyreels_v3.parallel.processes import GRACE
from skyreels_v3.subprocesses import kill, module_environment
from skyreels_v3.web.queue import Job, Queue, lock_worker
from skyreels_v3.web.retention import Retention

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
HANG_SECONDS = 1800.0  # a step on a slow GPU takes minutes
CANCEL_SECONDS = 10.0
LOADING, CANCELLED = ("", "loading"), -1  # stages that may take any time; `seen[1]` for a cancelled job
START_SECONDS = 30.0  # a worker that ends sooner has failed to start; the delay before a restart then grows
MAX_DELAY = 60.0  # seconds
RUNNER = (sys.executable, "-m", "skyreels_v3.web.runner")
GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass
class Slot:
    """A worker's name, and its process if it is running.

    Attributes:
        environment: environment variables of the process.
        begun: when it was started; all times are from `monotonic`.
        next_start: earliest time of the next start.
        failures: number of failed starts in a row.
        seen: job id and number of reports at the last change of either, and its time.
        killed_for: why the supervisor killed it; "" if it did not.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0
    next_start: float = 0.0
    failures: int = 0
    seen: tuple[str, int, float] = ("", 0, 0.0)
    killed_for: str = ""


def gpus_of(device: str) -> list[str]:
    """The GPUs that workers on a device may use, as entries of CUDA_VISIBLE_DEVICES."""
    if device == "cpu":
        return []
    import torch

    count = torch.accelerator.device_count()
    given = [gpu for gpu in os.environ.get(GPUS, "").split(",") if gpu]
    return given if len(given) == count else [*map(str, range(count))]


def slots_of(gpus: Sequence[str], workers: int | None = None) -> list[Slot]:
    """One slot per GPU, or one if there are no GPUs; or `workers` slots, which share the GPUs."""
    count = range(workers or max(1, len(gpus)))
    return [Slot(str(n), {GPUS: gpus[n % len(gpus)]} if gpus else {}) for n in count]


def group_size(gpus: Sequence[str], wanted: int | None) -> int:
    """The number of processes that share each video: `wanted`, or one per GPU; raises UserError."""
    if wanted is None and not gpus:
        raise UserError("--use_usp", "this machine has no GPUs to split a video over; give --gpu_num as well")
    if wanted is not None and gpus and wanted > len(gpus):
        raise UserError(
            "--gpu_num", f"{wanted}: this machine has {counted(len(gpus), 'GPU')}; give {len(gpus)} at most"
        )
    return wanted or len(gpus)


class Supervisor:
    """Keeps a worker running in each slot within a `with` block, from a background thread.

    Args:
        queue: the server's queue.
        flags: for all jobs that do not contradict them, as on a command line with --jobs.
        command: starts a worker; folder, name and flags are appended.
        hang_seconds: a worker without progress for so long is killed; loading is exempt, as it may download.
        cancel_seconds: a worker still loading so long after its job was cancelled is killed.
        retention: called at every check of the workers.
    """

    def __init__(
        self,
        queue: Queue,
        slots: Sequence[Slot],
        flags: Mapping[str, Any] | None = None,
        command: Sequence[str] = RUNNER,
        hang_seconds: float = HANG_SECONDS,
        retention: Retention | None = None,
        cancel_seconds: float = CANCEL_SECONDS,
    ) -> None:
        self.queue, self.slots = queue, slots
        self.hang_seconds, self.cancel_seconds = hang_seconds, cancel_seconds
        self.flags = json.dumps(dict(flags or {}))
        self.command = command
        self.retention = retention
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop all workers and requeue their jobs."""
        self._stopping.set()
        self._thread.join()
        running = [(slot, slot.process) for slot in self.slots if slot.process is not None]
        for _, process in running:
            close_stdin(process)
        end = monotonic() + GRACE + POLL_SECONDS
        for slot, process in running:
            try:
                process.wait(max(0.0, end - monotonic()))
            except subprocess.TimeoutExpired:
                kill(process)
                process.wait()
            slot.process = None
            with suppress(OSError, UserError):  # the next start releases its job too
                self.queue.release(slot.name)

    def _run(self) -> None:
        problem = ""
        while not self._stopping.is_set():
            try:
                self.look_after()
            except (OSError, UserError) as error:  # perhaps a full disk; retried
                if str(error) != problem:
                    logger.error("supervisor: %s", error)
                problem = str(error)
            self._stopping.wait(POLL_SECONDS)

    def look_after(self) -> None:
        """Start workers that are due, kill those that hang, and handle those that have ended."""
        jobs = self.queue.running()
        for worker in jobs.keys() - {slot.name for slot in self.slots}:
            self._release_left(worker)
        for slot in self.slots:
            if slot.process is None:
                if monotonic() >= slot.next_start:
                    self._start(slot)
            elif (code := slot.process.poll()) is not None:
                self._end(slot, code)
            else:
                self._check_progress(slot, slot.process, jobs.get(slot.name))
        if self.retention is not None:
            self.retention.apply()

    def _start(self, slot: Slot) -> None:
        # in its own session it does not receive Ctrl-C; it ends when its stdin is closed
        slot.process = subprocess.Popen(
            [*self.command, str(self.queue.folder), slot.name, self.flags],
            stdin=subprocess.PIPE,
            env=module_environment() | dict(slot.environment),
            start_new_session=True,
        )
        slot.begun, slot.killed_for, slot.seen = monotonic(), "", ("", 0, 0.0)

    def _end(self, slot: Slot, code: int) -> None:
        """Handle the end of a worker: requeue or fail its job, and schedule the next start."""
        assert slot.process is not None
        reason = slot.killed_for or reason_of_end(code)
        had_job = self.queue.lose(slot.name, reason)  # first: after an error all of this is retried
        close_stdin(slot.process)
        slot.process = None
        if code == 0:
            slot.failures = 0
            return
        # restarts with a job are limited, since a job that kills workers fails; those without one need a delay
        has_begun = had_job or monotonic() - slot.begun >= START_SECONDS
        slot.failures = 0 if has_begun else slot.failures + 1
        delay = min(MAX_DELAY, 2.0**slot.failures) if slot.failures else 0.0
        slot.next_start = monotonic() + delay
        logger.warning("%s (%s); restarting it in %.0f s", reason, slot.name, delay)

    def _check_progress(self, slot: Slot, process: subprocess.Popen[bytes], job: Job | None) -> None:
        """Kill a worker that has made no progress for too long."""
        if job is not None and job.cancelling and job.progress.stage in LOADING:
            # it would notice only after the download, which may take hours; downloaded files are kept
            if slot.seen[:2] != (job.id, CANCELLED):
                slot.seen = (job.id, CANCELLED, monotonic())
            elif monotonic() - slot.seen[2] > self.cancel_seconds:
                slot.killed_for = "the job was cancelled while it was loading"
                kill(process)
        elif job is None or job.progress.stage in LOADING or slot.seen[:2] != (job.id, job.reports):
            slot.seen = ("", 0, 0.0) if job is None else (job.id, job.reports, monotonic())
        elif monotonic() - slot.seen[2] > self.hang_seconds:
            slot.killed_for = f"the worker made no progress for {self.hang_seconds:.0f} s"
            kill(process)

    def _release_left(self, worker: str) -> None:
        """Requeue the job of an earlier server's worker, once that worker has ended."""
        with suppress(BlockingIOError), lock_worker(self.queue.folder, worker):
            self.queue.release(worker)


def close_stdin(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()


def reason_of_end(code: int) -> str:
    """A description of a worker's exit code, for messages."""
    if code >= 0:
        return f"the worker ended with code {code}"
    text = f"the worker was killed by {signal.Signals(-code).name}"
    return f"{text}, as happens when the host runs out of memory" if code == -signal.SIGKILL else text
