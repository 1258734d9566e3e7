"""--dry_run: describes a plan as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from skyreels_v3 import throughput
from skyreels_v3.checkpoints import hub, tiny
from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.checkpoints.formats import describe as describe_weights
from skyreels_v3.errors import counted, format_duration, one_line
from skyreels_v3.families import component_files, family_of, repositories_of
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.files import existing_folder, giga
from skyreels_v3.memory.policy import TILINGS
from skyreels_v3.parallel.ranks import Ranks
from skyreels_v3.plan import Checked, Plan, component_dtype, output_bytes, plan
from skyreels_v3.request import ENHANCER_LOCAL, GenerationRequest, ResolvedRequest
from skyreels_v3.resolve import preflight
from skyreels_v3.runtime import find_machine
from skyreels_v3.tasks import MEMORY_MODES, TINY


def dry_run(request: GenerationRequest, downloads: Path, ranks: Ranks) -> str:
    """Check a request and describe what it would do."""
    return describe_checked(preflight(request, downloads, ranks), downloads, ranks)


def describe_checked(checked: Checked, downloads: Path, ranks: Ranks) -> str:
    """Describe what a request that has passed `preflight` would do."""
    if checked.done:
        return f"{'done':14}{checked.request.output}"
    return describe(plan_of(checked, downloads, ranks))


def describe_prompt(request: GenerationRequest, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Rows on the prompt that the model gets, the prompt given, and whether it is still to be rewritten."""
    if request.to_enhance:
        from skyreels_v3.enhancer.enhance import model_folder, recall

        model = f"{request.enhancer_model}, {request.given['enhance_prompt']}"
        if request.enhance_prompt == ENHANCER_LOCAL and model_folder(request) is None:
            sizes = hub.bytes_to_fetch(request, hub.ENHANCER)
            model += f" ({giga(sizes[1])} to fetch)" if sizes else " (to be fetched)"
        request = recall(request, inputs)
        known = "asked for a better prompt" if request.to_enhance else "the prompt is known from an earlier run"
        yield "enhancer", f"{model}: {known}"
    yield "prompt", one_line(request.prompt)
    if (given := request.given.get("prompt", request.prompt)) != request.prompt:
        yield "given prompt", one_line(given)


def plan_of(checked: Checked, downloads: Path, ranks: Ranks) -> Plan:
    """Plan a request that has passed `preflight`, without loading or downloading weights.

    Raises:
        UserError: the checkpoint or a LoRA does not fit.
    """
    if checked.request.model_id == TINY:
        checkpoint = tiny.folder_of(checked.request.task)
        if not checkpoint.is_dir():  # a dry run leaves nothing in the cache
            checkpoint = downloads / TINY
            tiny.unpack(checked.request.task, checkpoint)
        checked = replace(checked, checkpoint=checkpoint)
    if checked.checkpoint is not None or checked.request.lora:
        from skyreels_v3.components import check_components  # imports all model-loading libraries

        check_components(checked.request, checked.checkpoint)
    return plan(checked, find_machine(checked.request, ranks), ranks)


