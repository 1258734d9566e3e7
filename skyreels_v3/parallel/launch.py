"""Starting the processes of a run on this machine: what `torchrun` does, without having to type it.

They are started by torchrun's own launcher, which watches them and ends all when one fails. Each finds its number in
its environment, as `ranks.ranks_of` reads it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from skyreels_v3.console import say
from skyreels_v3.media.files import run_folder
from skyreels_v3.parallel.processes import INTERRUPTED, LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

TORCHS_LAUNCHER = "torch.distributed.elastic"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
USER_ERROR = 2
WATCH = 0.2  # seconds between looks at whether they still run


def launch(command: Sequence[str], processes: int) -> int:
    """Run a Python script with its arguments in so many processes; returns the exit code of the first that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith(TORCHS_LAUNCHER)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes themselves say what went wrong
    with run_folder() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            max_restarts=0,
            monitor_interval=WATCH,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        config.signals_to_handle = ",".join(filter(is_heard, SIGNALS))
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            code, text = outcome(error.failures)
        except SignalException:
            code, text = INTERRUPTED, "interrupted"
        else:
            return 0
    if text:
        say(f"\n{text}\n")  # the first process's progress bar stands there
    return code


def is_heard(name: str) -> bool:
    """Whether there is such a signal, and it is not ignored, as SIGHUP is under nohup."""
    return hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN


def outcome(failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """The exit code of processes that have failed, and what none of them could say; by their ranks.

    One that was killed comes first: others may have failed for want of it, or were ended by the launcher.
    """
    killed = {rank: failed for rank, failed in failures.items() if failed.exitcode < 0}
    others = {rank: failed for rank, failed in killed.items() if failed.exitcode != -signal.SIGTERM}
    rank, first = min((others or failures).items(), key=lambda item: item[1].timestamp)
    if first.exitcode == INTERRUPTED:
        return INTERRUPTED, "interrupted"
    if rank not in killed:
        return first.exitcode if first.exitcode == USER_ERROR else 1, ""
    number = signal.Signals(-first.exitcode)
    text = f"error: rank {rank} was ended by {number.name} ({number})"
    if number == signal.SIGKILL:
        text += ", as the system does when the host runs out of memory; --low_vram takes less, --dry_run says how much"
    return 1, text
