"""Several processes make the same video as one: real torchrun, the real command, gloo, the built-in toy.

The jobs run in one process, then in several with every kind of parallelism, and final latents and frames are compared.
The toy has 4 attention heads. Its frames have 15 tokens, which only 3 processes divide evenly, or 8, which only 3 do
not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.conftest import ROOT, files_in

ASSETS = ROOT / "assets"
TOY = ("--model_id", "tiny", "--device", "cpu", "--num_inference_steps", "2", "--no_cache")
ODD, EVEN = {"height": 48, "width": 80}, {"height": 32, "width": 64}
TOLERANCE = 1e-4
LAUNCHER = (sys.executable, "-m", "torch.distributed.run")
ENDS_IN = 30  # seconds within which a run must end after one of its processes has

fox = {"task_type": "reference_to_video", "ref_imgs": str(ASSETS / "fox.png"), "num_frames": 5, "prompt": "a fox"}
boat = {"input_video": str(ASSETS / "boat.mp4"), "prompt": "a boat", "seed": 7}
cut = boat | {"task_type": "shot_switching_extension", "duration": 2}
shot = boat | {"task_type": "single_shot_extension", "duration": 5}
talk = {"task_type": "talking_avatar", "input_image": str(ASSETS / "portrait.png"), "prompt": "a woman"}
cat = {"task_type": "t2v", "num_frames": 5, "prompt": "a cat"}  # guided, 2 terms
comes = cat | {"task_type": "i2v", "image": str(ASSETS / "fox.png"), "guidance_scale": 1}
JOBS: dict[str, dict[str, Any]] = {
    "fox-odd": fox | ODD,
    "fox-even": fox | EVEN,
    "fox-least": fox | {"height": 32, "width": 32},  # 4 tokens: the last of 3 processes has none
    "guided-odd": fox | ODD | {"guidance_scale": 3, "image_guidance_scale": 2},  # 3 terms
    "cut-odd": cut | ODD,
    "cut-even": cut | EVEN | {"guidance_scale": 3},  # 2 terms
    "shot-odd": shot | ODD,
    "shot-even": shot | EVEN,
    "talk-odd": talk | ODD | {"input_audio": "one.wav"},
    "talk-even": talk | EVEN | {"input_audio": "one.wav", "audio_guidance_scale": 2, "text_guidance_scale": 2},
    "two-odd": talk | ODD | {"input_audio": "one.wav,two.wav"},
    "cat-odd": cat | ODD | {"num_frames": 29},  # 3 pieces in the VAE
    "cat-cached": cat | EVEN | {"guidance_scale": 1, "num_inference_steps": 12, "cache": "fbcache:0.2"},
    "comes-odd": comes | {"height": 272, "width": 48},  # two tiles in the VAE, for the input image too
}
QUICK = ("fox-odd", "cut-odd", "shot-odd", "talk-odd", "comes-odd")
GUIDED = ("guided-odd", "cut-even", "talk-even", "cat-odd")
V1 = ("cat-odd", "comes-odd", "cat-cached")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Made:
    """What a job has written."""

    latents: dict[str, np.ndarray]
    frames: np.ndarray  # uint8 [F, H, W, 3]


def write_hum(path: Path, pitch: float) -> None:
    """Write half a second of sound."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(8000) / pitch)).astype("<i2").tobytes())


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "SKYREELS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def carry_out(tmp_path_factory, cache) -> Callable[..., tuple[dict[str, Made], str]]:
    """Run jobs with some command; returns what they made, by name, and stderr."""

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
    """Check latents to 1e-4, and frames to within one level."""
    for name, job in made.items():
        assert job.latents.keys() == expected[name].latents.keys(), name
        for key, latents in expected[name].latents.items():
            np.testing.assert_allclose(job.latents[key], latents, atol=TOLERANCE, rtol=0, err_msg=name)
        difference = np.abs(job.frames.astype(int) - expected[name].frames)
        assert difference.max() <= 1, name


WAYS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], str]] = {
    "2 by Ulysses": (2, (), tuple(JOBS), "ring 1 x Ulysses 2"),
    "2 by a ring, read by one": (2, ("--ring_degree", "2", "--broadcast_weights"), QUICK, "ring 2 x Ulysses 1"),
    "3, weights divided, read by one": (
        3,
        ("--shard_weights", "--broadcast_weights"),
        (*QUICK, "two-odd", "fox-least", "cat-odd"),
        "ring 3 x Ulysses 1",
    ),
    "4 by both, streamed": (4, ("--ring_degree", "2", "--memory", "stream"), QUICK, "ring 2 x Ulysses 2"),
    "2 by Ulysses, all terms": (2, ("--cfg_degree", "1"), V1, "guidance 1 x ring 1 x Ulysses 2"),
    "4, guidance by 2": (4, ("--cfg_degree", "2", "--offload"), GUIDED, "guidance 2 x ring 1 x Ulysses 2"),
    "3, guidance by 3": (3, (), ("guided-odd",), "guidance 3 x ring 1 x Ulysses 1"),
}


