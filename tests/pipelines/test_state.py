"""Interrupted runs: what they leave, and that they go on to the very video of a run that was left alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from skyreels_v3.errors import UserError
from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.video import read_frames
from skyreels_v3.models.transformer import Segment
from skyreels_v3.pipelines.outputs import save_latents
from skyreels_v3.pipelines.state import RunRecord, RunState, open_state, state_folder
from skyreels_v3.sampling.denoise import Conditioning, denoise
from skyreels_v3.sampling.guidance import FULL, text_guidance
from skyreels_v3.sampling.schedules import euler, euler_of, restore_scheduler, scheduler_state, unipc
from tests.conftest import ROOT, files_in, stop_at

ASSETS = ROOT / "assets"
FLAGS = {"seed": 42, "dtype": "float32"}
V1 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
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


def record_of(folder: Path, **changes: object) -> RunRecord:
    return RunRecord(folder / "a.mp4", FLAGS | changes)


def numbers(state: RunState, *values: float) -> None:
    """Save passes."""
    for value in values:
        state.save(torch.full((1, 2), value), torch.Generator().manual_seed(int(value)))


def test_passes_come_back_with_the_state_of_the_noise(tmp_path):
    state = open_state(record_of(tmp_path))
    generator = torch.Generator().manual_seed(5)
    assert state.recall() == {}
    torch.randn(3, generator=generator)
    state.save(torch.ones(1, 2), generator)
    expected = torch.randn(3, generator=generator)
    state.close(completed=False)
    state = open_state(record_of(tmp_path), resume=True)
    generator = torch.Generator().manual_seed(5)
    saved = state.recall()
    generator.set_state(saved["generator"])
    torch.testing.assert_close(saved["latents"], torch.ones(1, 2))
    torch.testing.assert_close(torch.randn(3, generator=generator), expected)
    assert state.recall() == {}
    state.close(completed=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_damaged_pass_is_made_again(tmp_path, caplog, size):
    state = open_state(record_of(tmp_path))
    numbers(state, 1.0)
    state.close(completed=False)
    file = state.folder / "pass-000.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    state = open_state(record_of(tmp_path), resume=True)
    assert state.recall() == {}
    assert "pass-000.safetensors is damaged" in caplog.text
    numbers(state, 2.0)
    state.close(completed=False)
    state = open_state(record_of(tmp_path), resume=True)
    torch.testing.assert_close(state.recall()["latents"], torch.full((1, 2), 2.0))
    state.close(completed=True)


def test_two_runs_for_one_output(tmp_path):
    output = tmp_path / "a.mp4"
    first, second = (open_state(record_of(tmp_path, seed=seed)) for seed in (1, 2))
    assert [state.folder for state in (first, second)] == [state_folder(output), state_folder(output, 2)]
    numbers(first, 1.0)
    numbers(second, 2.0)
    second.close(completed=False)
    again = open_state(record_of(tmp_path, seed=2), resume=True)
    assert again.folder == second.folder
    again.close(completed=False)
    first.close(completed=True)
    again = open_state(record_of(tmp_path, seed=2), resume=True)  # though it is not the first any more
    torch.testing.assert_close(again.recall()["latents"], torch.full((1, 2), 2.0))
    again.close(completed=True)
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_going_on_is_not_touched(tmp_path):
    pytest.importorskip("fcntl")
    state = open_state(record_of(tmp_path))
    numbers(state, 1.0)
    (state.folder / "a.tmp.mp4").touch()
    with pytest.raises(UserError, match="in use by a run that has not ended; wait for it"):
        open_state(record_of(tmp_path), resume=True)
    other = open_state(record_of(tmp_path), resume=True, strict=False)
    assert (other.folder.name, other.resumed) == ("a.state-2", False)
    assert (state.folder / "a.tmp.mp4").exists()
    for each in (state, other):
        each.close(completed=True)


def test_a_state_of_another_run_is_not_taken(tmp_path):
    record = RunRecord(tmp_path / "a.mp4", FLAGS, inputs=[("ref_imgs", "a.png", "12"), ("ref_imgs", "b.png", "34")])
    state = open_state(record)
    numbers(state, 1.0)
    state.close(completed=False)
    for changes, problem in (
        ({"flags": FLAGS | {"seed": 1}}, "--resume: the interrupted run had other flags (seed 42 -> 1); repeat its"),
        ({"flags": FLAGS | {"shift": 5.0}}, "(shift None -> 5.0); repeat its command"),
        ({"flags": FLAGS | {"dtype": "bfloat16"}}, "(dtype float32 -> bfloat16); repeat its command"),
        ({"inputs": [record.inputs[0], ("ref_imgs", "b.png", "56")]}, "--ref_imgs: b.png has changed since the inter"),
    ):
        other = replace(record, **changes)
        with pytest.raises(UserError, match=re.escape(problem)):
            open_state(other, resume=True)
        new = open_state(other, resume=True, strict=False)
        assert not new.resumed
        new.close(completed=True)
    drawn = open_state(replace(record, flags=FLAGS | {"seed": 1}, any_seed=True), resume=True)
    assert drawn.resumed
    drawn.close(completed=True)


@pytest.mark.parametrize("content", ["", "[1]", '{"output": "a.mp4"}', "\0\xff"])
def test_where_nothing_was_left_a_new_run_begins(tmp_path, content):
    (tmp_path / "a.state").mkdir()
    if content:
        (tmp_path / "a.state" / "request.json").write_text(content, encoding="latin-1")
    state = open_state(record_of(tmp_path), resume=True)
    assert (state.folder.name, state.resumed) == ("a.state-2", False)
    state.close(completed=True)


def test_a_run_without_a_finished_pass_leaves_nothing(tmp_path):
    state = open_state(RunRecord(tmp_path / "new" / "folder" / "a.mp4", FLAGS))
    (state.folder / "a.tmp.mp4").touch()
    state.close(completed=False)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    state = open_state(RunRecord(tmp_path / "o" / "a.mp4", FLAGS))
    numbers(state, 1.0)
    shutil.rmtree(tmp_path / "o")
    numbers(state, 2.0)
    state.close(completed=False)
    state = open_state(RunRecord(tmp_path / "o" / "a.mp4", FLAGS), resume=True)
    assert state.recall() == {}
    numbers(state, 1.0)
    torch.testing.assert_close(state.recall()["latents"], torch.full((1, 2), 2.0))
    state.close(completed=True)


def test_a_copy_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    state = open_state(record_of(tmp_path))
    for number in (0, 1):
        (state.folder / f"pass-00{number}.safetensors" / "in the way").mkdir(parents=True)
    numbers(state, 1.0, 2.0, 3.0)
    assert state.failed and state.passes == 3
    (warning,) = (record.getMessage() for record in caplog.records)  # once for all
    assert warning.startswith(f"{state.folder}/pass-000.safetensors cannot be written (Is a directory)")
    state.close(completed=True)


def test_files_have_the_rights_that_the_user_gives(tmp_path):
    before = os.umask(0o002)
    try:
        state = open_state(RunRecord(tmp_path / "o" / "a.mp4", FLAGS))
        numbers(state, 1.0)
        latents = save_latents([torch.ones(1, 2)], tmp_path / "o" / "l.safetensors")
        rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*state.folder.iterdir(), latents)}
        folders = {stat.S_IMODE(path.stat().st_mode) for path in (state.folder, state.folder.parent)}
    finally:
        os.umask(before)
    assert rights == dict.fromkeys(("request.json", "pass-000.safetensors", "l.safetensors"), 0o664)
    assert folders == {0o775}
    state.close(completed=True)


@pytest.mark.parametrize(
    "make_scheduler", [lambda: unipc(8, 5.0), lambda: euler(8, 5.0), lambda: euler_of(V1, 8, None)]
)
@pytest.mark.parametrize("done", [1, 2, 5, 7])
def test_denoising_goes_on_after_any_step_to_the_same_latents(tmp_path, make_scheduler, done):
    """With noise that is drawn at every step, and a model whose every step matters to the next."""

    def denoised(state: RunState | None, start: int = 0) -> torch.Tensor:
        scheduler, generator = make_scheduler(), torch.Generator().manual_seed(3)
        latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        if start:
            saved = state.recall()
            generator.set_state(saved["generator"])
            restore_scheduler(scheduler, saved, torch.device("cpu"))
            latents = saved["latents"]
            assert scheduler.step_index == start

        def pin(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return latents + 0.1 * sigma * torch.randn(latents.shape, generator=generator)

        def after_step(step: int, latents: torch.Tensor) -> None:
            if state is not None and not start and step <= done:
                state.save_step(latents, generator, scheduler_state(scheduler))

        condition = Conditioning(torch.zeros(1))
        return denoise(
            SimpleModel(), scheduler, latents, {FULL: condition}, text_guidance(1.0), after_step, pin, done=start
        )

    state = open_state(record_of(tmp_path))
    expected = denoised(state)
    state.close(completed=False)
    state = open_state(record_of(tmp_path), resume=True)
    assert torch.equal(denoised(state, done), expected)
    numbers(state, 1.0)
    assert files_in(state.folder) == {"request.json", "pass-000.safetensors"}  # what was unfinished has had its day
    state.close(completed=True)


class SimpleModel:
    """In the place of a transformer."""

    def embed_context(self, *_: object) -> None:
        return None

    def __call__(self, segments: Sequence[Segment], timestep: torch.Tensor, context: None) -> tuple[torch.Tensor, ...]:
        return tuple(torch.sin(segment.latents * 3 + timestep / 500) for segment in segments)
