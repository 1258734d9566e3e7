"""--jobs: many videos in one run. Each line of the jobs file is a request; a results file beside it has the outcomes.

Jobs that share models run one after the other, so that the models are loaded once. With several processes, each takes
the next job on its own GPU whenever it is idle; with --use_usp, all make every video together. A failed job is recorded
and the others continue. A line is added to the results file as each job ends; later runs skip jobs marked done there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import count
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from skyreels_v3.checks import describe_value, request_of
from skyreels_v3.cli import job_flags, without_overruled
from skyreels_v3.concat import check_film, digest_of, is_film, make_film
from skyreels_v3.config_text import read_json_text
from skyreels_v3.console import say, show
from skyreels_v3.errors import IncompleteOutput, UserError, cause_of, counted, format_value
from skyreels_v3.media.files import check_readable, check_writable, run_folder
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import terms_of
from skyreels_v3.request import ENHANCER_LOCAL, ENHANCER_OFF, FLAGS, IN_PROMPT, OUTPUTS
from skyreels_v3.resolve import downloads_folder, networks
from skyreels_v3.story import (
    SIZES,
    Job,
    Line,
    Need,
    failure_of,
    frames_file,
    inputs_from,
    link_lines,
    plan_job,
    replace_references,
    with_inputs,
)
from skyreels_v3.worker import Worker

try:
    import fcntl
except ImportError:  # Windows: no locks, so only one run at a time; appending in one write must suffice
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_JOBS_BYTES = 1 << 24
POLL_SECONDS, IDLE_POLLS = 0.5, 20  # while waiting for a job that another process is doing
COLORS = "color_correction_strength"
EXAMPLE = '{"task_type": "talking_avatar", "input_image": "a.png", "input_audio": "a.wav", "prompt": "a man talks"}'
# flags that affect how a job runs, not what it makes; not part of its identity
NOT_IDENTITY = {
    *(flag.name for flag in FLAGS if not flag.recorded),
    "offload",
    "parameters_level",
    "sequence_batch",
    "url_timeout",
} - {*OUTPUTS, "outdir", *IN_PROMPT}


# Jobs and results


def read_jobs(name: str, defaults: Mapping[str, Any], keep_frames: bool = False) -> list[Job]:
    """Read the jobs of a file; `defaults` are flags for all lines that do not contradict them.

    Args:
        keep_frames: keep the frames of all videos, not only of those that other jobs need.

    Raises:
        UserError: the file cannot be read, or has no jobs.
    """
    path = Path(os.path.expanduser(name))
    check_readable(path, "--jobs")
    if (size := path.stat().st_size) > MAX_JOBS_BYTES:
        reason = f"{format_value(name)} has {size} bytes, more than {MAX_JOBS_BYTES}"
        raise UserError("--jobs", f"{reason}; split it into several files")
    lines = path.read_bytes().split(b"\n")
    if not any(line.lstrip().startswith(b"{") for line in lines):
        raise UserError("--jobs", f"{format_value(name)} has no lines of JSON; write some, such as {EXAMPLE}")
    seen: Counter[str] = Counter()
    made: dict[int, Job] = {}
    for line in link_lines([read_line(number, line) for number, line in enumerate(lines, start=1) if line.strip()]):
        made[line.number] = make_job(line, defaults, seen, path, made)
    jobs = without_clashes(made[number] for number in sorted(made))
    needed = {need.id for job in jobs for need in job.needs}
    return [
        replace(job, request=replace(job.request, frames_copy=frames_file(path, job.id)))
        if job.request is not None and (keep_frames or job.id in needed)
        else job
        for job in jobs
    ]


def read_line(number: int, content: bytes) -> Line:
    """Parse one line of a jobs file; errors go into `Line.problem`."""
    text, flags, problem = content.decode(errors="replace").strip(), None, ""
    try:
        flags = read_json_text(content)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        problem = (
            f"--jobs: {format_value(text)} is not JSON ({format_value(error)}); write flags as keys, such as {EXAMPLE}"
        )
    if not problem and not isinstance(flags, dict):
        problem = f"--jobs: {format_value(text)} is not a JSON object; write flags as keys, such as {EXAMPLE}"
        flags = None
    return Line(number, text, flags, problem)


def make_job(line: Line, defaults: Mapping[str, Any], seen: Counter[str], path: Path, made: Mapping[int, Job]) -> Job:
    """Make the job of one line of the file `path`.

    Args:
        seen: counts identical lines, so that each gets its own id.
        made: the jobs made so far, which include those that it needs.
    """
    request, problem, follows_size = None, line.problem, False
    needs = {
        reference: Need(number, made[number].id, frames_file(path, made[number].id))
        for reference, number in line.needs.items()
    }
    identity = identity_of(line.text)
    if line.flags is not None:
        ids = replace_references(line.flags, lambda _, text: f"{{{needs[text].id}}}" if text in needs else text)
        identity = identity_of(without_overruled(defaults, ids) | ids)
    failed = (need.number for need in needs.values() if made[need.number].request is None)
    problem = problem or next((failure_of(number) for number in failed), "")
    try:
        if not problem:
            assert line.flags is not None
            check_addresses(line.flags)
            flags = job_flags(line.flags, defaults, os.path.dirname(path))
            follows_size = bool(needs) and not any(name in flags for name in SIZES)
            request = request_of(replace_references(flags, lambda flag, text: needs[text].input(flag)))
            request = replace(request, resume_if_same=True)
            if needs and COLORS in request.task.takes and COLORS not in flags:  # color differences add up along a chain
                request = replace(request, color_correction_strength=1.0, flags={**request.flags, COLORS: 1.0})
    except UserError as error:
        problem = str(error)
    seen[identity] += 1
    id = hashlib.sha256(f"{identity} {seen[identity]}".encode()).hexdigest()
    return Job(line.number, id, request, problem, tuple(needs.values()), follows_size)


def check_addresses(flags: Mapping[str, Any]) -> None:
    """Raise UserError for a line that says where to send prompts and the API key: the file may be somebody else's."""
    way = flags.get("enhance_prompt", ENHANCER_OFF)
    if way not in (ENHANCER_OFF, ENHANCER_LOCAL):
        raise UserError(
            "--enhance_prompt", f"{describe_value(way)}: a line must not name an address; give it on the command line"
        )


