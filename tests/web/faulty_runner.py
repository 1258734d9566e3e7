"""A worker with injected faults: `faulty_runner.py FOLDER NAME FLAGS`, with `faults.json` in the queue's folder.

The file has a list of [place, action] or [place, action, job]; the first one is removed and carried out when its place
is reached. Places are "claimed", "loading", "step S" (of the loop itself), "denoising W S" (reported: pass and step),
"decoding W", "writing" and "written", and "rank R step S" for ranks other than the main one; actions are "kill", "oom",
"device oom", "error", "hang" and "stop" (SIGTERM). Each place reached is logged to `log.jsonl` as [place, job].
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from skyreels_v3.denoising.loop import denoise
from skyreels_v3.media.files import replace_file
from skyreels_v3.parallel import processes
from skyreels_v3.web import runner
from skyreels_v3.web.runner import Job, Reporter, Runner

FOLDER = Path(sys.argv[1])


def reach(place: str, job: Job) -> None:
    path = FOLDER / "faults.json"
    faults = json.loads(path.read_text()) if path.exists() else []
    is_fault = bool(faults) and faults[0][0] == place and faults[0][2:] in ([], [job.id])
    if is_fault:
        replace_file(path, json.dumps(faults[1:]).encode())
    with (FOLDER / "log.jsonl").open("a") as file:  # last, because a test may kill this process once it reads the line
        file.write(json.dumps([place, job.id]) + "\n")
    if not is_fault:
        return
    action = faults[0][1]
    if action in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[action])
    if action in ("hang", "stop"):
        time.sleep(100)
    if action == "oom":
        raise MemoryError
    if action == "device oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    raise ValueError("a fault\nin two lines")


class FaultyReporter(Reporter):
    def report(self, *arguments, stage="", **changes):
        super().report(*arguments, **changes, **({"stage": stage} if stage else {}))
        if stage == "denoising":
            reach(f"denoising {changes['window']} {changes['step']}", self.job)
        elif stage == "decoding":
            reach(f"decoding {changes['window']}", self.job)
        elif stage:
            reach(stage, self.job)


class FaultyRunner(Runner):
    def run_job(self, job):
        if self.ranks.is_main:
            reach("claimed", job)
        return super().run_job(job)

    def make_video(self, job):
        from skyreels_v3 import stages

        def denoised(*arguments):
            for step, latents in denoise(*arguments):
                reach(f"step {step}" if self.ranks.is_main else f"rank {self.ranks.rank} step {step}", job)
                yield step, latents

        stages.denoise = denoised
        facts = super().make_video(job)
        if self.ranks.is_main:
            reach("written", job)
        return facts


runner.Reporter, runner.Runner = FaultyReporter, FaultyRunner
processes.exit_process(runner.main(sys.argv[1:], (__file__,)))
