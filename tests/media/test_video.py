"""Clips are read by their timestamps and written whole, streamed both ways, whatever goes wrong on the way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from math import floor
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from skyreels_v3.errors import UserError
from skyreels_v3.media.image import cover_crop
from skyreels_v3.media.video import (
    FRAMES_AHEAD,
    HAS_OPEN_FILES,
    TO_RGB,
    TO_YUV,
    check_ffmpeg,
    last_frames,
    probe,
    read_comment,
    read_frames,
    resized,
    run_ffmpeg,
    write_frame_folder,
    write_video,
)

FLAG = "--input_video"
ROOT = Path(__file__).parent.parent.parent
REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "pipelines" / "video_input"
LOSSLESS = ["-c:v", "ffv1"]


def ffmpeg(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [get_ffmpeg_exe(), "-hide_banner", "-v", "info", "-y", *map(str, arguments)]
    return subprocess.run(
        command, input=data, stdin=None if data else subprocess.DEVNULL, capture_output=True, check=False
    )


def encode(frames: np.ndarray, path: Path, rate: object, *options: object, before: tuple[object, ...] = ()) -> Path:
    """Write uint8 [N, H, W, 3] with ffmpeg itself."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-"]
    run = ffmpeg(*before, *source, *options, path, data=frames.tobytes())
    assert run.returncode == 0, run.stderr.decode()
    return path


