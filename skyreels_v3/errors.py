"""What a user did that cannot work, said in one line.

A `UserError` names the flag, the value and the way out; the command line prints it and exits with 2. Everything else
that goes wrong is a bug or the machine's fault and exits with 1.
"""

from __future__ import annotations

import re
from pathlib import Path

SHOWN_CHARACTERS = 100  # of a value in a message
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,20}://"
URL = re.compile(rf"{SCHEME}\S+")
URL_PARTS = re.compile(
    rf"(\s*{SCHEME})((?:[^/?#]*|(?!\[)[^/?#@]*:(?!\d*(?:[/?#]|$))[^@]*)@)?([^?#]*)([?#])?", re.DOTALL
)


def redact_url(url: str) -> str:
    """An address without what gives access to it: `...` for user and password, `?...` for the query and what follows.

    A password with characters that should have been escaped counts as one, too.
    """
    parts = URL_PARTS.match(url)
    if parts is None:
        return url
    scheme, user, place, more = parts.groups()
    return f"{scheme}{'...@' if user else ''}{place}{'?...' if more else ''}"


def redact(text: str) -> str:
    """`text` with every address in it as `redact_url` gives it; once more changes nothing."""

    def cut(found: re.Match[str]) -> str:
        safe = redact_url(found[0])
        done = found[0].startswith(safe) and not re.search(r"\w", found[0][len(safe) :])
        return found[0] if done else safe

    return URL.sub(cut, text)


def shown(value: object) -> str:
    """`value` for a one-line message: no secrets, its middle left out when it is long, control characters escaped."""
    text = redact_url(str(value)) if URL_PARTS.match(str(value)) else redact(str(value))
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

    Attributes:
        message: the same in one line and without secrets; the error's own text is this after the flag.
    """

    def __init__(self, flag: str, message: str) -> None:
        message = re.sub(r"\s*\n\s*", " ", message)  # libraries' own reasons come in many lines
        self.flag, self.message = flag, one_line(redact(message))
        super().__init__(one_line(f"{flag}: {self.message}"))


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