def identity_of(flags: dict[str, Any] | str) -> str:
    """A text that is equal for flags that make the same video."""
    if isinstance(flags, dict):
        flags = {name: value for name, value in flags.items() if name not in NOT_IDENTITY}
    return json.dumps(flags, sort_keys=True)


def without_clashes(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, those that would write to the output of an earlier job replaced by an error."""
    outputs: dict[Path, int] = {}
    checked = []
    for job in jobs:
        output = None if job.request is None else job.request.output
        if output is not None and (line := outputs.setdefault(output.resolve(), job.number)) != job.number:
            problem = f"--output: {format_value(output)} is already the output of line {line}; give another name"
            job = replace(job, request=None, problem=problem)
        checked.append(job)
    return checked


def results_file(name: str) -> Path:
    """The results file of a jobs file."""
    path = Path(os.path.expanduser(name))
    return path.with_name(f"{path.stem}.results.jsonl")


def check_results(path: Path) -> None:
    """Raise UserError unless results can be appended to a file."""
    if not os.path.lexists(path):
        check_writable(path, "--jobs")
    elif not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
        raise UserError("--jobs", f"{format_value(path)}, the results file, is not writable; check its permissions")


def parse_results(content: bytes) -> dict[str, list[dict[str, Any]]]:
    """The lines of a results file by job id; a line cut off by a kill is ignored."""
    found = defaultdict(list)
    for line in content.split(b"\n"):
        with suppress(ValueError, RecursionError, KeyError, TypeError):
            result = json.loads(line)
            found[str(result["id"])].append(dict(result))
    return found


def videos_in(results: Path) -> dict[str, Path]:
    """The latest video of each job in a results file, by job id; its file may be gone.

    Closing the file would release the locks of a `Results` open in this process: use `Results.videos` then.
    """
    return latest_videos(parse_results(results.read_bytes() if results.is_file() else b""), results.parent)


def latest_videos(entries: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> dict[str, Path]:
    """The latest video of each job, by job id; paths in results are relative to `folder`."""
    videos = {id: video_of(each) for id, each in entries.items()}
    return {id: folder / video for id, video in videos.items() if video is not None}


def video_of(entries: Iterable[Mapping[str, Any]]) -> str | None:
    """The path of a job's latest video as recorded in its results; None if there is none."""
    return next((str(entry.get("output")) for entry in reversed([*entries]) if entry.get("status") == "done"), None)


class Results:
    """An open results file, which also holds the claims of the runs that share it.

    A run claims a job by locking a byte beyond the file's end, at an offset made from the job id, so that several runs
    can share the same jobs. The system releases the lock when the process ends in any way, and also when the process
    closes any handle of the file, so the file is opened only once.

    Raises:
        UserError: the file cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        check_results(path)
        self.path = path
        self._file = path.open("ab+", buffering=0)
        self._has_locks = fcntl is not None
        self.before = self.read()

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """See `parse_results`."""
        self._file.seek(0)
        return parse_results(self._file.read())

    def videos(self) -> dict[str, Path]:
        """See `latest_videos`."""
        return latest_videos(self.read(), self.path.parent)

    def exists(self, video: str | None) -> bool:
        """Whether a video is recorded and its file exists."""
        return video is not None and os.path.lexists(self.path.parent / video)

    def wait(self, id: str) -> str | None:
        """Wait until no run is doing a job; returns the path of its video, None if it failed."""
        idle = 0
        while True:
            entries = self.read()[id]
            if (done := self.exists(video_of(entries))) or len(entries) > len(self.before[id]) or idle > IDLE_POLLS:
                return str(self.path.parent / str(video_of(entries))) if done else None
            # unlocked: assigned to a process that has not claimed it yet, or that has died
            if mine := self._lock(id):
                self._unlock(id)
            idle = idle + 1 if mine and self._has_locks else 0
            sleep(POLL_SECONDS)

    def claim(self, job: Job) -> bool:
        """Claim a job; returns False if another run is making it, or has made it since this run began."""
        mine = self._lock(job.id)
        if mine:
            entries = self.read()[job.id]
            mine = len(entries) <= len(self.before[job.id]) and not self.exists(video_of(entries))
            if not mine:
                self._unlock(job.id)
        if not mine:
            logger.info("line %d: another run is making it, or has made it", job.number)
        return mine

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a result in one write and release its job; output paths become relative to the file."""
        if result.get("output") and not os.path.isabs(result["output"]):
            result = {**result, "output": os.path.relpath(result["output"], self.path.parent)}
        line = json.dumps(result).encode() + b"\n"
        self._lock(wait=True)
        if self._file.seek(0, os.SEEK_END) > 0:
            self._file.seek(-1, os.SEEK_END)
            line = line if self._file.read(1) == b"\n" else b"\n" + line  # after a line that was cut off
        self._file.write(line)
        self._unlock()
        self._unlock(result["id"])

    def record(self, result: Mapping[str, Any]) -> None:
        """Append a job's result, and print its video or log its error."""
        self.add(result)
        if result["status"] == "done":
            show(result["output"])
        else:
            logger.error("line %d: %s", result["job"], result["error"])

    @contextmanager
    def locked(self, id: str) -> Iterator[None]:
        """A `with` block that only one run at a time can enter."""
        if not self._lock(id):
            logger.info("waiting for another run, which is joining the videos")
            self._lock(id, wait=True)
        try:
            yield
        finally:
            self._unlock(id)

    def _lock(self, id: str = "", wait: bool = False) -> bool:
        """Lock a job, or without an id the writing of results; returns False if another process holds the lock."""
        if self._has_locks:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, lock_offset(id))
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                self._has_locks = False
                logger.warning(
                    "%s cannot be locked (%s); do not start a second run of these jobs", self.path, error.strerror
                )
        return True

    def _unlock(self, id: str = "") -> None:
        if self._has_locks:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, lock_offset(id))


