"""stdout and stderr, which may be unable to show a name, or be closed: neither costs a video."""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper

logger = logging.getLogger(__name__)


def escape_unknown() -> None:
    """Have characters that the terminal's encoding lacks written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # notebooks have others
            stream.reconfigure(errors="backslashreplace")


def show(result: object) -> None:
    """Print a result on stdout; once that takes no more, as behind `| head` or on a full disk, nothing is printed."""
    try:
        print(result, flush=True)  # noqa: T201
    except OSError as error:
        logger.warning("stdout takes no more (%s), not even %s", error.strerror, result)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also what is left in its buffer, when Python ends
        os.close(nowhere)
