"""Interrupted runs: what they leave behind, and that they resume to the same video as an uninterrupted run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.torch import load_file, save_file

from skyreels_v3.cli import parse_request
from skyreels_v3.denoising.guidance import FULL, text_guidance
from skyreels_v3.denoising.loop import ATTRIBUTES, denoise, euler, euler_of, restore_scheduler, scheduler_state, unipc
from skyreels_v3.errors import UserError
from skyreels_v3.generate import write
from skyreels_v3.inputs import open_inputs
from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.media.video_writer import read_comment, write_video
from skyreels_v3.outputs import record_of as record_of_request
from skyreels_v3.outputs import save_latents
from skyreels_v3.request import ResolvedRequest
from skyreels_v3.resume import RunRecord, RunState, find_left, open_state, state_folder
from skyreels_v3.wan.conditioning import Conditioning
from skyreels_v3.wan.rope import Segment
from tests.conftest import ASSETS, files_in, stop_at

FLAGS = {"seed": 42, "dtype": "float32"}
V1 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
TINY = (
    *("--prompt", "a", "--model_id", "tiny", "--device", "cpu", "--height", "32", "--width", "32"),
    *("--output", "o/a.mp4"),
)
STEPS = 60  # enough to be interrupted in between
SECONDS = {"talking_avatar": 5.6, "single_shot_extension": 6}  # for three passes, and for two


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    """Use one thread, here and in child processes, for reproducible sums; it is also faster for small tensors."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "passes", "fps", "stop"),
    [
        ("talking_avatar", 3, 25, signal.SIGINT),
        pytest.param("single_shot_extension", 2, 24, signal.SIGKILL, marks=pytest.mark.extended),
    ],
)
def test_an_ended_run_goes_on_to_the_same_video(start, main, command, tmp_path, caplog, task, passes, fps, stop):
    """From the middle of a pass to the same latents, keeping the folder of quantized weights that was already saved."""
    working, argv = tmp_path / "working", (*command[task], "--save_latents", "o/a.safetensors")
    more = ("--quant", "--save_quantized", "q")
    run = start(*argv, *more, "--checkpoint_every", "0.05")
    said = stop_at(run, rf"denoising {passes}/{passes}: .* [2-9]\d/{STEPS} ", stop)
    left = files_in(working / "o")
    if stop == signal.SIGINT:
        assert run.returncode == 130
        assert "the first 69 frames are in o/a.partial.mp4" in said
        assert "o/a.state holds the finished passes; to resume, repeat the command with --resume" in said
        partial = working / "o" / "a.partial.mp4"
        assert len(frames_of(partial, fps)) == 69
        assert probe_audio(partial).seconds == pytest.approx(69 / fps, abs=1 / fps)
        assert not files_in(tmp_path / "temporary")
        left.remove("a.partial.mp4")
    else:
        assert run.returncode == -stop
    finished = {f"a.state/pass-{number:03d}.safetensors" for number in range(passes - 1)}
    assert left >= {"a.state/request.json", f"a.state/steps-{passes - 1:03d}.safetensors", *finished}
    assert {name.split("/")[0] for name in left} <= {"a.state", "a.partial.mp4"}  # unfinished files
    (working / "o" / "a.state" / ".a.0123456789ab.tmp.mp4").touch()

    os.chdir(working)
    made = (working / "q").stat().st_mtime_ns
    code, stdout, stderr = main(*argv, *more, "--resume")
    assert (code, stdout) == (0, "o/a.mp4\n"), stderr
    assert not re.search(r"denoising 1/", stderr)
    assert re.search(rf"resuming after step \d+ of {STEPS}\n", caplog.text)
    assert (working / "q").stat().st_mtime_ns == made
    assert files_in(working / "o") == {"a.mp4", "a.safetensors"}
    (working / "o").rename(working / "resumed")
    code, _, stderr = main(*argv, "--quant")
    assert code == 0, stderr
    resumed = frames_of(working / "resumed" / "a.mp4", fps)
    assert len(resumed) == SECONDS[task] * fps
    np.testing.assert_array_equal(resumed, frames_of(working / "o" / "a.mp4", fps))
    first, second = (load_file(working / name / "a.safetensors") for name in ("resumed", "o"))
    assert first.keys() == second.keys() == {f"latents.{number}" for number in range(passes)}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def small() -> tuple[object, ...]:
    """A command line that takes a second."""
    task = ("--task_type", "reference_to_video", "--ref_imgs", ASSETS / "fox.png", "--num_frames", 5)
    return (*task, *TINY[:-2], "--num_inference_steps", 4)