def lock_offset(id: str) -> int:
    """The offset of the byte to lock for a job; 0 for no job."""
    return int(id[:15], 16) + 1 if id else 0  # offsets have at most 63 bits


def group_by_model(jobs: Iterable[Job]) -> list[Job]:
    """Order jobs: invalid ones first, then the others, grouped by the models they load.

    A job always comes after those that it needs, even if that splits a group.
    """
    known = {job.id: job for job in jobs}
    sorter = TopologicalSorter({id: [need.id for need in job.needs if need.id in known] for id, job in known.items()})
    sorter.prepare()
    groups: dict[tuple[object, ...], deque[Job]] = {(): deque()}
    group, order = groups[()], []
    while sorter.is_active():
        for id in sorter.get_ready():
            groups.setdefault(group_of(known[id]), deque()).append(known[id])
        group = group or next(filter(None, groups.values()))
        order.append(group.popleft())
        sorter.done(order[-1].id)
    return order


def group_of(job: Job) -> tuple[object, ...]:
    """A key that is equal for jobs that can share loaded models."""
    request = job.request
    if request is None:
        return ()
    terms = terms_of(request) if request.use_usp else 1  # the guidance terms decide how ranks are divided
    return (*networks(request), request.memory, request.stream_blocks, terms)


# A run