def numbered(count: int) -> np.ndarray:
    """Grey frames of which each says its number: value = 2 * number. uint8 [count, 16, 16, 3]."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 2, 16 * 16 * 3).reshape(count, 16, 16, 3)


def numbers(frames: Iterator[np.ndarray]) -> list[int]:
    return [int(frame[8, 8, 1]) // 2 for frame in frames]


def smooth(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A drifting colour gradient, uint8 [count, height, width, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width].astype(float)
    phases = np.stack([x / 40 + t / 9, y / 30 - t / 11, (x + y) / 50 + t / 7], -1)
    return (127.5 + 100 * np.sin(phases)).round().astype(np.uint8)


def write(frames: np.ndarray, path: Path, comment: str = "") -> Path:
    height, width = frames.shape[1:3]
    return write_video(iter(frames), path, height=height, width=width, fps=24, comment=comment)


def picked(times: list[Fraction], end: Fraction, fps: int) -> list[int]:
    """Which source frame every output frame shows, worked out anew: the last one that is not later, to half a frame."""

    def slot(seconds: Fraction) -> int:
        return floor(seconds * fps + Fraction(1, 2))

    return [max(i for i, t in enumerate(times) if slot(t) <= n) for n in range(slot(times[0]), slot(end))]


# reading


def test_recorded_clip_is_read_exactly() -> None:
    expected = np.load(REFERENCE / "input_frames.npz")["frames"]
    frames = list(read_frames(REFERENCE / "input.mp4", 24))
    assert len(frames) == 49
    assert np.array_equal(np.stack(frames), expected)
    info = probe(REFERENCE / "input.mp4", FLAG, 24)
    assert (info.height, info.width, info.frames) == (72, 108, 49)
    assert info.fps == pytest.approx(24)
    assert info.seconds == pytest.approx(49 / 24)


@pytest.mark.parametrize("rate", ["30", "12", "24", "25", "60", "24000/1001", "7"])
@pytest.mark.parametrize("fps", [24, 25])
def test_other_rates_are_resampled_by_timestamps(tmp_path: Path, rate: str, fps: int) -> None:
    clip = encode(numbered(40), tmp_path / "a.mov", rate, "-c:v", "qtrle")
    times = [i / Fraction(rate) for i in range(41)]
    expected = picked(times[:-1], times[-1], fps)
    assert numbers(read_frames(clip, fps)) == expected
    info = probe(clip, FLAG, fps)
    assert info.frames == len(expected)
    assert info.fps == pytest.approx(float(Fraction(rate)), rel=1e-3)
    assert info.seconds == pytest.approx(float(times[-1]), abs=2e-3)


def test_variable_rate(tmp_path: Path) -> None:
    """Frames further and further apart: 11, 15, 19, ... milliseconds."""
    milliseconds = [9 * n + 2 * n * n for n in range(30)]
    options = ["-vf", "setpts='9*N+2*N*N'", "-fps_mode", "passthrough", "-enc_time_base", "1/1000"]
    clip = encode(numbered(30), tmp_path / "vfr.mkv", 1000, *options, *LOSSLESS)
    times = [Fraction(t, 1000) for t in milliseconds]
    expected = picked(times, times[-1] + Fraction(1), 24)
    frames = numbers(read_frames(clip, 24))
    known = expected.index(29)  # how long the last frame is shown is not in the file
    assert frames[:known] == expected[:known]
    assert set(frames[known:]) <= {29}
    assert probe(clip, FLAG, 24).frames == len(frames)


def test_long_still_does_not_pile_up(tmp_path: Path) -> None:
    """Recordings of a screen have no frames where nothing moves: here for hours."""
    pause = "setpts='PTS+gte(N,12)*20000/TB'"
    clip = encode(numbered(24), tmp_path / "a.mkv", 24, "-vf", pause, "-fps_mode", "passthrough", *LOSSLESS)
    begin = time.monotonic()
    assert numbers(islice(read_frames(clip, 24), 100)) == [*range(11), *[11] * 89]
    assert time.monotonic() - begin < 5
    check_refused(clip, "is 20001 s long", "cut it")


@pytest.mark.parametrize("rotation, turned", [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_applied(tmp_path: Path, rotation: int, turned: int) -> None:
    frames = smooth(5, 48, 80)
    plain = encode(frames, tmp_path / "plain.mp4", 24, "-c:v", "libx264rgb", "-qp", 0)
    clip = tmp_path / "phone.mp4"
    assert ffmpeg("-display_rotation", rotation, "-i", plain, "-c", "copy", clip).returncode == 0
    expected = np.rot90(frames, turned, axes=(1, 2))
    assert np.array_equal(np.stack(list(read_frames(clip, 24))), expected)
    info = probe(clip, FLAG, 24)
    assert (info.height, info.width) == expected.shape[1:3]


def test_non_square_pixels_are_made_square(tmp_path: Path) -> None:
    clip = encode(smooth(3, 48, 60), tmp_path / "a.mp4", 24, "-vf", "setsar=4/3", "-pix_fmt", "yuv444p")
    assert probe(clip, FLAG, 24).width == 80
    assert next(read_frames(clip, 24)).shape == (48, 80, 3)


def test_animated_gif_is_a_clip(tmp_path: Path) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *rest = (Image.new("RGB", (20, 16), colour) for colour in colours)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=250)
    frames = list(read_frames(tmp_path / "a.gif", 24))
    assert len(frames) == probe(tmp_path / "a.gif", FLAG, 24).frames == 18
    assert [frames[i][0, 0].tolist() for i in (0, 6, 12)] == [list(colour) for colour in colours]


def test_name_is_not_an_option_or_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-version.mp4", "concat:a|b.mp4", "50%d 'x'.mp4"):
        assert write(smooth(2), Path(name)) == Path(name)
        assert probe(Path(name), FLAG, 24).frames == len(list(read_frames(Path(name), 24))) == 2


def test_last_frames() -> None:
    expected = np.load(REFERENCE / "input_frames.npz")["frames"]
    calls: list[int] = []
    frames = last_frames(REFERENCE / "input.mp4", 24, 25, FLAG, calls.append)
    assert np.array_equal(frames, expected[-25:])
    assert sum(calls) == 49
    with pytest.raises(
        UserError, match=r"--input_video: .*input\.mp4 is too short: 50 frames .* it has 49; give a longer"
    ):
        last_frames(REFERENCE / "input.mp4", 24, 50, FLAG)


def test_leaving_early_ends_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = encode(smooth(200), tmp_path / "a.mp4", 24)
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    frames = read_frames(clip, 24)
    next(frames)
    assert started[-1].poll() is None
    frames.close()
    assert started[-1].returncode is not None


def test_resized() -> None:
    frames = smooth(2, 60, 100)
    fitted = list(resized(iter(frames), 48, 64))
    for frame, source in zip(fitted, frames, strict=True):
        assert np.array_equal(frame, np.asarray(cover_crop(Image.fromarray(source), 48, 64)))
    assert next(resized(iter(frames), 60, 100)) is not None
    assert all(np.array_equal(a, b) for a, b in zip(resized(iter(frames), 60, 100), frames, strict=True))


def test_probe_is_fast(tmp_path: Path) -> None:
    clip = encode(np.repeat(smooth(1, 360, 640), 240, 0), tmp_path / "a.mp4", 24, "-preset", "ultrafast")
    begin = sum(os.times()[:4])  # of processors: the machine may be busy
    assert probe(clip, FLAG, 24).frames == 240
    assert sum(os.times()[:4]) - begin < 0.5


def check_refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        probe(path, FLAG, 24)
    message = str(caught.value)
    assert message.startswith(FLAG)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


def cut(path: Path, kept: float) -> Path:
    short = path.with_name(f"cut_{kept}_{path.name}")
    short.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    return short


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    "name, options",
    [("a.mp4", []), ("fast.mp4", ["-movflags", "+faststart"]), ("a.mkv", []), ("a.webm", []), ("a.gif", [])],
)
def test_truncated(tmp_path: Path, name: str, options: list[str], kept: float) -> None:
    speed = ["-deadline", "realtime"] if name.endswith("webm") else []
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    clip = encode(noise, tmp_path / name, 24, *options, *speed)
    assert probe(clip, FLAG, 24).frames == 30
    check_refused(cut(clip, kept), "truncated", "give a complete")


def test_not_a_clip(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "notes.txt").write_text("hello " * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\nfile://{REFERENCE / 'input.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{REFERENCE / 'input.mp4'}'\n")
    Image.fromarray(smooth(1)[0]).save(tmp_path / "still.png")
    Image.fromarray(smooth(1)[0]).save(tmp_path / "still.jpg")
    (tmp_path / "renamed.mp4").write_bytes((tmp_path / "still.jpg").read_bytes())
    assert ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.m4a").returncode == 0
    inputs = ["-i", tmp_path / "sound.m4a", "-i", tmp_path / "still.jpg", "-map", 0, "-map", 1]
    options = ["-c", "copy", "-disposition:v", "attached_pic"]
    assert ffmpeg(*inputs, *options, tmp_path / "cover.m4a").returncode == 0
    check_refused(tmp_path / "missing.mp4", "does not exist")
    check_refused(tmp_path / "empty.mp4", "is empty")
    check_refused(tmp_path / "folder.mp4", "is a folder")
    for name in ("still.png", "still.jpg", "renamed.mp4"):
        check_refused(tmp_path / name, "picture", "give a video clip")
    for name in ("sound.m4a", "cover.m4a"):
        check_refused(tmp_path / name, "no video stream", "give a video clip")
    for name in ("text.mp4", "notes.txt", "list.m3u8", "list.txt"):
        check_refused(tmp_path / name, "give a")


def test_undecodable_clip(tmp_path: Path) -> None:
    """The index is fine, the pictures are zeros."""
    clip = encode(smooth(10), tmp_path / "a.mp4", 24, "-c:v", "mpeg4")
    content = bytearray(clip.read_bytes())
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    content[begin : begin + size] = bytes(size)
    clip.write_bytes(content)
    check_refused(clip, "no frame can be decoded")


# colours, fields and transparency

PATCHES = np.array([(0, 0, 0), (60, 60, 60), (128, 128, 128), (210, 210, 210), (180, 120, 90), (90, 140, 180)])
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087


def encode_deep(rgb: np.ndarray, path: Path, primaries: str, transfer: str) -> Path:
    """Write three frames of RGB colours in [0, 1], each a patch of 16 x 16 pixels, as BT.2020 in 12 bits, lossless."""
    picture = np.rint(np.clip(rgb, 0, 1) * 65535).astype("<u2").repeat(16, 0)[None].repeat(16, 0)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{16 * len(rgb)}x16", "-r", 24, "-i", "-"]
    filters = "scale=out_color_matrix=bt2020:out_range=tv:flags=accurate_rnd,format=yuv444p12le,"
    filters += f"setparams=color_primaries={primaries}:color_trc={transfer}"
    run = ffmpeg(*source, "-vf", filters, *LOSSLESS, path, data=picture.tobytes() * 3)
    assert run.returncode == 0, run.stderr.decode()
    return path


def patches(path: Path) -> np.ndarray:
    """The colours of the patches in a clip's second frame."""
    return list(read_frames(path, 24))[1][8, 8::16].astype(int)


def pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 for a display of 1000 cd/m2."""
    display = nits / 1000
    luminance = np.maximum(display @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = display * luminance ** (1 / 1.2 - 1)
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


@pytest.mark.parametrize(
    "name, curve, transfer, tolerance", [("PQ", pq, "smpte2084", 2), ("HLG", hlg, "arib-std-b67", 12)]
)
def test_hdr_is_tone_mapped(tmp_path: Path, name: str, curve, transfer: str, tolerance: int) -> None:
    """The same picture as SDR's, whose white is at 203 cd/m2; what is brighter is not all white.

    The tolerance for HLG is for its system gamma, which zimg applies to each channel and not to the luminance.
    """
    nits = 203 * (PATCHES / 255) ** 2.4 @ TO_BT2020.T
    highlights = np.array([203, 400, 1000])[:, None] * np.ones(3)
    clip = encode_deep(curve(np.concatenate([nits, highlights])), tmp_path / "a.mkv", "bt2020", transfer)
    opened = patches(clip)
    assert np.abs(opened[:-3] - PATCHES).max() <= tolerance
    assert (np.diff(opened[-3:].mean(1)) >= 2).all()
    assert opened[-3].min() >= 240
    assert opened[-1].min() >= 253
    notes: list[str] = []
    probe(clip, FLAG, 24, notes.append)
    assert notes == [f"{clip} is HDR ({name}); it is tone-mapped to SDR"]


@pytest.mark.parametrize("transfer", ["bt2020-10", "bt709", "unknown"])
def test_wide_gamut_becomes_bt709(tmp_path: Path, transfer: str) -> None:
    stored = ((PATCHES / 255) ** 2.4 @ TO_BT2020.T) ** (1 / 2.4)
    clip = encode_deep(stored, tmp_path / "a.mkv", "bt2020", transfer)
    assert np.abs(patches(clip) - PATCHES).max() <= 2
    notes: list[str] = []
    probe(clip, FLAG, 24, notes.append)
    assert not notes


@pytest.mark.parametrize(
    "matrix, height, options",
    [
        ("bt601", 48, ["-colorspace", "smpte170m"]),
        ("bt601", 48, ["-colorspace", "bt470bg"]),
        ("bt601", 48, []),
        ("bt709", 48, ["-colorspace", "bt709"]),
        ("bt709", 720, []),
        ("bt601", 720, ["-colorspace", "smpte170m"]),
        ("bt2020", 720, ["-colorspace", "bt2020nc"]),
    ],
)
@pytest.mark.parametrize("values", ["tv", "pc"])
def test_matrix_and_range(tmp_path: Path, matrix: str, height: int, options: list[str], values: str) -> None:
    """As the clip says, else by its height."""
    frame = np.full((1, height, 64, 3), (200, 90, 40), np.uint8)
    scale = ["-vf", f"scale=out_color_matrix={matrix}:out_range={values},format=yuv444p", "-color_range", values]
    clip = encode(frame, tmp_path / "a.mkv", 24, *scale, *options, *LOSSLESS)
    assert np.abs(next(read_frames(clip, 24)).astype(int) - frame[0]).max() <= 2


INTERLACED = {
    "a.mp4": ("96x96", ["-c:v", "libx264", "-flags", "+ilme+ildct", "-crf", 4]),
    "b.mkv": ("96x96", ["-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", 2]),
    "c.avi": ("720x576", ["-c:v", "dvvideo"]),  # a camcorder's, which only says so of each frame
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_fields_become_frames(tmp_path: Path, name: str) -> None:
    """A bar that moves by 8 pixels a field is straight in every frame."""
    size, codec = INTERLACED[name]
    bar = np.zeros((32, 64, 96, 3), np.uint8)
    for number, frame in enumerate(bar):
        frame[:, (start := number * 8 % 64) : start + 16] = 255
    filters = f"scale={size}:flags=neighbor,tinterlace=interleave_bottom,setfield=bff"
    clip = encode(bar, tmp_path / name, 50, "-vf", filters, *codec, "-pix_fmt", "yuv420p", "-r", 25)
    notes: list[str] = []
    info = probe(clip, FLAG, 25, notes.append)
    assert notes == [f"{clip} is interlaced; whole frames are made of its fields"] * (name != "c.avi")
    frames = np.stack(list(read_frames(clip, 25))).astype(int)
    assert len(frames) == info.frames == 16
    rows = frames[2:-2, 8:-8, :, 1]
    assert np.abs(rows[:, 1:] - rows[:, :-1]).max() < 60


@pytest.mark.parametrize("name, codec", [("a.avi", ["mjpeg"]), ("b.mkv", ["huffyuv", "-pix_fmt", "yuv422p"])])
def test_progressive_frames_are_left_alone(tmp_path: Path, name: str, codec: list[object]) -> None:
    """Where the file does not say what they are, which the recorded clip's does."""
    clip = encode(smooth(30), tmp_path / name, 24, "-c:v", *codec)
    expected = ffmpeg("-i", clip, "-vf", TO_RGB, "-f", "rawvideo", "-").stdout
    assert b"".join(frame.tobytes() for frame in read_frames(clip, 24)) == expected
    assert len(expected) == 30 * 64 * 96 * 3


