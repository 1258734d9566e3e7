"""Videos and frame folders are streamed and written whole, whatever goes wrong on the way."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.media import video_writer
from skyreels_v3.media.video_reader import probe_video, read_frames, resize_frames
from skyreels_v3.media.video_writer import FRAMES_AHEAD, copy_frames, read_comment, write_frame_folder
from tests.media.clips import (
    LOSSLESS,
    click_times,
    clicks,
    description,
    encode,
    fake_ffmpeg,
    ffmpeg,
    lengths,
    smooth,
    write,
)

ROOT = Path(__file__).parent.parent.parent
COMMENT = json.dumps({"prompt": 'a cat; = # \\ "quoted" \n gr\u00fc\u00df ' + "x" * 30_000, "seed": 42})


def atoms(path: Path) -> list[str]:
    """Names of the top-level boxes of an mp4 file, in order."""
    content, names, position = path.read_bytes(), [], 0
    while position < len(content):
        names.append(content[position + 4 : position + 8].decode())
        position += int.from_bytes(content[position : position + 4], "big")
    return names


def check_video(path: Path, size: str, fps: int) -> None:
    """Check that players and browsers will accept a file."""
    assert atoms(path).index("moov") < atoms(path).index("mdat")
    assert re.search(rf"Video: h264 \(High\).*yuv420p\(tv, bt709, progressive\), {size}.*{fps} fps", description(path))


def test_written_video_looks_like_its_frames(tmp_path: Path) -> None:
    frames = smooth(30)
    path = write(frames, tmp_path / "new" / "folders" / "a.mp4")
    assert path == tmp_path / "new" / "folders" / "a.mp4"
    assert os.listdir(path.parent) == ["a.mp4"]
    back = np.stack(list(read_frames(path, 24)))
    error = np.mean((back.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) >= 40
    info = probe_video(path, 24)
    assert (info.height, info.width, info.frames) == (64, 96, 30)
    check_video(path, "96x64", 24)
    assert "Audio" not in description(path)


def test_colors_are_bt709(tmp_path: Path) -> None:
    colors = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 40)], np.uint8
    )
    row = np.repeat(colors, 32, axis=0)
    path = write(np.broadcast_to(row, (6, 48, *row.shape)), tmp_path / "a.mp4", height=48, width=len(row))
    for frame in read_frames(path, 24):
        assert np.abs(frame[24, 16::32].astype(int) - colors).max() <= 3
    # and by the standard's own constants, so that reader and writer cannot share an error
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-").stdout
    luma = np.frombuffer(raw, np.uint8)[: 48 * len(row)].reshape(48, -1)[24, 16::32]
    assert np.abs(luma - (16 + 219 / 255 * colors @ [0.2126, 0.7152, 0.0722])).max() <= 2


def test_comment(tmp_path: Path) -> None:
    path = write(smooth(2), tmp_path / "a.mp4", comment=COMMENT)
    assert read_comment(path) == COMMENT
    metadata = ffmpeg("-i", path, "-f", "ffmetadata", "-").stdout.decode()
    line = re.search(r"^comment=(.*)$", metadata, re.MULTILINE)
    assert line
    assert re.sub(r"\\([=;#\\])", r"\1", line[1]) == COMMENT
    with pytest.raises(ValueError, match="comment"):
        write(smooth(2), tmp_path / "b.mp4", comment="x" * 200_000)


def test_frames_are_encoded_as_they_come(tmp_path: Path) -> None:
    """At most two frames are alive at a time."""
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for i in range(20):
            frame = np.full((64, 96, 3), i, np.uint8)
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 2
            yield frame

    write(resize_frames(frames(), 32, 48), tmp_path / "a.mp4", height=32, width=48)
    assert len(alive) == 20


def test_frame_folder_is_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    comment = '{"prompt": "gr\u00fc\u00df \u732b"}'
    folder = write_frame_folder(iter(frames), tmp_path / "new" / "run.v1", comment=comment)
    assert folder == tmp_path / "new" / "run.v1"
    assert os.listdir(tmp_path / "new") == ["run.v1"]
    assert sorted(os.listdir(folder)) == ["00000.png", "00001.png", "00002.png", "00003.png"]
    for path, frame in zip(sorted(folder.iterdir()), frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), frame)
        assert read_comment(path) == comment
    assert write_frame_folder(iter(frames), folder, comment="").name == "run.v1-2"


# Failures and interruptions


def test_copied_frames_are_the_same(tmp_path: Path) -> None:
    """The copy appears once all frames have passed; what a killed run left behind is replaced."""
    frames = [*np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), np.uint8)]
    copy = tmp_path / "folder" / "copy.mp4"
    copying = copy_frames((frame for frame in frames), copy, 24)
    next(copying)
    copying.close()
    assert not [*copy.parent.iterdir()]
    (copy.parent / ".copy.mp4.part").write_text("left")
    np.testing.assert_array_equal([*copy_frames((frame for frame in frames), copy, 24)], frames)
    assert [*copy.parent.iterdir()] == [copy] and probe_video(copy, 24).frames == 7
    np.testing.assert_array_equal([*read_frames(copy, 24)], frames)


def failing(count: int, error: BaseException) -> Iterator[np.ndarray]:
    yield from smooth(count)
    raise error


WRITERS: dict[str, Callable[[Iterator[np.ndarray], Path], Path]] = {
    ".mp4": lambda frames, path: write(frames, path.with_suffix(".mp4"), comment="c"),
    "": lambda frames, path: write_frame_folder(frames, path, comment="c"),
}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("suffix", WRITERS)
def test_interrupted(tmp_path: Path, suffix: str, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"a.partial{suffix}", f"a.partial-2{suffix}"]
    for name in names:
        with pytest.raises(type(error)) as caught, caplog.at_level(logging.WARNING):
            WRITERS[suffix](failing(7, error), tmp_path / "a")
        assert caught.value is error
        assert name in caplog.text
        partial = tmp_path / name
        assert len(list(read_frames(partial, 24)) if suffix else os.listdir(partial)) == 7
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("suffix", WRITERS)
def test_no_frames(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(RuntimeError, match="no frames"):
        WRITERS[suffix](iter(()), tmp_path / "new" / "a")
    with pytest.raises(KeyboardInterrupt):
        WRITERS[suffix](failing(0, KeyboardInterrupt()), tmp_path / "new" / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("bad", [np.zeros((64, 95, 3), np.uint8), np.zeros((64, 96, 3), np.float32)])
def test_only_whole_frames_before_a_failure_are_kept(tmp_path: Path, bad: np.ndarray) -> None:
    """A frame that cannot be written ends the file, even if good frames follow."""
    with pytest.raises(ValueError, match=r"frame is .* not uint8"):
        write([*smooth(5), bad, *smooth(5)], tmp_path / "a.mp4")
    assert len(list(read_frames(tmp_path / "a.partial.mp4", 24))) == 5


@pytest.mark.parametrize("read", ["", "head -c 100000 >/dev/null;", "cat >/dev/null;"])
def test_ffmpeg_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    """At once, in the middle, and at the end."""
    leave = 'for last; do :; done\n: > "${last#file:}"'
    fake_ffmpeg(tmp_path, f'{leave}\n{read}\necho "No space left" >&2\nexit 1', monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError) as caught:
        write(smooth(40), tmp_path / "out" / "a.mp4")
    assert "No space left" in str(caught.value) + str(caught.value.__cause__)
    assert not os.listdir(tmp_path / "out")


INTERRUPTED = """
import logging, sys, numpy as np
from pathlib import Path
from skyreels_v3.media.video_writer import write_video
logging.basicConfig(level=logging.WARNING)
frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
def frames():
    while True:
        print("frame", flush=True)
        yield frame