def run_jobs(flags: Mapping[str, Any], ranks: Ranks) -> int:
    """Carry out --jobs with the other flags of the command line; returns the exit code."""
    name, film = flags["jobs"], film_of(flags)
    defaults = {flag: value for flag, value in flags.items() if flag not in ("jobs", "concat")}
    jobs = read_jobs(name, defaults, keep_frames=film is not None)
    together = flags.get("use_usp", False)
    video_ranks = ranks if together else SINGLE
    film_is_made = film is not None and check_film(film, group_by_model(jobs), videos_in(results_file(name)))
    if flags.get("dry_run"):
        if ranks.is_main:
            show_plans(name, jobs, video_ranks)
        return 0
    if film_is_made:
        if ranks.is_main:
            show(film)
        return 0
    results = Results(results_file(name))
    worker = Worker(ranks, video_ranks)
    if ranks.world_size > 1:
        on_cpu = not together or all(job.request.device == "cpu" for job in jobs if job.request is not None)
        processes.init_process_group(ranks, "cpu" if on_cpu else "auto")
    todo = choose_jobs(jobs, results, ranks)
    if ranks.world_size > 1 and not together:
        share_assets(worker, todo)
    failed = 0
    for job in claim_jobs(todo, results, ranks, video_ranks):
        if job.request is not None:
            logger.info("line %d: %s", job.number, job.request.task.name)
        failed += not run_job(job, worker, results.record)
    if ranks.world_size > 1 and not together:
        processes.store_set(f"failed/{ranks.rank}", failed)
        # not torch's barrier: a job may take longer than its timeout
        failed = sum(processes.store_get(f"failed/{rank}") for rank in range(ranks.world_size))
    if ranks.is_main and failed:
        say(f"error: {failed} of {counted(len(jobs), 'job')} failed; {results.path} says why\n")
    processes.destroy()
    if ranks.is_main and film is not None and not failed:
        show(join_videos(film, jobs, results, flags.get("check", False)))
    return 1 if failed else 0


def film_of(flags: Mapping[str, Any]) -> Path | None:
    """The file that --concat names."""
    return Path(os.path.expanduser(flags["concat"])) if "concat" in flags else None


