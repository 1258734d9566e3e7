"""How much a run writes, and what besides the video. torch is imported with the first tensor that is saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import pipeline_of
from skyreels_v3.media.files import existing_folder, giga, publish, replace_file, temporary_name
from skyreels_v3.plan import output_bytes, transformer_sizes
from skyreels_v3.request import ResolvedRequest
from skyreels_v3.resume import passes_in
from skyreels_v3.runtime import default_dtype, likely_device
from skyreels_v3.tasks import LATENT_CHANNELS, VAE_STRIDE

if TYPE_CHECKING:
    from torch import Tensor


LITTLE = 1 << 14  # bytes without which no output is possible
COPIES = 4  # of the largest pass's latents, and more, in a safety copy of a scheduler that goes on from earlier steps


def check_room(request: ResolvedRequest, checkpoint: Path | None) -> Iterator[str]:
    """Warnings where the disks may have too little room for what a request writes.

    Raises:
        UserError: they cannot have enough.
    """
    disks: dict[int, list[tuple[str, Path, float, float]]] = {}
    for entry in bytes_to_write(request, checkpoint):
        disks.setdefault(existing_folder(entry[1]).stat().st_dev, []).append(entry)
    for entries in disks.values():
        flag, path, _, _ = max(entries, key=lambda entry: entry[2])
        folder = existing_folder(path)
        usage = shutil.disk_usage(folder)
        least, most = sum(entry[2] for entry in entries), sum(entry[3] for entry in entries)
        if usage.total and usage.free < least + LITTLE:  # some file systems do not tell
            needs = f"{format_value(path)} needs {giga(least + LITTLE)}"
            reason = f"{needs}, {giga(usage.free)} are free in {format_value(folder)}"
            raise UserError(flag, f"{reason}; free some space, or give a path on another disk")
        if usage.total and usage.free < most:
            yield f"{giga(usage.free)} are free in {folder}; this run may need {giga(most)}"


def bytes_to_write(request: ResolvedRequest, checkpoint: Path | None) -> Iterator[tuple[str, Path, float, float]]:
    """For each output its flag, its path, and how many bytes it takes at least and at most."""
    size = 4 * LATENT_CHANNELS * (request.height // VAE_STRIDE[1]) * (request.width // VAE_STRIDE[2])
    passes = [frames * size for frames, _ in pipeline_of(request.task).passes(request)]
    yield "--output", request.output, 0, output_bytes(request) + sum(passes) + COPIES * max(passes)
    if request.save_latents is not None:
        yield "--save_latents", request.save_latents, sum(passes), sum(passes)
    if request.save_quantized is not None:
        dtype = request.dtype or default_dtype(likely_device(request))
        weights = transformer_sizes(request, checkpoint).weight_bytes(dtype, quantized=True)
        yield "--save_quantized", request.save_quantized, weights / 2, weights


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
