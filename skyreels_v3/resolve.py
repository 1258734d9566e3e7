"""Prepares a request on this machine: `preflight` checks it, `resolve` also downloads what is missing.

Usage errors are found without importing torch. With several ranks, the local main process of each machine fetches
inputs and checkpoints first; the others then find them there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyreels_v3.checkpoints.files import errors_about
from skyreels_v3.checkpoints.formats import CAST, GGUF, read_format
from skyreels_v3.checkpoints.hub import (
    COMPONENTS,
    ENHANCER,
    LORA,
    FileKind,
    check_on_hub,
    components_of,
    download,
    download_file,
    locate,
    locate_file,
)
from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.errors import UserError, cause_of, format_value
from skyreels_v3.families import component_files, family_of, pipeline_of, repositories_of
from skyreels_v3.inputs import open_inputs
from skyreels_v3.media.ffmpeg import check_ffmpeg
from skyreels_v3.media.files import run_folder
from skyreels_v3.outputs import check_outputs, check_room, continue_earlier, free_name
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Checked, degrees_of
from skyreels_v3.request import BY_NAME, ENHANCER_LOCAL, GenerationRequest, Request, ResolvedRequest
from skyreels_v3.runtime import check_compute, check_device, default_dtype, likely_device
from skyreels_v3.tasks import TINY

logger = logging.getLogger(__name__)

RemoteError = tuple[str | None, str]  # an error sent to other processes: the flag of a UserError, and the message
Outcome = tuple[str | None, RemoteError | None]  # of a download: its path or its error


def preflight(request: GenerationRequest, downloads: Path, ranks: Ranks = SINGLE) -> Checked:
    """Check `request` on this machine, quick checks first.

    Args:
        downloads: this run's folder for inputs that are URLs; files already in it are not fetched again.
        ranks: this process; outputs are checked only on the main one, which writes them.

    Raises:
        UserError: the request cannot work; names the flag to change.
    """
    check_device(request.device)
    check_compute(request)
    with explain_commas(request):
        request, checkpoint = locate_checkpoint(request)
        if ranks.is_main:
            if request.enhance_prompt == ENHANCER_LOCAL:
                locate(request, ENHANCER)
            check_on_hub(request)
        resumes = ranks.is_main and (request.resume or request.resume_if_same)
        if not resumes:
            request = replace(request, output=request.output or free_name(request))
            if ranks.is_main:
                check_outputs(request)
        if not request.frame_folder or request.input_video or request.speakers:
            check_ffmpeg()
        opened, inputs = open_inputs(request, downloads)
    resolved, done = ResolvedRequest.of(opened, output=opened.output or free_name(opened)), False
    pipeline_of(request.task).check_inputs(resolved, inputs)
    if resumes:
        resolved, done = continue_earlier(resolved, inputs, named=request.output is not None)
    warnings = [*inputs.notes, *(check_room(resolved, checkpoint) if ranks.is_main and not done else ())]
    degrees_of(request, checkpoint, ranks)  # raises for unsuitable degrees
    for note in resolved.notes:  # only now, so that an error appears alone
        logger.info(note)
    for note in warnings:
        logger.warning(note)
    return Checked(resolved, inputs, checkpoint, done)


@contextmanager
def explain_commas(request: GenerationRequest) -> Iterator[None]:
    """Make an error about a missing file among several entries explain that commas separate them."""
    try:
        yield
    except UserError as error:
        flag = BY_NAME.get(error.flag.removeprefix("--"))
        missing = "does not exist" in error.message or "not a file or folder" in error.message
        if flag is None or not flag.several or not missing or len(getattr(request, flag.name)) < 2:
            raise
        remedy = f"commas separate entries: if a name has one, give {error.flag} once for each entry"
        raise UserError(error.flag, f"{error.message}; {remedy}") from error


def locate_checkpoint(request: Request) -> tuple[Request, Path | None]:
    """Find the checkpoint; returns the request and the folder, None if it must be downloaded or built.

    The request's `base_model_id` becomes the folder of the other components if they are on this machine.
    """
    family = family_of(request.task)
    first, *others = repositories_of(request)
    checkpoint, base = None if request.model_id == TINY else locate(request, first), None
    request = follow_weights(request, checkpoint)
    for repository in others:
        base = locate(request, repository, checkpoint)
    family.check_configs(request.task, checkpoint, base)
    return request if base is None else replace(request, base_model_id=str(base)), checkpoint


def follow_weights(request: Request, checkpoint: Path | None) -> Request:
    """Adapt the request to the weights on this machine, with the paths of their files.

    With FP8 weights saved by this package, --quant is set, so that the text encoder is quantized as well.

    Raises:
        UserError: the format is not supported, or the request asks for what its quantized weights do not allow.
    """
    for field, name in components_of(request).items():
        if (found := locate_file(name, COMPONENTS[field])) is not None:
            request = with_files(request, {field: str(found)})
            with errors_about(COMPONENTS[field].flag):
                read_format([found])
    if checkpoint is None if request.transformer is None else not Path(request.transformer).is_file():
        return request
    with errors_about("--model_id"):
        form = read_format(component_files(request, checkpoint or Path(), "transformer"))
    if not form.is_quantized:
        return request
    if request.lora and form.name != CAST:
        reason = (
            f"{format_value(request.lora[0].source)}: the transformer's weights are quantized already ({form.name})"
        )
        remedy = "give weights in bfloat16 and --quant fp8, which adds it first (--save_quantized keeps both)"
        raise UserError("--lora", f"{reason}; {remedy}")
    if request.save_quantized is not None and form.name == GGUF:
        reason = f"{format_value(request.save_quantized)}: GGUF's blocks are not quantized again"
        raise UserError("--save_quantized", f"{reason}; leave it out, and use the GGUF file itself")
    return replace(request, quant=request.quant or "fp8") if form.ours else request


def with_files(request: Request, files: Mapping[str, Any]) -> Request:
    """The request with other component files, by the keys of COMPONENTS."""
    return replace(request, **files)


def networks(request: GenerationRequest) -> tuple[object, ...]:
    """A key of which models are loaded and how they are set up; requests with equal keys can share them.

    It leaves out their placement, which the memory policy chooses and which also depends on the video's size.
    """
    task, device = request.task, likely_device(request)
    files = (request.model_id, *components_of(request).items(), request.base_model_id, request.model_source)
    parts = (task.layout, task.transformer_folder, "input_audio" in task.inputs)
    numbers = (device, request.dtype or default_dtype(device), request.vae_dtype, request.quant, request.lora)
    kernels = (request.attention, request.exact_steps > 0, request.compile)
    work = (request.no_cache, request.shard_weights, request.broadcast_weights)
    return (*files, *parts, *numbers, *kernels, *work)


class AssetResolver:
    """Downloads checkpoints and LoRAs, each once; failed downloads are not repeated."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}  # JSON-serializable, for the other processes on this machine

    def resolve(self, request: Request, checkpoint: Path | None) -> tuple[Request, Path]:
        """Download what a request needs; returns it with local paths, and the folder of its checkpoint.

        Args:
            checkpoint: the folder, None if it must be downloaded or built.
        """
        source = request.model_source
        loras = tuple(lora._replace(source=self.file(lora.source, request, LORA)) for lora in request.lora)
        own = {field: self.file(name, request, COMPONENTS[field]) for field, name in components_of(request).items()}
        request = with_files(replace(request, lora=loras), own)
        first, *others = repositories_of(request)
        if checkpoint is None:
            task, tiny = request.task, request.model_id == TINY
            if loras and not tiny:  # check the small LoRAs before the large download
                from skyreels_v3.components import check_components

                check_components(request, None)
            make = (lambda: make_tiny(task)) if tiny else (lambda: download(request, first))
            key = " ".join((source, request.model_id, task.name, *own))  # files given separately are left out
            checkpoint = Path(self.fetch(key, make))
        for repository in others:
            base = locate(request, repository, checkpoint)
            if base is None:
                name = request.base_model_id or repository.model_id
                base = Path(self.fetch(f"{source} {name} base", lambda: download(request, repository)))  # noqa: B023
            request = replace(request, base_model_id=str(base))
        if request.enhance_prompt == ENHANCER_LOCAL:
            folder = locate(request, ENHANCER)
            key = f"{source} {request.enhancer_model} enhancer"
            folder = folder or Path(self.fetch(key, lambda: download(request, ENHANCER)))
            request = replace(request, enhancer_model=str(folder))
        return follow_weights(request, checkpoint), checkpoint

    def file(self, name: str, request: GenerationRequest, kind: FileKind) -> str:
        """The local path of a single file, downloaded if necessary."""
        found = locate_file(name, kind)
        key = f"{request.model_source} {name}"
        return str(found or self.fetch(key, lambda: download_file(name, request, kind)))

    def fetch(self, key: str, fetch: Callable[[], Path]) -> str:
        """The path that `fetch` returns, which is called once per key; a failure is raised again."""
        if key not in self.outcomes:
            try:
                self.outcomes[key] = str(fetch()), None
            except Exception as error:
                self.outcomes[key] = None, to_remote(error)
                raise
        path, problem = self.outcomes[key]
        if path is None:
            assert problem is not None
            raise from_remote(problem)
        return path

    def resolve_all(self, requests: Iterable[GenerationRequest]) -> None:
        """Download what all requests need; failures are kept for `fetch`."""
        for request in requests:
            with suppress(Exception):  # the job itself reports it
                self.resolve(*locate_checkpoint(request))

    def merge_outcomes(self, outcomes: Mapping[str, Outcome]) -> None:
        """Adopt the outcomes of another process on this machine."""
        self.outcomes |= outcomes


