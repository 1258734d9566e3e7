"""What a plan says, for people."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from skyreels_v3 import throughput
from skyreels_v3.checkpoints import hub
from skyreels_v3.media.files import existing_folder, giga
from skyreels_v3.memory.policy import BYTES, TILINGS
from skyreels_v3.parallel.ranks import Ranks
from skyreels_v3.plan import (
    IMAGE_ENCODER_FILE_BYTES,
    Plan,
    component_parameters,
    output_bytes,
    plan,
    stage_dtype,
    transformer_sizes,
)
from skyreels_v3.preflight import preflight
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.runtime import find_machine
from skyreels_v3.tasks import HUNYUAN, MEMORY_MODES, TINY


def dry_run(request: GenerationRequest, downloads: Path, ranks: Ranks) -> str:
    """Check a request, and say what it would do."""
    checked = preflight(request, downloads, ranks)
    return describe(plan(checked, find_machine(checked.request, ranks), ranks))


def describe(plan: Plan) -> str:
    """The plan as a table."""
    request = plan.request
    size, length = f"{request.width} x {request.height}", request.frames_out / request.task.fps
    video = f"{size}, {request.frames_out} new frames at {request.task.fps} fps ({length:.2f} s)"
    lines = [("task", f"{request.task.name}: {request.task.summary}"), ("video", video)]
    lines += [("checkpoint", request.model_id if plan.checkpoint is None else f"{plan.checkpoint} (on this machine)")]
    if plan.checkpoint is None and request.model_id != TINY:
        lines += [("to fetch", f"from {request.model_source}: {', '.join(hub.download_patterns(request.task))}")]
    if request.task.layout == HUNYUAN and request.model_id != TINY:
        lines += [describe_base(request)]
    if to_fetch := missing_repositories(plan):
        lines += [("download", describe_download(plan, to_fetch))]
    shift = "the scheduler's shift" if request.shift is None else f"shift {request.shift:g}"
    lines += [("steps", f"{request.num_inference_steps}, {shift}, {plan.forwards} forwards a pass")]
    for number, made in enumerate(plan.passes, start=1):
        work = f"{peta(made.flop / plan.forwards)} a forward, {peta(made.flop)} in all"
        lines += [(f"pass {number}", f"latents {list(made.latents)}, {made.tokens:,} tokens, {work}")]
    if (denoising := throughput.seconds_of(plan)) is not None:
        lines += [("time", f"about {duration(denoising)} of denoising, as fast as it was here before")]
    for name, stage in plan.stages.items():
        quantized = f", {request.quant}" if request.quant and name in ("transformer", "text encoder") else ""
        weights = f"{giga(stage.weights)} weights ({stage_dtype(request, name, plan.dtype)}{quantized})"
        lines += [(name, weights + (f", about {giga(stage.activations)} activations" if stage.activations else ""))]
    if plan.degrees.world_size > 1:
        lines += [("processes", f"{plan.degrees.world_size}: {plan.degrees}; memory is that of one of them")]
    lines += [("memory", describe_memory(plan)), ("output", str(request.output)), ("disk", describe_disk(request))]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def describe_base(request: GenerationRequest) -> tuple[str, str]:
    """A line on where V1's encoders and VAE come from."""
    name = request.base_model_id or request.task.base_model_id
    if Path(name).is_dir():
        return "base model", f"{name} (on this machine)"
    return "base model", f"{name}, to fetch: {', '.join(hub.base_patterns())}"


def missing_repositories(plan: Plan) -> dict[str, list[str]]:
    """The hub's repositories of which something is to be downloaded, and the patterns of its files."""
    request, found = plan.request, {}
    if request.model_id == TINY:
        return {}
    if plan.checkpoint is None:
        found[request.model_id] = hub.download_patterns(request.task)
    base = request.base_model_id or request.task.base_model_id
    if request.task.layout == HUNYUAN and not Path(base).is_dir():
        found[base] = hub.base_patterns()
    return found


def describe_download(plan: Plan, repositories: Mapping[str, list[str]]) -> str:
    """How much is to be downloaded, how much of that is here, and whether there is room for the rest."""
    request = plan.request
    size = transformer_sizes(request, None).weight_bytes("bfloat16") if request.model_id in repositories else 0
    if request.task.layout != HUNYUAN or any(name != request.model_id for name in repositories):
        size += sum(published_bytes(request).values())
    folder, here = hub.downloaded(request.model_source, repositories)
    free = shutil.disk_usage(folder if folder.exists() else existing_folder(folder)).free
    begun = f"{giga(here)} of it" if here else "nothing"
    text = f"about {giga(size)} in bfloat16, {begun} is here already; {giga(free)} free in {folder}"
    return (
        text if size - here <= free else f"{text}: too little; set {hub.CACHES[request.model_source]} to another folder"
    )


def published_bytes(request: GenerationRequest) -> dict[str, int]:
    """About the bytes of the published files of all components but the transformer."""
    sizes = {
        name: count * BYTES[stage_dtype(replace(request, vae_dtype="float32"), name, "bfloat16")]
        for name, count in component_parameters(request).items()
    }
    return sizes | ({"image encoder": IMAGE_ENCODER_FILE_BYTES} if "image encoder" in sizes else {})


def describe_disk(request: ResolvedRequest) -> str:
    """How much room there is for the output."""
    free, need = shutil.disk_usage(existing_folder(request.output)).free, output_bytes(request)
    return f"{giga(free)} free for the output" + (f": it may need {giga(need)}" if need > free else "")


def describe_memory(plan: Plan) -> str:
    """The most memory that is in use at one time, for each --memory; in brackets with the VAE in tiles."""
    if plan.request.task.layout == HUNYUAN:  # its VAE always works in tiles
        return f"about {', '.join(f'{mode} {giga(plan.peak(mode))}' for mode in MEMORY_MODES)} on the device at most"
    told = (
        f"{mode} {giga(plan.peak(mode, TILINGS[0]))} ({giga(plan.peak(mode, TILINGS[-1]))})" for mode in MEMORY_MODES
    )
    return f"about {', '.join(told)} on the device at most; in brackets with the VAE in tiles, made when needed"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def peta(work: float) -> str:
    if work < 1e11:
        return f"{work / 1e9:.3g} GFLOP"
    return f"{work / 1e15:.1f} PFLOP" if work >= 1e14 else f"{work / 1e12:.3g} TFLOP"
