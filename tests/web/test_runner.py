"""A worker: the videos it makes, the progress it reports, and how jobs and the worker end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.media.video_writer import read_comment
from skyreels_v3.preview import MAX_SIDE, Noisy, Projection, png
from skyreels_v3.web.queue import FINAL, Job, Queue, State, lock_worker
from skyreels_v3.web.runner import without_folders
from tests.conftest import ASSETS, ROOT, files_in

TOY = {"model_id": "tiny", "device": "cpu", "height": 32, "width": 48, "num_inference_steps": 3, "seed": 7}
FOX = {
    **TOY, "task_type": "reference_to_video", "ref_imgs": [str(ASSETS / "fox.png")], "num_frames": 5, "prompt": "a fox",
}  # fmt: skip
TWO_PASSES = {
    **TOY, "task_type": "single_shot_extension", "input_video": str(ASSETS / "boat.mp4"), "duration": 6,
    "prompt": "a boat",
}  # fmt: skip
JOINED = {
    "task_type": "shot_switching_extension", "input_video": str(ASSETS / "boat.mp4"), "duration": 2, "prompt": "a boat",
    "include_input": True,
}  # fmt: skip
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_runner.py")))
PLACE, MORE_PLACES = "denoising 2 1", ("claimed", "loading", "denoising 1 2", "decoding 1", "writing", "written")


@pytest.fixture
def queue(tmp_path, cache, monkeypatch) -> Iterator[Queue]:
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    queue = Queue(tmp_path / "server")
    yield queue
    queue.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    """The command's video for the job with two passes."""
    video = tmp_path_factory.mktemp("whole") / "a.mp4"
    flags = [word for name, value in TWO_PASSES.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "generate_video.py"), *flags, "--output", str(video)]
    variables = {"SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | variables, capture_output=True, check=True)
    return video


@pytest.fixture
def start(queue) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a worker that can have faults."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str = "w") -> subprocess.Popen[bytes]:
        command = [*FAULTY, str(queue.folder), name, "{}"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stderr):
            pipe.close()


def add(queue: Queue, flags: dict[str, Any] = FOX, **more: Any) -> str:
    id, _ = queue.new_id()
    return queue.add(id, flags | more).id


def set_faults(queue: Queue, *faults: tuple[str, ...]) -> None:
    (queue.folder / "faults.json").write_text(json.dumps(faults))


def wait(reached: Callable[[], Any], seconds: float = 300) -> Any:
    """Wait until `reached` returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (result := reached()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


def ended(queue: Queue, id: str) -> Job:
    """Wait until a job has ended, and return it."""
    return wait(lambda: (job := queue.get(id)) is not None and job.state in FINAL and job)


def log_of(queue: Queue, id: str) -> list[str]:
    """The places that workers have logged for a job."""
    path = queue.folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [place for place, job in lines if job == id]


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path, 24)))


def test_what_a_video_says_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    flags = {
        "model_id": "models", "transformer": f"{tmp_path}/secret/a.gguf", "base_model_id": "a/b", "prompt": "/a/b c",
        "lora": ["owner/name:0.8", f"{tmp_path}/l.safetensors:0.5:partial"], "image": "~/i.png", "seed": 1,
        "keyframes": [f"{tmp_path}/k.png@2.5"], "enhancer_model": f"{tmp_path}/models/",
    }  # fmt: skip
    assert without_folders(flags) == flags | {
        "transformer": "a.gguf", "lora": ["owner/name:0.8", "l.safetensors:0.5:partial"], "image": "i.png",
        "keyframes": ["k.png@2.5"], "enhancer_model": "models",
    }  # fmt: skip


@pytest.mark.slow
def test_jobs_that_succeed_and_jobs_that_fail(queue, start):
    """One process makes them all; each model is loaded once; paths are relative to the job's folder."""
    wrong, good = add(queue, num_inference_steps=0), add(queue, ref_imgs=["fox.png"])
    (queue.get(good).folder / "fox.png").write_bytes((ASSETS / "fox.png").read_bytes())
    gone, again, refused = add(queue, ref_imgs=["gone.png"]), add(queue, seed=8), add(queue, resume=True)
    joined = add(queue, {**TOY, **JOINED})
    process = start()
    job = ended(queue, good)
    assert job.state == State.COMPLETED and frames_of(job.video).shape == (5, 32, 48, 3)
    known = {"seed": 7, "width": 48, "height": 32, "frames": 5, "fps": 24}
    assert job.facts.items() >= known.items() and job.facts["seconds"] > 0
    assert {"denoising", "decoding with the VAE"} <= job.facts["stages"].keys() and job.facts["peak_bytes"] > 1e8
    assert ended(queue, joined).facts["frames"] == len(frames_of(queue.get(joined).video))
    progress = job.progress
    assert (progress.part, progress.window, progress.windows, progress.step, progress.steps) == (1.0, 1, 1, 3, 3)
    preview = Image.open(job.folder / "preview.png")
    assert progress.preview >= 1 and preview.size == (48, 32)  # of the last frame
    assert files_in(job.folder) == {"fox.png", "video.mp4", "preview.png"}
    expected = {wrong: "--num_inference_steps: 0 is out of range", refused: "--resume: is not allowed in a line"}
    for id, message in (expected | {gone: "--ref_imgs: "}).items():
        failed = ended(queue, id)
        assert failed.state == State.FAILED and failed.error[0] == "invalid_request"
        assert failed.error[1].startswith(message) and failed.error[1].isprintable()
    assert ended(queue, again).facts["seed"] == 8
    said = [read_comment(queue.get(id).video) for id in (good, again)]
    assert [json.loads(text)["flags"]["ref_imgs"] for text in said] == [["fox.png"]] * 2
    assert not any(str(folder) in text for text in said for folder in (queue.folder, ROOT))
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(100) == 130
    with lock_worker(queue.folder, "w"):
        pass
    said = process.stderr.read().decode()
    assert said.count("device cpu") == 2, said


@pytest.mark.slow
@pytest.mark.parametrize("place", [PLACE, *(pytest.param(place, marks=pytest.mark.extended) for place in MORE_PLACES)])
def test_a_killed_worker_goes_on_where_it_was(queue, start, whole, place):
    """From the last finished pass, to the same video as the command's; finished jobs are not made again."""
    set_faults(queue, (place, "kill"))
    done, id = add(queue, FOX), add(queue, TWO_PASSES)
    queue.claim("other"), queue.complete(done, "other", {})
    assert start().wait(300) == -9
    job = queue.get(id)
    assert job.state == State.IN_PROGRESS
    before = log_of(queue, id)
    start()
    job = ended(queue, id)
    assert job.state == State.COMPLETED
    after = log_of(queue, id)[len(before) :]
    if place in ("denoising 2 1", "decoding 1"):
        assert not any(each.startswith("denoising 1") for each in after)
    if place in ("writing", "written"):
        assert not any(each.startswith("denoising") for each in after)
    assert after.count("written") == (place != "written")
    assert job.facts.items() >= {"frames": 144, "seed": 7}.items()
    np.testing.assert_array_equal(frames_of(job.video), frames_of(whole))
    assert files_in(job.folder) == {"video.mp4", "preview.png"}
    assert not log_of(queue, done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        ("device oom", "out_of_memory", "out of memory while denoising: 2.00 GiB was requested"),
        pytest.param(
            *("oom", "out_of_memory", "out of memory while denoising: some host memory was requested"),
            marks=pytest.mark.extended,
        ),
        pytest.param("error", "internal_error", "ValueError: a fault", marks=pytest.mark.extended),
    ],
)
def test_an_error_ends_the_job_and_the_worker(queue, start, action, code, message):
    """A new worker makes the next job."""
    set_faults(queue, ("step 2", action))
    id, other = add(queue), add(queue)
    assert start().wait(300) == 0
    job = queue.get(id)
    assert job.state == State.FAILED and job.error[0] == code
    assert job.error[1].startswith(message) and job.error[1].isprintable()
    assert queue.get(other).state == State.QUEUED
    start()
    assert ended(queue, other).state == State.COMPLETED


