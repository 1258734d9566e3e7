"""When memory runs out: which stage, how much it asked for, and what would ask for less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from skyreels_v3.errors import OutOfMemory
from skyreels_v3.media.files import giga
from skyreels_v3.memory.policy import TILINGS
from skyreels_v3.plan import Plan
from skyreels_v3.tasks import HUNYUAN, MEMORY_MODES, RESOLUTIONS

# torch has a class for a GPU's memory; of the host's it says it in words only, with the number of bytes
HOST_SHORTAGE = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
# what the drivers and the libraries that take memory beside torch say, such as CUBLAS_STATUS_ALLOC_FAILED
DEVICE_SHORTAGE = re.compile(r"out of memory|ALLOC(ATION)?_?FAILED", re.IGNORECASE)
ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


@contextmanager
def explained(stage: str, plan: Plan, free: Callable[[], int | None]) -> Iterator[None]:
    """Raise OutOfMemory instead of torch's own errors.

    Args:
        stage: what the `with` block does.
        free: asked for the free bytes of the device.
    """
    try:
        yield
    except OutOfMemory:
        raise  # of a stage within this one
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        asked = asked_for(error)
        if asked is None:
            raise
        there = free()
        left = "" if there is None else f", {giga(there)} are free"
        raise OutOfMemory(
            f"out of memory while {stage}: {asked} more were asked for{left}; {way_out(plan, there is not None)}"
        ) from error


def asked_for(error: Exception) -> str | None:
    """How much an error of torch's says that was asked for; None for an error about something else."""
    if isinstance(error, torch.OutOfMemoryError) or DEVICE_SHORTAGE.search(str(error)):
        found = ASKED.search(str(error))
        return found[1] if found else "some memory"
    if isinstance(error, MemoryError):
        return "some host memory"
    found = HOST_SHORTAGE.search(str(error))
    return f"{giga(int(found[1]))} of host memory" if found else None


def way_out(plan: Plan, own_memory: bool) -> str:
    """What asks for less than the plan's memory mode, with the peak that the plan has for it.

    Where components live makes a difference only on a device with memory of its own.
    """
    request, mode = plan.request, plan.policy.mode
    smaller = MEMORY_MODES[MEMORY_MODES.index(mode) + 1 :] if own_memory else ()
    ways = [f"--memory {name} (about {giga(plan.peak(name, TILINGS[-1]))})" for name in smaller]
    if request.quant is None:
        ways.append("--low_vram (streamed, in FP8)")
    if request.vae_dtype == "float32":
        ways.append("--vae_dtype bfloat16")
    if request.task.layout == HUNYUAN:
        ways.append("a smaller --height and --width")
    elif request.resolution != RESOLUTIONS[0]:
        ways.append("a smaller --resolution")
    if request.duration > request.task.min_duration > 0 and len(plan.passes) == 1:  # else there are fewer, as long
        ways.append("a smaller --duration" if request.num_frames is None else "a smaller --num_frames")
    return f"ask for less with {', '.join(ways)}" if ways else "it takes a machine with more memory"
