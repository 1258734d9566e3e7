"""The Python API makes the same videos as the command."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from skyreels_v3 import Done, Frame, Step, UserError, load
from tests.conftest import ASSETS

SMALL = {"model_id": "tiny", "device": "cpu", "height": 32, "width": 48}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, cache):
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))


def test_the_same_video_as_the_command(main, tmp_path):
    generator = load("reference_to_video", **SMALL)
    flags = {"prompt": "a fox", "ref_imgs": [ASSETS / "fox.png", ASSETS / "lantern.png"], "num_frames": 9, "seed": 3}
    events = [*generator(**flags)]
    steps, frames = ([event for event in events if isinstance(event, kind)] for kind in (Step, Frame))
    assert [(step.number, step.total) for step in steps] == [(number, 8) for number in range(1, 9)]
    assert [frame.number for frame in frames] == [*range(9)]
    assert all(frame.image.shape == (32, 48, 3) and frame.image.dtype == np.uint8 for frame in frames)
    done = events[-1]
    assert isinstance(done, Done) and (done.seed, done.fps) == (3, 24)

    pictures = ",".join(map(str, flags["ref_imgs"]))
    argv = ("--task_type", "reference_to_video", "--prompt", "a fox", "--ref_imgs", pictures, "--num_frames", 9)
    where = ("--model_id", "tiny", "--device", "cpu", "--height", 32, "--width", 48, "--output", "frames/")
    code, _, stderr = main(*argv, *where, "--seed", 3, "--save_latents", "a.safetensors")
    assert code == 0, stderr
    np.testing.assert_array_equal(done.latents[0].numpy(), load_file(tmp_path / "a.safetensors")["latents.0"])
    assert len([*(tmp_path / "frames").glob("*.png")]) == len(frames)


def test_cancelled_and_used_again():
    generator = load("t2v", num_inference_steps=4, num_frames=5, prompt="FPS-24, a cat", **SMALL)
    events = generator(seed=1)
    assert isinstance(next(events), Step)
    loaded = generator.worker.generator
    events.close()
    again, other = ([*generator(seed=seed)][-1].latents[0] for seed in (1, 2))
    assert generator.worker.generator is loaded and not np.array_equal(again, other)
    np.testing.assert_array_equal([*generator(seed=1)][-1].latents[0], again)
    [*generator(seed=1, memory="offload")]  # overrides the conflicting flag
    assert isinstance(next(load("t2v", memory="offload", prompt="FPS-24, a cat", **SMALL)(low_vram=True)), Step)
    assert generator.worker.generator is not loaded


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"promt": "a"}, "--promt: there is no such flag; did you mean --prompt"),
        ({"output": "a.mp4"}, "--output: is for the command"),
        ({"gpu_num": 2}, "--gpu_num: is for the command"),
        ({"prompt": ""}, "--prompt: missing or empty"),
        ({"prompt": "a", "num_frames": 6}, "--num_frames: 6: not 4k"),
        ({"prompt": "a", "ref_imgs": ["nowhere.png"]}, "--ref_imgs: nowhere.png does not exist"),
    ],
)
def test_what_is_wrong(flags, message):
    with pytest.raises(UserError, match=message):
        [*load("reference_to_video", **SMALL)(**{"ref_imgs": [ASSETS / "fox.png"]} | flags)]


def test_importing_the_package_is_quick():
    program = "import sys, skyreels_v3; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
