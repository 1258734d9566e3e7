"""Starting the processes of a run on this machine: what `torchrun` does, without having to type it.

They are started by torchrun's own launcher, which watches them and ends all when one fails. Each finds its number in
its environment, as `ranks.ranks_of` reads it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from uuid import uuid4

from skyreels_v3.processes import INTERRUPTED

LAUNCHER = "torch.distributed.elastic"
USER_ERROR = 2
WATCH = 0.2  # seconds between looks at whether they still run


def launch(command: Sequence[str], processes: int) -> int:
    """Run a Python script with its arguments in so many processes; returns the exit code of the first that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHER)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes themselves say what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
        monitor_interval=WATCH,
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return exit_code(error.get_first_failure()[1].exitcode)
    except SignalException:
        return INTERRUPTED
    return 0


def exit_code(code: int) -> int:
    """This program's exit code for that of one of its processes; one that a signal ended has a negative number."""
    return code if code in (USER_ERROR, INTERRUPTED) else 1
