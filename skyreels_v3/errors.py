"""Error types, and formatting of values in their messages.

A `UserError` names the flag, the value and the remedy; the command line prints it and exits with 2. Any other error is
a bug or a failure of the machine and exits with 1.
"""

from __future__ import annotations

import re
from pathlib import Path

FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)")  # in a message
MAX_SHOWN = 100  # characters of a value in a message
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,20}://"
URL = re.compile(rf"{SCHEME}\S+")
# scheme, user and password, host and path, start of the query; passwords may contain unescaped / ? # @
URL_PARTS = re.compile(
    rf"(\s*{SCHEME})((?:[^/?#]*|(?!\[)[^/?#@]*:(?!\d*(?:[/?#]|$))[^@]*)@)?([^?#]*)([?#])?", re.DOTALL
)


def redact_url(url: str) -> str:
    """A URL without credentials: user and password become `...`, query and fragment `?...`."""
    parts = URL_PARTS.match(url)
    if parts is None:
        return url
    scheme, user, place, query = parts.groups()
    return f"{scheme}{'...@' if user else ''}{place}{'?...' if query else ''}"


def redact(text: str) -> str:
    """`text` with each URL in it redacted; idempotent."""

    def cut(found: re.Match[str]) -> str:
        safe = redact_url(found[0])
        redacted = found[0].startswith(safe) and not re.search(r"\w", found[0][len(safe) :])
        return found[0] if redacted else safe

    return URL.sub(cut, text)


def format_value(value: object) -> str:
    """Format a value for a message: on one line, redacted, shortened in the middle."""
    text = str(value)
    text = redact_url(text) if URL_PARTS.match(text) else redact(text)
    if len(text) > MAX_SHOWN:
        half = MAX_SHOWN // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return one_line(text)


def one_line(text: str) -> str:
    """Escape all characters that would break the line or control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(count: int, one: str, several: str = "") -> str:
    """A count with its noun, such as 1 frame or 2 frames; `several` is the plural if not `one` + s."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def format_duration(seconds: float) -> str:
    """Seconds in readable units, at least one."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class UserError(Exception):
    """A request that cannot work as it is.

    Args:
        flag: the flag at fault, such as `--ref_imgs`.
        message: the value, what is wrong with it and what to give instead.

    Attributes:
        message: the message, on one line and redacted; `str(error)` puts the flag before it.
    """

    def __init__(self, flag: str, message: str) -> None:
        message = re.sub(r"\s*\n\s*", " ", message)  # libraries' messages may have several lines
        self.flag, self.message = flag, one_line(redact(message))
        super().__init__(one_line(f"{flag}: {self.message}"))


class CheckpointError(UserError):
    """A missing, damaged or unsuitable checkpoint file; the message names the file and the keys."""

    def __init__(self, message: str) -> None:
        super().__init__("--model_id", message)


class OutOfMemory(RuntimeError):
    """A stage ran out of memory; the message says how much it needs and which flags reduce that."""


class IncompleteOutput(RuntimeError):
    """The video `output` is complete, but another requested output could not be written."""

    def __init__(self, message: str, output: Path) -> None:
        super().__init__(message)
        self.output = output


def cause_of(error: Exception) -> str:
    """Describe an error other than `UserError` in one line, redacted."""
    lines = str(error).strip().splitlines()
    return redact(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