def test_a_run_of_which_nothing_is_left_begins(main, small, interrupt, tmp_path, caplog):
    argv = (*small, "--output", "o/a.mp4")
    interrupt(2)
    assert main(*argv)[:2] == (130, "")
    assert not (tmp_path / "o").exists()
    interrupt(0)
    assert main(*argv, "--resume")[:2] == (0, "o/a.mp4\n")
    assert "there is no interrupted run of this request in o; starting from the beginning" in caplog.text


def test_a_run_that_begins_again_leaves_nothing_of_the_first(main, small, interrupt, tmp_path):
    """Once it is complete; what other runs left stays."""
    argv, folder = (*small, "--checkpoint_every", "0.0001"), tmp_path / "result" / "reference_to_video"
    interrupt(2)
    for seed in (7, 42):
        assert main(*argv, "--seed", seed)[0] == 130
        (state,) = folder.glob(f"{seed}_*.state")
        size = {"height": 32, "width": 32, "fps": 24}
        name, comment = f"{state.stem}.partial.mp4", (state / "request.json").read_text()
        write_video([np.zeros((32, 32, 3), np.uint8)], folder / name, comment=lambda text=comment: text, **size)
    interrupt(0)
    code, stdout, stderr = main(*small)
    assert code == 0, stderr
    others = {path.name for path in folder.glob("7_*")}
    assert len(others) == 2 and {path.name for path in folder.iterdir()} == {Path(stdout.strip()).name, *others}


def test_the_device_is_what_it_came_to(tmp_path):
    """--device auto is only resolved once torch is imported; then the devices are compared."""
    on_cpu = replace(record_of(tmp_path), device="cpu")
    for flags, device in (({"device": "auto"}, ""), ({}, "cpu"), ({"device": "cpu"}, ""), ({"device": "auto"}, "cpu")):
        leave(on_cpu, 1.0)
        state = open_state(replace(record_of(tmp_path, **flags), device=device), resume=True)
        assert state.resumed
        state.close(completed=True)
    leave(on_cpu, 1.0)
    for flags, device in (({"device": "cuda"}, ""), ({"device": "auto"}, "cuda")):
        with pytest.raises(UserError, match=r"other flags \(device cpu -> cuda\)"):
            open_state(replace(record_of(tmp_path, **flags), device=device), resume=True)


@pytest.mark.parametrize("seed", [(), ("--seed", "-1")])
def test_without_an_output_the_interrupted_run_is_found(main, small, interrupt, tmp_path, caplog, seed):
    interrupt(2)
    assert main(*small, "--checkpoint_every", "0.0001", "--seed", "7")[0] == 130
    assert main(*small, "--checkpoint_every", "0.0001", *seed)[0] == 130
    folder = tmp_path / "result" / "reference_to_video"
    state = next(path for path in folder.iterdir() if not path.name.startswith("7_"))
    interrupt(0)
    if seed:
        shutil.rmtree(next(folder.glob("7_*")))
    code, stdout, stderr = main(*small, *seed, "--resume")
    assert code == 0, stderr
    assert "resuming after step 2 of 4" in caplog.text
    assert tmp_path / stdout.strip() == state.with_suffix(".mp4")
    assert main(*small, "--seed", state.name.split("_")[0], "--resume")[:2] == (0, stdout)
    assert "is already done" in caplog.text