write_video(frames(), Path(sys.argv[1]), height=480, width=640, fps=24, comment=str)
"""


@pytest.mark.slow
def test_ctrl_c_keeps_the_frames(tmp_path: Path) -> None:
    """As in a terminal: the signal goes to the whole process group, mostly while a frame is being passed to ffmpeg."""
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
    frames = probe_video(tmp_path / "a.partial.mp4", 24).frames
    assert frames >= 11
    assert len(list(read_frames(tmp_path / "a.partial.mp4", 24))) == frames


# Producing frames while others are written


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns a file; until it exists ffmpeg does not start and accepts no frame."""
    path = tmp_path / "go"
    fake_ffmpeg(tmp_path, f'while [ ! -e "{path}" ]; do sleep 0.01; done\nexec "$FFMPEG" "$@"', monkeypatch)
    yield path
    path.touch()  # a failing test must not hang


class Producer:
    """Produces frames of different grays and counts them; a frame is larger than a pipe's buffer."""

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
        """Whether exactly `count` frames get produced while the writer is blocked."""
        end = time.monotonic() + 10
        while self.made < count and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        return self.made == count


def write_large(frames: Producer, path: Path) -> Path:
    return write(frames, path, height=240, width=320)


def written(path: Path) -> list[int]:
    """Which of a producer's frames are in a file."""
    return [round(frame.mean() / 5) for frame in read_frames(path, 24)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    time.sleep(0.05)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("frame writer")]


