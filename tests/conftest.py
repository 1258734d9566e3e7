"""Paths and small tools that tests of several folders share."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imageio_ffmpeg import write_frames

import skyreels_v3.main
from skyreels_v3.parallel import processes

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "data" / "reference"
SECONDS = 2.0  # of processor time, in which every error must be found
# main, and an exit code that tells when it imported what takes seconds
DRIVER = """
import sys
from skyreels_v3.main import main
code = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers"} & sys.modules.keys()
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""
# imports the command once, and runs each command line that it reads in a fork: 20 ms instead of a new Python
SERVER = f"""
import json, os, signal, sys
import skyreels_v3.main, skyreels_v3.preflight

for line in sys.stdin:
    argv, folder, environment, stdout, stderr = json.loads(line)
    if child := os.fork():
        _, status, used = os.wait4(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)
        continue
    signal.alarm(60)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv[1:] = argv
    try:
        exec({DRIVER!r})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
"""

# A shell starts what goes on in its background with SIGINT ignored, nohup with SIGHUP; runs in tests hear both
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("test_distributed.py", "test_sequence_parallel.py", "test_recorded_runs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left with one of them in the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@dataclass(frozen=True)
class Case:
    """A command line, with places in braces, and what its error must say: flag, value, way out."""

    name: str
    argv: list[str]
    flag: str
    value: str
    remedy: str


def bad(base: list[str], flag: str, value: str, remedy: str, shown: str | None = None, name: str = "") -> Case:
    """A good command line made bad by one flag's value."""
    name = f"{base[1].split('_')[0]}{flag}={name or value[:40]}"
    if flag in base:  # given twice some flags add up
        base = [*base[: base.index(flag)], *base[base.index(flag) + 2 :]]
    return Case(name, [*base, flag, value], flag, value if shown is None else shown, remedy)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The recorded inputs and outputs of the official code."""
    return REFERENCE


@pytest.fixture(scope="session")
def generate() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "generate_video.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    return run


@pytest.fixture(scope="session")
def write_lossless() -> Callable[[Path, np.ndarray, int], Path]:
    """Write uint8 [F, H, W, 3] frames as an RGB H.264 clip that decodes to the very same values."""

    def write(path: Path, frames: np.ndarray, fps: int = 24) -> Path:
        size = (frames.shape[2], frames.shape[1])
        writer = write_frames(
            str(path), size, fps=fps, codec="libx264rgb", pix_fmt_out="rgb24", quality=None, macro_block_size=1,
            output_params=["-crf", "0"],
        )  # fmt: skip
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def command_server() -> Iterator[subprocess.Popen[str]]:
    """A process that runs command lines, see `SERVER`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        yield server
        server.stdin.close()


@pytest.fixture
def refuse(tmp_path, command_server) -> Callable[..., str]:
    """Run a bad command line, check all that every error has in common, and return its line."""
    home, working, stdout, stderr = (tmp_path / name for name in ("home", "working", "stdout", "stderr"))
    working.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    caches = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "SKYREELS_CACHE": str(home)}

    def refuse(argv: list[str]) -> str:
        for path in (stdout, stderr):
            path.unlink(missing_ok=True)
        command_server.stdin.write(json.dumps([argv, str(working), kept | caches, str(stdout), str(stderr)]) + "\n")
        command_server.stdin.flush()
        code, seconds = json.loads(command_server.stdout.readline())
        text = stderr.read_text(errors="surrogateescape")
        assert code == 2, text
        assert stdout.read_text() == ""
        assert text.startswith("error: ") and text.endswith("\n")
        line = text[:-1]
        assert line.isprintable()
        assert len(line) < 600
        assert seconds < SECONDS
        assert not home.exists()
        assert not any(working.iterdir())
        return line

    return refuse


def check_refused(case: Case, refuse: Callable[[list[str]], str], **places: object) -> None:
    """Run a bad command line with its places filled in, and check what its error says."""
    line = refuse([argument.format(**places) for argument in case.argv])
    assert line.startswith(f"error: {case.flag}: ")
    value = case.value.format(**places)
    start, _, end = value.partition("...")
    assert start in line and end in line
    assert case.remedy in line.replace(value, "", 1)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory) -> None:
    """Compiled code is not taken from where another run has left it, perhaps for another processor."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where the toy model is made, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path, cache) -> Callable[..., subprocess.Popen[str]]:
    """Start the command in a folder of its own, with its temporary files beside that."""
    environment = os.environ | {"SKYREELS_CACHE": str(cache), "TMPDIR": str(tmp_path / "temporary")}
    for name in ("working", "temporary"):
        (tmp_path / name).mkdir()

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "generate_video.py"), *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=tmp_path / "working", env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture
def main(tmp_path, cache, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}

    def main(*arguments: object, default_task: str | None = None) -> tuple[int, str, str]:
        code = skyreels_v3.main.main([str(argument) for argument in arguments], default_task)
        return code, *capsys.readouterr()

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.getLogger("skyreels_v3").setLevel(logging.NOTSET)


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """Have the next denoising be interrupted after a step; 0: after none, and no more."""

    def interrupt(at: int) -> None:
        from skyreels_v3.denoising.loop import denoise

        def denoised(*arguments: Any) -> Iterator[Any]:
            for step, latents in denoise(*arguments):
                yield step, latents
                if step == at:
                    raise KeyboardInterrupt

        monkeypatch.setattr("skyreels_v3.stages.denoise", denoised)

    return interrupt


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Make a file system of so many KiB; only root can."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def stop_at(run: subprocess.Popen[str], pattern: str, number: int) -> str:
    """Send a signal when stderr says `pattern`; returns all of it."""
    said = b""
    while not re.search(pattern.encode(), said):
        more = os.read(run.stderr.fileno(), 4096)
        assert more, said.decode()
        said += more
    run.send_signal(number)
    return said.decode() + run.communicate(timeout=60)[1]
