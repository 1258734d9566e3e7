"""A server's worker: `python -m skyreels_v3.web.runner FOLDER NAME [FLAGS]` runs the jobs of a queue, one at a time.

Models stay loaded between jobs. An interrupted job resumes where it stopped, as with --resume. The process ends when
its parent does, which closes its stdin, and on SIGTERM; its job is then requeued. It also ends after an error that may
have left the device in a bad state; the supervisor then starts a new one.

FLAGS, in JSON, are for all jobs that do not contradict them. If they have a `gpu_num` above 1, the worker is a group of
so many processes that share each video: this one starts and stops them. Rank 0 claims jobs and reports their progress;
the others follow it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from skyreels_v3 import throughput
from skyreels_v3.checks import parse_lora, request_of
from skyreels_v3.cli import job_flags
from skyreels_v3.console import escape_unknown, set_up_logging
from skyreels_v3.errors import OutOfMemory, UserError, cause_of, one_line, redact
from skyreels_v3.media.files import reason_of, replace_file
from skyreels_v3.memory.policy import requested_size
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.launch import USER_ERROR, launch
from skyreels_v3.parallel.ranks import SINGLE, Ranks, ranks_of
from skyreels_v3.plan import Plan
from skyreels_v3.preview import Preview, Projection, png
from skyreels_v3.request import BY_NAME
from skyreels_v3.resolve import downloads_folder
from skyreels_v3.web.queue import Job, Progress, Queue, State, lock_worker
from skyreels_v3.worker import Worker

if TYPE_CHECKING:
    from skyreels_v3.stages import Event, Pass, Step

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between polls for a job
REPORT_SECONDS = 1.0  # between reports within a stage other than denoising, and between previews
DENOISING = 0.9  # approximate share of a pass's time
MODULE = ("-m", "skyreels_v3.web.runner")
OUT_OF_STEP = USER_ERROR  # a rank's exit code, which `launch` returns once it has stopped the others


class Ended(Exception):
    """The job must end: it was cancelled, or no longer belongs to this worker."""


class Follower:
    """One rank's side of ending a job early: all ranks end it after the same step or frame.

    Args:
        is_any: whether its argument is true on any rank, see `processes.connect_flags`.
    """

    def __init__(self, is_any: Callable[[bool], bool] = bool) -> None:
        self.is_any = is_any
        self.ended = False  # as far as this rank knows

    def check(self) -> None:
        """Raise Ended, on all ranks, if the job must end."""
        if self.is_any(self.ended):
            raise Ended

    def begin(self, plan: Plan, projection: Projection) -> None:
        """Called when everything is loaded."""

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass events on; raises Ended after a step or a frame if the job must end."""
        from skyreels_v3.stages import Step

        done = 0  # passes
        for event in events:
            if isinstance(event, Step):
                self.step(event, done)
                self.check()
                yield event
            else:
                yield replace(event, frames=self.frames(event, done))
                done += 1

    def step(self, step: Step, done: int) -> None:
        """Called after each denoising step; `done` passes are complete."""

    def frames(self, made: Pass, done: int) -> Iterator[np.ndarray]:
        """Pass on the frames of a pass; `done` earlier ones are complete."""
        for frame in made.frames:
            yield frame
            self.check()


