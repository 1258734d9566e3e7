"""A checkpoint that is loaded, and the videos that are made with it, one after the other."""

from __future__ import annotations

import gc
import json
import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skyreels_v3 import __version__, runtime
from skyreels_v3.checkpoints.save import save_quantized
from skyreels_v3.components import load_components, others_of
from skyreels_v3.errors import IncompleteOutput
from skyreels_v3.families import make_pipeline
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.audio import mix
from skyreels_v3.media.files import is_full, reason_of
from skyreels_v3.media.video import COMMENT_BYTES, ClipInfo, read_frames, resized, write_frame_folder, write_video
from skyreels_v3.memory.policy import Policy, choose
from skyreels_v3.outputs import save_latents
from skyreels_v3.parallel.ranks import Ranks
from skyreels_v3.plan import Plan, plan
from skyreels_v3.preflight import networks, record_of
from skyreels_v3.resume import RunRecord, RunState, open_state
from skyreels_v3.stages import Pass
from skyreels_v3.tasks import GenerationRequest

logger = logging.getLogger(__name__)


class Session:
    """The networks for `request`, on this process's device.

    Args:
        checkpoint: its folder.
        ranks: this process among those that share the work on a video.
    """

    def __init__(self, request: GenerationRequest, checkpoint: Path, ranks: Ranks) -> None:
        self.checkpoint = checkpoint
        self.ranks = ranks
        self.networks = networks(request)
        self.runtime = runtime.start(request, self.plan(request))
        self.components = load_components(checkpoint, request, self.runtime)

    def plan(self, request: GenerationRequest) -> Plan:
        """The plan of a request with this checkpoint."""
        return plan(request, self.checkpoint, runtime.expected_dtype(request), self.ranks)

    def policy(self, planned: Plan) -> Policy:
        """Where the components would live if this were the first plan."""
        return choose(planned, self.runtime.room.device, self.runtime.room.host)

    def fits(self, request: GenerationRequest, checkpoint: Path) -> bool:
        """Whether the networks that are loaded are those that a request needs, placed as it needs them."""
        if (checkpoint, networks(request)) != (self.checkpoint, self.networks):
            return False
        planned, now = self.plan(request), self.runtime
        wanted, there = self.policy(planned), now.policy
        placed = (wanted.mode, wanted.keep, wanted.pinned) == (there.mode, there.keep, there.pinned)
        return placed and planned.degrees == now.plan.degrees

    def follow(self, request: GenerationRequest) -> None:
        """Have tiles, and what is said when memory runs out, be those of a request that fits."""
        planned = self.plan(request)
        policy = replace(self.runtime.policy, tiles=self.policy(planned).tiles)
        self.runtime = replace(self.runtime, plan=planned, policy=policy)
        self.components.vae.set_tiles(*policy.tiles)

    def generate(self, request: GenerationRequest, inputs: Inputs) -> Path:
        """Make a video; returns its path. Several processes make it together, and the first one writes it."""
        assert request.output is not None and request.height is not None and request.width is not None
        self.follow(request)
        if not self.runtime.parallel.is_main:
            self.help(request, inputs)
            return request.output
        record = record_of(request, inputs, dtype=str(self.runtime.dtype).removeprefix("torch."))
        state = open_state(record, request.resume or request.resume_if_same, strict=request.resume)
        completed = False
        try:
            if request.save_quantized is not None and not (state.resumed and request.save_quantized.exists()):
                others = others_of(self.checkpoint, request)
                transformer, folder = self.components.transformer, request.save_quantized
                with naming_room(folder):
                    save_quantized(transformer, self.checkpoint, others, folder, request.task, state.folder)
            latents: list[Tensor] = []
            logger.info("seed %d, %d x %d", request.seed, request.width, request.height)
            passes = self.passes(request, inputs, state)
            # closed before anything is said of how it ended: a progress bar that is open would write after it
            made_by = "" if request.no_metadata else comment(record)
            with closing(all_frames(request, inputs, passes, latents)) as frames, naming_room(request.output):
                path = write(request, inputs, frames, made_by, state.folder)
            completed = request.save_latents is None or state.failed
            if request.save_latents is not None:
                write_latents(latents, request.save_latents, path, kept=not state.failed)
            completed = True
        finally:
            state.close(completed)
        return path

    def passes(self, request: GenerationRequest, inputs: Inputs, state: RunState | None) -> Iterator[Pass]:
        return make_pipeline(request.task, self.components, self.runtime, state)(request, inputs)

    def help(self, request: GenerationRequest, inputs: Inputs) -> None:
        """Do this process's part of what the first one makes and writes."""
        for made in self.passes(request, inputs, None):
            deque(made.frames, maxlen=0)


def free_memory() -> None:
    """Give the memory of networks that nobody holds any more back to the device."""
    gc.collect()  # hooks and what they are on hold each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def write(
    request: GenerationRequest, inputs: Inputs, frames: Iterator[np.ndarray], made_by: str, workspace: Path
) -> Path:
    """Write the frames as the request wants them; returns the path."""
    assert request.output is not None and request.height is not None and request.width is not None
    if request.frame_folder:
        return write_frame_folder(frames, request.output, comment=made_by, workspace=workspace)
    size = {"height": request.height, "width": request.width, "fps": request.task.fps}
    sound: Path | ClipInfo | None = inputs.audio[0].path if inputs.audio else None
    if len(inputs.audio) > 1:
        paths = [audio.path for audio in inputs.audio]
        sound = mix(paths, request.audio_type == "sequential", workspace / "mixed.wav")
    if request.include_input and inputs.clip is not None and inputs.clip.has_sound:
        sound = inputs.clip
    return write_video(frames, request.output, **size, comment=made_by, audio=sound, workspace=workspace)


def all_frames(
    request: GenerationRequest, inputs: Inputs, passes: Iterable[Pass], latents: list[Tensor]
) -> Generator[np.ndarray, None, None]:
    """The frames to write, in order; the latents of each pass are added to `latents` as they are made."""
    if request.include_input:
        assert inputs.clip is not None and request.height is not None and request.width is not None
        yield from resized(read_frames(inputs.clip.path, request.task.fps), request.height, request.width)
    for made in passes:
        if request.save_latents is not None:
            latents.append(made.latents)
        yield from made.frames


@contextmanager
def naming_room(path: Path) -> Iterator[None]:
    """Have the error of a full disk say what could not be written there, and how much is free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise RuntimeError(f"{path} cannot be written ({reason_of(error, path)}); free some space") from error


def write_latents(latents: Sequence[Tensor], path: Path, video: Path, kept: bool) -> None:
    """Save the latents of a video that is complete.

    Args:
        kept: whether a run with --resume can do so later.

    Raises:
        IncompleteOutput: they cannot be written.
    """
    try:
        save_latents(latents, path)
    except OSError as error:
        way_out = "give another --save_latents and --resume" if kept else "they are lost"
        message = f"--save_latents: {path} cannot be written ({reason_of(error, path)}); {way_out}; {video} is complete"
        raise IncompleteOutput(message, video) from error


def comment(record: RunRecord) -> str:
    """What made a video, as JSON: put `flags` into a file for --config to make it again."""
    content = {"skyreels_v3": __version__, "flags": dict(record.flags), "inputs": record.digests}
    text = json.dumps(content, ensure_ascii=False)
    if len(text.encode()) > COMMENT_BYTES:
        logger.warning("the flags are too long for the file's comment, which is left empty")
        return ""
    return text
