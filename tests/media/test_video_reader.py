"""Clips are read by timestamp, upright and in BT.709 colors, one frame at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from itertools import islice
from math import floor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from skyreels_v3.media.files import MediaError
from skyreels_v3.media.image import cover_crop
from skyreels_v3.media.video_reader import TO_RGB, last_frames, probe_video, read_frames, resize_frames
from tests.media.clips import LOSSLESS, check_refused, cut, encode, fake_ffmpeg, ffmpeg, smooth, write

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "pipelines" / "video_input"


def numbered(count: int) -> np.ndarray:
    """Gray frames that encode their number: value = 2 * number. uint8 [count, 16, 16, 3]."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 2, 16 * 16 * 3).reshape(count, 16, 16, 3)


def numbers(frames: Iterator[np.ndarray]) -> list[int]:
    return [int(frame[8, 8, 1]) // 2 for frame in frames]


def picked(times: list[Fraction], end: Fraction, fps: int) -> list[int]:
    """The source frame that each output frame shows: the last one that starts at most half a frame later."""

    def slot(seconds: Fraction) -> int:
        return floor(seconds * fps + Fraction(1, 2))

    return [max(i for i, t in enumerate(times) if slot(t) <= n) for n in range(slot(times[0]), slot(end))]


def test_last_frames_of_the_recorded_clip() -> None:
    expected = np.load(REFERENCE / "input_frames.npz")["frames"]
    calls: list[int] = []
    assert np.array_equal(last_frames(REFERENCE / "input.mp4", 24, 49, calls.append), expected)
    assert np.array_equal(last_frames(REFERENCE / "input.mp4", 24, 25), expected[-25:])
    assert sum(calls) == 49
    with pytest.raises(MediaError, match=r"input\.mp4 is too short: 50 frames .* it has 49; give a longer"):
        last_frames(REFERENCE / "input.mp4", 24, 50)


# Times


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["30", "12", "24", "25", "60", "24000/1001", "7"])
@pytest.mark.parametrize("fps", [24, 25])
def test_other_rates_are_resampled_by_timestamps(tmp_path: Path, rate: str, fps: int) -> None:
    clip = encode(numbered(40), tmp_path / "a.mov", rate, "-c:v", "qtrle")
    times = [i / Fraction(rate) for i in range(41)]
    expected = picked(times[:-1], times[-1], fps)
    assert numbers(read_frames(clip, fps)) == expected
    info = probe_video(clip, fps)
    assert info.frames == len(expected)
    assert info.fps == pytest.approx(float(Fraction(rate)), rel=1e-3)
    assert info.seconds == pytest.approx(float(times[-1]), abs=2e-3)


def test_variable_rate(tmp_path: Path) -> None:
    """Frames at growing intervals: 11, 15, 19, ... milliseconds."""
    milliseconds = [9 * n + 2 * n * n for n in range(30)]
    options = ["-vf", "setpts='9*N+2*N*N'", "-fps_mode", "passthrough", "-enc_time_base", "1/1000"]
    clip = encode(numbered(30), tmp_path / "vfr.mkv", 1000, *options, *LOSSLESS)
    times = [Fraction(t, 1000) for t in milliseconds]
    expected = picked(times, times[-1] + Fraction(1), 24)
    frames = numbers(read_frames(clip, 24))
    known = expected.index(29)  # the file does not say how long the last frame is shown
    assert frames[:known] == expected[:known]
    assert set(frames[known:]) <= {29}
    assert probe_video(clip, 24).frames == len(frames)


def test_long_still_does_not_pile_up(tmp_path: Path) -> None:
    """Screen recordings have no frames while nothing moves, here for hours."""
    pause = "setpts='PTS+gte(N,12)*20000/TB'"
    clip = encode(numbered(24), tmp_path / "a.mkv", 24, "-vf", pause, "-fps_mode", "passthrough", *LOSSLESS)
    begin = time.monotonic()
    assert numbers(islice(read_frames(clip, 24), 100)) == [*range(11), *[11] * 89]
    assert time.monotonic() - begin < 5
    check_refused(lambda path: probe_video(path, 24), clip, "is 20001 s long", "cut it")


def test_animated_gif_is_a_clip(tmp_path: Path) -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *rest = (Image.new("RGB", (20, 16), color) for color in colors)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=250)
    frames = list(read_frames(tmp_path / "a.gif", 24))
    assert len(frames) == probe_video(tmp_path / "a.gif", 24).frames == 18
    assert [frames[i][0, 0].tolist() for i in (0, 6, 12)] == [list(color) for color in colors]


# Shapes and tracks