def test_frames_are_made_while_one_is_written(tmp_path: Path, gate: Path) -> None:
    """As many as the bound allows, with none lost or out of order."""
    frames = Producer(3 * FRAMES_AHEAD)
    run = threading.Thread(target=write_large, args=(frames, tmp_path / "a.mp4"))
    run.start()
    assert frames.has_made(FRAMES_AHEAD + 1)  # one is being written
    gate.touch()
    run.join()
    assert frames.made == 3 * FRAMES_AHEAD
    assert written(tmp_path / "a.mp4") == list(range(3 * FRAMES_AHEAD))


def interrupt(frames: Producer, made: int, then: Callable[[], object]) -> None:
    """Send Ctrl-C once `made` frames are produced, and call `then` a little later."""

    def work() -> None:
        frames.has_made(made)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        then()

    threading.Thread(target=work).start()


@pytest.mark.slow
@pytest.mark.parametrize("count", [FRAMES_AHEAD - 6, 3 * FRAMES_AHEAD])
def test_ctrl_c_while_waiting_for_the_encoder(tmp_path: Path, gate: Path, count: int) -> None:
    """Waiting for it to finish, and waiting for room in its queue: every frame that was produced is kept."""
    frames = Producer(count)
    made = min(count, FRAMES_AHEAD + 1)
    interrupt(frames, made, gate.touch)
    with pytest.raises(KeyboardInterrupt):
        write_large(frames, tmp_path / "a.mp4")
    assert frames.made == made
    assert written(tmp_path / "a.partial.mp4") == list(range(made))


@pytest.mark.slow
def test_second_ctrl_c_does_not_wait_for_the_encoder(tmp_path: Path, gate: Path) -> None:
    """The encoder hangs; it is killed and nothing is left."""
    frames = Producer(3 * FRAMES_AHEAD)
    interrupt(frames, FRAMES_AHEAD + 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_large(frames, tmp_path / "out" / "a.mp4")
    assert not os.listdir(tmp_path / "out")


def test_dead_encoder_stops_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, "head -c 500000 >/dev/null\necho 'No space left' >&2\nexit 1", monkeypatch)
    frames = Producer(10_000)
    with pytest.raises(RuntimeError, match="ffmpeg"):
        write_large(frames, tmp_path / "a.mp4")
    assert frames.made <= 4 + FRAMES_AHEAD


# Sound


def write_with(audio: object, count: int, path: Path, fps: int = 25, **options) -> Path:
    return write(smooth(count), path, fps, audio=audio, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rate, channels, layout",
    [
        *((rate, 1, f"{rate} Hz, mono") for rate in (16_000, 44_100, 48_000)),
        *((rate, 2, f"{rate} Hz, stereo") for rate in (22_050, 48_000, 96_000)),
        (192_000, 2, "96000 Hz, stereo"),
        (48_000, 6, "48000 Hz, stereo"),
    ],
)
def test_sound_is_heard_in_time_at_its_own_quality(tmp_path: Path, rate: int, channels: int, layout: str) -> None:
    """AAC starts with a priming frame, which must not delay the sound."""
    path = write_with(clicks(tmp_path / "a.wav", rate, 2.0, (0.2, 1.0, 1.9), channels), 50, tmp_path / "a.mp4")
    assert click_times(path) == pytest.approx([0.2, 1.0, 1.9], abs=0.004)
    assert lengths(path) == pytest.approx((2.0, 2.0), abs=1e-3)
    assert f"Audio: aac (LC) (mp4a / 0x6134706D), {layout}" in description(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds, rate", [(0.4, 44_100), (1.97, 44_100), (1.999, 44_100), (2.001, 44_100), (9.0, 44_100), (2.04, 16_000)]
)
def test_the_picture_decides_the_length(tmp_path: Path, seconds: float, rate: int) -> None:
    path = write_with(clicks(tmp_path / "a.wav", rate, seconds, (0.3,)), 50, tmp_path / "a.mp4")
    assert len(list(read_frames(path, 25))) == probe_video(path, 25).frames == 50
    assert lengths(path) == pytest.approx((2.0, 2.0), abs=1e-3)
    assert click_times(path) == pytest.approx([0.3], abs=0.004)


def test_sound_leaves_picture_and_file_as_they_are(tmp_path: Path) -> None:
    silent = write(smooth(30), tmp_path / "b.mp4", comment=COMMENT)
    sound = clicks(tmp_path / "a.wav", 44_100, 2.0, (0.3,))
    path = write_with(sound, 30, tmp_path / "new" / "a.mp4", 24, comment=COMMENT)
    assert os.listdir(path.parent) == ["a.mp4"]
    assert all(np.array_equal(a, b) for a, b in zip(read_frames(path, 24), read_frames(silent, 24), strict=True))
    check_video(path, "96x64", 24)
    assert read_comment(path) == COMMENT