def join_videos(film: Path, jobs: Sequence[Job], results: Results, check: bool) -> Path:
    """Join the videos of jobs (see `make_film`) unless another run has; raises UserError if a video is missing."""
    with results.locked(digest_of(jobs)):
        videos = results.videos()
        if missing := [job.number for job in jobs if job.id not in videos or not os.path.lexists(videos[job.id])]:
            reason = f"{format_value(film)}: the video of line {missing[0]} is not there yet"
            raise UserError("--concat", f"{reason}; repeat the command when the other run has ended")
        return film if is_film(film, jobs, videos) else make_film(film, jobs, videos, check)


def choose_jobs(jobs: Sequence[Job], results: Results, ranks: Ranks) -> list[Job]:
    """The jobs still to do, in order; the main process decides for all ranks.

    Jobs that failed before come last; otherwise one that crashes the run would keep the others from ever being done.
    """
    videos = {job.id: video_of(results.before[job.id]) for job in jobs}
    left = [job for job in jobs if not results.exists(videos[job.id])]
    for job in left:
        if (video := videos[job.id]) is not None:
            gone = format_value(results.path.parent / video)
            logger.warning("line %d: %s is gone; making it again", job.number, gone)
    failed = {job.id for job in left if results.before[job.id] and videos[job.id] is None}
    last: set[str] = set()
    for job in group_by_model(left):  # jobs that need a failed one come last, too
        if job.id in failed or any(need.id in last for need in job.needs):
            last.add(job.id)
    todo = group_by_model(job for job in left if job.id not in last)
    todo += group_by_model(job for job in left if job.id in last)
    if len(todo) < len(jobs):
        done = f"{len(jobs) - len(todo)} of {counted(len(jobs), 'job')}"
        logger.info("%s already done, according to %s", done, results.path)
    if ranks.world_size == 1:
        return todo
    known = {job.id: job for job in jobs}
    chosen = processes.broadcast_object("jobs", [job.id for job in todo], ranks)
    if not known.keys() >= set(chosen):
        reason = f"{format_value(results.path)}: this machine has another file"
        raise UserError("--jobs", f"{reason}; put it where all machines see it")
    return [known[each] for each in chosen]


def share_assets(worker: Worker, jobs: Iterable[Job]) -> None:
    """Download what the jobs need in one process per machine; the others wait and reuse its results."""
    key = f"assets/{worker.ranks.node}"
    if worker.ranks.is_local_main:
        worker.resolver.resolve_all(job.request for job in jobs if job.request is not None)
        processes.store_set(key, worker.resolver.outcomes)
    else:
        worker.resolver.merge_outcomes(processes.store_get(key))


