"""Clips and sounds for tests, written and inspected with ffmpeg itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from skyreels_v3.media.files import MediaError
from skyreels_v3.media.video_writer import write_video

LOSSLESS = ["-c:v", "ffv1"]


def ffmpeg(*arguments: object, data: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    command = [get_ffmpeg_exe(), "-hide_banner", "-v", "info", "-y", *map(str, arguments)]
    stdin = None if data else subprocess.DEVNULL
    run = subprocess.run(command, input=data, stdin=stdin, capture_output=True, check=False)
    assert not check or run.returncode == 0, run.stderr.decode()
    return run


def description(path: Path) -> str:
    """ffmpeg's description of a file."""
    return ffmpeg("-i", path, check=False).stderr.decode()


def fake_ffmpeg(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ffmpeg with a shell script, in which $FFMPEG is the real program."""
    program = folder / "ffmpeg"
    program.write_text(f'#!/bin/sh\nFFMPEG="{get_ffmpeg_exe()}"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


def encode(frames: np.ndarray, path: Path, rate: object, *options: object) -> Path:
    """Encode uint8 [N, H, W, 3] frames with ffmpeg."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-"]
    ffmpeg(*source, *options, path, data=frames.tobytes())
    return path


def smooth(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A drifting color gradient, uint8 [count, height, width, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width].astype(float)
    phases = np.stack([x / 40 + t / 9, y / 30 - t / 11, (x + y) / 50 + t / 7], -1)
    return (127.5 + 100 * np.sin(phases)).round().astype(np.uint8)


def write(frames: np.ndarray | Iterator[np.ndarray], path: Path, fps: int = 24, comment: str = "", **options) -> Path:
    """Write 64 x 96 frames with our own writer."""
    size = {"height": 64, "width": 96, "fps": fps}
    return write_video(iter(frames), path, **(size | options), comment=lambda: comment)


def clicks(path: Path, rate: int, seconds: float, times: tuple[float, ...], channels: int = 1) -> Path:
    """Write silence with 2 ms clicks at `times` (seconds), in the codec that the suffix implies."""
    levels = np.zeros((round(seconds * rate), channels), "<f4")
    for begin in times:
        levels[round(begin * rate) : round((begin + 0.002) * rate)] = 0.8
    ffmpeg("-f", "f32le", "-ar", rate, "-ac", channels, "-i", "-", path, data=levels.tobytes())
    return path


def heard(path: Path) -> np.ndarray:
    """The first channel as a player would play it, at 48 kHz and following the timestamps."""
    options = ["-af", "aresample=48000:async=1:first_pts=0,pan=mono|c0=c0", "-f", "f32le", "-"]
    return np.frombuffer(ffmpeg("-i", path, *options).stdout, "<f4")


def click_times(path: Path) -> list[float]:
    """When the clicks in a file begin, in seconds."""
    loud = np.flatnonzero(np.abs(heard(path)) > 0.2)
    return [float(i) / 48_000 for i, before in zip(loud, [-(10**6), *loud[:-1]], strict=True) if i - before > 4800]


def lengths(path: Path) -> tuple[float, float]:
    """Seconds of picture and sound, according to the packets."""
    totals = []
    for stream in ("0:v", "0:a"):
        listing = ffmpeg("-i", path, "-map", stream, "-c", "copy", "-f", "framecrc", "-").stdout.decode().splitlines()
        base = Fraction(next(line for line in listing if line.startswith("#tb 0:")).split(":")[1].strip())
        packets = [[int(word) for word in line.split(",")[2:4]] for line in listing if line[0] != "#"]
        totals.append(float(max(sum(packet) for packet in packets) * base))
    return totals[0], totals[1]


def check_refused(work: Callable[[Path], object], path: Path, *words: str) -> None:
    """Check that a file is refused with an error that names it once and contains these words."""
    with pytest.raises(MediaError) as caught:
        work(path)
    assert str(caught.value) == f"{path} {caught.value.reason}"
    assert "\n" not in caught.value.reason
    for word in words:
        assert word in caught.value.reason


def cut(path: Path, kept: float) -> Path:
    """A copy of the first part of a file; `kept` is the fraction of its bytes."""
    short = path.with_name(f"cut_{path.name}")
    short.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    return short