@contextmanager
def downloads_folder(ranks: Ranks) -> Iterator[Path]:
    """A temporary folder for one video's downloaded inputs, on the local main process; empty path on others."""
    if not ranks.is_local_main:
        yield Path()
        return
    with run_folder() as folder:
        yield folder


def resolve(
    request: GenerationRequest,
    downloads: Path,
    ranks: Ranks,
    resolver: AssetResolver,
    name: str,
    checked: Checked | None = None,
) -> Checked:
    """Check a request, download what is missing, and rewrite the prompt if requested.

    An error on one rank is raised on all.

    Args:
        downloads: a folder for inputs that are URLs, kept until the video is made.
        ranks: this process among those that make the video together.
        name: a unique name for this video, the same on all ranks.
        checked: the result of `preflight` if it has been called already.
    """

    def here() -> Checked:
        found = checked or preflight(request, downloads, ranks)
        if found.done:
            return found
        asked = found.request if ranks.is_main else found.request.with_prompt(found.request.prompt)
        resolved, checkpoint = resolver.resolve(asked, found.checkpoint)
        if resolved.to_enhance:
            from skyreels_v3.enhancer.enhance import enhance  # imported late: it opens images

            resolved = enhance(resolved, found.inputs)
        return replace(found, request=resolved, checkpoint=checkpoint)

    if ranks.world_size == 1:
        return here()
    found, own, problem = None, None, None
    if not ranks.is_local_main:
        there, outcomes, problem = processes.store_get(f"found/{name}/{ranks.node}")
        downloads = Path(there)
        resolver.merge_outcomes(outcomes)
    try:
        found = here() if problem is None else None
    except Exception as error:
        own, problem = error, to_remote(error)
    if ranks.is_local_main:
        processes.store_set(f"found/{name}/{ranks.node}", [str(downloads), resolver.outcomes, problem])
    # the main rank's values count: they may come from a resumed run
    state = None if found is None else [found.request.seed, found.request.prompt, found.done]
    processes.store_set(f"ready/{name}/{ranks.rank}", [state, problem])
    everyone = [processes.store_get(f"ready/{name}/{rank}") for rank in range(ranks.world_size)]
    if (problem := next((problem for _, problem in everyone if problem), None)) is not None:
        raise own or from_remote(problem)
    assert found is not None
    (seed, prompt, done), _ = everyone[0]
    return replace(found, request=replace(found.request, seed=seed).with_prompt(prompt), done=done)


def to_remote(error: Exception) -> RemoteError:
    """Convert an error to send it to other processes."""
    return (error.flag, error.message) if isinstance(error, UserError) else (None, cause_of(error))


def from_remote(remote: RemoteError) -> Exception:
    """Restore the error that another process sent."""
    flag, text = remote
    return RuntimeError(text) if flag is None else UserError(flag, text)
