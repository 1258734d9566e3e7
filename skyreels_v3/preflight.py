"""What must be known of this machine before anything long begins: device, checkpoint, outputs, inputs. No torch."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from skyreels_v3.checkpoints.files import is_quantized
from skyreels_v3.checkpoints.hub import check_on_hub, locate
from skyreels_v3.errors import AlreadyDone, UserError, format_value
from skyreels_v3.families import family_of, pipeline_of
from skyreels_v3.inputs import Inputs, open_inputs
from skyreels_v3.media.ffmpeg import check_ffmpeg
from skyreels_v3.media.files import check_writable
from skyreels_v3.media.video_writer import read_comment
from skyreels_v3.outputs import check_room, join_passes
from skyreels_v3.parallel.ranks import SINGLE, Ranks, choose_degrees
from skyreels_v3.plan import Checked, transformer_sizes
from skyreels_v3.request import BY_NAME, GenerationRequest, Request, ResolvedRequest
from skyreels_v3.resume import NO_RECORD, RunRecord, find_left
from skyreels_v3.runtime import check_compute, check_device, default_dtype, likely_device
from skyreels_v3.tasks import TINY

logger = logging.getLogger(__name__)

EARLIER_OUTPUTS = 8  # that are looked at
PROMPT_IN_NAME = 100  # characters
NAME_BYTES = 180  # of them; file systems take 255 for a name, and those of temporary files are longer
NOT_IN_NAMES = r"[/\x00-\x1f\x7f-\x9f\u2028\u2029]" if os.name != "nt" else r'[<>:"/\\|?*\x00-\x1f]'


def preflight(request: GenerationRequest, downloads: Path, ranks: Ranks = SINGLE) -> Checked:
    """Check `request` against this machine, quick checks first.

    Args:
        downloads: a folder of this run for inputs that are URLs; what is in it already is not fetched again.
        ranks: this process; outputs are looked at by the one that writes them.

    Raises:
        UserError: what cannot work, with the flag to change.
        AlreadyDone: with `resume`, the run was complete.
    """
    with commas_explained(request):
        return check(request, downloads, ranks)


@contextmanager
def commas_explained(request: GenerationRequest) -> Iterator[None]:
    """Have an error about one of several entries that is not there say what made them several."""
    try:
        yield
    except UserError as error:
        name = error.flag.removeprefix("--")
        absent = any(words in str(error) for words in ("does not exist", "no file or folder"))
        flag = BY_NAME.get(name)
        if flag is None or not flag.several or not absent or len(getattr(request, name)) < 2:
            raise
        remedy = f"commas separate entries: where a name has one, give {error.flag} once for each"
        raise UserError(error.flag, f"{error.message}; {remedy}") from error


def check(request: GenerationRequest, downloads: Path, ranks: Ranks) -> Checked:
    """See `preflight`."""
    check_device(request.device)
    check_compute(request)
    checkpoint = checkpoint_here(request)
    if checkpoint is not None:
        request = follow_checkpoint(request, checkpoint)
    request = with_base(request, base_here(request, checkpoint))
    if ranks.is_main:
        check_on_hub(request)
    going_on = ranks.is_main and (request.resume or request.resume_if_same)
    if not going_on:
        request = replace(request, output=request.output or free_name(request))
        if ranks.is_main:
            check_outputs(request)
    if not request.frame_folder or request.input_video or request.input_audio:
        check_ffmpeg()
    opened, inputs = open_inputs(request, downloads)
    resolved = ResolvedRequest.of(opened, output=opened.output or free_name(opened))
    pipeline_of(request.task).check_inputs(resolved, inputs)
    if going_on:
        resolved = go_on(resolved, inputs, named=request.output is not None)
    warnings = [*inputs.notes, *(check_room(resolved, checkpoint) if ranks.is_main else ())]
    if request.use_usp:  # refuses degrees that do not fit
        heads, terms = (
            transformer_sizes(request, checkpoint).num_attention_heads,
            pipeline_of(request.task).guidance(request).terms,
        )
        choose_degrees(request, ranks.world_size, heads, len(terms))
    for note in resolved.notes:  # not before all has been checked: an error stands alone
        logger.info(note)
    for note in warnings:
        logger.warning(note)
    return Checked(resolved, inputs, checkpoint)


def check_outputs(request: GenerationRequest) -> None:
    """Raise UserError for an output that is there already, or cannot be made."""
    output = "output" if request.outdir is None else "outdir"
    outputs = {output: request.output, "save_latents": request.save_latents, "save_quantized": request.save_quantized}
    for name, path in outputs.items():
        if path is not None:
            check_writable(path, f"--{name}")


def go_on(request: ResolvedRequest, inputs: Inputs, named: bool) -> ResolvedRequest:
    """A request for the output of the run that it goes on with, or for a new one where none was interrupted.

    Args:
        named: the user has named the output.

    Raises:
        UserError: the run for that output was not the same, or its inputs were not, or it has not ended.
        AlreadyDone: it was complete.
    """
    made = [request.output] if named else earlier_outputs(request) if request.resume else []
    record = record_of(request, inputs)
    left = find_left(record, strict=request.resume, anywhere=not named)
    if left is None:
        for output in made:
            if is_of(output, record):
                raise AlreadyDone(output)
        check_outputs(request)
        note = f"there is no interrupted run of this request in {record.output.parent}; it starts from the beginning"
        return replace(request, resume=False, notes=(*request.notes, note) if request.resume else request.notes)
    folder, file, before = left
    with file:  # locked until here
        output = folder.parent / Path(before["output"]).name
        if os.path.lexists(output) and is_of(output, record, unsaid=True):  # it was not there when that run began
            if not request.dry_run:
                finish(request, output, folder)
            raise AlreadyDone(output)
    if request.seed_drawn:
        seed = before["flags"]["seed"]
        request = replace(request, seed=seed, flags={**request.flags, "seed": seed})
    quantized = request.save_quantized
    own = quantized is not None and str(quantized) == before["save_quantized"]
    check_outputs(replace(request, output=output, save_quantized=None if own else quantized))
    return replace(request, output=output)


def finish(request: ResolvedRequest, output: Path, state: Path) -> None:
    """Do what is left to do of a run whose video is there: the latents, if they were asked for and could not be saved.

    Raises:
        UserError: they were not kept.
    """
    latents = request.save_latents
    if latents is not None and not os.path.lexists(latents):
        check_writable(latents, "--save_latents")
        if not join_passes(state, latents, len([*pipeline_of(request.task).passes(request)])):
            reason = f"{format_value(latents)}: the latents of {format_value(output)} were not kept"
            raise UserError("--save_latents", f"{reason}; leave it out, or make both again with another --output")
    shutil.rmtree(state, ignore_errors=True)


def is_of(output: Path, record: RunRecord, unsaid: bool = False) -> bool:
    """Whether a file or a folder was made by a run of the same flags and inputs, as its comment says.

    Args:
        unsaid: what to take it for if it has none.
    """
    try:
        comment = read_comment(output)
    except (OSError, RuntimeError, ValueError):
        return False
    if not comment:
        return unsaid
    try:
        record.check_same(json.loads(comment))
    except (UserError, *NO_RECORD):
        return False
    return True


def earlier_outputs(request: GenerationRequest) -> list[Path]:
    """The newest videos that may have been made by a request that names no output."""
    folder, stem = default_place(request)
    found = sorted(folder.glob(f"{glob.escape(stem)}*.mp4"), reverse=True)
    return [] if request.seed_drawn else found[:EARLIER_OUTPUTS]


def default_place(request: GenerationRequest) -> tuple[Path, str]:
    """The folder of the video of a request that names no output, and how its name begins."""
    if request.outdir is None:
        return Path("result") / request.task.name, f"{request.seed}_"
    words = re.sub(NOT_IN_NAMES, "", request.prompt[:PROMPT_IN_NAME]).encode()[:NAME_BYTES]
    stem = f"{words.decode(errors='ignore').lstrip(' .')}_{request.seed}_{request.number}"
    return Path("results") / request.outdir, stem


def free_name(request: GenerationRequest) -> Path:
    """Where the video of a request goes that names no output. Small ones may be made several in a second."""
    folder, stem = default_place(request)
    time = f"{datetime.now():%Y%m%d-%H%M%S}" if request.outdir is None else ""
    path = folder / f"{stem}{time}.mp4"
    numbered = (path.with_name(f"{path.stem}-{number}.mp4") for number in count(2))
    return next(name for name in chain([path], numbered) if not os.path.lexists(name))


def checkpoint_here(request: GenerationRequest) -> Path | None:
    """The folder of a checkpoint that is on this machine, None for one that is yet to be fetched or made."""
    return None if request.model_id == TINY else locate(request, family_of(request.task).repositories(request.task)[0])


def base_here(request: GenerationRequest, checkpoint: Path | None) -> Path | None:
    """The folder of the components that are not the checkpoint's own, where it is on this machine."""
    family, base = family_of(request.task), None
    for repository in family.repositories(request.task)[1:]:
        base = locate(request, repository, checkpoint)
    family.check_configs(request.task, checkpoint, base)
    return base


