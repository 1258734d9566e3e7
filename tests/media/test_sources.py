"""Paths, good and bad, and which URLs are downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyreels_v3.errors import UserError
from skyreels_v3.media.files import is_url, local_file

FLAG = "--ref_imgs"


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd: name, with = signs.png"
    path.write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(path), f"~/{path.name}"):
        assert not is_url(source)
        assert local_file(source, FLAG, tmp_path / "downloads", 1) == path
    assert not (tmp_path / "downloads").exists()


@pytest.mark.parametrize(
    "source, reason",
    [
        ("missing.png", "missing.png does not exist"),
        ("", "an empty path"),
        ("x" * 100_000, "xxx...xxx"),
        ("a\nb.png", r"a\nb.png"),
        *(
            (url, f"{url}: only http and https addresses are fetched")
            for url in ("ftp://a.example/b.png", "file:///etc/hostname", "s3://a/b", "data:image/png;base64,AA")
        ),
        ("https://h/a.png?...", "https://h/a.png?...: its query or password was not recorded; give the whole address"),
        ("https://...@h/a.png", "https://...@h/a.png: its query or password was not recorded"),
    ],
)
def test_refused(tmp_path: Path, source: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        local_file(source, FLAG, tmp_path / "downloads", 1)
    assert str(caught.value).startswith(f"{FLAG}: ")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "downloads").exists()
