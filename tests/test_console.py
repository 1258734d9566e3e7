"""If a stream cannot be written to, only the message is lost."""

from __future__ import annotations

import io
import os
import sys

import pytest

from skyreels_v3.console import escape_unknown, say, show
from skyreels_v3.progress import progress_bar


@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", b"\\u72d0.mp4\n"), ("utf-8", "\u72d0.mp4\n".encode())])
def test_names_that_the_encoding_lacks(monkeypatch, encoding, shown):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n"))
    escape_unknown()
    show("\u72d0.mp4")
    assert sys.stdout.buffer.getvalue() == shown


def test_nobody_reads_stdout_any_more(monkeypatch, caplog):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.close(reading)
        show("a.mp4")
        show("b.mp4")
    assert caplog.messages == ["stdout cannot be written to (Broken pipe); the result is a.mp4"]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_from_the_start(monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)  # as Python does with closed streams
    escape_unknown()
    show("a.mp4")
    say("error: a\n")
    getattr(sys, closed).close()


def test_nobody_reads_stderr_any_more(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        os.close(reading)
        with progress_bar("loading", 2) as bar:
            bar.update(2)
    assert bar.n == 2