@pytest.mark.slow
def test_cancelling_a_running_job_keeps_what_is_done(queue, start):
    id = add(queue, TWO_PASSES, num_inference_steps=200)
    process = start()
    wait(lambda: "denoising 2 3" in log_of(queue, id))
    assert queue.cancel(id).cancelling
    steps = len(log_of(queue, id))
    job = ended(queue, id)
    assert (job.state, job.error) == (State.CANCELLED, None)
    assert len(log_of(queue, id)) <= steps + 3  # the end of the reported step, and one more
    assert files_in(job.folder) == {"video.partial.mp4", "preview.png"}
    assert len(frames_of(job.folder / "video.partial.mp4")) >= 48
    deleted = add(queue, TWO_PASSES, num_inference_steps=200)
    wait(lambda: "denoising 1 3" in log_of(queue, deleted))
    folder = queue.get(deleted).folder
    assert queue.delete(deleted)
    wait(lambda: not folder.exists())
    assert ended(queue, add(queue)).state == State.COMPLETED
    assert process.poll() is None


@pytest.mark.slow
def test_a_worker_that_is_stopped_gives_its_job_back(queue, start):
    set_faults(queue, ("denoising 2 1", "stop"))
    id = add(queue, TWO_PASSES)
    assert start().wait(300) == 130
    job = queue.get(id)
    assert (job.state, job.worker, job.losses) == (State.QUEUED, "", 0)
    assert "video.partial.mp4" in files_in(job.folder)
    start()
    job = ended(queue, id)
    assert job.state == State.COMPLETED and files_in(job.folder) == {"video.mp4", "preview.png"}
    assert log_of(queue, id).count("denoising 1 3") == 1