def claim_jobs(jobs: Sequence[Job], results: Results, ranks: Ranks, video_ranks: Ranks) -> Iterator[Job]:
    """Claim and yield the jobs that this process makes, alone or with its `video_ranks`, one at a time."""
    known = {job.id: job for job in jobs}

    def ready(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a claimed job with its inputs, after any job that it needs and that another run left undone."""
        for need in job.needs:
            left = known.get(need.id)
            if left is not None and results.wait(need.id) is None and results.claim(left):
                yield from ready(left)
        yield job.id, find_inputs(job, results)

    def claimed() -> Iterator[tuple[str, dict[str, Any]]]:
        alone = ranks.world_size > 1 and video_ranks.world_size == 1
        for number in (processes.store_next("job") for _ in jobs) if alone else range(len(jobs)):
            if number >= len(jobs):  # other processes took the rest
                return
            if results.claim(jobs[number]):
                yield from ready(jobs[number])

    mine = claimed() if video_ranks.is_main else iter(())
    for turn in count():
        found = next(mine, None)
        if video_ranks.world_size > 1:
            found = processes.broadcast_object(f"claimed/{turn}", found, video_ranks)
        if found is None:
            return
        yield with_inputs(known[found[0]], found[1])


def find_inputs(job: Job, results: Results) -> dict[str, Any]:
    """The changes for `with_inputs`; waits until all jobs that this one needs have ended."""
    clips: dict[Need, Path] = {}
    if job.request is None:
        return {}
    for need in job.needs:
        if (video := results.wait(need.id)) is None:
            return {"problem": failure_of(need.number)}
        clips[need] = need.frames if need.frames.is_file() else Path(video)
        if clips[need].is_dir():
            reason = f"{format_value(video)} is a folder, and its frames were not kept as a clip; move it away"
            return {"problem": f"--jobs: line {need.number}: {reason} to have it made again"}
        if clips[need] != need.frames:
            logger.warning("line %d: the frames of line %d were not kept; reading %s", job.number, need.number, video)
    try:
        return inputs_from(job, clips)
    except Exception as error:
        logger.debug("line %d", job.number, exc_info=True)
        return {"problem": failure(error)["error"]}


def run_job(job: Job, worker: Worker, record: Callable[[Mapping[str, Any]], object]) -> bool:
    """Run a job and `record` its result; returns whether its video was made.

    Raises:
        Exception: a failure while several ranks were working together, since they may be out of sync now.
    """
    start, video_ranks = perf_counter(), worker.video_ranks
    result: dict[str, Any] = {"job": job.number, "id": job.id}

    def end(status: str, **more: Any) -> bool:
        if video_ranks.is_main:
            record(result | {"status": status, **more, "seconds": round(perf_counter() - start, 1)})
        return status == "done"

    if job.request is None:
        return end("error", error=job.problem, exit=2)
    with downloads_folder(video_ranks) as downloads:
        try:
            ready = worker.resolve(job.request, downloads, job.id)
            if ready.done:
                return end("done", output=str(ready.request.output))
            result["seed"] = ready.request.seed
        except Exception as error:
            logger.debug("line %d", job.number, exc_info=True)
            return end("error", **failure(error))
        try:
            video = worker.make(ready)
        except Exception as error:
            logger.debug("line %d", job.number, exc_info=True)
            if video_ranks.world_size > 1:
                if processes.store_next(f"failed/{job.id}") == 0:
                    record(result | {"status": "error", **failure(error)})
                raise
            problem = failure(error)
        else:
            figures = {} if video.quality is None else {"quality": video.quality.figures()}
            return end("done", output=str(video.path), **figures)
    worker.unload()  # the models may be inconsistent; not in `except`, where the error would keep them alive
    return end("error", **problem)


def failure(error: Exception) -> dict[str, Any]:
    """The entries of a result that describe an error."""
    user_error = isinstance(error, UserError)
    made = {"output": str(error.output)} if isinstance(error, IncompleteOutput) else {}
    return {"error": str(error) if user_error else cause_of(error), "exit": 2 if user_error else 1, **made}


def show_plans(name: str, jobs: Sequence[Job], video_ranks: Ranks) -> None:
    """Print each job's plan, its finished video or its error; raises UserError if any job has an error."""
    made, wrong = videos_in(results_file(name)), 0
    texts: dict[str, str] = {}
    with run_folder() as folder:
        clips: dict[str, Path] = {}
        for job in group_by_model(jobs):
            video, problem = made.get(job.id), job.problem
            texts[job.id] = ""
            if video is not None and os.path.lexists(video):
                clips[job.id] = video
                texts[job.id] = f"{'done':14}{clips[job.id]}"
            elif failed := [need.number for need in job.needs if need.id not in clips]:
                problem = problem or failure_of(failed[0])
            elif job.request is not None:
                with downloads_folder(video_ranks) as downloads:
                    try:
                        texts[job.id], clips[job.id] = plan_job(job, clips, folder, downloads, video_ranks)
                    except UserError as error:
                        problem = str(error)
            wrong += not texts[job.id]
            texts[job.id] = texts[job.id] or "error".ljust(14) + problem
    for job in jobs:
        before = "".join(f"{'needs':14}line {need.number}\n" for need in dict.fromkeys(job.needs))
        show(f"{'line':14}{job.number}\n{before}{texts[job.id]}\n")
    if wrong:
        raise UserError(
            "--jobs",
            f"{format_value(name)}: errors in {wrong} of {counted(len(jobs), 'line')}; fix them as described above",
        )