TRANSPARENT = {
    "a.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "b.mov": ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"],
    "c.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "4", "-b:v", "0", "-cpu-used", "8"],
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_becomes_white(tmp_path: Path, name: str) -> None:
    """As in pictures: opaque, half and wholly transparent."""
    frames = np.zeros((2, 32, 96, 4), np.uint8)
    frames[..., :3] = (200, 40, 90)
    frames[:, :, :32, 3], frames[:, :, 32:64, 3] = 255, 128
    source = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", "96x32", "-r", 24, "-i", "-"]
    assert ffmpeg(*source, *TRANSPARENT[name], tmp_path / name, data=frames.tobytes()).returncode == 0
    opened = next(read_frames(tmp_path / name, 24))[16, 16::32].astype(int)
    assert np.abs(opened - [(200, 40, 90), (227, 147, 172), (255, 255, 255)]).max() <= 4
    assert probe(tmp_path / name, FLAG, 24).frames == 2


def test_default_track_is_read(tmp_path: Path) -> None:
    inputs = [
        encode(np.full((3, 16, 16, 3), level, np.uint8), tmp_path / f"{level}.mkv", 24, *LOSSLESS) for level in (9, 200)
    ]
    both = ["-i", inputs[0], "-i", inputs[1], "-map", 0, "-map", 1, "-c", "copy"]
    assert ffmpeg(*both, "-disposition:v:0", 0, "-disposition:v:1", "default", tmp_path / "a.mkv").returncode == 0
    assert {frame.mean() for frame in read_frames(tmp_path / "a.mkv", 24)} == {200}


def test_too_large_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by their shape, which may be anything in the file."""
    monkeypatch.setattr("skyreels_v3.media.video.MAX_FRAME_PIXELS", 1000)
    check_refused(encode(smooth(2, 32, 32), tmp_path / "a.mkv", 24, *LOSSLESS), "frames of more than", "scale it down")
    wide = encode(smooth(2, 16, 32), tmp_path / "b.mkv", 24, *LOSSLESS, "-vf", "setsar=2")
    check_refused(wide, "frames of more than", "scale it down")


def test_ffmpeg_without_what_hdr_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    fails = 'case "$*" in *zscale*) echo "No such filter: \'zscale\'" >&2; exit 8;; esac'
    program.write_text(f'#!/bin/sh\n{fails}\nexec "{get_ffmpeg_exe()}" "$@"\n')
    program.chmod(0o755)
    clip = encode_deep(pq(PATCHES), tmp_path / "a.mkv", "bt2020", "smpte2084")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    check_refused(clip, "no zscale filter", "unset IMAGEIO_FFMPEG_EXE")


# writing


def atoms(path: Path) -> list[str]:
    """Names of the top-level boxes of an mp4 file, in order."""
    content, names, position = path.read_bytes(), [], 0
    while position < len(content):
        names.append(content[position + 4 : position + 8].decode())
        position += int.from_bytes(content[position : position + 4], "big")
    return names


def test_written_video_looks_like_its_frames(tmp_path: Path) -> None:
    frames = smooth(30)
    path = write(frames, tmp_path / "new" / "folders" / "a.mp4")
    assert path == tmp_path / "new" / "folders" / "a.mp4"
    assert os.listdir(path.parent) == ["a.mp4"]
    back = np.stack(list(read_frames(path, 24)))
    assert back.shape == frames.shape
    error = np.mean((back.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) >= 40
    info = probe(path, FLAG, 24)
    assert (info.height, info.width, info.frames) == (64, 96, 30)
    assert info.fps == pytest.approx(24)
    names = atoms(path)
    assert names.index("moov") < names.index("mdat")
    stream = ffmpeg("-i", path).stderr.decode()
    assert re.search(r"Video: h264 \(High\).*yuv420p\(tv, bt709, progressive\), 96x64.*24 fps", stream)


COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (200, 120, 40),
    (16, 235, 90),
]


def test_colours_are_bt709(tmp_path: Path) -> None:
    row = np.repeat(np.array(COLOURS, np.uint8), 32, axis=0)
    frames = np.broadcast_to(row, (6, 48, *row.shape))
    path = write(frames, tmp_path / "a.mp4")
    for frame in read_frames(path, 24):
        assert np.abs(frame[24, 16::32].astype(int) - COLOURS).max() <= 3
    # and by the standard's own numbers, so that reader and writer cannot be wrong together
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-").stdout
    luma = np.frombuffer(raw, np.uint8)[: 48 * 256].reshape(48, 256)[24, 16::32]
    expected = 16 + 219 / 255 * np.array(COLOURS) @ [0.2126, 0.7152, 0.0722]
    assert np.abs(luma - expected).max() <= 2


def test_comment(tmp_path: Path) -> None:
    text = json.dumps({"prompt": 'a cat; = # \\ "quoted" \n gr\u00fc\u00df ' + "x" * 30_000, "seed": 42})
    path = write(smooth(2), tmp_path / "a.mp4", text)
    metadata = ffmpeg("-i", path, "-f", "ffmetadata", "-").stdout.decode()
    line = re.search(r"^comment=(.*)$", metadata, re.MULTILINE)
    assert line
    assert re.sub(r"\\([=;#\\])", r"\1", line[1]) == text
    with pytest.raises(ValueError, match="comment"):
        write(smooth(2), tmp_path / "b.mp4", "x" * 200_000)


def test_frames_are_encoded_as_they_come(tmp_path: Path) -> None:
    """A frame is let go before the next but one is asked for."""
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for i in range(20):
            frame = np.full((64, 96, 3), i, np.uint8)
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 2
            yield frame

    write_video(resized(frames(), 32, 48), tmp_path / "a.mp4", height=32, width=48, fps=24, comment="")
    assert len(alive) == 20


def test_taken_name_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also when it was taken only while the frames were being made."""
    path = tmp_path / "a.mp4"

    def frames() -> Iterator[np.ndarray]:
        yield smooth(1)[0]
        path.write_text("somebody else's")

    with caplog.at_level(logging.WARNING):
        used = write_video(frames(), path, height=64, width=96, fps=24, comment="")
    assert used == tmp_path / "a-2.mp4"
    assert "a-2.mp4" in caplog.text
    assert path.read_text() == "somebody else's"
    assert probe(used, FLAG, 24).frames == 1
    assert sorted(os.listdir(tmp_path)) == ["a-2.mp4", "a.mp4"]


