"""Messages reveal no secrets and contain no control characters."""

from __future__ import annotations

import os

import pytest

from skyreels_v3.errors import UserError, counted, format_duration, format_value, redact, redact_url


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://h.example:8080/a/b.png", "https://h.example:8080/a/b.png"),
        ("https://h/@2x.png", "https://h/@2x.png"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("https://h/a.png?sig=secret", "https://h/a.png?..."),
        ("https://h/a.png#secret", "https://h/a.png?..."),
        ("https://h/a.png?sig=secret and more secret\nsecret", "https://h/a.png?..."),
        ("https://me:secret@h/a.png", "https://...@h/a.png"),
        ("https://secret@h/a.png?secret@h", "https://...@h/a.png?..."),
        ("https://me:secret@secret@h/a.png", "https://...@h/a.png"),
        ("https://me:secret/secret@h/a.png", "https://...@h/a.png"),
        ("https://me:secret?secret@h/a.png", "https://...@h/a.png"),
        (" s3+x://me:secret@h?secret", " s3+x://...@h?..."),
        ("a.png?b", "a.png?b"),
    ],
)
def test_addresses_lose_their_secrets(url: str, safe: str) -> None:
    assert redact_url(url) == safe
    assert redact_url(safe) == safe
    assert format_value(url) == safe.replace("\n", "\\n")


def test_secrets_in_messages() -> None:
    text = "Client error '403' for url 'https://me:secret@h/a?sig=secret' and https://h/b?secret, that is all"
    safe = "Client error '403' for url 'https://...@h/a?... and https://h/b?... that is all"
    assert redact(text) == redact(safe) == safe
    assert redact("(https://h/a?...); https://h/b?...: no") == "(https://h/a?...); https://h/b?...: no"
    assert str(UserError("--x", text)) == f"--x: {safe}"
    assert "secret" not in format_value("https://h/" + "x" * 200 + "?sig=secret")
    redact("a" * 100_000)  # must be fast


def test_shown() -> None:
    assert format_value("pictures/katze-\u00fc.png") == "pictures/katze-\u00fc.png"
    assert format_value("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    long = format_value("start" + "x" * 5000 + "end.png")
    assert len(long) <= 100
    assert long.startswith("start") and long.endswith("end.png")
    format_value(os.fsdecode(b"bad\xff.png")).encode()


def test_one_and_several() -> None:
    assert [counted(count, "frame") for count in (0, 1, 2)] == ["0 frames", "1 frame", "2 frames"]
    assert [counted(count, "entry is", "entries are") for count in (1, 2)] == ["1 entry is", "2 entries are"]


def test_durations() -> None:
    made = [format_duration(seconds) for seconds in (0.2, 59.4, 59.6, 3599.6, 5430)]
    assert made == ["1 s", "59 s", "1 min 0 s", "1 h 0 min", "1 h 30 min"]
