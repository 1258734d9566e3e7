"""A job as OpenAI's Video object."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from skyreels_v3.checks import request_of
from skyreels_v3.cli import convert_flags
from skyreels_v3.errors import UserError
from skyreels_v3.request import GenerationRequest
from skyreels_v3.web.errors import as_fields, for_clients, without_paths
from skyreels_v3.web.queue import Job, State
from skyreels_v3.web.retention import DAY_SECONDS
from skyreels_v3.web.settings import Settings

FACTS = ("width", "height", "frames", "fps", "seconds", "stages", "peak_bytes", "quality")  # that clients see


@lru_cache(maxsize=1024)
def request_for(id: str, flags: tuple[tuple[str, Any], ...]) -> GenerationRequest | None:
    """A job's request; None if this version does not accept its flags any more."""
    try:
        return request_of(convert_flags(dict(flags)))
    except UserError:
        return None


def request_of_job(job: Job) -> GenerationRequest | None:
    """See `request_for`, whose flags must be hashable: lists become tuples."""
    flags = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in job.flags.items())
    return request_for(job.id, flags)


def video_of(job: Job, settings: Settings) -> dict[str, Any]:
    """The Video object of a job: OpenAI's fields, and `details`."""
    request, facts = request_of_job(job), job.facts or {}
    model = job.flags.get("model_id") or (request.model_id if request is not None else "")
    state, error = State.FAILED if job.state is State.CANCELLED else job.state, error_of(job)
    return {
        "id": job.id,
        "object": "video",
        "model": settings.model_name(model),
        "status": state.value,
        "progress": 100 if job.state is State.COMPLETED else min(99, max(0, int(100 * job.progress.part))),
        "created_at": int(job.created),
        "completed_at": int(job.ended) if job.ended and job.state is State.COMPLETED else None,
        "expires_at": expiry_of(job, settings.keep_days),
        "prompt": job.flags.get("prompt"),
        "seconds": seconds_of(job, request),
        "size": size_of(job, request),
        "remixed_from_video_id": job.parent or None,
        "error": error and {**error, "message": as_fields(error["message"])},
        "details": {
            "task_type": job.flags.get("task_type"),
            "seed": facts.get("seed", job.flags.get("seed")),
            "state": job.state.value,
            "place": None,
            "cancelling": job.cancelling,
            "started_at": int(job.started) if job.started else None,
            "ended_at": int(job.ended) if job.ended else None,
            "progress": progress_of(job),
            "result": {name: facts[name] for name in FACTS if name in facts} or None,
        },
    }


def expiry_of(job: Job, keep_days: float | None) -> int | None:
    """The earliest time at which a completed video is deleted for its age; None for others or without a limit."""
    if keep_days is None or job.ended is None or job.state is not State.COMPLETED:
        return None
    return int(job.ended + keep_days * DAY_SECONDS)


def progress_of(job: Job) -> dict[str, Any]:
    """A job's progress, for a progress bar."""
    progress = job.progress
    return {
        **{"stage": progress.stage, "part": progress.part, "window": progress.window, "windows": progress.windows},
        **{"step": progress.step, "steps": progress.steps, "seconds_left": progress.seconds_left},
        "preview": f"/v1/videos/{job.id}/preview?number={progress.preview}" if progress.preview else None,
    }


def seconds_of(job: Job, request: GenerationRequest | None) -> str:
    """The video's length in seconds: as requested, or of its frames where sound, a clip or num_frames decides."""
    facts = job.facts or {}
    is_known = bool(facts.get("frames") and facts.get("fps"))
    takes_over = request is None or bool(request.input_audio) or (request.include_input and is_known)
    if request is not None and not takes_over and "num_frames" not in job.flags:
        return str(request.duration)
    if is_known:
        return f"{facts['frames'] / facts['fps']:.4g}"
    if request is None or request.input_audio:
        return "0"
    return f"{request.frames_out / request.task.fps:.4g}"


def size_of(job: Job, request: GenerationRequest | None) -> str:
    """WIDTHxHEIGHT; while that still depends on an unopened input, the name of the resolution."""
    facts = job.facts or {}
    if facts.get("width") and facts.get("height"):
        return f"{facts['width']}x{facts['height']}"
    if request is None:
        return ""
    return f"{request.width}x{request.height}" if request.height and request.width else request.resolution


def error_of(job: Job) -> dict[str, str] | None:
    """Why a job has no video, or None; the message names fields as --flags, see `ApiError`."""
    if job.state is State.CANCELLED:
        return {"code": "cancelled", "message": "it was cancelled"}
    if job.state is not State.FAILED:
        return None
    code, message = job.error or ("failed", "it failed")
    folder = str(job.folder)
    message = without_paths(message.replace(f"{folder}/", "").replace(folder, ""))
    return {"code": code, "message": for_clients(message)}