def failing(count: int, error: BaseException) -> Iterator[np.ndarray]:
    yield from smooth(count)
    raise error


WRITERS: dict[str, Callable[[Iterator[np.ndarray], Path], Path]] = {
    "mp4": lambda frames, path: write_video(frames, path.with_suffix(".mp4"), height=64, width=96, fps=24, comment="c"),
    "folder": lambda frames, path: write_frame_folder(frames, path, comment="c"),
}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("kind", WRITERS)
def test_interrupted(tmp_path: Path, kind: str, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    suffix = ".mp4" if kind == "mp4" else ""
    for name in (f"a.partial{suffix}", f"a.partial-2{suffix}"):
        caplog.clear()
        with pytest.raises(type(error)) as caught, caplog.at_level(logging.WARNING):
            WRITERS[kind](failing(7, error), tmp_path / "a")
        assert caught.value is error
        assert name in caplog.text
        partial = tmp_path / name
        if kind == "mp4":
            assert len(list(read_frames(partial, 24))) == probe(partial, FLAG, 24).frames == 7
        else:
            assert len(os.listdir(partial)) == 7
    assert sorted(os.listdir(tmp_path)) == sorted([f"a.partial{suffix}", f"a.partial-2{suffix}"])


@pytest.mark.parametrize("kind", WRITERS)
def test_no_frames(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeError, match="no frames"):
        WRITERS[kind](iter(()), tmp_path / "new" / "a")
    with pytest.raises(KeyboardInterrupt):
        WRITERS[kind](failing(0, KeyboardInterrupt()), tmp_path / "new" / "a")
    assert not os.listdir(tmp_path)


def test_wrong_frames(tmp_path: Path) -> None:
    for frame in (np.zeros((64, 95, 3), np.uint8), np.zeros((64, 96, 3), np.float32)):
        with pytest.raises(ValueError, match="not uint8"):
            write_video(iter([frame]), tmp_path / "a.mp4", height=64, width=96, fps=24, comment="")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("when", ["at once", "in the middle", "at the end"])
def test_ffmpeg_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    read = {"at once": "", "in the middle": "head -c 100000 >/dev/null;", "at the end": "cat >/dev/null;"}[when]
    fake = tmp_path / "ffmpeg"
    fake.write_text(
        f'#!/bin/sh\nfor last; do :; done\n: > "${{last#file:}}"\n{read}\necho "No space left" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError) as caught:
        write(smooth(40), tmp_path / "out" / "a.mp4")
    assert "No space left" in str(caught.value) + str(caught.value.__cause__)
    assert not os.listdir(tmp_path / "out")


INTERRUPTED = """
import logging, sys, numpy as np
from pathlib import Path
from skyreels_v3.media.video import write_video
logging.basicConfig(level=logging.WARNING)
frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
def frames():
    while True:
        print("frame", flush=True)
        yield frame
write_video(frames(), Path(sys.argv[1]), height=480, width=640, fps=24, comment="")
"""


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    """As in a terminal: the signal goes to the whole process group, mostly while a frame is being handed over."""
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "a.mp4")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert run.stdout
    for _ in range(12):
        run.stdout.readline()
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    assert b"a.partial.mp4" in errors
    frames = probe(tmp_path / "a.partial.mp4", FLAG, 24).frames
    assert frames >= 11
    assert len(list(read_frames(tmp_path / "a.partial.mp4", 24))) == frames


# making frames while others are written


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ffmpeg does not begin, and takes no frame, before this file is there."""
    path, slow = tmp_path / "go", tmp_path / "ffmpeg"
    slow.write_text(f'#!/bin/sh\nwhile [ ! -e "{path}" ]; do sleep 0.01; done\nexec "{get_ffmpeg_exe()}" "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(slow))
    yield path
    path.touch()  # a test that fails must not hang


class Producer:
    """Counts the frames that it was asked for, each a grey of its own; they are larger than a pipe."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.made = 0
        self.count = count
        self.error = error

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.count):
            self.made += 1
            yield np.full((240, 320, 3), 5 * number, np.uint8)
        if self.error is not None:
            raise self.error

    def has_made(self, count: int) -> bool:
        """Whether it comes to make `count` frames, and no more while one could wait for them."""
        end = time.monotonic() + 10
        while self.made < count and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        return self.made == count


def write_large(frames: Producer, path: Path) -> Path:
    return write_video(frames, path, height=240, width=320, fps=24, comment="")


def written(path: Path) -> list[int]:
    """Which of a producer's frames are in a file."""
    return [round(frame.mean() / 5) for frame in read_frames(path, 24)]


def writers() -> list[str]:
    """Threads that still write frames, a moment after they should have ended."""
    time.sleep(0.05)
    return [thread.name for thread in threading.enumerate() if thread.name == "frame writer"]


def test_frames_are_made_while_one_is_written(tmp_path: Path, gate: Path) -> None:
    """As many as the bound allows, and none is lost or changes its place."""
    frames = Producer(3 * FRAMES_AHEAD)
    run = threading.Thread(target=write_large, args=(frames, tmp_path / "a.mp4"))
    run.start()
    assert frames.has_made(FRAMES_AHEAD + 1)  # one is being written
    gate.touch()
    run.join()
    assert frames.made == 3 * FRAMES_AHEAD
    assert written(tmp_path / "a.mp4") == list(range(3 * FRAMES_AHEAD))
    assert not writers()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_frames_that_wait_are_in_the_partial_file(tmp_path: Path, gate: Path, error: BaseException) -> None:
    frames = Producer(FRAMES_AHEAD, error)
    threading.Timer(0.2, gate.touch).start()
    with pytest.raises(type(error)) as caught:
        write_large(frames, tmp_path / "a.mp4")
    assert caught.value is error
    assert written(tmp_path / "a.partial.mp4") == list(range(FRAMES_AHEAD))
    assert not writers()


