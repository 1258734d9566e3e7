"""Paths and fixtures that tests in several folders share."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imageio_ffmpeg import write_frames

# No test may contact a real hub. Its clients read these variables at import.
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

import skyreels_v3.main  # noqa: E402
from skyreels_v3.parallel import processes  # noqa: E402
from skyreels_v3.tasks import task_spec  # noqa: E402
from tests import toys  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
REFERENCE = ROOT / "tests" / "data" / "reference"

# A shell starts background jobs with SIGINT ignored, nohup ignores SIGHUP; runs under test must receive both
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = (
    "test_distributed.py", "test_memory_modes.py", "test_generate_video.py", "test_resume.py", "test_packaging.py",
    "test_compile.py", "test_recorded_runs.py", "test_launch.py", "test_save.py", "test_devices.py",
    "test_runner.py", "test_supervisor.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that no worker is still busy with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with recorded inputs and outputs of the official code."""
    return REFERENCE


@pytest.fixture(scope="session")
def write_lossless() -> Callable[[Path, np.ndarray, int], Path]:
    """Write uint8 [F, H, W, 3] frames as an RGB H.264 clip that decodes to the same values."""

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


def write_tone(path: Path, seconds: float, rate: int = 8000, frequency: int = 440) -> Path:
    """Write a mono WAV file."""
    times = np.arange(round(seconds * rate)) / rate
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(2 * np.pi * frequency * times)).astype("<i2").tobytes())
    return path


@pytest.fixture
def refuse(main, tmp_path, monkeypatch, caplog) -> Callable[..., str]:
    """Run an invalid command line, check what all usage errors have in common, and return the error line."""
    home, working = tmp_path / "home", tmp_path / "working"
    working.mkdir()
    for name in ("HF_HOME", "SKYREELS_CACHE"):
        monkeypatch.setenv(name, str(home))

    def refuse(argv: list[str]) -> str:
        monkeypatch.chdir(working)
        code, stdout, stderr = main(*argv)
        assert (code, stdout) == (2, ""), stderr
        line = stderr.removesuffix("\n")
        assert line.startswith("error: ") and line.isprintable() and len(line) < 600
        assert not caplog.records
        assert not home.exists() and not any(working.iterdir())
        return line

    return refuse


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory) -> None:
    """Ignore compiled code from earlier runs, perhaps for another processor."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the log level that a run sets, for later tests that read the log."""
    logger = logging.getLogger("skyreels_v3")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache folder with random toys in place of the built-in model, which is slower."""
    folder = tmp_path_factory.mktemp("cache")
    toys.put_into(folder)
    return folder


@pytest.fixture(scope="session")
def t2v_toy(tmp_path_factory) -> Path:
    """V1's toy checkpoint and HunyuanVideo's components in one folder."""
    folder = tmp_path_factory.mktemp("toy")
    toys.write(folder, task_spec("t2v"))
    return folder


@pytest.fixture
def start(tmp_path, cache) -> Callable[..., subprocess.Popen[str]]:
    """Start the command in its own working folder, with its temporary files in another."""
    environment = os.environ | {"SKYREELS_CACHE": str(cache), "TMPDIR": str(tmp_path / "temporary")}
    for name in ("working", "temporary"):
        (tmp_path / name).mkdir()

    def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "generate_video.py"), *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=tmp_path / "working", env=environment | variables,
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


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """Interrupt later denoising after the given step; 0 stops doing so."""

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
    """Mount a file system of the given size in KiB; requires root."""
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
    """Send a signal once stderr matches `pattern`; returns all of stderr."""
    said = b""
    while not re.search(pattern.encode(), said):
        more = os.read(run.stderr.fileno(), 4096)
        assert more, said.decode()
        said += more
    run.send_signal(number)
    return said.decode() + run.communicate(timeout=60)[1]
