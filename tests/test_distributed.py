"""Several processes make the video that one makes: real torchrun, the real command, gloo, the built-in toy.

The jobs of a file are done by one process, then by several in the ways there are, and final latents and frames are
compared. The toy has 4 attention heads; its sizes have 15 tokens a frame, which only 3 processes divide evenly, or 8,
which only 3 do not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.conftest import ROOT

ASSETS = ROOT / "assets"
TOY = ("--model_id", "tiny", "--device", "cpu", "--num_inference_steps", "2", "--no_cache")
ODD, EVEN = {"height": 48, "width": 80}, {"height": 32, "width": 64}
TOLERANCE = 1e-4
LAUNCHER = (sys.executable, "-m", "torch.distributed.run")
ENDS_IN = 30  # seconds that a run may take to end after one of its processes has

fox = {"task_type": "reference_to_video", "ref_imgs": str(ASSETS / "fox.png"), "num_frames": 5, "prompt": "a fox"}
boat = {"input_video": str(ASSETS / "boat.mp4"), "prompt": "a boat", "seed": 7}
cut = boat | {"task_type": "shot_switching_extension", "duration": 2}
shot = boat | {"task_type": "single_shot_extension", "duration": 5}
talk = {"task_type": "talking_avatar", "input_image": str(ASSETS / "portrait.png"), "prompt": "a woman"}
JOBS: dict[str, dict[str, Any]] = {
    "fox-odd": fox | ODD,
    "fox-even": fox | EVEN,
    "guided-odd": fox | ODD | {"guidance_scale": 3, "image_guidance_scale": 2},  # 3 terms
    "cut-odd": cut | ODD,
    "cut-even": cut | EVEN | {"guidance_scale": 3},  # 2 terms
    "shot-odd": shot | ODD,
    "shot-even": shot | EVEN,
    "talk-odd": talk | ODD | {"input_audio": "one.wav"},
    "talk-even": talk | EVEN | {"input_audio": "one.wav", "audio_guidance_scale": 2, "text_guidance_scale": 2},
    "two-odd": talk | ODD | {"input_audio": "one.wav,two.wav"},
}
QUICK = ("fox-odd", "cut-odd", "shot-odd", "talk-odd", "fox-even")
GUIDED = ("guided-odd", "cut-even", "talk-even")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Made:
    """What a job has written."""

    latents: dict[str, np.ndarray]
    frames: np.ndarray  # uint8 [F, H, W, 3]


def write_hum(path: Path, pitch: float) -> None:
    """Half a second of sound."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(8000) / pitch)).astype("<i2").tobytes())


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "SKYREELS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def carry_out(tmp_path_factory, cache) -> Callable[..., tuple[dict[str, Made], str]]:
    """Do jobs with some command; returns what they made, by name, and stderr."""

    def carry_out(names: tuple[str, ...], *command: str) -> tuple[dict[str, Made], str]:
        folder = tmp_path_factory.mktemp("jobs")
        write_hum(folder / "one.wav", 5), write_hum(folder / "two.wav", 9)
        files = {name: {"output": f"{name}/", "save_latents": f"{name}.safetensors"} for name in names}
        lines = [json.dumps(JOBS[name] | files[name]) for name in names]
        (folder / "jobs.jsonl").write_text("\n".join(lines))
        made = subprocess.run(
            command, cwd=folder, env=environment(cache), capture_output=True, text=True, check=False, timeout=400
        )
        assert made.returncode == 0, made.stderr[-6000:]
        assert len(made.stdout.splitlines()) == len(names)
        return {name: read(folder, name) for name in names}, made.stderr

    return carry_out


def read(folder: Path, name: str) -> Made:
    frames = [np.asarray(Image.open(path)) for path in sorted((folder / name).glob("*.png"))]
    return Made(load_file(folder / f"{name}.safetensors"), np.stack(frames))


def torchrun(processes: int, *flags: str, program: Path = ROOT / "generate_video.py") -> tuple[str, ...]:
    launcher = (*LAUNCHER, "--standalone", "--nproc_per_node", str(processes))
    return (*launcher, str(program), *TOY, "--use_usp", "--jobs", "jobs.jsonl", *flags)


@pytest.fixture(scope="module")
def expected(carry_out) -> dict[str, Made]:
    """What one process makes."""
    program = str(ROOT / "generate_video.py")
    return carry_out(tuple(JOBS), sys.executable, program, *TOY, "--jobs", "jobs.jsonl")[0]


def compare(made: dict[str, Made], expected: dict[str, Made]) -> None:
    """Latents to 1e-4, frames within one level."""
    for name, job in made.items():
        assert job.latents.keys() == expected[name].latents.keys(), name
        for key, latents in expected[name].latents.items():
            np.testing.assert_allclose(job.latents[key], latents, atol=TOLERANCE, rtol=0, err_msg=name)
        difference = np.abs(job.frames.astype(int) - expected[name].frames)
        assert difference.max() <= 1, name


WAYS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], str]] = {
    "2 by Ulysses": (2, (), tuple(JOBS), "ring 1 x Ulysses 2"),
    "2 by a ring, read by one": (2, ("--ring_degree", "2", "--broadcast_weights"), QUICK, "ring 2 x Ulysses 1"),
    "3, weights divided": (3, ("--shard_weights",), (*QUICK, "two-odd"), "ring 3 x Ulysses 1"),
    "4 by both, streamed": (4, ("--ring_degree", "2", "--memory", "stream"), QUICK, "ring 2 x Ulysses 2"),
    "4, guidance by 2": (4, ("--cfg_degree", "2", "--offload"), GUIDED, "guidance 2 x ring 1 x Ulysses 2"),
    "3, guidance by 3": (3, (), ("guided-odd",), "guidance 3 x ring 1 x Ulysses 1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_make_the_same_video(way, carry_out, expected):
    processes, flags, names, said = WAYS[way]
    made, stderr = carry_out(names, *torchrun(processes, *flags))
    compare(made, expected)
    assert f"INFO: {processes} processes:" in stderr and said in stderr
    assert stderr.count("INFO: line ") == len(names)  # one of them speaks


@pytest.mark.parametrize(("processes", "names"), [(2, tuple(JOBS)), (4, QUICK)])
def test_xdit_makes_the_same_video(processes, names, carry_out, expected, tmp_path):
    """xDiT's own code, of its own functions nothing is replaced but where it asks for a GPU."""
    program = Path(__file__).with_name("xdit_on_cpu.py")
    made, stderr = carry_out(names, *torchrun(processes, program=program))
    compare(made, expected)
    assert "xDiT: SDPA attention" in stderr