@pytest.mark.parametrize("count", [FRAMES_AHEAD - 6, 3 * FRAMES_AHEAD])
def test_ctrl_c_while_waiting_for_the_encoder(tmp_path: Path, gate: Path, count: int) -> None:
    """For its end, and for room: every frame that was made is kept."""
    frames = Producer(count)
    made = min(count, FRAMES_AHEAD + 1)

    def interrupt() -> None:
        frames.has_made(made)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        gate.touch()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        write_large(frames, tmp_path / "a.mp4")
    assert frames.made == made
    assert written(tmp_path / "a.partial.mp4") == list(range(made))
    assert not writers()


def test_second_ctrl_c_does_not_wait_for_the_encoder(tmp_path: Path, gate: Path) -> None:
    """The encoder hangs for good; it is ended, and nothing is left."""
    frames = Producer(3 * FRAMES_AHEAD)

    def interrupt() -> None:
        frames.has_made(FRAMES_AHEAD + 1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        write_large(frames, tmp_path / "out" / "a.mp4")
    assert not os.listdir(tmp_path / "out")
    assert not writers()


def test_dead_encoder_stops_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\nhead -c 500000 >/dev/null\necho 'No space left' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    frames = Producer(10_000)
    with pytest.raises(RuntimeError, match="ffmpeg"):
        write_large(frames, tmp_path / "a.mp4")
    assert frames.made <= 4 + FRAMES_AHEAD
    assert not writers()


def test_only_whole_frames_before_a_failure_are_kept(tmp_path: Path) -> None:
    """A frame that cannot be written ends the file, also where good ones wait behind it."""
    frames = [*smooth(5), np.zeros((64, 95, 3), np.uint8), *smooth(5)]
    with pytest.raises(ValueError, match="frame 5 is"):
        write_video(iter(frames), tmp_path / "a.mp4", height=64, width=96, fps=24, comment="")
    assert len(list(read_frames(tmp_path / "a.partial.mp4", 24))) == 5
    assert not writers()


# writing with sound


def clicks(path: Path, rate: int, seconds: float, times: tuple[float, ...], channels: int = 1) -> Path:
    """A sound file of silence with a click of 2 ms at every one of `times`; the codec is that of its suffix."""
    levels = np.zeros((round(seconds * rate), channels), "<f4")
    for begin in times:
        levels[round(begin * rate) : round((begin + 0.002) * rate)] = 0.8
    run = ffmpeg("-f", "f32le", "-ar", rate, "-ac", channels, "-i", "-", path, data=levels.tobytes())
    assert run.returncode == 0, run.stderr.decode()
    return path


def heard(path: Path) -> np.ndarray:
    """The first channel of what a player plays, at 48 kHz and with timestamps obeyed."""
    options = ["-af", "aresample=48000:async=1:first_pts=0,pan=mono|c0=c0", "-f", "f32le", "-"]
    return np.frombuffer(ffmpeg("-i", path, *options).stdout, "<f4")


def click_times(path: Path) -> list[float]:
    """When the clicks of a file begin, in seconds."""
    loud = np.flatnonzero(np.abs(heard(path)) > 0.2)
    return [float(i) / 48_000 for i, before in zip(loud, [-(10**6), *loud[:-1]], strict=True) if i - before > 4800]


def lengths(path: Path) -> tuple[float, float]:
    """Seconds of picture and sound according to the packets."""
    totals = []
    for stream in ("0:v", "0:a"):
        listing = ffmpeg("-i", path, "-map", stream, "-c", "copy", "-f", "framecrc", "-").stdout.decode().splitlines()
        base = Fraction(next(line for line in listing if line.startswith("#tb 0:")).split(":")[1].strip())
        packets = [[int(word) for word in line.split(",")[2:4]] for line in listing if line[0] != "#"]
        totals.append(float(max(sum(packet) for packet in packets) * base))
    return totals[0], totals[1]


def write_with(audio: Path, count: int, path: Path, fps: int = 25, comment: str = "") -> Path:
    return write_video(smooth(count), path, height=64, width=96, fps=fps, comment=comment, audio=audio)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000, 96_000])
def test_sound_is_heard_in_time_at_its_own_quality(tmp_path: Path, rate: int, channels: int) -> None:
    """AAC begins with a frame of nothing, which must not delay the sound."""
    path = write_with(clicks(tmp_path / "a.wav", rate, 2.0, (0.2, 1.0, 1.9), channels), 50, tmp_path / "a.mp4")
    assert click_times(path) == pytest.approx([0.2, 1.0, 1.9], abs=0.004)
    picture, sound = lengths(path)
    assert picture == pytest.approx(2.0, abs=1e-3)
    assert sound == pytest.approx(2.0, abs=1e-3)
    layout = "mono" if channels == 1 else "stereo"
    assert f"Audio: aac (LC) (mp4a / 0x6134706D), {rate} Hz, {layout}" in ffmpeg("-i", path).stderr.decode()


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.ogg", "a.flac", "a.opus", "a.mkv"])
def test_sound_of_other_formats(tmp_path: Path, name: str) -> None:
    path = write_with(clicks(tmp_path / name, 48_000, 2.0, (0.2, 1.0), 2), 50, tmp_path / "a.mp4")
    assert click_times(path) == pytest.approx([0.2, 1.0], abs=0.025)


@pytest.mark.parametrize(
    "rate, channels, expected", [(192_000, 2, "96000 Hz, stereo"), (48_000, 6, "48000 Hz, stereo")]
)
def test_sound_beyond_aac_or_stereo(tmp_path: Path, rate: int, channels: int, expected: str) -> None:
    path = write_with(clicks(tmp_path / "a.wav", rate, 2.0, (0.2, 1.0), channels), 50, tmp_path / "a.mp4")
    assert expected in ffmpeg("-i", path).stderr.decode()
    assert click_times(path) == pytest.approx([0.2, 1.0], abs=0.004)


