"""Interrupted runs: what they leave, and that they go on to the very video of a run that was left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from skyreels_v3.errors import UserError
from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.video import read_frames
from skyreels_v3.pipelines.state import RunState, open_state, state_folder
from tests.conftest import ROOT, files_in, stop_at

ASSETS = ROOT / "assets"
FLAGS = {"seed": 42, "dtype": "float32"}
TINY = (
    "--prompt",
    "a",
    "--model_id",
    "tiny",
    "--device",
    "cpu",
    "--height",
    "32",
    "--width",
    "32",
    "--output",
    "o/a.mp4",
)
STEPS = 60  # enough to be stopped in
SECONDS = {"talking_avatar": 5.6, "single_shot_extension": 6}  # of three passes, and of two


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    """Here and in the processes started: the sums of one are those of the other, and small tensors are quicker."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(tmp_path) -> dict[str, tuple[object, ...]]:
    """A command line for each task."""
    sound = tmp_path / "speech.wav"
    speech = ["-stream_loop", "-1", "-i", ASSETS / "speech.mp3", "-t", str(SECONDS["talking_avatar"])]
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *speech, sound], stdin=subprocess.DEVNULL, check=True)
    avatar = ("--input_image", ASSETS / "portrait.png", "--input_audio", sound)
    extension = ("--input_video", ASSETS / "boat.mp4", "--duration", SECONDS["single_shot_extension"])
    inputs = {"talking_avatar": avatar, "single_shot_extension": extension}
    return {
        task: ("--task_type", task, *flags, *TINY, "--num_inference_steps", STEPS) for task, flags in inputs.items()
    }


def frames_of(path: Path, fps: int) -> np.ndarray:
    return np.stack(list(read_frames(path, fps)))


@pytest.mark.parametrize(
    ("task", "passes", "fps", "stop"),
    [("talking_avatar", 3, 25, signal.SIGKILL), ("single_shot_extension", 2, 24, signal.SIGKILL)],
)
def test_a_killed_run_goes_on_to_the_same_video(start, main, command, tmp_path, task, passes, fps, stop):
    working = tmp_path / "working"
    run = start(*command[task])
    stop_at(run, rf"denoising {passes}/{passes}: .* \d/{STEPS} ", stop)
    assert run.returncode == -stop
    left = files_in(working / "o")
    finished = {f"a.state/pass-{number:03d}.safetensors" for number in range(passes - 1)}
    assert left >= {"a.state/request.json", *finished}
    assert {name.split("/")[0] for name in left} == {"a.state"}  # unfinished files are in there as well
    (working / "o" / "a.state" / ".a.0123456789ab.tmp.mp4").touch()

    os.chdir(working)
    code, stdout, stderr = main(*command[task], "--resume")
    assert (code, stdout) == (0, "o/a.mp4\n"), stderr
    assert not re.search(r"denoising 1/", stderr)
    assert re.search(rf"denoising {passes}/{passes}: 100%", stderr)
    assert files_in(working) == {"o/a.mp4"}
    assert not (working / "o" / "a.state").exists()
    (working / "o" / "a.mp4").rename(working / "resumed.mp4")
    code, _, stderr = main(*command[task])
    assert code == 0, stderr
    resumed = frames_of(working / "resumed.mp4", fps)
    assert len(resumed) == SECONDS[task] * fps
    np.testing.assert_array_equal(resumed, frames_of(working / "o" / "a.mp4", fps))
    assert files_in(working) == {"o/a.mp4", "resumed.mp4"}  # a run that completes leaves nothing else


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(start, command, tmp_path):
    working = tmp_path / "working"
    run = start(*command["talking_avatar"])
    stderr = stop_at(run, rf"denoising 3/3: .* \d/{STEPS} ", signal.SIGINT)
    assert run.returncode == 130
    passes = {f"o/a.state/pass-00{number}.safetensors" for number in (0, 1)}
    assert files_in(working) == {"o/a.partial.mp4", "o/a.state/request.json", *passes}
    assert not files_in(tmp_path / "temporary")
    assert "the first 69 frames are in o/a.partial.mp4" in stderr
    assert "o/a.state keeps what is finished" in stderr
    assert "repeat the command with --resume, --output o/a.mp4 and --seed 42" in stderr
    partial = working / "o" / "a.partial.mp4"
    assert len(frames_of(partial, 25)) == 69
    assert probe_audio(partial, "").seconds == pytest.approx(69 / 25, abs=1 / 25)


