"""Clips are checked quickly, and refused with a reason if they cannot be used."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.media.video_reader import probe_video
from tests.media.clips import LOSSLESS, check_refused, cut, encode, fake_ffmpeg, ffmpeg, smooth

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "pipelines" / "video_input"

refused = partial(check_refused, lambda path: probe_video(path, 24))


def test_recorded_clip() -> None:
    info = probe_video(REFERENCE / "input.mp4", 24)
    assert (info.height, info.width, info.frames) == (72, 108, 49)
    assert (info.fps, info.seconds) == pytest.approx((24, 49 / 24))
    assert not info.has_sound and not info.notes


@pytest.mark.slow
def test_probe_is_fast(tmp_path: Path) -> None:
    clip = encode(np.repeat(smooth(1, 360, 640), 240, 0), tmp_path / "a.mp4", 24, "-preset", "ultrafast")
    begin = sum(os.times()[:4])  # of processors: the machine may be busy
    assert probe_video(clip, 24).frames == 240
    assert sum(os.times()[:4]) - begin < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    "name, options",
    [("a.mp4", []), ("fast.mp4", ["-movflags", "+faststart"]), ("a.mkv", []), ("a.webm", [])],
)
def test_truncated(tmp_path: Path, name: str, options: list[str], kept: float) -> None:
    speed = ["-deadline", "realtime"] if name.endswith("webm") else []
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    clip = encode(noise, tmp_path / name, 24, *options, *speed)
    assert probe_video(clip, 24).frames == 30
    refused(cut(clip, kept), "truncated", "give a complete")


def test_not_a_clip(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "notes.txt").write_text("hello " * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\nfile://{REFERENCE / 'input.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{REFERENCE / 'input.mp4'}'\n")
    for name in ("text.mp4", "notes.txt", "list.m3u8", "list.txt"):
        refused(tmp_path / name, "give a")
    for name in ("still.png", "still.jpg"):
        Image.fromarray(smooth(1)[0]).save(tmp_path / name)
    (tmp_path / "renamed.mp4").write_bytes((tmp_path / "still.jpg").read_bytes())
    for name in ("still.png", "still.jpg", "renamed.mp4"):
        refused(tmp_path / name, "picture", "give a video clip")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.m4a")
    inputs = ["-i", tmp_path / "sound.m4a", "-i", tmp_path / "still.jpg", "-map", 0, "-map", 1]
    ffmpeg(*inputs, "-c", "copy", "-disposition:v", "attached_pic", tmp_path / "cover.m4a")
    for name in ("sound.m4a", "cover.m4a"):
        refused(tmp_path / name, "no video stream", "give a video clip")


def test_undecodable_clip(tmp_path: Path) -> None:
    """The index is fine, the pictures are zeros."""
    clip = encode(smooth(10), tmp_path / "a.mp4", 24, "-c:v", "mpeg4")
    content = bytearray(clip.read_bytes())
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    content[begin : begin + size] = bytes(size)
    clip.write_bytes(content)
    refused(clip, "no frame that can be decoded")


def test_too_large_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by their aspect ratio, which may be anything in the file."""
    monkeypatch.setattr("skyreels_v3.media.video_reader.MAX_FRAME_PIXELS", 1000)
    refused(encode(smooth(2, 32, 32), tmp_path / "a.mkv", 24, *LOSSLESS), "frames of more than", "scale it down")
    wide = encode(smooth(2, 16, 32), tmp_path / "b.mkv", 24, *LOSSLESS, "-vf", "setsar=2")
    refused(wide, "frames of more than", "scale it down")


def test_ffmpeg_without_what_hdr_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hdr = "format=yuv420p10le,setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc"
    clip = encode(smooth(3), tmp_path / "a.mkv", 24, *LOSSLESS, "-vf", hdr)
    fails = 'case "$*" in *zscale*) echo "No such filter: \'zscale\'" >&2; exit 8;; esac'
    fake_ffmpeg(tmp_path, f'{fails}\nexec "$FFMPEG" "$@"', monkeypatch)
    refused(clip, "No such filter: 'zscale'", "convert it to an H.264 mp4 file in SDR")
