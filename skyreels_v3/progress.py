"""Progress bars on stderr: tqdm's own on a terminal, one line per tenth in a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from skyreels_v3.console import Stderr

LINES = 10  # per bar in a file, after the first
INTERVAL = 10  # seconds between lines if the total is not known


class LineBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """A bar for files, which cannot be redrawn: prints a line at the start, after each tenth and at the end."""

    def __init__(self, **options: Any) -> None:
        total = options["total"]
        self.written = ""
        options |= {"mininterval": 0 if total else INTERVAL, "miniters": math.ceil((total or 0) / LINES)}
        # a finite maxinterval would write lines without progress; leave, an empty last line
        super().__init__(**options, maxinterval=math.inf, leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line. tqdm calls this whenever it would redraw the bar, with an empty `msg` to erase it."""
        done = f"{self.n}/{self.total}"
        if msg is None or self.written != done:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        self.written = done


@contextmanager
def progress_bar(name: str, total: int | None, shown: bool = True, **options: Any) -> Iterator[tqdm[Any]]:
    """Show a tqdm bar, which is filled if the `with` block ends without an exception.

    Args:
        total: number of steps, None if unknown. It may be slightly off.
        options: further arguments of tqdm.
    """
    shown = shown and sys.stderr is not None  # it is None without a console on Windows
    kind = tqdm if shown and sys.stderr.isatty() else LineBar
    with kind(desc=name, total=total, disable=not shown, file=Stderr(), **options) as bar:
        yield bar
        bar.total = bar.n
