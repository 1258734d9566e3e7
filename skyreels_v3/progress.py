"""Progress bars on stderr: on a terminal tqdm's own, in a file a line of text for each tenth of the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from skyreels_v3.console import Stderr

PARTS = 10  # lines of a bar in a file, besides that at its beginning
SECONDS = 10  # between lines where the end is not known


class LineBar(tqdm):  # type: ignore[type-arg]
    """A bar for a file, where nothing can be drawn over: a line at its beginning, after each tenth and at its end."""

    def __init__(self, **arguments: Any) -> None:
        total = arguments["total"]
        lines = {"mininterval": 0 if total else SECONDS, "miniters": math.ceil((total or 0) / PARTS)}
        self.written = ""
        # no interval after which a line comes though nothing has happened; leave: no empty line at the end
        super().__init__(**arguments, **lines, maxinterval=math.inf, leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line; tqdm calls this whenever the bar would be drawn, and with an empty `msg` to wipe it out."""
        done = f"{self.n}/{self.total}"
        if msg is None or self.written != done:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        self.written = done


@contextmanager
def progress_bar(name: str, total: int | None, shown: bool = True, **how: Any) -> Iterator[tqdm[None]]:
    """A bar with `update`, that is full when the `with` block ends as it should.

    Args:
        total: steps to come, None if that is not known. It may be a little off.
        how: more of tqdm's arguments.
    """
    kind = tqdm if sys.stderr.isatty() else LineBar
    with kind(desc=name, total=total, disable=not shown, file=Stderr(), **how) as bar:
        yield bar
        bar.total = bar.n
