"""stdout and stderr, which may be unable to show a name, or be closed: neither costs a video."""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)


def escape_unknown() -> None:
    """Have characters that the terminal's encoding lacks written as escapes, and all to nowhere that is closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # notebooks have others
            stream.reconfigure(errors="backslashreplace")


def show(result: object) -> None:
    """Print a result on stdout; once that takes no more, as behind `| head` or on a full disk, nothing is printed."""
    try:
        print(result, flush=True)  # noqa: T201
    except OSError as error:
        logger.warning("stdout cannot be written to (%s); the result is %s", error.strerror, result)
        close(sys.stdout)


def say(text: str) -> None:
    """Write to stderr, if it takes anything: Ctrl-C may have ended `| tee` as well, a terminal may be closed."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        close(sys.stderr)


class Stderr:
    """stderr for messages and progress bars, written to by `say`."""

    def write(self, text: str) -> None:
        say(text)

    def flush(self) -> None:
        """Nothing is left to flush."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def close(stream: TextIO) -> None:
    """Have all go nowhere that is written to a stream, also what it has left when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
