"""Starting processes without torchrun: what they end with is what the command ends with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from skyreels_v3.launch import exit_code
from tests.conftest import ROOT, files_in, stop_at

SCRIPT = """
import os, signal, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
open(f"{sys.argv[1]}/{rank}-of-{world}-{sys.argv[2]}", "w").close()
end = sys.argv[3]
if rank == "0" and end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "0" and end != "0":
    sys.exit(int(end))
time.sleep(0 if end == "0" else 60)  # the others are ended
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("0", 0), ("2", 2), ("130", 130), ("7", 1), ("kill", 1)])
def test_how_they_end(script, tmp_path, end, code):
    argument = "as it is; $HOME"
    program = "import sys; from skyreels_v3.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    command = [sys.executable, "-c", program, str(script), str(tmp_path), argument, end]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert (made.returncode, made.stdout, made.stderr) == (code, "", "")  # nobody speaks but the processes
    assert (tmp_path / f"0-of-2-{argument}").exists()


def test_exit_codes():
    assert [exit_code(code) for code in (2, 130, 1, -9, 77)] == [2, 130, 1, 1, 1]


TOY = [
    *("--task_type", "t2v", "--model_id", "tiny", "--device", "cpu", "--prompt", "FPS-24, a cat", "--num_frames", 5),
    *("--height", 48, "--width", 80, "--no_cache"),
]


@pytest.mark.slow
def test_two_processes_from_the_plain_command(start, tmp_path):
    """Guidance by 2, and the video that one process makes; several videos, too."""
    made = {}
    for name, flags in {"one": [], "two": ["--gpu_num", 2]}.items():
        steps = ["--num_inference_steps", 2, "--save_latents", f"{name}.safetensors"]
        run = start(*TOY, *steps, "--output", f"{name}.mp4", *flags)
        out, stderr = run.communicate(timeout=200)
        assert run.returncode == 0, stderr
        assert out == f"{name}.mp4\n"
        assert ("2 processes: guidance 2 x ring 1 x Ulysses 1" in stderr) == (name == "two")
        made[name] = load_file(tmp_path / "working" / f"{name}.safetensors")["latents.0"]
    np.testing.assert_allclose(made["two"], made["one"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)])
def test_interrupted_all_end(start, tmp_path, number):
    run = start(*TOY, "--num_inference_steps", 200, "--guidance_scale", 1, "--gpu_num", 2, "--output", "a.mp4")
    begun = time.perf_counter()
    said = stop_at(run, r"denoising: +\d+%\|.{0,40} [1-9]\d*/200", number)
    assert run.returncode == 130, said
    assert said.count("interrupted") == 1 and "Traceback" not in said
    assert time.perf_counter() - begun < 100
    assert not files_in(tmp_path / "working")
