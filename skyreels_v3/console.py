"""stdout, stderr and logging. A closed stream or an unsupported character must not cost a finished video."""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from skyreels_v3.errors import redact

logger = logging.getLogger(__name__)


def escape_unknown() -> None:
    """Escape characters that a stream's encoding lacks, and replace a missing stream by the null device."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open until Python ends
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")


def show(result: object) -> None:
    """Print a result on stdout; if that fails (`| head`, a full disk), log it and print nothing from then on."""
    try:
        sys.stdout.write(f"{result}\n")  # in one write: other processes may print lines, too
        sys.stdout.flush()
    except OSError as error:
        logger.warning("stdout cannot be written to (%s); the result is %s", error.strerror, result)
        redirect_to_null(sys.stdout)


def say(text: str) -> None:
    """Write to stderr; ignore a closed pipe, since Ctrl-C may have ended `| tee`, too."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        redirect_to_null(sys.stderr)


class Stderr:
    """A stderr for logging and progress bars that writes with `say`."""

    def write(self, text: str) -> None:
        say(text)

    def flush(self) -> None:
        """Nothing to do: `say` flushes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def redirect_to_null(stream: TextIO) -> None:
    """Discard what is written to a stream, including what Python flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class RedactingFormatter(logging.Formatter):
    """Redacts URLs in everything that is logged, including tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def set_up_logging(verbosity: int, is_main: bool = True) -> None:
    """Log to stderr; libraries, and ranks other than the main one, log errors only."""
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity] if is_main else logging.ERROR
    handler = logging.StreamHandler(Stderr())
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("skyreels_v3").setLevel(level)
