"""Starting programs, and ending them with all that they have started."""

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
    """A program for the length of a `with` block, at whose end it is killed; wait for it there.

    Args:
        options: of subprocess.Popen.
    """
    # in a session of its own: Ctrl-C in the terminal reaches us only
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill(process)
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
            with suppress(OSError):  # what is left to be written to a process that is gone
                pipe.close()


def kill(process: subprocess.Popen[bytes] | Process) -> None:
    """Kill a process with all that it has started: other sessions too, and what is left if it has ended itself."""
    if process.returncode is None:
        import psutil  # most programs have ended by themselves

        children = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    if hasattr(os, "killpg"):  # not on Windows
        with suppress(ProcessLookupError, PermissionError):  # it led no group, or nobody is left
            os.killpg(process.pid, signal.SIGKILL)


def module_environment() -> dict[str, str]:
    """Environment variables for `python -m skyreels_v3...` in any current folder: the package may not be installed."""
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
