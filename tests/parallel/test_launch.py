"""Launching processes without torchrun: the command's exit code and message follow from how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from skyreels_v3.parallel.launch import is_handled, outcome
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


KILLED = "\nerror: rank 0 was killed by SIGKILL (9), as happens when the host runs out of memory; --low_vram "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("0", 0, ""), ("2", 2, ""), ("130", 130, "\ninterrupted\n"), ("7", 1, ""), ("kill", 1, KILLED)],
)
def test_how_they_end(script, tmp_path, end, code, said):
    argument = "as it is; $HOME"
    program = "import sys; from skyreels_v3.parallel.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    command = [sys.executable, "-c", program, str(script), str(tmp_path), argument, end]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=50)
    assert (made.returncode, made.stdout) == (code, "")
    assert made.stderr.startswith(said) and len(made.stderr.splitlines()) == len(said.splitlines())
    assert (tmp_path / f"0-of-2-{argument}").exists()
    assert not files_in(tmp_path / "temporary")


def failed(*codes: int) -> dict[int, SimpleNamespace]:
    """Processes that failed one after the other, with ranks from 1 on."""
    return {
        rank: SimpleNamespace(exitcode=code, timestamp=1_800_000_000 + rank) for rank, code in enumerate(codes, start=1)
    }


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        (failed(2, -15), 2, ""),
        (failed(130, -15), 130, "interrupted"),
        (failed(1), 1, ""),
        (failed(77), 1, ""),
        (failed(1, -9, -15), 1, "error: rank 2 was killed by SIGKILL (9), "),  # rank 1 failed because of it
        (failed(-11, 1), 1, "error: rank 1 was killed by SIGSEGV (11)"),
        (failed(-15, 130), 1, "error: rank 1 was killed by SIGTERM (15)"),
    ],
)
def test_outcomes(failures, code, said):
    found, text = outcome(failures)
    assert found == code and text.startswith(said) and bool(text) == bool(said)


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert [is_handled(name) for name in ("SIGHUP", "SIGTERM", "SIGNONE")] == [False, True, False]
    finally:
        signal.signal(signal.SIGHUP, before)


TOY = [
    *("--task_type", "t2v", "--model_id", "tiny", "--device", "cpu", "--prompt", "FPS-24, a cat", "--num_frames", 5),
    *("--height", 48, "--width", 80, "--no_cache"),
]


@pytest.mark.slow
def test_two_processes_from_the_plain_command(start, tmp_path):
    """With guidance over 2 processes, the command makes the same video as with one; also for several videos."""
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
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)]
)
def test_interrupted_all_end(start, tmp_path, number):
    """Also if the launcher is killed: stderr is read to its end, which comes once no process holds it open."""
    run = start(*TOY, "--num_inference_steps", 200, "--guidance_scale", 1, "--gpu_num", 2, "--output", "a.mp4")
    begun = time.perf_counter()
    said = stop_at(run, r"denoising: +\d+%\|.{0,40} [1-9]\d*/200", number)
    killed = number == signal.SIGKILL
    assert run.returncode == (-number if killed else 130), said
    assert said.count("interrupted") == (not killed) and "Traceback" not in said
    assert time.perf_counter() - begun < 100
    assert not files_in(tmp_path / "working")
    assert killed or not files_in(tmp_path / "temporary")
