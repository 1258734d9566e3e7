#!/usr/bin/env python3
"""Make video with the SkyReels models: `python3 generate_video.py --help`.

The straight path of a request: argv -> request -> checks -> checkpoint -> runtime -> components -> passes -> frames ->
mp4. The last line on stdout is the path of what was made. Exit codes: 0 done, 2 the request cannot work, 130
interrupted, 1 anything else.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3 import __version__
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.tasks import GenerationRequest

if TYPE_CHECKING:
    import numpy as np

    from skyreels_v3.media.inputs import Inputs
    from skyreels_v3.pipelines.steps import Pass

logger = logging.getLogger("skyreels_v3")


def run(request: GenerationRequest) -> None:
    """Carry out a request and print the path of what it made, or its plan."""
    from skyreels_v3.preflight import follow_checkpoint, preflight
    from skyreels_v3.runtime import expected_dtype, set_environment

    with tempfile.TemporaryDirectory(prefix="skyreels-") as downloads:
        request, inputs, checkpoint = preflight(request, Path(downloads))
        if request.dry_run:
            from skyreels_v3.memory.planner import describe, plan

            print(describe(plan(request, checkpoint, expected_dtype(request))))  # noqa: T201  the result
        else:
            set_environment()
            if checkpoint is None:
                checkpoint = fetch(request)
                request = follow_checkpoint(request, checkpoint)
            print(generate(request, inputs, checkpoint))  # noqa: T201  the result


def fetch(request: GenerationRequest) -> Path:
    """The folder of a checkpoint that was not on this machine."""
    from skyreels_v3.checkpoints.hub import TINY, download

    if request.model_id != TINY:
        return download(request)
    from skyreels_v3.cache import cache_folder
    from skyreels_v3.checkpoints.tiny import make_tiny

    try:
        return make_tiny(request.task)
    except OSError as error:
        reason = f"{TINY} cannot be made in {cache_folder()} ({error.strerror or error})"
        raise UserError("--model_id", f"{reason}; set SKYREELS_CACHE to a folder that can be written to") from error


def generate(request: GenerationRequest, inputs: Inputs, checkpoint: Path) -> Path:
    """Make the video; returns its path."""
    from skyreels_v3 import runtime
    from skyreels_v3.checkpoints.hub import download_lora, locate_lora
    from skyreels_v3.checkpoints.save import save_quantized
    from skyreels_v3.memory.planner import plan
    from skyreels_v3.pipelines.components import load_components
    from skyreels_v3.pipelines.outputs import save_latents
    from skyreels_v3.pipelines.registry import make_pipeline
    from skyreels_v3.pipelines.state import open_state
    from skyreels_v3.preflight import recorded_flags

    assert request.output is not None and request.height is not None and request.width is not None
    loras = [locate_lora(name) or download_lora(name, request) for name, _ in request.lora]
    device = runtime.start(request, plan(request, checkpoint, runtime.expected_dtype(request)))
    flags = recorded_flags(request) | {"dtype": str(device.dtype).removeprefix("torch.")}
    state = open_state(request.output, flags, request.resume, request.frame_folder)
    completed = False
    try:
        components = load_components(checkpoint, request, device, loras)
        if request.save_quantized is not None:
            save_quantized(components.transformer, checkpoint, request.save_quantized, request.task)
        pipeline = make_pipeline(request.task, components, device, state)
        latents: list[Any] = []
        logger.info("seed %d, %d x %d", request.seed, request.height, request.width)
        # closed before anything is said of how it ended: a progress bar that is open would write after it
        with closing(all_frames(request, inputs, pipeline(request, inputs), latents)) as frames:
            path = write(request, inputs, frames, comment(flags), state.folder)
        if request.save_latents is not None:
            save_latents(latents, request.save_latents)
        completed = True
    finally:
        state.close(completed)
    return path


def write(
    request: GenerationRequest, inputs: Inputs, frames: Iterator[np.ndarray], made_by: str, workspace: Path
) -> Path:
    """Write the frames as the request wants them; returns the path."""
    from skyreels_v3.media.audio import mix
    from skyreels_v3.media.video import write_frame_folder, write_video

    assert request.output is not None and request.height is not None and request.width is not None
    if request.frame_folder:
        return write_frame_folder(frames, request.output, comment=made_by, workspace=workspace)
    size = {"height": request.height, "width": request.width, "fps": request.task.fps}
    sounds = [audio.path for audio in inputs.audio]
    if len(sounds) > 1:
        sounds = [mix(sounds, request.audio_type == "sequential", workspace / "mixed.wav")]
    sound = sounds[0] if sounds else None
    return write_video(frames, request.output, **size, comment=made_by, audio=sound, workspace=workspace)


def all_frames(
    request: GenerationRequest, inputs: Inputs, passes: Iterable[Pass], latents: list[Any]
) -> Generator[np.ndarray, None, None]:
    """The frames to write, in order; the latents of each pass are added to `latents` as they are made."""
    from skyreels_v3.media.video import read_frames, resized

    if request.include_input:
        assert inputs.clip is not None and request.height is not None and request.width is not None
        yield from resized(read_frames(inputs.clip.path, request.task.fps), request.height, request.width)
    for made in passes:
        if request.save_latents is not None:
            latents.append(made.latents)
        yield from made.frames


def comment(flags: dict[str, Any]) -> str:
    """What made a video, as JSON: put `flags` into a file for --config to make it again."""
    return json.dumps({"skyreels_v3": __version__, "flags": flags}, ensure_ascii=False)


def set_up_logging(verbosity: int) -> None:
    """Messages go to stderr; the libraries' own chatter only with --verbose."""
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity]
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.ERROR)
    logger.setLevel(level)


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
    request = None
    try:
        request = parse_request(argv)
        set_up_logging(request.verbosity)
        run(request)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        if request is None or request.verbosity > 0:
            logging.exception("failed")
        cause = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        sys.stderr.write(f"error: {type(error).__name__}: {cause} (--verbose shows where)\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
