"""What a run writes besides the video. torch is imported with the first tensor that is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_v3.media.files import publish, replace_file, temporary_name
from skyreels_v3.pipelines.state import passes_in

if TYPE_CHECKING:
    from torch import Tensor


def save_latents(latents: Sequence[Tensor], path: Path) -> Path:
    """Write the latents (B, C, F, H, W) of each pass as `latents.0`, `latents.1`, ..., float32.

    Returns:
        The path used: another than `path` where that has been taken meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    return write_new(path, save({name_of(n): tensor.float().contiguous() for n, tensor in enumerate(latents)}))


def join_passes(state: Path, path: Path, count: int) -> bool:
    """Write the same file from the passes that a run has left; returns whether all `count` of them are there."""
    from safetensors.numpy import load_file, save

    files = passes_in(state)
    if len(files) != count:
        return False
    write_new(path, save({name_of(number): load_file(file)["latents"] for number, file in enumerate(files)}))
    return True


def name_of(number: int) -> str:
    """What a pass's latents go by."""
    return f"latents.{number}"


def write_new(path: Path, content: bytes) -> Path:
    """Write a file under a name that is free."""
    temporary = temporary_name(path)
    try:
        replace_file(temporary, content)
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
