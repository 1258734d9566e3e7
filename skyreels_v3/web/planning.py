"""Plans for clients, made in a separate process, since planning imports torch and may take seconds.

`python -m skyreels_v3.web.planning` reads lines of JSON, {"flags", "group", "folder"}, and answers each with a line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyreels_v3.errors import UserError
from skyreels_v3.subprocesses import kill, module_environment

IDLE_SECONDS = 300.0  # after which the process is killed to free its memory


class PlanFailed(Exception):
    """Planning failed or took too long."""


class Planner:
    """Makes one plan at a time.

    Args:
        seconds: time limit for each.
        group: see `Settings`.
    """

    def __init__(self, seconds: float, group: Mapping[str, Any]) -> None:
        self.seconds, self.group = seconds, dict(group)
        self.lock = asyncio.Lock()
        self.process: Process | None = None
        self.timer: asyncio.TimerHandle | None = None

    async def plan(self, flags: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The plan of a job whose files are in `folder`, as text and numbers.

        Raises:
            UserError: the job cannot work on this machine.
            PlanFailed: it took too long, or the process ended.
        """
        async with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            try:
                async with asyncio.timeout(self.seconds):
                    answer = await self.ask({"flags": flags, "group": self.group, "folder": str(folder)})
            except BaseException as error:
                self.end()
                if isinstance(error, TimeoutError | OSError | ValueError):
                    raise PlanFailed("no plan was made") from error
                raise
            self.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.end)
        if "flag" in answer:
            raise UserError(answer["flag"], answer["message"])
        if "failed" in answer:
            raise PlanFailed(answer["failed"])
        return answer

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.returncode is not None:
            command = (sys.executable, "-m", "skyreels_v3.web.planning")
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=1 << 20, env=module_environment()
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        await self.process.stdin.drain()
        return json.loads(await self.process.stdout.readline())

    def end(self) -> Process | None:
        """Kill the process, and return it."""
        process, self.process = self.process, None
        if process is not None:
            kill(process)
        return process

    async def close(self) -> None:
        """Kill the process, and wait until it has ended."""
        if self.timer is not None:
            self.timer.cancel()
        if (process := self.end()) is not None:
            await process.communicate()


def answer_to(question: dict[str, Any]) -> dict[str, Any]:
    """The requested plan, or what is wrong with the request."""
    from skyreels_v3.checks import request_of
    from skyreels_v3.cli import job_flags
    from skyreels_v3.dry_run import describe, plan_of
    from skyreels_v3.errors import cause_of
    from skyreels_v3.parallel.ranks import Ranks
    from skyreels_v3.resolve import preflight

    folder, group = Path(question["folder"]), question["group"]
    size = group.pop("gpu_num", 1)
    ranks = Ranks(0, size, 0, size)
    try:
        request = request_of(job_flags(question["flags"], group, str(folder)))
        request = replace(request, output=folder / "video.mp4")
        plan = plan_of(preflight(request, folder, ranks), folder, ranks)
        return {"text": describe(plan), **numbers_of(plan)}
    except UserError as error:
        return {"flag": error.flag, "message": error.message}
    except Exception as error:
        return {"failed": cause_of(error)}


def numbers_of(plan: Any) -> dict[str, Any]:
    """The numbers in a plan's text: pixels, frames, seconds, bytes and floating-point operations."""
    from skyreels_v3 import throughput
    from skyreels_v3.memory.policy import TILINGS
    from skyreels_v3.tasks import MEMORY_MODES

    request = plan.request
    modes = {mode: {"whole": plan.peak(mode), "tiled": plan.peak(mode, TILINGS[-1])} for mode in MEMORY_MODES}
    return {
        **{"task_type": request.task.name, "width": request.width, "height": request.height},
        **{"frames": request.frames_out, "fps": request.task.fps, "seconds": request.frames_out / request.task.fps},
        **{"num_inference_steps": request.num_inference_steps, "forwards": plan.forwards},
        "passes": [{"latents": [*each.latents], "tokens": each.tokens, "flop": each.flop} for each in plan.passes],
        "weights_bytes": {name: part.weights for name, part in plan.components.items()},
        **{"memory_bytes": modes, "memory": plan.policy.mode, "denoising_seconds": throughput.seconds_of(plan)},
    }


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer_to(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