def with_base(request: GenerationRequest, base: Path | None) -> GenerationRequest:
    """The request, naming a folder of the other components if there is one."""
    return request if base is None else replace(request, base_model_id=str(base))


def follow_checkpoint(request: Request, checkpoint: Path) -> Request:
    """The request for the checkpoint in a folder: FP8 weights make it one in FP8, which takes no more LoRAs."""
    if not is_quantized(checkpoint / request.task.transformer_folder):
        return request
    if request.lora:
        reason = f"{format_value(request.lora[0].source)}: the checkpoint's weights are quantized already"
        raise UserError("--lora", f"{reason}; give it to the run that quantizes them, with --save_quantized")
    return replace(request, quant=request.quant or "fp8")  # the text encoder too, as when it was saved


def recorded_flags(request: GenerationRequest) -> dict[str, Any]:
    """The flags that make the same video again, but for the dtype where torch chooses it."""
    return {**request.flags, "height": request.height, "width": request.width}


def record_of(request: ResolvedRequest, inputs: Inputs, **more: Any) -> RunRecord:
    """What the run for a request is known by; `more` flags are those that are only known later."""
    flags = recorded_flags(request) | more
    made = (request.save_quantized, request.frame_folder, request.seed_drawn, request.resume_if_same)
    return RunRecord(request.output, flags, inputs.digests, *made)


def networks(request: GenerationRequest) -> tuple[object, ...]:
    """What decides which networks are loaded, and what is done to them: requests alike in it can use the same.

    Where they live is the memory policy's, which looks at sizes too.
    """
    task = request.task
    files = (request.model_id, request.base_model_id, request.model_source)
    parts = (task.layout, task.transformer_folder, "input_audio" in task.inputs)
    device = likely_device(request)
    numbers = (device, request.dtype or default_dtype(device), request.vae_dtype, request.quant, request.lora)
    work = (request.attention, request.compile, request.no_cache, request.shard_weights, request.broadcast_weights)
    return (*files, *parts, *numbers, *work)
