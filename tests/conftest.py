"""Paths and small tools that tests of several folders share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import write_frames

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "data" / "reference"


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
