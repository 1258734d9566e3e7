#!/usr/bin/env python3
"""Make video with the SkyReels models: `python3 generate_video.py --help`.

The straight path of a request: argv -> request -> checks -> checkpoint -> runtime -> components -> passes -> frames ->
mp4. The last line on stdout is the path of what was made. Exit codes: 0 done, 2 the request cannot work, 130
interrupted, 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_v3 import processes
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.ranks import ALONE, Ranks, check_ranks, ranks_of
from skyreels_v3.tasks import GenerationRequest

if TYPE_CHECKING:
    from skyreels_v3.media.inputs import Inputs

logger = logging.getLogger("skyreels_v3")


def run(request: GenerationRequest, ranks: Ranks) -> None:
    """Carry out a request and print the path of what it made, or its plan."""
    check_ranks(request, ranks)
    with tempfile.TemporaryDirectory(prefix="skyreels-") as downloads:
        if request.dry_run:
            if ranks.main:
                print(planned(request, Path(downloads), ranks))  # noqa: T201  the result
        else:
            path = generate(request, Path(downloads), ranks)
            if ranks.main:
                print(path)  # noqa: T201  the result


def planned(request: GenerationRequest, downloads: Path, ranks: Ranks) -> str:
    """What a request would do."""
    from skyreels_v3.memory.planner import describe, plan
    from skyreels_v3.preflight import preflight
    from skyreels_v3.runtime import expected_dtype

    request, _, checkpoint = preflight(request, downloads, ranks)
    return describe(plan(request, checkpoint, expected_dtype(request), ranks))


def generate(request: GenerationRequest, downloads: Path, ranks: Ranks) -> Path:
    """Make the video; returns its path.

    Of several processes the first one of each machine looks at the inputs and fetches what is missing; the others come
    after it, and find everything there.
    """
    from skyreels_v3.preflight import preflight
    from skyreels_v3.runtime import set_environment

    ready = preflight(request, downloads, ranks) if ranks.leads else None
    set_environment()
    if ranks.world > 1:
        processes.meet(ranks, request.device)
    if ready is not None:
        ready = fetched(*ready)
        processes.tell(f"found/{ranks.machine}", [str(downloads), str(ready[2]), ready[0].lora])
    else:
        there, checkpoint, lora = processes.hear(f"found/{ranks.machine}")
        request = replace(request, lora=tuple(map(tuple, lora)))
        request, inputs, _ = preflight(request, Path(there), ranks)
        ready = fetched(request, inputs, Path(checkpoint))
    request, inputs, checkpoint = ready
    request = replace(request, seed=processes.agreed("seed", request.seed, ranks))
    from skyreels_v3.session import Session

    path = Session(request, checkpoint, ranks).generate(request, inputs)
    processes.part()
    return path


def fetched(
    request: GenerationRequest, inputs: Inputs, checkpoint: Path | None
) -> tuple[GenerationRequest, Inputs, Path]:
    """What `preflight` found, with the checkpoint and the LoRAs on this machine."""
    from skyreels_v3.checkpoints.hub import download_lora, locate_lora
    from skyreels_v3.preflight import follow_checkpoint

    checkpoint = checkpoint or fetch(request)
    files = [(str(locate_lora(name) or download_lora(name, request)), scale) for name, scale in request.lora]
    return follow_checkpoint(replace(request, lora=tuple(files)), checkpoint), inputs, checkpoint


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


def set_up_logging(verbosity: int, ranks: Ranks) -> None:
    """Messages go to stderr, those of the first process; the libraries' own chatter only with --verbose."""
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity] if ranks.main else logging.ERROR
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.ERROR)
    logger.setLevel(level)


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    request, ranks = None, ALONE
    try:
        ranks = ranks_of(os.environ)
        processes.prepare_to_end(ranks)
        request = parse_request(argv)
        if not ranks.main:
            request = replace(request, verbosity=-1)
        set_up_logging(request.verbosity, ranks)
        run(request, ranks)
    except UserError as error:
        processes.say(f"error: {error}\n", ranks)
        return 2
    except KeyboardInterrupt:
        processes.say("interrupted\n", ranks)
        return 130
    except Exception as error:
        if request is None or request.verbosity > 0:
            logging.exception("failed")
        cause = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        processes.say(f"error: {type(error).__name__}: {cause} (--verbose shows where)\n", ranks)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
