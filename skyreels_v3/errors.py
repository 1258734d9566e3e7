"""What a user did that cannot work, said in one line.

A `UserError` names the flag, the value and the way out; the command line prints it and exits with 2. Everything else
that goes wrong is a bug or the machine's fault and exits with 1.
"""

from __future__ import annotations

import re
from pathlib import Path

SHOWN_CHARACTERS = 100  # of a value in a message


def shown(value: object) -> str:
    """`value` for a one-line message: its middle left out when it is long, control characters escaped."""
    text = str(value)
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return one_line(text)


def one_line(text: str) -> str:
    """`text` with everything escaped that would leave its line or act on a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """A request that cannot be carried out as it stands.

    Args:
        flag: the command line flag at fault, such as `--ref_imgs`.
        message: the value that was given, what is wrong with it and what to give instead.
    """

    def __init__(self, flag: str, message: str) -> None:
        message = re.sub(r"\s*\n\s*", " ", message)  # libraries' own reasons come in many lines
        super().__init__(one_line(f"{flag}: {message}"))
        self.flag = flag


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged or not what its model needs; names the file and the keys."""

    def __init__(self, message: str) -> None:
        super().__init__("--model_id", message)


class OutOfMemory(RuntimeError):
    """A stage of a run asked for more memory than there is; says how much, and which flags would ask for less."""


class IncompleteOutput(RuntimeError):
    """A video is complete, and in `output`; something else that was asked for could not be written."""

    def __init__(self, message: str, output: Path) -> None:
        super().__init__(message)
        self.output = output


class AlreadyDone(Exception):
    """What --resume would go on with is complete, and in `output`."""

    def __init__(self, output: Path) -> None:
        super().__init__(f"{output} is done already")
        self.output = output
