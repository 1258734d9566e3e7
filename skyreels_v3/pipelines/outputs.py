"""What a run writes besides the video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from skyreels_v3.media.files import publish, temporary_name


def save_latents(latents: Sequence[Tensor], path: Path) -> Path:
    """Write the latents (B, C, F, H, W) of each pass as `latents.0`, `latents.1`, ..., float32.

    Returns:
        The path used: another than `path` where that has been taken meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        tensors = {f"latents.{number}": tensor.float().contiguous() for number, tensor in enumerate(latents)}
        save_file(tensors, temporary)
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