class Reporter(Follower):
    """Reports a job's progress to the queue, on the main process."""

    def __init__(self, queue: Queue, job: Job, worker: str, is_any: Callable[[bool], bool] = bool) -> None:
        super().__init__(is_any)
        self.queue, self.job, self.worker = queue, job, worker
        self.progress = Progress(preview=job.progress.preview)
        self.preview = Preview(Projection())
        self._frames = 1  # per pass
        self._reported = self._shown = -REPORT_SECONDS
        self._begun: tuple[float, float] | None = None  # time of the first step, and the part done then

    def report(self, facts: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Record changes in progress, and find out whether the job must end."""
        self.progress = replace(self.progress, **changes)
        self._reported = monotonic()
        try:
            self.ended |= not self.queue.report(self.job.id, self.worker, self.progress, facts)
        except OSError as error:  # of the disk; the video matters more
            logger.warning("the progress of %s cannot be recorded (%s)", self.job.id, reason_of(error))

    def begin(self, plan: Plan, projection: Projection) -> None:
        request, windows = plan.request, len(plan.passes)
        facts = {"seed": request.seed, "width": request.width, "height": request.height}
        before = plan.inputs.clip.frames if request.include_input and plan.inputs.clip is not None else 0
        facts |= {"frames": before + request.frames_out, "fps": request.task.fps}
        self.preview = Preview(projection)
        self._frames = max(1, request.frames_out // windows)
        self.report(facts, stage="encoding", windows=windows, seconds_left=throughput.seconds_of(plan))

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        yield from super().watch(events)
        self.report(stage="writing", part=1.0, seconds_left=None)

    def step(self, step: Step, done: int) -> None:
        self.preview.add(step)
        if monotonic() - self._shown >= REPORT_SECONDS:
            self._show(self.preview.picture())
        part = self._part(done, DENOISING * step.number / step.total)
        self.report(stage="denoising", window=done + 1, step=step.number, steps=step.total, **part)

    def frames(self, made: Pass, done: int) -> Iterator[np.ndarray]:
        frame = None
        for number, frame in enumerate(super().frames(made, done), start=1):
            yield frame
            if monotonic() - self._reported >= REPORT_SECONDS:
                part = self._part(done, DENOISING + (1 - DENOISING) * min(1.0, number / self._frames))
                self.report(stage="decoding", window=done + 1, **part)
        if frame is not None:
            self.preview.fit(frame, made.latents)
            self._show(frame)
            self.report(stage="decoding", window=done + 1, **self._part(done, 1.0))

    def _part(self, done: int, of_pass: float) -> dict[str, Any]:
        """The part that is done, and an estimate of the seconds left."""
        part = min(1.0, (done + of_pass) / self.progress.windows)
        if self._begun is None:  # steps restored from an interrupted run say nothing about speed
            self._begun = monotonic(), part
            return {"part": part}
        start, before = self._begun
        left = (monotonic() - start) / (part - before) * (1 - part) if part > before else None
        return {"part": part, "seconds_left": left}

    def _show(self, picture: np.ndarray) -> None:
        """Save a picture as the preview. If that fails, the job continues without one."""
        self._shown = monotonic()
        try:
            replace_file(self.job.preview, png(picture))
        except OSError as error:
            logger.debug("no preview: %s", error)
        else:
            self.progress = replace(self.progress, preview=self.progress.preview + 1)


class Runner:
    """Claims jobs from a queue and runs them. Several ranks share each job.

    Args:
        flags: for all jobs that do not contradict them, as on a command line with --jobs.
        ranks: this process's place among the worker's.
    """

    def __init__(self, queue: Queue, name: str, flags: Mapping[str, Any], ranks: Ranks = SINGLE) -> None:
        self.queue, self.name = queue, name
        self.flags = {**flags, "quiet": True}
        self.ranks = ranks
        self.worker = Worker(ranks, ranks)
        if ranks.world_size > 1:
            processes.init_process_group(ranks, self.flags.get("device", "auto"))
        self.is_any = processes.connect_flags(ranks)
        self.jobs = 0  # started so far
        self.in_step = True
        self.projections: dict[Path | None, Projection] = {}

    def run(self) -> int:
        """Run jobs until one may have left the device or the ranks in a bad state; returns the exit code."""
        if self.ranks.is_main:
            self.queue.release(self.name)  # the job of an earlier process of this name that was killed
        in_order = True
        while in_order:
            if (job := self.next_job()) is None:
                time.sleep(POLL_SECONDS)
            else:
                logger.info("%s: started", job.id)
                in_order = self.run_job(job)
        return 0 if self.in_step else OUT_OF_STEP

    def next_job(self) -> Job | None:
        """The next job, broadcast from the main process; None, on the main process only, if there is none."""
        job = self.claim() if self.ranks.is_main else None
        if job is not None or not self.ranks.is_main:
            self.jobs += 1
            announced = None if job is None else (job.id, dict(job.flags))
            id, flags = processes.broadcast_object(f"job/{self.jobs}", announced, self.ranks)
            job = job or Job(id, flags, State.IN_PROGRESS, self.queue.folder_of(id))
        return job

    def claim(self) -> Job | None:
        """Claim the next job, skipping jobs whose video is already there."""
        while (job := self.queue.claim(self.name)) is not None and job.video.exists():
            # a video has its final name only when complete: an earlier worker ended before it could report it
            self.end(job)
        return job

    def run_job(self, job: Job) -> bool:
        """Make a job's video and end the job; returns False if the device or the ranks may be in a bad state."""
        code, message, facts = "", "", dict[str, Any]()
        try:
            facts = self.make_video(job)
        except Ended:  # on all ranks
            code = message = "cancelled"
            self.in_step = True
        except UserError as error:
            code, message = "invalid_request", str(error)
        except OutOfMemory as error:
            code, message = "out_of_memory", redact(str(error))
        except Exception as error:
            logger.debug("%s", job.id, exc_info=True)
            code = "internal_error" if requested_size(error) is None else "out_of_memory"
            message = one_line(cause_of(error))
        if not self.in_step:  # perhaps because another rank has ended: then the launcher interrupts this one
            time.sleep(processes.LAUNCHER_ENDS)
        if self.ranks.is_main or not self.in_step:  # the first rank gives the reason; the others change nothing
            self.end(job, code, message, facts)
        return self.in_step and code not in ("out_of_memory", "internal_error")

    def end(self, job: Job, code: str = "", message: str = "", facts: Mapping[str, Any] | None = None) -> None:
        """Complete a job, or fail it if there is an error code."""
        if code:
            logger.warning("%s: %s", job.id, message)
            self.queue.fail(job.id, self.name, code, message)
        else:
            self.queue.complete(job.id, self.name, facts or {})

    def make_video(self, job: Job) -> dict[str, Any]:
        """Make a job's video, resuming where an earlier worker stopped; returns facts about it.

        Raises:
            Ended: the job must end; the finished passes are in `video.partial.mp4`.
        """
        start, alone = monotonic(), self.ranks.world_size == 1
        follower = Follower(self.is_any)
        self.in_step = alone
        if self.ranks.is_main:
            follower = reporter = Reporter(self.queue, job, self.name, self.is_any)
            reporter.report(stage="loading")
            for partial in job.folder.glob(f"{job.video.stem}.partial*"):
                partial.unlink()
        with downloads_folder(self.ranks) as downloads:
            try:
                request = request_of(job_flags(job.flags, self.flags, str(job.folder)))
                request = replace(request, output=job.video, outdir=None, frame_folder=False, resume_if_same=True)
                flags, given = without_folders(request.flags), without_folders(request.given)
                request = replace(request, flags=flags, given=given)
                checked = self.worker.resolve(request, downloads, str(self.jobs))
            except Exception:  # on all ranks
                self.in_step = True
                raise
            if self.ranks.is_main:
                reporter.report()
            follower.check()
            generator, plan = self.worker.load(checked)
            follower.begin(plan, self.projections.setdefault(plan.checkpoint, Projection()))
            follower.check()
            video = generator.write(plan, follower.watch)
        self.in_step = True
        usage = generator.runtime.usage
        stages = {name: round(taken, 1) for name, taken in usage.seconds.items()}
        facts = {"seconds": round(monotonic() - start, 1), "stages": stages, "peak_bytes": usage.peak_bytes}
        return facts if video.quality is None else facts | {"quality": video.quality.figures()}


def without_folders(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags for the video's metadata, which clients can read: only the names of local paths, hub ids as they are."""

    def name_of(entry: str) -> str:
        path = os.path.expanduser(parse_lora(entry).source)  # drops a LoRA's scale; other values have none
        return os.path.basename(entry.rstrip("/")) if os.path.isabs(path) or os.path.exists(path) else entry

    def named(value: Any) -> Any:
        return [*map(name_of, value)] if isinstance(value, list) else name_of(value)

    return {name: named(value) if BY_NAME[name].path else value for name, value in flags.items()}


def end_with_parent() -> None:
    """End this process when its stdin is closed, as it is when the parent ends; after `GRACE` by force."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(processes.GRACE)
        os._exit(processes.INTERRUPTED)

    Thread(target=watch, daemon=True).start()


def wait_for_lock(folder: Path, name: str) -> IO[str]:
    """Lock the worker once an earlier process of that name has ended; raises BlockingIOError if it does not end."""
    end = monotonic() + 2 * processes.GRACE
    while True:
        try:
            return lock_worker(folder, name)
        except BlockingIOError:
            if monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)


def launch_group(queue: Queue, name: str, command: Sequence[str], count: int) -> int:
    """Run a worker's ranks until one ends, and requeue or fail an interrupted job; returns the exit code."""

    said: list[str] = []
    code = launch(command, count, said.append)
    if code == processes.INTERRUPTED:
        queue.release(name)
        return code
    had_job = False
    for text in said:  # which rank was killed
        logger.warning("worker %s: %s", name, text)
        had_job = queue.lose(name, text.removeprefix("error: "))
    return 0 if had_job or code == OUT_OF_STEP else code


def main(argv: Sequence[str], command: Sequence[str] = MODULE) -> int:
    """Run a worker; returns the exit code, 0 if it should be restarted at once.

    Args:
        command: what Python runs in each process of a group, before `argv`.
    """
    folder, name, *texts = argv
    flags = json.loads(texts[0]) if texts else {}
    count = flags.pop("gpu_num", 1)
    ranks = ranks_of(os.environ)
    escape_unknown()
    set_up_logging(0, ranks.is_main)
    processes.handle_signals(ranks)
    if ranks.world_size == 1:
        end_with_parent()
    try:
        queue = Queue(Path(folder))
        if count > ranks.world_size:
            return launch_group(queue, name, [*command, *argv], count)
        with wait_for_lock(queue.folder, name) if ranks.is_main else nullcontext():
            try:
                return Runner(queue, name, flags, ranks).run()
            except KeyboardInterrupt:
                if ranks.world_size == 1:  # else `launch_group` does, unless a rank was killed
                    queue.release(name)
                return processes.INTERRUPTED
    except KeyboardInterrupt:
        return processes.INTERRUPTED
    except (UserError, OSError) as error:
        logger.error("worker %s: %s", name, cause_of(error))
    except RuntimeError:
        if ranks.is_main:
            raise
        logger.debug("rank %d: the main process is gone", ranks.rank, exc_info=True)
    return 1


if __name__ == "__main__":
    processes.exit_process(main(sys.argv[1:]))