def describe(plan: Plan) -> str:
    """Format a plan as a table."""
    request = plan.request
    size, length = f"{request.width} x {request.height}", request.frames_out / request.task.fps
    video = f"{size}, {counted(request.frames_out, 'new frame')} at {request.task.fps} fps ({length:.2f} s)"
    lines = [("task", f"{request.task.name}: {request.task.summary}"), ("video", video)]
    own = request.model_id if plan.checkpoint is None else f"{plan.checkpoint} (on this machine)"
    lines += [("checkpoint", f"{TINY} (built in)" if request.model_id == TINY else own)]
    if request.transformer is None and plan.checkpoint is not None:
        lines += [("weights", describe_weights(component_files(request, plan.checkpoint, "transformer")))]
    for field, file in hub.components_of(request).items():
        state = f"{describe_weights([Path(file)])} (on this machine)" if Path(file).is_file() else "to be fetched"
        lines += [(hub.COMPONENTS[field].name, f"{file}: {state}")]
    if request.base_model_id is not None and Path(request.base_model_id).is_dir():
        lines += [("base model", f"{request.base_model_id} (on this machine)")]
    lines += [describe_download(request, repository) for repository in missing_repositories(plan)]
    shift = "the scheduler's shift" if request.shift is None else f"shift {request.shift:g}"
    lines += describe_prompt(request, plan.inputs)
    lines += [("steps", f"{request.num_inference_steps}, {shift}, {counted(plan.forwards, 'forward')} a pass")]
    for number, made in enumerate(plan.passes, start=1):
        work = f"{format_flop(made.flop / plan.forwards)} a forward, {format_flop(made.flop)} in all"
        lines += [(f"pass {number}", f"latents {list(made.latents)}, {made.tokens:,} tokens, {work}")]
    if (denoising := throughput.seconds_of(plan)) is not None:
        lines += [("time", f"about {format_duration(denoising)} of denoising, at the speed measured here before")]
    for name, part in plan.components.items():
        quantized = f", {request.quant}" if request.quant and name in ("transformer", "text encoder") else ""
        weights = f"{giga(part.weights)} weights ({component_dtype(request, name, plan.dtype)}{quantized})"
        lines += [(name, weights + (f", about {giga(part.activations)} activations" if part.activations else ""))]
    if plan.degrees.world_size > 1:
        lines += [("processes", f"{plan.degrees.world_size}: {plan.degrees}; memory is that of one of them")]
    lines += [("memory", describe_memory(plan)), ("here", f"--memory {plan.policy.mode} ({plan.policy.reason})")]
    lines += [("output", str(request.output)), ("disk", describe_disk(request))]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def missing_repositories(plan: Plan) -> list[Repository]:
    """The repositories of which at least a part must be downloaded."""
    request = plan.request
    first, *others = repositories_of(request)
    if request.model_id == TINY:
        return []
    base_is_here = request.base_model_id is not None and Path(request.base_model_id).is_dir()
    return [*([first] if plan.checkpoint is None else []), *([] if base_is_here else others)]


def describe_download(request: GenerationRequest, repository: Repository) -> tuple[str, str]:
    """A row on what must be downloaded, its size, and whether there is room for it."""
    name, source = hub.model_id_of(request, repository), request.model_source
    known = hub.bytes_to_fetch(request, repository)
    published = family_of(request.task).published_bytes(request.task)
    total, missing = known or (sum(published[name] for name in repository.components),) * 2
    size = f"{giga(missing)} of {giga(total)} to fetch" if known else f"about {giga(total)} in bfloat16"
    folder = hub.cache_of(source)
    free = shutil.disk_usage(existing_folder(folder)).free
    text = f"{name} from {source} ({', '.join(repository.patterns)}): {size}; {giga(free)} free in {folder}"
    return "download", text if missing <= free else f"{text}: not enough; set {hub.CACHES[source]} to another folder"


def describe_disk(request: ResolvedRequest) -> str:
    """Describe the free space for the output."""
    free, need = shutil.disk_usage(existing_folder(request.output)).free, output_bytes(request)
    return f"{giga(free)} free for the output" + (f": it may need {giga(need)}" if need > free else "")


def describe_memory(plan: Plan) -> str:
    """Describe the peak memory of each --memory mode, in brackets with a tiled VAE."""
    whole, tiled = ([plan.peak(mode, tiles) for mode in MEMORY_MODES] for tiles in (TILINGS[0], TILINGS[-1]))
    if whole == tiled:
        return f"about {', '.join(f'{mode} {giga(plan.peak(mode))}' for mode in MEMORY_MODES)} on the device at most"
    peaks = (f"{mode} {giga(need)} ({giga(less)})" for mode, need, less in zip(MEMORY_MODES, whole, tiled, strict=True))
    return f"about {', '.join(peaks)} on the device at most; in parentheses with a tiled VAE, used if needed"


def format_flop(work: float) -> str:
    if work < 1e11:
        return f"{work / 1e9:.3g} GFLOP"
    return f"{work / 1e15:.1f} PFLOP" if work >= 1e14 else f"{work / 1e12:.3g} TFLOP"