EXTENDED = (
    "2 by Ulysses",
    "2 by a ring, read by one",
    "2 by Ulysses, all terms",
    "4, guidance by 2",
    "3, guidance by 3",
)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.extended) if way in EXTENDED else way for way in WAYS]
)
def test_several_processes_make_the_same_video(way, carry_out, expected):
    processes, flags, names, said = WAYS[way]
    made, stderr = carry_out(names, *torchrun(processes, *flags))
    compare(made, expected)
    assert f"INFO: {processes} processes:" in stderr and said in stderr
    assert stderr.count("INFO: line ") == len(names)  # only the main process logs


@pytest.mark.parametrize(("processes", "names"), [(2, tuple(JOBS)), pytest.param(4, QUICK, marks=pytest.mark.extended)])
def test_xdit_makes_the_same_video(processes, names, carry_out, expected, tmp_path):
    """With xDiT's own code, in which only the checks for a GPU are replaced."""
    program = Path(__file__).with_name("xdit_on_cpu.py")
    made, stderr = carry_out(names, *torchrun(processes, program=program))
    compare(made, expected)
    assert "xDiT: SDPA attention" in stderr


# How runs end

# the command, with trouble injected into rank 1's second forward
TROUBLED = """
import os
import re
import signal
import sys
import torch
import skyreels_v3.main
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

forward, calls = SkyReelsTransformer3DModel.forward, []


def troubled(*arguments):
    calls.append(1)
    if len(calls) == 2:
        open(f"there-{os.environ['RANK']}", "w").close()
        if os.environ["RANK"] == "1":
            {trouble}
    return forward(*arguments)


SkyReelsTransformer3DModel.forward = troubled
sys.exit(skyreels_v3.main.main(sys.argv[1:]))
"""
ARGUMENTS = ("--task_type", "reference_to_video", "--ref_imgs", str(ASSETS / "fox.png"), "--prompt", "a fox")
SMALL = ("--num_frames", "5", "--height", "32", "--width", "64")