@pytest.mark.parametrize("output", ["o/a.mp4", "o/a/"])
def test_a_run_that_was_complete_is_done(main, small, tmp_path, caplog, output):
    argv = (*small, "--output", output)
    assert main(*argv)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.clear()
    assert main(*argv, "--resume") == (0, f"{Path(output)}\n", "")
    assert caplog.messages == [f"{Path(output)} is already done"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    code, _, stderr = main(*argv, "--seed", "1", "--resume")
    assert code == 2 and "exists already" in stderr
    left = json.loads(read_comment(tmp_path / output)) | {"output": output, "save_quantized": None}
    left["flags"]["seed"] = 1
    (tmp_path / "o" / "a.state").mkdir()  # from an earlier interrupted run
    (tmp_path / "o" / "a.state" / "request.json").write_text(json.dumps(left))
    code, _, stderr = main(*argv, "--seed", "1", "--resume")
    assert code == 2 and "exists already" in stderr and (tmp_path / "o" / "a.state").exists()


def test_a_job_that_was_complete_is_done(main, small, tmp_path):
    """By a run that was killed before it could report success or clean up."""
    names, values = small[::2], small[1::2]
    flags = {name.removeprefix("--"): str(value) for name, value in zip(names, values, strict=True)}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(flags | {"output": "o/a.mp4"}))
    argv = (*small, "--output", "o/a.mp4")
    assert main(*argv)[0] == 0
    request, inputs = open_inputs(parse_request([str(word) for word in argv]), tmp_path)
    resolved = ResolvedRequest.of(request)
    state = open_state(record_of_request(resolved, inputs, dtype="float32"))
    save_passes(state, 1.0)
    state.close(completed=False)
    assert main("--jobs", "jobs.jsonl", "--dry_run")[:2] == (0, f"{'line':14}1\n{'done':14}o/a.mp4\n\n")
    assert (tmp_path / "o" / "a.state").exists()
    assert main("--jobs", "jobs.jsonl")[:2] == (0, "o/a.mp4\n")
    assert files_in(tmp_path / "o") == {"a.mp4"}


def test_latents_that_could_not_be_saved_are_saved_later(main, small, monkeypatch, tmp_path):
    def write_and_block(*arguments: Any) -> Path:
        (tmp_path / "l").write_text("in the way of a folder")
        return write(*arguments)

    monkeypatch.setattr("skyreels_v3.generate.write", write_and_block)
    argv = (*small, "--output", "o/a.mp4")
    code, stdout, stderr = main(*argv, "--save_latents", "l/a.safetensors")
    assert (code, stdout) == (1, "o/a.mp4\n")
    reason = "--save_latents: l/a.safetensors cannot be written (Not a directory)"
    assert f"{reason}; give another --save_latents and --resume; o/a.mp4 is complete" in stderr
    code, stdout, _ = main(*argv, "--save_latents", "a.safetensors", "--resume")
    assert (code, stdout) == (0, "o/a.mp4\n")
    assert files_in(tmp_path / "o") == {"a.mp4"}
    assert main(*argv[:-1], "o/b.mp4", "--save_latents", "b.safetensors")[0] == 0
    first, second = (load_file(tmp_path / name)["latents.0"] for name in ("a.safetensors", "b.safetensors"))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_a_full_disk(main, small, small_disk, caplog):
    """What cannot fit is refused at once; intermediate saves that do not fit only cause a warning."""
    disk = small_disk(40)
    argv = (*small, "--num_frames", 33, "--height", 96, "--width", 96, "--num_inference_steps", 1, "--output")
    code, _, stderr = main(*argv, "o/a.mp4", "--save_latents", disk / "a.safetensors")
    assert code == 2
    assert f"--save_latents: {disk}/a.safetensors needs 99.3 kB, but 41.0 kB is free in {disk}; free some" in stderr
    code, _, stderr = main(*argv, disk / "a.mp4")
    assert code == 1
    assert f"41.0 kB is free in {disk}; this run may need" in caplog.text
    assert "pass-000.safetensors cannot be written (No space left on device, " in caplog.text
    assert re.search(rf"{disk}/a.mp4 cannot be written \(No space left on device, \d.+ free in {disk}\); free", stderr)
    assert not any(disk.iterdir())


# The files of an interrupted run


def record_of(folder: Path, **changes: object) -> RunRecord:
    return RunRecord(folder / "a.mp4", FLAGS | changes)


def save_passes(state: RunState, *values: float) -> None:
    for value in values:
        state.save(torch.full((1, 2), value), torch.Generator().manual_seed(int(value)))


def leave(record: RunRecord, *values: float) -> Path:
    """Save passes and stop, like an interrupted run; returns its state folder."""
    state = open_state(record)
    save_passes(state, *values)
    state.close(completed=False)
    return state.folder


def check_pass(state: RunState, value: float) -> None:
    torch.testing.assert_close(state.recall()["latents"], torch.full((1, 2), value))


