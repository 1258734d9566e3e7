"""Loads the components of a plan, makes its video and writes it."""

from __future__ import annotations

import json
import logging
from collections import abc, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from skyreels_v3 import runtime
from skyreels_v3.checkpoints.save import save_quantized
from skyreels_v3.components import load_components, others_of
from skyreels_v3.errors import IncompleteOutput
from skyreels_v3.families import family_of, pipeline_of
from skyreels_v3.media.audio import mix
from skyreels_v3.media.files import is_full, reason_of
from skyreels_v3.media.video_reader import ClipInfo, read_frames, resize_frames
from skyreels_v3.media.video_writer import COMMENT_BYTES, copy_frames, write_frame_folder, write_video
from skyreels_v3.outputs import record_of, remove_left, save_latents
from skyreels_v3.plan import Plan
from skyreels_v3.quality import Meter, Quality, report, warnings
from skyreels_v3.resolve import networks
from skyreels_v3.resume import RunRecord, RunState, open_state
from skyreels_v3.stages import Event, Pass, Stages
from skyreels_v3.version import __version__

logger = logging.getLogger(__name__)


class Video(NamedTuple):
    """A finished video and, with --check on the main rank, its measurements."""

    path: Path
    quality: Quality | None = None


class Generator:
    """A plan's components, loaded and placed; makes its video, and those of other plans that fit."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runtime = runtime.start(plan)
        with self.runtime.usage.stage("loading"):
            self.components = load_components(plan, self.runtime)

    def fits(self, plan: Plan) -> bool:
        """Whether another plan needs the same components in the same places."""
        return needs(plan) == needs(self.plan)

    def events(self, plan: Plan, state: RunState | None = None) -> Iterator[Event]:
        """Make the video of a plan that fits; yields the events of its pipeline, see stages.py."""
        usage = self.runtime.usage if plan is self.plan else runtime.Usage(self.runtime.device)
        self.runtime = replace(self.runtime, plan=plan, usage=usage)
        self.components.vae.tiles = plan.policy.tiles
        return pipeline_of(plan.request.task).run(Stages(self.components, self.runtime, plan, state))

    def write(self, plan: Plan, watch: Callable[[Iterator[Event]], Iterator[Event]] = iter) -> Video:
        """Make the video of a plan that fits and write it.

        All ranks make it together; the main rank writes it.

        Args:
            watch: wraps the event stream of this rank; what it raises ends the video, as an interrupt does.
        """
        request, inputs = plan.request, plan.inputs
        if not self.runtime.parallel.is_main:
            for event in watch(self.events(plan)):
                if isinstance(event, Pass):
                    deque(event.frames, maxlen=0)
            return Video(request.output)
        record = record_of(request, inputs, plan.device.partition(":")[0], dtype=plan.dtype)
        state = open_state(record, request.resume or request.resume_if_same, strict=request.resume)
        completed = False
        try:
            if request.save_quantized is not None and not (state.resumed and request.save_quantized.exists()):
                self.save_quantized(plan, request.save_quantized, state.folder)
            latents: list[Tensor] = []
            logger.info("seed %d, %d x %d", request.seed, request.width, request.height)
            meter = Meter(request.task.fps) if request.check else None
            frames = all_frames(plan, watch(self.events(plan, state)), latents, meter)
            if request.frames_copy is not None:
                frames = copy_frames(frames, request.frames_copy, request.task.fps)
            # closed before the summary is logged: an open progress bar would write after it
            with closing(frames), explain_full_disk(request.output):
                path = write(plan, frames, record, self.runtime.usage, state.folder)
            logger.info("%s", summary(self.runtime.usage))
            quality = None if meter is None else judge(meter, plan)
            completed = request.save_latents is None or state.failed
            if request.save_latents is not None:
                write_latents(latents, request.save_latents, path, kept=not state.failed)
            completed = True
        finally:
            state.close(completed)
        remove_left(record, path)
        return Video(path, quality)

    def save_quantized(self, plan: Plan, folder: Path, workspace: Path) -> None:
        """Save the checkpoint with quantized weights."""
        assert plan.checkpoint is not None
        repositories = family_of(plan.request.task).repositories(plan.request.task)
        folders = plan.checkpoint, others_of(plan.checkpoint, plan.request)
        with explain_full_disk(folder):
            save_quantized(self.components.transformer, [*zip(folders, repositories, strict=False)], folder, workspace)


def needs(plan: Plan) -> tuple[object, ...]:
    """A key of which components are loaded, and where; plans with equal keys can share them."""
    policy = plan.policy
    place = (plan.device, plan.dtype, policy.mode, policy.resident_blocks, policy.pinned, plan.degrees)
    return (plan.checkpoint, *networks(plan.request), *place)


def write(plan: Plan, frames: Iterator[np.ndarray], record: RunRecord, usage: runtime.Usage, workspace: Path) -> Path:
    """Write the frames in the format that the request asks for; returns the path."""
    request = plan.request
    if request.frame_folder:
        text = "" if request.no_metadata else comment(record)
        return write_frame_folder(frames, request.output, comment=text, workspace=workspace)
    size = {"height": request.height, "width": request.width, "fps": request.task.fps}
    sound = sound_of(plan, workspace)

    def made_by() -> str:
        return "" if request.no_metadata else comment(record, usage.figures())

    return write_video(frames, request.output, **size, comment=made_by, audio=sound, workspace=workspace)


def sound_of(plan: Plan, workspace: Path) -> Path | ClipInfo | None:
    """The sound of a video: speech, or that of the clip that --include_input puts before it."""
    request, inputs = plan.request, plan.inputs
    if request.include_input and inputs.clip is not None and inputs.clip.has_sound:
        return inputs.clip
    paths = [audio.path for audio in inputs.audio]
    if len(paths) > 1:
        return mix(paths, request.audio_type == "sequential", workspace / "mixed.wav")
    return paths[0] if paths else None


def all_frames(
    plan: Plan, events: Iterable[Event], latents: list[Tensor], meter: Meter | None = None
) -> abc.Generator[np.ndarray, None, None]:
    """Yield the frames to write, in order; adds latents to `latents` with --save_latents, and frames to `meter`."""
    yield from clip_frames(plan, meter)
    for event in events:
        if isinstance(event, Pass):
            if plan.request.save_latents is not None:
                latents.append(event.latents)
            yield from measured(event, meter)


def clip_frames(plan: Plan, meter: Meter | None) -> Iterator[np.ndarray]:
    """Yield the frames of the input clip that --include_input puts before the new ones."""
    request, clip = plan.request, plan.inputs.clip
    if not request.include_input:
        return
    assert clip is not None
    for frame in resize_frames(read_frames(clip.path, request.task.fps), request.height, request.width):
        if meter is not None:
            meter.first += 1
        yield frame


def measured(made: Pass, meter: Meter | None) -> Iterator[np.ndarray]:
    """Yield the frames of a pass and add them to `meter`, the first time after the frames that they continue."""
    if meter is None:
        yield from made.frames
        return
    if made.before is not None and not meter.rows:
        meter.add_before(made.before)
    for frame in made.frames:
        meter.add(frame[None])
        yield frame


def judge(meter: Meter, plan: Plan) -> Quality:
    """Compute and log the figures of a video, and warn of bad ones."""
    quality, request = meter.quality(), plan.request
    for line in report(quality):
        logger.info("check: %s", line)
    # a dubbed clip may have cuts of its own
    cuts_known = request.input_video is None or request.condition_frames > 0
    for line in warnings(quality, request.task.cut_at_seam, cuts_known):
        logger.warning("check: %s", line)
    return quality


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Make the error of a full disk say what could not be written and how much is free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise RuntimeError(f"{path} cannot be written ({reason_of(error, path)}); free some space") from error


def write_latents(latents: Sequence[Tensor], path: Path, video: Path, kept: bool) -> None:
    """Save the latents of a finished video.

    Args:
        kept: whether a run with --resume can save them later.

    Raises:
        IncompleteOutput: they cannot be written.
    """
    try:
        save_latents(latents, path)
    except OSError as error:
        way_out = "give another --save_latents and --resume" if kept else "they are lost"
        message = f"--save_latents: {path} cannot be written ({reason_of(error, path)}); {way_out}; {video} is complete"
        raise IncompleteOutput(message, video) from error


def summary(usage: runtime.Usage) -> str:
    """One line on the time and memory that a video took."""
    figures = usage.figures()
    everything = figures["seconds"].pop("everything")
    stages = ", ".join(f"{name} {taken:.1f}" for name, taken in figures["seconds"].items())
    return f"{everything:.1f} s ({stages}), at most {figures['peak_gb']:.1f} GB"


def comment(record: RunRecord, figures: Mapping[str, Any] = MappingProxyType({})) -> str:
    """JSON on how a video was made and what it took; its `flags` in a file for --config make it again."""
    text = json.dumps({"skyreels_v3": __version__, **record.made_by(), **figures}, ensure_ascii=False)
    if len(text.encode()) > COMMENT_BYTES:
        logger.warning("the flags are too long for the file's comment, which is left empty")
        return ""
    return text
