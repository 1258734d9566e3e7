"""Starts programs, and kills them with all their children."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio.subprocess import Process


@contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program during a `with` block, which kills it at the end; wait for it inside.

    Args:
        options: for subprocess.Popen.
    """
    # in its own session, so that Ctrl-C in the terminal reaches only us
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill(process)
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
            with suppress(OSError):  # unwritten data for a process that is gone
                pipe.close()


def kill(process: subprocess.Popen[bytes] | Process) -> None:
    """Kill a process and all its descendants, in other sessions too, or what is left if it has ended by itself."""
    if process.returncode is None:
        import psutil  # imported late: most programs have ended by themselves

        children = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    if hasattr(os, "killpg"):  # not on Windows
        with suppress(ProcessLookupError, PermissionError):  # it led no process group, or the group is empty
            os.killpg(process.pid, signal.SIGKILL)


def module_environment() -> dict[str, str]:
    """Environment variables for `python -m skyreels_v3...` in any folder, even if the package is not installed."""
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