def test_passes_come_back_with_the_state_of_the_noise(tmp_path):
    state = open_state(record_of(tmp_path))
    generator = torch.Generator().manual_seed(5)
    assert state.recall() == {}
    torch.randn(3, generator=generator)
    state.save(torch.ones(1, 2), generator)
    expected = torch.randn(3, generator=generator)
    state.close(completed=False)
    state = open_state(record_of(tmp_path), resume=True)
    saved = state.recall()
    generator.set_state(saved["generator"])
    torch.testing.assert_close(saved["latents"], torch.ones(1, 2))
    torch.testing.assert_close(torch.randn(3, generator=generator), expected)
    assert state.recall() == {}
    state.close(completed=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_damaged_pass_is_made_again(tmp_path, caplog, size):
    file = leave(record_of(tmp_path), 1.0) / "pass-000.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    state = open_state(record_of(tmp_path), resume=True)
    assert state.recall() == {} and "pass-000.safetensors is damaged" in caplog.text
    save_passes(state, 2.0)
    state.close(completed=False)
    check_pass(open_state(record_of(tmp_path), resume=True), 2.0)


def test_two_runs_for_one_output(tmp_path):
    first, second = (open_state(record_of(tmp_path, seed=seed)) for seed in (1, 2))
    assert [state.folder for state in (first, second)] == [state_folder(tmp_path / "a.mp4", n) for n in (1, 2)]
    save_passes(first, 1.0)
    save_passes(second, 2.0)
    second.close(completed=False)
    first.close(completed=True)
    again = open_state(record_of(tmp_path, seed=2), resume=True)  # although it is no longer the first
    assert again.folder == second.folder
    check_pass(again, 2.0)
    again.close(completed=True)
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_going_on_is_not_touched(tmp_path):
    pytest.importorskip("fcntl")
    state = open_state(record_of(tmp_path))
    save_passes(state, 1.0)
    (state.folder / "a.tmp.mp4").touch()
    with pytest.raises(UserError, match="in use by a run that has not ended; wait for it"):
        open_state(record_of(tmp_path), resume=True)
    other = open_state(record_of(tmp_path), resume=True, strict=False)
    assert (other.folder.name, other.resumed) == ("a.state-2", False)
    assert (state.folder / "a.tmp.mp4").exists()


def test_a_state_of_another_run_is_not_taken(tmp_path):
    record = replace(record_of(tmp_path), inputs=[("ref_imgs", "a.png", "12"), ("ref_imgs", "b.png", "34")])
    leave(record, 1.0)
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
    assert open_state(replace(record, flags=FLAGS | {"seed": 1}, seed_drawn=True), resume=True).resumed


@pytest.mark.parametrize("content", ["", "[1]", '{"output": "a.mp4"}', "\0\xff", "[" * 100_000])
def test_where_nothing_was_left_a_new_run_begins(tmp_path, content):
    (tmp_path / "a.state").mkdir()
    if content:
        (tmp_path / "a.state" / "request.json").write_text(content, encoding="latin-1")
    state = open_state(record_of(tmp_path), resume=True)
    assert (state.folder.name, state.resumed) == ("a.state-2", False)


@pytest.mark.parametrize(("padding", "resumed"), [("", True), (" " * (1 << 20), False)])
def test_a_record_without_end_is_none(tmp_path, padding, resumed):
    file = leave(record_of(tmp_path), 1.0) / "request.json"
    file.write_text(padding + file.read_text())
    assert open_state(record_of(tmp_path), resume=True).resumed == resumed


def test_a_run_without_a_finished_pass_leaves_nothing(tmp_path):
    state = open_state(RunRecord(tmp_path / "new" / "folder" / "a.mp4", FLAGS))
    (state.folder / "a.tmp.mp4").touch()
    state.close(completed=False)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    state = open_state(record_of(tmp_path / "o"))
    save_passes(state, 1.0)
    shutil.rmtree(tmp_path / "o")
    save_passes(state, 2.0)
    state.close(completed=False)
    state = open_state(record_of(tmp_path / "o"), resume=True)
    assert state.recall() == {}
    save_passes(state, 1.0)
    check_pass(state, 2.0)


def test_a_copy_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    state = open_state(record_of(tmp_path))
    for number in (0, 1):
        (state.folder / f"pass-00{number}.safetensors" / "in the way").mkdir(parents=True)
    save_passes(state, 1.0, 2.0, 3.0)
    assert state.failed and state.passes == 3
    (warning,) = (record.getMessage() for record in caplog.records)  # only once
    assert warning.startswith(f"{state.folder}/pass-000.safetensors cannot be written (Is a directory)")


def test_files_have_the_rights_that_the_user_gives(tmp_path):
    before = os.umask(0o002)
    try:
        state = open_state(record_of(tmp_path / "o"))
        save_passes(state, 1.0)
        latents = save_latents([torch.ones(1, 2)], tmp_path / "o" / "l.safetensors")
        rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*state.folder.iterdir(), latents)}
        folders = {stat.S_IMODE(path.stat().st_mode) for path in (state.folder, state.folder.parent)}
    finally:
        os.umask(before)
    assert rights == dict.fromkeys(("request.json", "pass-000.safetensors", "l.safetensors"), 0o664)
    assert folders == {0o775}