@pytest.mark.parametrize("rotation, turned", [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_applied(tmp_path: Path, rotation: int, turned: int) -> None:
    frames = smooth(5, 48, 80)
    plain = encode(frames, tmp_path / "plain.mp4", 24, "-c:v", "libx264rgb", "-qp", 0)
    clip = tmp_path / "phone.mp4"
    ffmpeg("-display_rotation", rotation, "-i", plain, "-c", "copy", clip)
    expected = np.rot90(frames, turned, axes=(1, 2))
    assert np.array_equal(np.stack(list(read_frames(clip, 24))), expected)
    info = probe_video(clip, 24)
    assert (info.height, info.width) == expected.shape[1:3]


def test_non_square_pixels_are_made_square(tmp_path: Path) -> None:
    clip = encode(smooth(3, 48, 60), tmp_path / "a.mp4", 24, "-vf", "setsar=4/3", "-pix_fmt", "yuv444p")
    assert probe_video(clip, 24).width == 80
    assert next(read_frames(clip, 24)).shape == (48, 80, 3)


def test_resize_frames() -> None:
    frames = smooth(2, 60, 100)
    for frame, source in zip(resize_frames(frames, 48, 64), frames, strict=True):
        assert np.array_equal(frame, np.asarray(cover_crop(Image.fromarray(source), 48, 64)))
    assert all(np.array_equal(a, b) for a, b in zip(resize_frames(frames, 60, 100), frames, strict=True))


def test_default_track_is_read(tmp_path: Path) -> None:
    inputs = [
        encode(np.full((3, 16, 16, 3), level, np.uint8), tmp_path / f"{level}.mkv", 24, *LOSSLESS) for level in (9, 200)
    ]
    both = ["-i", inputs[0], "-i", inputs[1], "-map", 0, "-map", 1, "-c", "copy"]
    ffmpeg(*both, "-disposition:v:0", 0, "-disposition:v:1", "default", tmp_path / "a.mkv")
    assert {frame.mean() for frame in read_frames(tmp_path / "a.mkv", 24)} == {200}


@pytest.mark.parametrize("name", ["-version.mp4", "concat:a|b.mp4", "50%d 'x'.mp4"])
def test_name_is_not_an_option_or_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert write(smooth(2), Path(name)) == Path(name)
    assert probe_video(Path(name), 24).frames == len(list(read_frames(Path(name), 24))) == 2


def test_leaving_early_ends_ffmpeg(tmp_path: Path) -> None:
    frames = read_frames(encode(smooth(200), tmp_path / "a.mp4", 24), 24)
    before = {*psutil.Process().children()}
    next(frames)
    (process,) = {*psutil.Process().children()} - before
    frames.close()
    assert not process.is_running()


# Colors, fields and transparency

PATCHES = np.array([(0, 0, 0), (60, 60, 60), (128, 128, 128), (210, 210, 210), (180, 120, 90), (90, 140, 180)])
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087


def encode_deep(rgb: np.ndarray, path: Path, transfer: str) -> Path:
    """Write three identical frames of 16 x 16 patches with these RGB colors in [0, 1], as lossless 12-bit BT.2020."""
    picture = np.rint(np.clip(rgb, 0, 1) * 65535).astype("<u2").repeat(16, 0)[None].repeat(16, 0)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{16 * len(rgb)}x16", "-r", 24, "-i", "-"]
    filters = "scale=out_color_matrix=bt2020:out_range=tv:flags=accurate_rnd,format=yuv444p12le,"
    filters += f"setparams=color_primaries=bt2020:color_trc={transfer}"
    ffmpeg(*source, "-vf", filters, *LOSSLESS, path, data=picture.tobytes() * 3)
    return path


def patches(path: Path) -> np.ndarray:
    """The colors of the patches in a clip's second frame."""
    return list(read_frames(path, 24))[1][8, 8::16].astype(int)


def pq(nits: np.ndarray) -> np.ndarray:
    """The SMPTE ST 2084 transfer function."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """The ITU-R BT.2100 transfer function for a 1000 cd/m2 display."""
    display = nits / 1000
    luminance = np.maximum(display @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = display * luminance ** (1 / 1.2 - 1)
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


@pytest.mark.parametrize(
    "name, curve, transfer, tolerance", [("PQ", pq, "smpte2084", 2), ("HLG", hlg, "arib-std-b67", 12)]
)
def test_hdr_is_tone_mapped(tmp_path: Path, name: str, curve, transfer: str, tolerance: int) -> None:
    """HDR gives the same picture as SDR with white at 203 cd/m2, and not all brighter colors become white.

    The tolerance for HLG covers its system gamma, which zimg applies per channel instead of to the luminance.
    """
    nits = 203 * (PATCHES / 255) ** 2.4 @ TO_BT2020.T
    highlights = np.array([203, 400, 1000])[:, None] * np.ones(3)
    clip = encode_deep(curve(np.concatenate([nits, highlights])), tmp_path / "a.mkv", transfer)
    opened = patches(clip)
    assert np.abs(opened[:-3] - PATCHES).max() <= tolerance
    assert (np.diff(opened[-3:].mean(1)) >= 2).all()
    assert opened[-3].min() >= 240
    assert opened[-1].min() >= 253
    assert probe_video(clip, 24).notes == (f"is HDR ({name}); it is tone-mapped to SDR",)


@pytest.mark.parametrize("transfer", ["bt2020-10", "bt709", "unknown"])
def test_wide_gamut_becomes_bt709(tmp_path: Path, transfer: str) -> None:
    stored = ((PATCHES / 255) ** 2.4 @ TO_BT2020.T) ** (1 / 2.4)
    clip = encode_deep(stored, tmp_path / "a.mkv", transfer)
    assert np.abs(patches(clip) - PATCHES).max() <= 2
    assert not probe_video(clip, 24).notes


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
    """As declared in the clip, otherwise chosen by its height."""
    frame = np.full((1, height, 64, 3), (200, 90, 40), np.uint8)
    scale = ["-vf", f"scale=out_color_matrix={matrix}:out_range={values},format=yuv444p", "-color_range", values]
    clip = encode(frame, tmp_path / "a.mkv", 24, *scale, *options, *LOSSLESS)
    assert np.abs(next(read_frames(clip, 24)).astype(int) - frame[0]).max() <= 2


INTERLACED = {
    "a.mp4": ("96x96", ["-c:v", "libx264", "-flags", "+ilme+ildct", "-crf", 4]),
    "b.mkv": ("96x96", ["-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", 2]),
    "c.avi": ("720x576", ["-c:v", "dvvideo"]),  # from a camcorder; only its frames say that they are interlaced
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_fields_become_frames(tmp_path: Path, name: str) -> None:
    """A bar that moves by 8 pixels per field has straight edges in every frame."""
    size, codec = INTERLACED[name]
    bar = np.zeros((32, 64, 96, 3), np.uint8)
    for number, frame in enumerate(bar):
        frame[:, (start := number * 8 % 64) : start + 16] = 255
    filters = f"scale={size}:flags=neighbor,tinterlace=interleave_bottom,setfield=bff"
    clip = encode(bar, tmp_path / name, 50, "-vf", filters, *codec, "-pix_fmt", "yuv420p", "-r", 25)
    info = probe_video(clip, 25)
    assert info.notes == ("is interlaced; its fields are combined into whole frames",) * (name != "c.avi")
    frames = np.stack(list(read_frames(clip, 25))).astype(int)
    assert len(frames) == info.frames == 16
    rows = frames[2:-2, 8:-8, :, 1]
    assert np.abs(rows[:, 1:] - rows[:, :-1]).max() < 60


@pytest.mark.parametrize("name, codec", [("a.avi", ["mjpeg"]), ("b.mkv", ["huffyuv", "-pix_fmt", "yuv422p"])])
def test_progressive_frames_are_left_alone(tmp_path: Path, name: str, codec: list[object]) -> None:
    """When the file does not say whether it is interlaced; the recorded clip does."""
    clip = encode(smooth(30), tmp_path / name, 24, "-c:v", *codec)
    expected = ffmpeg("-i", clip, "-vf", TO_RGB, "-f", "rawvideo", "-").stdout
    assert b"".join(frame.tobytes() for frame in read_frames(clip, 24)) == expected
    assert len(expected) == 30 * 64 * 96 * 3


TRANSPARENT = {
    "a.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "b.mov": ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"],
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_becomes_white(tmp_path: Path, name: str) -> None:
    """As for images: opaque, half transparent and fully transparent."""
    frames = np.zeros((2, 32, 96, 4), np.uint8)
    frames[..., :3] = (200, 40, 90)
    frames[:, :, :32, 3], frames[:, :, 32:64, 3] = 255, 128
    source = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", "96x32", "-r", 24, "-i", "-"]
    ffmpeg(*source, *TRANSPARENT[name], tmp_path / name, data=frames.tobytes())
    opened = next(read_frames(tmp_path / name, 24))[16, 16::32].astype(int)
    assert np.abs(opened - [(200, 40, 90), (227, 147, 172), (255, 255, 255)]).max() <= 4
    assert probe_video(tmp_path / name, 24).frames == 2


refused = partial(check_refused, lambda path: probe_video(path, 24))


def test_recorded_clip() -> None:
    info = probe_video(REFERENCE / "input.mp4", 24)
    assert (info.height, info.width, info.frames) == (72, 108, 49)
    assert (info.fps, info.seconds) == pytest.approx((24, 49 / 24))
    assert not info.has_sound and not info.notes


@pytest.mark.slow
def test_probe_is_fast(tmp_path: Path) -> None:
    clip = encode(np.repeat(smooth(1, 360, 640), 240, 0), tmp_path / "a.mp4", 24, "-preset", "ultrafast")
    begin = sum(os.times()[:4])  # CPU time: the machine may be busy
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
    """The index is intact, the frames are zeros."""
    clip = encode(smooth(10), tmp_path / "a.mp4", 24, "-c:v", "mpeg4")
    content = bytearray(clip.read_bytes())
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    content[begin : begin + size] = bytes(size)
    clip.write_bytes(content)
    refused(clip, "no frame that can be decoded")


def test_too_large_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including through the aspect ratio, which the file can set to anything."""
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
