"""An ffmpeg that cannot do its work here is refused before any long work begins."""

from __future__ import annotations

import pytest

from skyreels_v3.errors import UserError
from skyreels_v3.media.ffmpeg import check_ffmpeg
from tests.media.clips import fake_ffmpeg


@pytest.fixture(autouse=True)
def unchecked() -> None:
    check_ffmpeg.cache_clear()


def test_ffmpeg_is_fit() -> None:
    check_ffmpeg()


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo \"Unrecognized option 'fps_mode'.\" >&2; exit 1", "Unrecognized option 'fps_mode'"),
        ("echo \"Unknown encoder 'libx264'\" >&2; exit 8", "Unknown encoder 'libx264'"),
        ("exit 3", "no message"),
        ("exit 0", "no message"),
    ],
)
def test_unfit_ffmpeg_is_refused(tmp_path, monkeypatch, script: str, reason: str) -> None:
    fake_ffmpeg(tmp_path, script, monkeypatch)
    remedy = "unset it to use imageio-ffmpeg's own, or set it to ffmpeg 5.1 or newer with libx264 and aac"
    with pytest.raises(UserError, match=rf"IMAGEIO_FFMPEG_EXE: .*ffmpeg: ffmpeg fails \({reason}\.?\); {remedy}"):
        check_ffmpeg()


def test_missing_ffmpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    with pytest.raises(UserError, match=r"/nonexistent/ffmpeg: ffmpeg fails \(.*No such file"):
        check_ffmpeg()