@pytest.mark.parametrize(
    "make_scheduler", [lambda: unipc(8, 5.0), lambda: euler(8, 5.0), lambda: euler_of(V1, 8, None)]
)
@pytest.mark.parametrize("done", [1, 2, 5, 7])
def test_denoising_goes_on_after_any_step_to_the_same_latents(tmp_path, make_scheduler, done):
    """With noise drawn at every step, and with multistep schedulers."""

    def denoised(state: RunState | None, start: int = 0) -> torch.Tensor:
        scheduler, generator = make_scheduler(), torch.Generator().manual_seed(3)
        latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        if start:
            saved = state.recall()
            generator.set_state(saved["generator"])
            restore_scheduler(scheduler, saved, torch.device("cpu"))
            latents = saved["latents"]
            assert scheduler.step_index == start

        def constraint(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return latents + 0.1 * sigma * torch.randn(latents.shape, generator=generator)

        conditions = {FULL: Conditioning(torch.zeros(1, 1, 1))}
        guidance = text_guidance(1.0)
        steps = denoise(SimpleModel(), scheduler, latents, conditions, guidance, constraint, done=start)
        for step, latents in steps:
            if state is not None and not start and step <= done:
                state.save_step(latents, generator, scheduler_state(scheduler))
        return latents

    state = open_state(record_of(tmp_path))
    expected = denoised(state)
    state.close(completed=False)
    state = open_state(record_of(tmp_path), resume=True)
    assert torch.equal(denoised(state, done), expected)
    save_passes(state, 1.0)
    assert files_in(state.folder) == {"request.json", "pass-000.safetensors"}  # the unfinished pass's file is gone
    state.close(completed=True)


class SimpleModel:
    """Stands in for a transformer."""

    def __call__(self, segments: Sequence[Segment], timestep: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
        return tuple(torch.sin(segment.latents * 3 + timestep / 500) for segment in segments)


@pytest.mark.parametrize(
    "record", [{"save_quantized": None}, {"output": "a.mp4"}, {"output": "a/", "save_quantized": None}]
)
def test_a_record_of_another_kind_is_no_interrupted_run(tmp_path, record):
    """A record that lacks required entries, or is of a folder of frames with the same name."""
    folder = tmp_path / "a.state"
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"flags": FLAGS, "inputs": [], **record}))
    assert find_left(record_of(tmp_path)) is None


def test_a_damaged_scheduler_state_is_refused_and_changes_nothing():
    state = scheduler_state(unipc(4, 5.0))
    attributes = json.loads(bytes(state[ATTRIBUTES].tolist()))
    for changed in (attributes | {"step": 1}, {}, attributes | {"sigmas": {"tensor": "gone", "cpu": True}}):
        scheduler = unipc(4, 5.0)
        content = torch.frombuffer(bytearray(json.dumps(changed).encode()), dtype=torch.uint8)
        with pytest.raises((ValueError, KeyError)):
            restore_scheduler(scheduler, state | {ATTRIBUTES: content}, torch.device("cpu"))
        assert "step" not in vars(scheduler) and torch.equal(scheduler.sigmas, unipc(4, 5.0).sigmas)


def test_a_pass_with_a_damaged_state_starts_over(main, small, interrupt, tmp_path, caplog):
    assert main(*small, "--output", "whole/")[0] == 0
    interrupt(3)
    assert main(*small, "--checkpoint_every", "0.0001", "--output", "a/")[0] == 130
    (steps,) = (tmp_path / "a.state").glob("steps-*")
    saved = load_file(steps)
    save_file({name: tensor for name, tensor in saved.items() if name != "sigmas"}, steps)
    interrupt(0)
    code, _, stderr = main(*small, "--output", "a/", "--resume")
    assert code == 0, stderr
    assert "the pass starts over" in caplog.text
    first, second = ((tmp_path / name / "00004.png").read_bytes() for name in ("a", "whole"))
    assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(second)).tobytes()