@pytest.fixture
def begin(tmp_path, cache) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes in their own process group, as a terminal does."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*command: str) -> subprocess.Popen[str]:
        for name in ("working", "temporary"):
            (tmp_path / name).mkdir(exist_ok=True)
        begun.append(
            subprocess.Popen(
                command,
                cwd=tmp_path / "working",
                env=environment(cache) | {"TMPDIR": str(tmp_path / "temporary")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def troubled(tmp_path: Path, processes: int, trouble: str) -> tuple[str, ...]:
    program = tmp_path / "troubled.py"
    program.write_text(TROUBLED.replace("{trouble}", trouble))
    launcher = (*LAUNCHER, "--standalone", "--nproc_per_node", str(processes))
    return (*launcher, str(program), *TOY, *ARGUMENTS, *SMALL, "--use_usp", "--output", "a.mp4")


def our_lines(stderr: str) -> list[str]:
    """What the command itself, not torchrun, said at the end."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "interrupted"))]


def wait_for(*files: Path) -> float:
    """Wait until all files exist; returns the time."""
    for _ in range(600):
        if all(file.exists() for file in files):
            return time.monotonic()
        time.sleep(0.1)
    raise AssertionError(f"{files} did not come")


TROUBLES = {
    "out of memory": (
        "torch.empty(1 << 62, dtype=torch.uint8)",
        "error: rank 1: OutOfMemory: out of memory while denoi",
    ),
    "a bug": ("raise RuntimeError('a bug')", "error: rank 1: RuntimeError: a bug (--verbose shows where)"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", ""),  # torchrun reports it
}


@pytest.mark.parametrize("name", ["out of memory", "killed", pytest.param("a bug", marks=pytest.mark.extended)])
def test_one_process_fails_and_all_end(name, begin, tmp_path):
    trouble, message = TROUBLES[name]
    run = begin(*troubled(tmp_path, 2, trouble))
    start = wait_for(tmp_path / "working" / "there-1")
    stdout, stderr = run.communicate(timeout=60)
    assert time.monotonic() - start < ENDS_IN
    assert run.returncode != 0 and stdout == ""
    assert [line.startswith(message) for line in our_lines(stderr)] == [True] * bool(message), stderr
    assert "atexit" not in stderr and (message or re.search(r"rank +: 1 .*\n.*SIGKILL", stderr)), stderr
    left = files_in(tmp_path / "working") - {"there-0", "there-1"}
    assert not left and not any((tmp_path / "temporary").glob("skyreels-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)])
def test_interrupted_all_end(number, begin, tmp_path):
    """By Ctrl-C, which a terminal sends to all of them, or by a scheduler, which sends SIGTERM to the launcher."""
    run = begin(*troubled(tmp_path, 2, "import time; time.sleep(600)"))
    start = wait_for(*(tmp_path / "working" / f"there-{rank}" for rank in (0, 1)))
    time.sleep(0.5)  # the main process is now waiting for the other in a collective
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    stdout, stderr = run.communicate(timeout=60)
    assert time.monotonic() - start < ENDS_IN
    assert run.returncode != 0 and stdout == ""
    assert our_lines(stderr) in ([], ["interrupted"])
    assert not any(name.endswith(".mp4") for name in files_in(tmp_path / "working"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--use_usp", "--height", "31", "--width", "64"), "error: rank 0: --height: 31: not a multiple of 16"),
        (("--use_usp", "--ulysses_degree", "3"), "error: rank 0: --ulysses_degree: 3: ring x Ulysses must be 2"),
        ((), "error: rank 0: --use_usp: missing; 2 processes were started"),
    ],
    ids=str,
)
def test_bad_requests_are_told_once(flags, message, begin):
    run = begin(*LAUNCHER, "--standalone", "--nproc_per_node", "2", str(ROOT / "generate_video.py"), *ARGUMENTS, *flags)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode != 0
    (line,) = our_lines(stderr)
    assert line.startswith(message)


def test_two_machines(begin, tmp_path, expected):
    """Two launchers with one process each, which meet at an address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = (*LAUNCHER, "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    request = (*TOY, *ARGUMENTS, "--num_frames", "5", "--height", "48", "--width", "80", "--use_usp")
    files = ("--output", "frames/", "--save_latents", "frames.safetensors")
    program = (str(ROOT / "generate_video.py"), *request, *files)
    runs = [begin(*command, f"--node_rank={number}", *program) for number in (0, 1)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sorted(stdout for stdout, _ in outputs) == ["", "frames\n"]
    compare({"fox-odd": read(tmp_path / "working", "frames")}, {"fox-odd": expected["fox-odd"]})


def test_what_one_process_left_all_go_on_with(main, begin, interrupt, monkeypatch, tmp_path):
    """All resume in the middle of a pass, with the recorded seed; otherwise each would have drawn its own."""
    argv = (*TOY, *ARGUMENTS, *SMALL)
    (tmp_path / "working").mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "working")
        interrupt(1)
        assert main(*argv, "--seed", "7", "--checkpoint_every", "0.0001")[0] == 130
        interrupt(0)
        assert main(*argv, "--seed", "7", "--output", "b.mp4", "--save_latents", "b.safetensors")[0] == 0
    launcher = (*LAUNCHER, "--standalone", "--nproc_per_node", "2", str(ROOT / "generate_video.py"))
    run = begin(*launcher, *argv, "--use_usp", "--seed", "-1", "--resume", "--save_latents", "a.safetensors")
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    assert Path(stdout.strip()).name.split("_")[0] == "7"
    assert "resuming after step 1 of 2" in stderr
    a, b = (load_file(tmp_path / "working" / f"{name}.safetensors")["latents.0"] for name in "ab")
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


def test_one_process_of_torchruns_makes_the_same_as_none(begin, tmp_path):
    """Bit for bit, since a single process has nobody to communicate with."""
    program = (str(ROOT / "generate_video.py"), *TOY, *ARGUMENTS, *SMALL)
    alone = begin(sys.executable, *program, "--save_latents", "a.safetensors")
    launched = begin(
        *LAUNCHER, "--standalone", "--nproc_per_node", "1", *program, "--use_usp", "--save_latents", "b.safetensors"
    )
    for run in (alone, launched):
        assert run.communicate(timeout=120)[0] and run.returncode == 0
    a, b = (load_file(tmp_path / "working" / f"{name}.safetensors")["latents.0"] for name in "ab")
    np.testing.assert_array_equal(a, b)