@pytest.mark.parametrize(
    "seconds, rate",
    [(0.4, 44_100), (1.97, 44_100), (1.999, 44_100), (2.001, 44_100), (9.0, 44_100), (1.97, 16_000), (2.04, 16_000)],
)
def test_the_picture_decides_the_length(tmp_path: Path, seconds: float, rate: int) -> None:
    path = write_with(clicks(tmp_path / "a.wav", rate, seconds, (0.3,)), 50, tmp_path / "a.mp4")
    assert len(list(read_frames(path, 25))) == probe(path, FLAG, 25).frames == 50
    assert lengths(path) == pytest.approx((2.0, 2.0), abs=1e-3)
    assert click_times(path) == pytest.approx([0.3], abs=0.004)


def test_sound_leaves_picture_and_file_as_they_are(tmp_path: Path) -> None:
    comment = json.dumps({"prompt": 'a = # "cat"; gr\u00fc\u00df ' + "x" * 30_000})
    silent = write_video(smooth(30), tmp_path / "b.mp4", height=64, width=96, fps=24, comment=comment)
    sound = clicks(tmp_path / "a.wav", 44_100, 2.0, (0.3,))
    path = write_with(sound, 30, tmp_path / "new" / "a.mp4", 24, comment)
    assert os.listdir(path.parent) == ["a.mp4"]
    assert all(np.array_equal(a, b) for a, b in zip(read_frames(path, 24), read_frames(silent, 24), strict=True))
    names = atoms(path)
    assert names.index("moov") < names.index("mdat")
    described = [ffmpeg("-i", file).stderr.decode() for file in (path, silent)]
    assert "h264 (High) (avc1 / 0x31637661), yuv420p(tv, bt709, progressive), 96x64" in described[0]
    written = [re.search(r"^    comment +: (.*)$", text, re.MULTILINE) for text in described]
    assert written[0] and written[1]
    assert written[0][1] == written[1][1]
    assert lengths(path) == pytest.approx((1.25, 1.25), abs=1e-3)


def test_late_sound_track_begins_with_the_picture(tmp_path: Path) -> None:
    """As `read_audio` hands it to the model."""
    sound = clicks(tmp_path / "a.flac", 44_100, 1.0, (0.3,))
    picture = encode(smooth(50), tmp_path / "b.mp4", 25)
    late = tmp_path / "late.mkv"
    assert ffmpeg("-i", picture, "-itsoffset", 0.7, "-i", sound, "-c", "copy", late).returncode == 0
    assert click_times(late) == pytest.approx([1.0], abs=0.004)
    assert click_times(write_with(late, 50, tmp_path / "c.mp4")) == pytest.approx([0.3], abs=0.004)


def test_level_is_kept_and_excess_clipped(tmp_path: Path) -> None:
    t = np.arange(88_200) / 44_100
    for level, tolerance in ((0.5, 0.01), (3.0, 0.06)):  # the encoder takes sound at full scale down by 5 %
        sound = (level * np.sin(2 * np.pi * 441 * t)).astype("<f4")
        path = tmp_path / f"{level}.wav"
        ffmpeg("-f", "f32le", "-ar", 44_100, "-i", "-", "-c:a", "pcm_f32le", path, data=sound.tobytes())
        back = heard(write_with(path, 50, tmp_path / f"{level}.mp4"))[4800:-4800]
        clipped = (level * np.sin(2 * np.pi * 441 * np.arange(len(back)) / 48_000)).clip(-1, 1)
        assert np.sqrt(np.mean(back**2)) == pytest.approx(np.sqrt(np.mean(clipped**2)), rel=tolerance)
        assert np.abs(back).max() < 1.1


def test_partial_file_has_sound(tmp_path: Path) -> None:
    sound = clicks(tmp_path / "a.wav", 44_100, 3.0, (0.1, 0.5, 2.0))
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_video(
                failing(20, error), tmp_path / "out" / "a.mp4", height=64, width=96, fps=25, comment="", audio=sound
            )
    assert sorted(os.listdir(tmp_path / "out")) == ["a.partial-2.mp4", "a.partial.mp4"]
    for path in (tmp_path / "out").iterdir():
        assert len(list(read_frames(path, 25))) == 20
        assert click_times(path) == pytest.approx([0.1, 0.5], abs=0.004)
        assert lengths(path) == pytest.approx((0.8, 0.8), abs=1e-3)


def test_unusable_sound_does_not_cost_the_frames(tmp_path: Path) -> None:
    """It was whole when it was probed, hours ago."""
    (tmp_path / "a.wav").write_text("hello " * 100)
    with pytest.raises(RuntimeError, match=r"could not add the sound of .*a\.wav: .*"):
        write_with(tmp_path / "a.wav", 20, tmp_path / "out" / "a.mp4")
    assert os.listdir(tmp_path / "out") == ["a.partial.mp4"]
    assert len(list(read_frames(tmp_path / "out" / "a.partial.mp4", 25))) == 20


