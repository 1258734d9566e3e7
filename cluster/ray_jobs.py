"""The jobs of a file on a Ray cluster: an actor for each GPU, or with --device cpu for each CPU, makes one at a time.

    pip install ray
    python cluster/ray_jobs.py --jobs jobs.jsonl --low_vram

Flags are those of generate_video.py that can stand beside --jobs, and so is all else: the results go into the same file,
and a job that is done there is skipped. Ray is started on this machine, unless RAY_ADDRESS names a cluster. On several
machines the checkout, the inputs and the outputs must be on a disk that all of them see under the same path, since the
actors work in the folder in which this is called:

    ray job submit --address http://HEAD:8265 -- bash -c "cd /shared/checkout && python cluster/ray_jobs.py --jobs jobs.jsonl"
"""  # noqa: E501  a command

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, nothing installed

import ray

from skyreels_v3.batch import (
    Job,
    Results,
    Studio,
    carry_out,
    failure,
    left_to_do,
    read_jobs,
    record,
    report,
    results_file,
)
from skyreels_v3.cli import parse_flags, verbosity_of
from skyreels_v3.console import escape_unknown, say
from skyreels_v3.errors import UserError
from skyreels_v3.main import set_up_logging
from skyreels_v3.parallel.processes import INTERRUPTED, handle_signals
from skyreels_v3.parallel.ranks import SINGLE

ROOT = Path(__file__).resolve().parents[1]


@ray.remote
class Worker:
    """Makes videos on its GPU, or its CPU.

    Args:
        folder: where relative paths begin.
    """

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        set_up_logging(-1, SINGLE)
        self.studio = Studio(SINGLE, SINGLE)

    def carry_out(self, job: Job) -> dict[str, Any]:
        """Do a job; returns its result."""
        results: list[dict[str, Any]] = []
        carry_out(job, self.studio, results.append)
        return results[0]


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code, one of generate_video.py's."""
    escape_unknown()
    handle_signals(SINGLE)
    try:
        flags = parse_flags(argv)
        set_up_logging(verbosity_of(flags), SINGLE)
        return run(flags)
    except UserError as error:
        say(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        say("interrupted\n")
        return INTERRUPTED


def run(flags: Mapping[str, Any]) -> int:
    """Carry out --jobs; returns the exit code."""
    for name in ("use_usp", "dry_run"):
        if flags.get(name):
            raise UserError(f"--{name}", "is not for actors that make a video each; give it to generate_video.py")
    if "jobs" not in flags:
        raise UserError("--jobs", "missing; give a file with a request in each line")
    defaults = {name: value for name, value in flags.items() if name not in ("jobs", "verbose")}
    jobs = read_jobs(flags["jobs"], defaults | {"quiet": True})  # many progress bars are none
    results = Results(results_file(flags["jobs"]))
    todo = left_to_do(jobs, results, SINGLE)
    failed = share_out(todo, results, on_cpu=flags.get("device") == "cpu") if todo else 0
    report(failed, len(jobs), results.path)
    return 1 if failed else 0


def share_out(todo: Sequence[Job], results: Results, on_cpu: bool) -> int:
    """Have actors take the jobs one after the other; returns how many went wrong."""
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, logging_level="warning")
    kind, options = ("CPU", {"num_cpus": 1}) if on_cpu else ("GPU", {"num_gpus": 1})
    count = int(ray.cluster_resources().get(kind, 0))
    if count == 0:
        raise UserError("--device", f"the Ray cluster has no {kind}; {'add some' if on_cpu else 'add --device cpu'}")
    waiting, failed = deque(todo), 0
    idle = [start(options) for _ in range(min(count, len(todo)))]
    running: dict[ray.ObjectRef, tuple[Any, Job]] = {}
    while waiting or running:
        while waiting and idle:
            if results.claim(job := waiting.popleft()):
                worker = idle.pop()
                running[worker.carry_out.remote(job)] = worker, job
        if not running:
            break
        (ended,), _ = ray.wait([*running])
        worker, job = running.pop(ended)
        try:
            result = ray.get(ended)
        except ray.exceptions.RayError as error:  # the actor is dead, of the host's lack of memory perhaps
            result = {"job": job.number, "id": job.id, "status": "error", **failure(error)}
            worker = start(options)
        record(results, result)
        failed += result["status"] != "done"
        idle.append(worker)
    ray.shutdown()  # what the actors say comes late, and the last line is ours
    return failed


def start(options: Mapping[str, int]) -> Any:
    """A new actor."""
    return Worker.options(**options).remote(os.getcwd())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
