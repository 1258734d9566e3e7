"""Runs a jobs file on a Ray cluster: one actor per GPU (per CPU with --device cpu), each making one video at a time.

    pip install ray
    python cluster/ray_jobs.py --jobs jobs.jsonl --low_vram

Accepts the flags of generate_video.py that --jobs allows and writes the same results file; jobs marked done in it are
skipped. Starts Ray on this machine unless RAY_ADDRESS names a cluster. On several machines, the checkout, inputs and
outputs must be on a shared disk under the same path, because the actors run in the folder you start this from:

    ray job submit --address http://HEAD:8265 -- bash -c "cd /shared/checkout && python cluster/ray_jobs.py --jobs jobs.jsonl"
"""  # noqa: E501  a command

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout, without installing

import ray

from skyreels_v3.batch import (
    Results,
    choose_jobs,
    failure,
    film_of,
    find_inputs,
    group_by_model,
    join_videos,
    read_jobs,
    results_file,
    run_job,
    videos_in,
)
from skyreels_v3.cli import parse_flags, verbosity_of
from skyreels_v3.concat import check_film
from skyreels_v3.console import escape_unknown, say, set_up_logging, show
from skyreels_v3.errors import UserError, counted
from skyreels_v3.parallel.processes import INTERRUPTED, handle_signals
from skyreels_v3.parallel.ranks import SINGLE
from skyreels_v3.story import Job, with_inputs
from skyreels_v3.worker import Worker

ROOT = Path(__file__).resolve().parents[1]


@ray.remote
class Actor:
    """A worker that makes videos on its own GPU or CPU.

    Args:
        folder: the working directory, against which relative paths are resolved.
    """

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        set_up_logging(-1)
        self.worker = Worker()

    def run_job(self, job: Job) -> Mapping[str, Any]:
        """Run a job; returns its result, which the main process records."""
        results: list[Mapping[str, Any]] = []
        run_job(job, self.worker, results.append)
        return results[-1]


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns an exit code, the same as generate_video.py."""
    escape_unknown()
    handle_signals(SINGLE)
    try:
        flags = parse_flags(argv)
        set_up_logging(verbosity_of(flags))
        return run(flags)
    except UserError as error:
        say(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        say("interrupted\n")
        return INTERRUPTED


def run(flags: Mapping[str, Any]) -> int:
    """Run the jobs; returns the exit code."""
    for name in ("use_usp", "dry_run"):
        if flags.get(name):
            raise UserError(f"--{name}", "does not work with one video per actor; use generate_video.py")
    if "jobs" not in flags:
        raise UserError("--jobs", "missing; give a file with one request per line")
    defaults = {name: value for name, value in flags.items() if name not in ("jobs", "concat", "verbose")}
    quiet = defaults | {"quiet": True}  # no progress bars: those of several actors would interleave
    film = film_of(flags)
    jobs = read_jobs(flags["jobs"], quiet, keep_frames=film is not None)
    file = results_file(flags["jobs"])
    if film is not None and check_film(film, group_by_model(jobs), videos_in(file)):
        show(film)
        return 0
    results = Results(file)
    todo = choose_jobs(jobs, results, SINGLE)
    failed = run_on_actors(todo, results, on_cpu=flags.get("device") == "cpu") if todo else 0
    if failed:
        say(f"error: {failed} of {counted(len(jobs), 'job')} failed; {results.path} says why\n")
    elif film is not None:
        show(join_videos(film, jobs, results, flags.get("check", False)))
    return 1 if failed else 0


def run_on_actors(todo: Sequence[Job], results: Results, on_cpu: bool) -> int:
    """Hand each job to the next idle actor; returns the number of failed jobs."""
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, logging_level="warning")
    kind, options = ("CPU", {"num_cpus": 1}) if on_cpu else ("GPU", {"num_gpus": 1})
    count = int(ray.cluster_resources().get(kind, 0))
    if count == 0:
        raise UserError("--device", f"the Ray cluster has no {kind}; {'add some' if on_cpu else 'add --device cpu'}")
    waiting, failed = list(todo), 0
    idle = [start(options) for _ in range(min(count, len(todo)))]
    running: dict[ray.ObjectRef, tuple[Any, Job]] = {}
    while waiting or running:
        while idle and (job := next_job(waiting, [job for _, job in running.values()])) is not None:
            waiting.remove(job)
            if results.claim(job):
                actor = idle.pop()
                running[actor.run_job.remote(with_inputs(job, find_inputs(job, results)))] = actor, job
        if not running:
            break
        (ended,), _ = ray.wait([*running])
        actor, job = running.pop(ended)
        try:
            result = ray.get(ended)
        except ray.exceptions.RayError as error:  # the actor died, perhaps because the host ran out of memory
            result = {"job": job.number, "id": job.id, "status": "error", **failure(error)}
            actor = start(options)
        results.record(result)
        failed += result["status"] != "done"
        idle.append(actor)
    ray.shutdown()  # the actors' output arrives late, and the last line must be ours
    return failed


def next_job(waiting: Sequence[Job], running: Sequence[Job]) -> Job | None:
    """The first waiting job that depends on no unfinished one."""
    unmade = {job.id for job in (*waiting, *running)}
    return next((job for job in waiting if not any(need.id in unmade for need in job.needs)), None)


def start(options: Mapping[str, int]) -> Any:
    """Start an actor."""
    return Actor.options(**options).remote(os.getcwd())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
