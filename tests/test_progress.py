"""Progress bars in a file and on a terminal."""

from __future__ import annotations

import re
import sys

import pytest

from skyreels_v3.progress import progress_bar


def parts(text: str) -> list[str]:
    return [line.split("|")[0] for line in text.splitlines()]


def test_in_a_file_there_is_a_line_for_each_tenth(capsys):
    with progress_bar("outer", 2) as outer, progress_bar("working", 1000) as bar:
        for _ in range(1000):
            bar.update()
        outer.update()
        outer.update()
    assert parts(capsys.readouterr().err) == [
        "outer:   0%",
        *(f"working: {percent:3}%" for percent in range(0, 101, 10)),
        "outer:  50%",
        "outer: 100%",
    ]


@pytest.mark.parametrize("steps", [24, 26])
def test_a_total_that_is_a_little_off(capsys, steps):
    with progress_bar("reading", 25) as bar:
        for _ in range(steps):
            bar.update()
    assert re.match(rf"reading: 100%\|\S+\| {steps}/{steps} ", capsys.readouterr().err.splitlines()[-1])


def test_what_is_interrupted_is_not_full(capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("reading", 10) as bar:
        bar.update(3)
        raise KeyboardInterrupt
    assert parts(capsys.readouterr().err) == ["reading:   0%", "reading:  30%"]


def test_nothing_of_a_hidden_one(capsys):
    with progress_bar("reading", 2, shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_drawn_over_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("reading", 3) as bar:
        bar.update(2)
    written = capsys.readouterr().err
    assert "\n" not in written.strip()
    assert written.split("\r")[-1].startswith("reading: 100%")