def test_ctrl_c_while_the_sound_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames are there: what is kept has them, and the sound, which gets a second try."""
    sound = clicks(tmp_path / "a.wav", 44_100, 3.0, (0.1,))
    calls = []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        run_ffmpeg(*arguments)

    monkeypatch.setattr("skyreels_v3.media.video.run_ffmpeg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_with(sound, 20, tmp_path / "out" / "a.mp4")
    assert os.listdir(tmp_path / "out") == ["a.partial.mp4"]
    assert len(list(read_frames(tmp_path / "out" / "a.partial.mp4", 25))) == 20
    assert click_times(tmp_path / "out" / "a.partial.mp4") == pytest.approx([0.1], abs=0.004)


def test_without_sound_nothing_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, with the same options as ever."""
    started: list[list[str]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__(command, **options)
            started.append(command)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    write(smooth(3), tmp_path / "a.mp4", "c")
    assert len(started) == 1
    assert started[0][1:-1] == (
        "-hide_banner -nostdin -nostats -v warning -f rawvideo -pix_fmt rgb24 -s 96x64 -r 24 -i pipe:0 -vf "
        f"{TO_YUV} -c:v libx264 -crf 16 -preset medium -movflags +faststart -metadata comment=c -f mp4 -y"
    ).split(" ")
    assert "Audio" not in ffmpeg("-i", tmp_path / "a.mp4").stderr.decode()


@pytest.mark.skipif(not HAS_OPEN_FILES, reason="open files have no names here")
@pytest.mark.parametrize("workspace", [None, "out/a.state"])
def test_a_folder_that_is_removed_costs_no_frame(tmp_path: Path, workspace: str | None) -> None:
    sound, path = clicks(tmp_path / "a.wav", 44_100, 3.0, (0.1,)), tmp_path / "out" / "a.mp4"
    room = None if workspace is None else tmp_path / workspace

    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(smooth(60)):
            if number == 50:
                shutil.rmtree(tmp_path / "out")
            yield frame

    made = write_video(frames(), path, height=64, width=96, fps=25, comment="c", audio=sound, workspace=room)
    assert (made, read_comment(made)) == (path, "c")
    assert len(list(read_frames(path, 25))) == 60
    assert click_times(path) == pytest.approx([0.1], abs=0.004)


def test_a_frame_folder_that_is_removed_is_not_taken_for_whole(tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(smooth(60)):
            if number == 50:
                while any(tmp_path.iterdir()):  # a picture may come into a folder while that is emptied
                    for folder in tmp_path.iterdir():
                        shutil.rmtree(folder, ignore_errors=True)
            yield frame

    with pytest.raises(FileNotFoundError, match=r"\d\d.png"):
        write_frame_folder(frames(), tmp_path / "a", comment="c")
    assert not any(tmp_path.iterdir())


def test_frame_folder_is_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    comment = '{"prompt": "gr\u00fc\u00df \u732b"}'
    folder = write_frame_folder(iter(frames), tmp_path / "new" / "run.v1", comment=comment)
    assert folder == tmp_path / "new" / "run.v1"
    assert os.listdir(tmp_path / "new") == ["run.v1"]
    assert sorted(os.listdir(folder)) == ["00000.png", "00001.png", "00002.png", "00003.png"]
    for path, frame in zip(sorted(folder.iterdir()), frames, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), frame)
            assert image.text["comment"] == comment
    assert write_frame_folder(iter(frames), folder, comment="").name == "run.v1-2"


# writing with the sound of a clip that comes first


@pytest.mark.parametrize(
    "name, options, heard_at",
    [
        ("a.mkv", [], (0.2, 0.9)),
        ("a.mkv", ["-itsoffset", 0.3], (0.5, 1.2)),
        ("a.mkv", ["-itsoffset", -0.3], (0.6,)),
        ("a.mp4", ["-itsoffset", -0.3], (0.6,)),
    ],
)
def test_sound_of_the_clip_stays_with_its_frames(tmp_path: Path, name: str, options: list[object], heard_at) -> None:
    """Silence comes after it; the clip is 1.5 s long, at another rate, and the video 3 s."""
    sound = clicks(tmp_path / "a.wav", 48_000, 3.0, (0.2, 0.9, 1.9), 2)
    picture = encode(smooth(45), tmp_path / "b.mp4", 30)
    clip = tmp_path / name
    made = ffmpeg(
        "-i", picture, *options, "-i", sound, "-c:v", "copy", "-c:a", "aac", "-map", "0:v", "-map", "1:a", clip
    )
    assert made.returncode == 0, made.stderr
    info = probe(clip, FLAG, 24)
    assert info.has_sound
    path = write_with(info, 72, tmp_path / "out.mp4", 24)
    assert click_times(path) == pytest.approx(heard_at, abs=0.03)
    assert lengths(path) == pytest.approx((3.0, 3.0), abs=1e-3)


def test_sound_of_a_clip_with_gaps_in_its_times(tmp_path: Path) -> None:
    """Both tracks pause for a second, as where a phone's recording was interrupted."""
    pause = "'PTS+gte(T,0.5)/TB'"
    sound = clicks(tmp_path / "a.wav", 48_000, 1.5, (0.2, 0.9))
    picture = encode(smooth(36), tmp_path / "b.mp4", 24)
    filters = ["-vf", f"setpts={pause}", "-af", f"asetpts={pause}", "-fps_mode", "passthrough", "-c:a", "libopus"]
    made = ffmpeg("-i", picture, "-i", sound, *filters, *LOSSLESS, tmp_path / "c.mkv")
    assert made.returncode == 0, made.stderr
    info = probe(tmp_path / "c.mkv", FLAG, 24)
    assert info.frames == 60
    assert click_times(write_with(info, 84, tmp_path / "out.mp4", 24)) == pytest.approx((0.2, 1.9), abs=0.03)


def test_sound_of_a_clip_that_cannot_be_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = tmp_path / "a.mkv"
    sound = clicks(tmp_path / "a.wav", 48_000, 1.0, (0.2,))
    assert ffmpeg("-i", encode(smooth(24), tmp_path / "b.mp4", 24), "-i", sound, clip).returncode == 0
    info = probe(clip, FLAG, 24)
    clip.unlink()
    path = write_with(info, 48, tmp_path / "out.mp4", 24)
    assert path.name == "out.mp4"
    assert "could not add the sound of" in caplog.text
    assert "the video has none" in caplog.text


# ffmpeg itself

UNFIT = {
    "echo \"Unrecognized option 'fps_mode'.\" >&2; exit 1": "older than ffmpeg 5.1",
    "echo \"Unknown encoder 'libx264'\" >&2; exit 8": "no encoder libx264",
    "exit 3": "fails",
    "exit 0": "fails",
}


def test_ffmpeg_is_fit() -> None:
    check_ffmpeg()


@pytest.mark.parametrize("script", UNFIT)
def test_unfit_ffmpeg_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    expected = f"IMAGEIO_FFMPEG_EXE: .*{UNFIT[script]}.*; unset it, so that imageio-ffmpeg's own is taken"
    with pytest.raises(UserError, match=expected):
        check_ffmpeg()


def test_missing_ffmpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    with pytest.raises(UserError, match=r"/nonexistent/ffmpeg, which cannot be started \(.*No such file"):
        check_ffmpeg()