@pytest.mark.slow
def test_no_worker_without_its_parent(queue, cache):
    """If the parent is killed in the middle of a step, the worker soon exits and its job is queued again."""
    id = add(queue, TWO_PASSES, num_inference_steps=200)
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(100)"
    )
    command = [sys.executable, "-c", code, *FAULTY, str(queue.folder), "w"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        wait(lambda: "denoising 1 3" in log_of(queue, id))
        parent.kill()
    wait(lambda: not is_alive(pid))
    assert queue.get(id).state == State.QUEUED


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.extended
def test_two_workers_of_one_name(queue, start, monkeypatch):
    """The second waits for the first, which may be about to exit, so no job is ever worked on by both."""
    first, second = start(), start()
    id = add(queue)
    assert ended(queue, id).state == State.COMPLETED
    first.stdin.close()
    first.wait(100)
    assert second.poll() is None
    id = add(queue)
    assert ended(queue, id).state == State.COMPLETED


# Previews


def test_a_projection_learns_the_colors():
    """From frames that are a linear function of the latents; random frames cause no error."""
    random = np.random.default_rng(1)
    latents, weights = random.normal(size=(16, 4, 6)), random.normal(size=(16, 3)) * 10
    colors = np.einsum("chw,cr->hwr", latents, weights) + 128
    projection = Projection()
    assert projection.picture(latents).shape == (4, 6, 3)
    projection.fit(latents, colors.clip(0, 255).round().astype(np.uint8).repeat(8, 0).repeat(8, 1))
    difference = projection.picture(latents).astype(float) - colors.clip(0, 255)
    assert np.abs(difference).mean() < 15
    assert projection.picture(np.full((16, 2, 3), np.nan)).shape == (2, 3, 3)


def test_what_noise_will_become():
    """For a flow of constant velocity, the end is known after one step."""
    random = np.random.default_rng(0)
    end, noise = random.normal(size=(2, 16, 4, 6))
    early, late = (Noisy(end + sigma * (noise - end), sigma) for sigma in (0.9, 0.7))
    np.testing.assert_allclose(late.denoised(early), end, atol=1e-9)
    np.testing.assert_array_equal(late.denoised(None), late.latents)
    np.testing.assert_array_equal(late.denoised(late), late.latents)


def test_pictures_are_small(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((720, 1280, 3), np.uint8)))
    assert Image.open(tmp_path / "a.png").size == (MAX_SIDE, MAX_SIDE * 720 // 1280)


def test_a_worker_starts_without_torch():
    code = "import sys, skyreels_v3.web.runner, skyreels_v3.web.supervisor\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
