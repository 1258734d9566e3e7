"""Outputs of a run: their names, the disk space they need, and what an earlier run of the same request left.

torch is imported when the first tensor is saved.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import pipeline_of
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.files import check_writable, existing_folder, giga, publish, remove, replace_file, temporary_name
from skyreels_v3.media.video_writer import read_comment
from skyreels_v3.plan import output_bytes, transformer_file_bytes
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.resume import NO_RECORD, RunRecord, claim, find_left, passes_in, state_folders
from skyreels_v3.tasks import LATENT_CHANNELS, VAE_STRIDE

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EARLIER_OUTPUTS = 8  # number to check
PROMPT_IN_NAME = 100  # characters
NAME_BYTES = 180  # of these; file systems allow 255 for a name, and temporary names are longer
NOT_IN_NAMES = r"[/\x00-\x1f\x7f-\x9f\u2028\u2029]" if os.name != "nt" else r'[<>:"/\\|?*\x00-\x1f]'
MIN_FREE_BYTES = 1 << 14  # without these no output is possible
COPIES = 4  # times the largest pass's latents: a safety copy with a multistep scheduler's state


# Names


def default_place(request: GenerationRequest) -> tuple[Path, str]:
    """The default folder for a request without --output, and the beginning of the file name."""
    if request.outdir is None:
        return Path("result") / request.task.name, f"{request.seed}_"
    words = re.sub(NOT_IN_NAMES, "", request.prompt[:PROMPT_IN_NAME]).encode()[:NAME_BYTES]
    stem = f"{words.decode(errors='ignore').lstrip(' .')}_{request.seed}_{request.number}"
    return Path("results") / request.outdir, stem


def free_name(request: GenerationRequest) -> Path:
    """An unused path for the video of a request without --output; several may be made in one second."""
    folder, stem = default_place(request)
    time = f"{datetime.now():%Y%m%d-%H%M%S}" if request.outdir is None else ""
    path = folder / f"{stem}{time}.mp4"
    numbered = (path.with_name(f"{path.stem}-{number}.mp4") for number in count(2))
    return next(name for name in chain([path], numbered) if not os.path.lexists(name))


def check_outputs(request: GenerationRequest) -> None:
    """Raise UserError for an output that already exists or cannot be written."""
    output = "output" if request.outdir is None else "outdir"
    outputs = {output: request.output, "save_latents": request.save_latents, "save_quantized": request.save_quantized}
    for name, path in outputs.items():
        if path is not None:
            check_writable(path, f"--{name}")
    if request.frames_copy is not None and not request.frames_copy.exists():
        check_writable(request.frames_copy, "--jobs")


# Disk space


def check_room(request: ResolvedRequest, checkpoint: Path | None) -> Iterator[str]:
    """Yield warnings if a disk may have too little space for what a request writes.

    Raises:
        UserError: a disk certainly has too little.
    """
    disks: dict[int, list[tuple[str, Path, float, float]]] = {}
    for entry in bytes_to_write(request, checkpoint):
        disks.setdefault(existing_folder(entry[1]).stat().st_dev, []).append(entry)
    for entries in disks.values():
        flag, path, _, _ = max(entries, key=lambda entry: entry[2])
        folder = existing_folder(path)
        usage = shutil.disk_usage(folder)
        least, most = sum(entry[2] for entry in entries) + MIN_FREE_BYTES, sum(entry[3] for entry in entries)
        if usage.total and usage.free < least:  # some file systems report 0
            free = f"{giga(usage.free)} is free in {format_value(folder)}"
            remedy = "free some space, or give a path on another disk"
            raise UserError(flag, f"{format_value(path)} needs {giga(least)}, but {free}; {remedy}")
        if usage.total and usage.free < most:
            yield f"{giga(usage.free)} is free in {folder}; this run may need {giga(most)}"


def bytes_to_write(request: ResolvedRequest, checkpoint: Path | None) -> Iterator[tuple[str, Path, float, float]]:
    """Flag, path, and minimum and maximum bytes of each output."""
    size = 4 * LATENT_CHANNELS * (request.height // VAE_STRIDE[1]) * (request.width // VAE_STRIDE[2])
    passes = [frames * size for frames, _ in pipeline_of(request.task).passes(request)]
    yield "--output", request.output, 0, output_bytes(request) + sum(passes) + COPIES * max(passes)
    if request.frames_copy is not None:
        yield "--jobs", request.frames_copy, 0, output_bytes(replace(request, frame_folder=True))
    if request.save_latents is not None:
        yield "--save_latents", request.save_latents, sum(passes), sum(passes)
    if request.save_quantized is not None:
        weights = transformer_file_bytes(request, checkpoint)  # the files may be float32
        yield "--save_quantized", request.save_quantized, weights / 4, weights


# Earlier runs


def recorded_flags(request: GenerationRequest) -> dict[str, Any]:
    """The flags that make the same video again, except for a default dtype, which is chosen later."""
    return {**request.flags, "height": request.height, "width": request.width}


def record_of(request: ResolvedRequest, inputs: Inputs, device: str = "", **more: Any) -> RunRecord:
    """The record that identifies a run; `device` and `more` flags are known only after torch is imported."""
    flags = recorded_flags(request) | more
    made = (request.save_quantized, request.frame_folder, request.seed_drawn, request.resume_if_same)
    return RunRecord(request.output, flags, inputs.digests, *made, request.given, request.to_enhance, device)


def continue_earlier(request: ResolvedRequest, inputs: Inputs, named: bool) -> tuple[ResolvedRequest, bool]:
    """Find the run to continue, if any; returns the request with its output, and whether that is complete.

    Args:
        named: the user named the output.

    Raises:
        UserError: the run for that output had other flags or inputs, or is still active.
    """
    made = [request.output] if named else earlier_outputs(request) if request.resume else []
    record = record_of(request, inputs)
    left = find_left(record, strict=request.resume, anywhere=not named)
    if left is None:
        for output in made:
            if is_of(output, record):
                return replace(request, output=output), True
        check_outputs(request)
        note = f"there is no interrupted run of this request in {record.output.parent}; starting from the beginning"
        notes = (*request.notes, note) if request.resume else request.notes
        return replace(request, resume=False, notes=notes), False
    folder, file, before = left
    with file:  # locked until the block ends
        output = request.output if named else folder.parent / Path(before["output"]).name
        if os.path.lexists(output) and is_of(output, record, unsaid=True):  # made by that run: it did not exist before
            if not request.dry_run:
                finish(request, output, folder)
            return replace(request, output=output), True
    if request.seed_drawn:
        seed = before["flags"]["seed"]
        request = replace(request, seed=seed, flags={**request.flags, "seed": seed})
    if request.to_enhance:
        request = request.with_prompt(before["flags"]["prompt"])
    quantized = request.save_quantized
    own = quantized is not None and str(quantized) == before["save_quantized"]
    check_outputs(replace(request, output=output, save_quantized=None if own else quantized))
    return replace(request, output=output), False


def finish(request: ResolvedRequest, output: Path, state: Path) -> None:
    """Finish an interrupted run whose video is complete: save the latents if requested, and remove its state.

    Raises:
        UserError: the latents were not kept.
    """
    latents = request.save_latents
    if latents is not None and not os.path.lexists(latents):
        check_writable(latents, "--save_latents")
        if not join_passes(state, latents, len([*pipeline_of(request.task).passes(request)])):
            reason = f"{format_value(latents)}: the latents of {format_value(output)} were not kept"
            raise UserError("--save_latents", f"{reason}; leave it out, or make both again with another --output")
    shutil.rmtree(state, ignore_errors=True)


def remove_left(record: RunRecord, video: Path) -> None:
    """Remove what interrupted runs with the same record left beside the video, which is complete now.

    Active runs are left alone, and so is what another video still needs.
    """
    same, folder = replace(record, seed_drawn=False, to_enhance=False), record.output.parent
    names = {record.output.name if record.frame_folder else record.output.stem}
    for state in [*state_folders(record.output, anywhere=True)]:
        try:
            _, file, left = claim(state, same)
        except (UserError, OSError, *NO_RECORD):
            continue
        with file:
            output = folder / Path(left["output"]).name
            if output == video or not os.path.lexists(output):
                names.add(output.name if record.frame_folder else output.stem)
                shutil.rmtree(state, ignore_errors=True)
    for path in [path for name in names for path in folder.glob(f"{glob.escape(name)}.partial*")]:
        if is_of(path, same):
            logger.info("removed %s, as the video is complete", path)
            remove(path)


def is_of(output: Path, record: RunRecord, unsaid: bool = False) -> bool:
    """Whether a file or folder was made with the same flags and inputs, according to its comment.

    Args:
        unsaid: the answer if it has no comment.
    """
    try:
        if not (comment := read_comment(output)):
            return unsaid
        record.check_same(json.loads(comment))
    except (UserError, OSError, RuntimeError, *NO_RECORD):
        return False
    return True


def earlier_outputs(request: GenerationRequest) -> list[Path]:
    """The newest videos that may have been made by the same request without --output."""
    folder, stem = default_place(request)
    found = sorted(folder.glob(f"{glob.escape(stem)}*.mp4"), reverse=True)
    return [] if request.seed_drawn else found[:EARLIER_OUTPUTS]


# Latents


def save_latents(latents: Sequence[Tensor], path: Path) -> Path:
    """Save the latents (B, C, F, H, W) of each pass as `latents.0`, `latents.1`, ..., float32.

    Returns:
        The path used, which differs from `path` if that has been taken in the meantime.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    return write_new(path, save({f"latents.{n}": tensor.float().contiguous() for n, tensor in enumerate(latents)}))


def join_passes(state: Path, path: Path, count: int) -> bool:
    """Write the file of `save_latents` from the saved passes of a run; returns whether all `count` exist."""
    from safetensors.numpy import load_file, save

    files = passes_in(state)
    if len(files) == count:
        write_new(path, save({f"latents.{number}": load_file(file)["latents"] for number, file in enumerate(files)}))
    return len(files) == count


def write_new(path: Path, content: bytes) -> Path:
    """Write a file atomically under `path`, or a similar name if that is taken; returns the path used."""
    temporary = temporary_name(path)
    try:
        replace_file(temporary, content)
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