def test_late_sound_track_begins_with_the_picture(tmp_path: Path) -> None:
    """The model gets the sound from `read_audio`, which starts it at zero too."""
    sound = clicks(tmp_path / "a.flac", 44_100, 1.0, (0.3,))
    late = tmp_path / "late.mkv"
    ffmpeg("-i", encode(smooth(50), tmp_path / "b.mp4", 25), "-itsoffset", 0.7, "-i", sound, "-c", "copy", late)
    assert click_times(late) == pytest.approx([1.0], abs=0.004)
    assert click_times(write_with(late, 50, tmp_path / "c.mp4")) == pytest.approx([0.3], abs=0.004)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_partial_file_has_sound(tmp_path: Path, error: BaseException) -> None:
    sound = clicks(tmp_path / "a.wav", 44_100, 3.0, (0.1, 0.5, 2.0))
    with pytest.raises(type(error)):
        write(failing(20, error), tmp_path / "a.mp4", 25, audio=sound)
    assert len(list(read_frames(tmp_path / "a.partial.mp4", 25))) == 20
    assert click_times(tmp_path / "a.partial.mp4") == pytest.approx([0.1, 0.5], abs=0.004)
    assert lengths(tmp_path / "a.partial.mp4") == pytest.approx((0.8, 0.8), abs=1e-3)


def test_unusable_sound_does_not_cost_the_frames(tmp_path: Path) -> None:
    """The file was intact when it was probed, perhaps hours ago."""
    (tmp_path / "a.wav").write_text("hello " * 100)
    with pytest.raises(RuntimeError, match=r"a\.wav "):
        write_with(tmp_path / "a.wav", 20, tmp_path / "out" / "a.mp4")
    assert os.listdir(tmp_path / "out") == ["a.partial.mp4"]
    assert len(list(read_frames(tmp_path / "out" / "a.partial.mp4", 25))) == 20


def test_ctrl_c_while_the_sound_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(video_writer, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_with(clicks(tmp_path / "a.wav", 44_100, 3.0, (0.1,)), 20, tmp_path / "out" / "a.mp4")
    assert os.listdir(tmp_path / "out") == ["a.partial.mp4"]
    assert len(list(read_frames(tmp_path / "out" / "a.partial.mp4", 25))) == 20


# The sound of a clip that precedes the new frames


@pytest.mark.slow
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
    """Silence follows it; the clip lasts 1.5 s at another frame rate, the video 3 s."""
    sound = clicks(tmp_path / "a.wav", 48_000, 3.0, (0.2, 0.9, 1.9), 2)
    picture = encode(smooth(45), tmp_path / "b.mp4", 30)
    streams = ["-c:v", "copy", "-c:a", "aac", "-map", "0:v", "-map", "1:a"]
    ffmpeg("-i", picture, *options, "-i", sound, *streams, tmp_path / name)
    info = probe_video(tmp_path / name, 24)
    assert info.has_sound
    path = write_with(info, 72, tmp_path / "out.mp4", 24)
    assert click_times(path) == pytest.approx(heard_at, abs=0.03)
    assert lengths(path) == pytest.approx((3.0, 3.0), abs=1e-3)


def test_sound_of_a_clip_with_gaps_in_its_times(tmp_path: Path) -> None:
    """Both tracks have a gap of one second, as when a phone's recording is interrupted."""
    pause = "'PTS+gte(T,0.5)/TB'"
    sound = clicks(tmp_path / "a.wav", 48_000, 1.5, (0.2, 0.9))
    picture = encode(smooth(36), tmp_path / "b.mp4", 24)
    filters = ["-vf", f"setpts={pause}", "-af", f"asetpts={pause}", "-fps_mode", "passthrough", "-c:a", "libopus"]
    ffmpeg("-i", picture, "-i", sound, *filters, *LOSSLESS, tmp_path / "c.mkv")
    info = probe_video(tmp_path / "c.mkv", 24)
    assert info.frames == 60
    assert click_times(write_with(info, 84, tmp_path / "out.mp4", 24)) == pytest.approx((0.2, 1.9), abs=0.03)


def test_sound_of_a_clip_that_cannot_be_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = tmp_path / "a.mkv"
    sound = clicks(tmp_path / "a.wav", 48_000, 1.0, (0.2,))
    ffmpeg("-i", encode(smooth(24), tmp_path / "b.mp4", 24), "-i", sound, clip)
    info = probe_video(clip, 24)
    clip.unlink()
    assert write_with(info, 48, tmp_path / "out.mp4", 24).name == "out.mp4"
    assert "a.mkv" in caplog.text
    assert "the video has no sound" in caplog.text