def numbers(state: RunState, *values: float) -> None:
    """Save passes."""
    for value in values:
        state.save(torch.full((1, 2), value), torch.Generator().manual_seed(int(value)))


def test_passes_come_back_with_the_state_of_the_noise(tmp_path):
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=False)
    generator = torch.Generator().manual_seed(5)
    assert state.recall() == {}
    torch.randn(3, generator=generator)
    state.save(torch.ones(1, 2), generator)
    expected = torch.randn(3, generator=generator)
    state.close(completed=False)
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=True)
    generator = torch.Generator().manual_seed(5)
    saved = state.recall()
    generator.set_state(saved["generator"])
    torch.testing.assert_close(saved["latents"], torch.ones(1, 2))
    torch.testing.assert_close(torch.randn(3, generator=generator), expected)
    assert state.recall() == {}
    state.close(completed=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 60, 200])
def test_a_damaged_pass(tmp_path, size):
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=False)
    numbers(state, 1.0)
    state.close(completed=False)
    file = state.folder / "pass-000.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*pass-000.safetensors is damaged .*delete it, and the pass"):
        state.recall()
    file.unlink()
    assert state.recall() == {}
    state.close(completed=True)


def test_two_runs_for_one_output(tmp_path):
    output = tmp_path / "a.mp4"
    first, second = (open_state(output, FLAGS | {"seed": seed}, resume=False) for seed in (1, 2))
    assert [state.folder for state in (first, second)] == [state_folder(output), state_folder(output, 2)]
    numbers(first, 1.0)
    numbers(second, 2.0)
    second.close(completed=False)
    again = open_state(output, FLAGS | {"seed": 2}, resume=True)
    assert again.folder == second.folder
    again.close(completed=False)
    first.close(completed=True)
    again = open_state(output, FLAGS | {"seed": 2}, resume=True)  # though it is not the first any more
    torch.testing.assert_close(again.recall()["latents"], torch.full((1, 2), 2.0))
    again.close(completed=True)
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_going_on_is_not_touched(tmp_path):
    pytest.importorskip("fcntl")
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=False)
    numbers(state, 1.0)
    (state.folder / "a.tmp.mp4").touch()
    with pytest.raises(UserError, match="in use by a run that has not ended; wait for it"):
        open_state(tmp_path / "a.mp4", FLAGS, resume=True)
    assert (state.folder / "a.tmp.mp4").exists()
    state.close(completed=True)


def test_a_state_of_other_flags_is_not_taken(tmp_path):
    state = open_state(tmp_path / "a.mp4", FLAGS, resume=False)
    numbers(state, 1.0)
    state.close(completed=False)
    for flags, change in (
        (FLAGS | {"seed": 1}, "seed 42 -> 1"),
        (FLAGS | {"shift": 5.0}, "shift None -> 5.0"),
        (FLAGS | {"dtype": "bfloat16"}, "dtype float32 -> bfloat16"),
    ):
        with pytest.raises(UserError, match=re.escape(f"other flags ({change}); repeat its command")):
            open_state(tmp_path / "a.mp4", flags, resume=True)
    with pytest.raises(UserError, match=r"b\.state holds no interrupted run"):
        open_state(tmp_path / "b.mp4", FLAGS, resume=True)


def test_a_run_without_a_finished_pass_leaves_nothing(tmp_path):
    state = open_state(tmp_path / "new" / "folder" / "a.mp4", FLAGS, resume=False)
    (state.folder / "a.tmp.mp4").touch()
    state.close(completed=False)
    assert not any(tmp_path.iterdir())
