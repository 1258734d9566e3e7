"""Starts the processes of a run on this machine with torchrun's launcher, which stops all when one fails.

Each process reads its rank from environment variables, see `ranks.ranks_of`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from skyreels_v3.console import say
from skyreels_v3.media.files import run_folder
from skyreels_v3.parallel.processes import INTERRUPTED, LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
USER_ERROR = 2
MONITOR_INTERVAL = 0.2  # seconds


def show_below(text: str) -> None:
    """Write to stderr, below the main process's progress bar."""
    say(f"\n{text}\n")


def launch(command: Sequence[str], processes: int, report: Callable[[str], object] = show_below) -> int:
    """Run a Python script with its arguments in several processes.

    Args:
        report: called with what no process could report itself, such as which one was killed.

    Returns:
        0, `INTERRUPTED`, or the code that `outcome` gives for failed processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes report what went wrong
    with run_folder() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            max_restarts=0,
            monitor_interval=MONITOR_INTERVAL,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        config.signals_to_handle = ",".join(filter(is_handled, SIGNALS))
        code, text = 0, ""
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            code, text = outcome(error.failures)
        except SignalException:
            code, text = INTERRUPTED, "interrupted"
    if text:
        report(text)
    return code


def is_handled(name: str) -> bool:
    """Whether the system has this signal and it is not ignored, as SIGHUP is under nohup."""
    return hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN


def outcome(failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """The exit code for failed processes, by rank, and a message that none of them could report itself.

    A killed process takes precedence: others may have failed because of it, or were stopped by the launcher.
    """
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
    causes = {rank: failure for rank, failure in killed.items() if failure.exitcode != -signal.SIGTERM}
    rank, first = min((causes or failures).items(), key=lambda item: item[1].timestamp)
    if first.exitcode == INTERRUPTED:
        return INTERRUPTED, "interrupted"
    if rank not in killed:
        return first.exitcode if first.exitcode == USER_ERROR else 1, ""
    number = signal.Signals(-first.exitcode)
    text = f"error: rank {rank} was killed by {number.name} ({number})"
    if number == signal.SIGKILL:
        text += ", as happens when the host runs out of memory; --low_vram needs less, --dry_run shows how much"
    return 1, text
