"""When memory runs out: in which stage, how much was requested, and what would need less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol

import torch

from skyreels_v3.errors import OutOfMemory
from skyreels_v3.media.files import giga
from skyreels_v3.memory.policy import TILINGS, Policy, Tiles
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, RESOLUTIONS

# torch raises a class of its own for its allocations on a device. For the host's memory it has only this message, and
# drivers and libraries that allocate beside torch raise RuntimeError, such as CUBLAS_STATUS_ALLOC_FAILED.
HOST = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
DEVICE = re.compile(r"out of memory|ALLOC(ATION)?_?FAILED", re.IGNORECASE)
REQUESTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


class MemoryPlan(Protocol):
    """What a plan knows about memory."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def passes(self) -> Sized: ...

    def peak(self, mode: str, tiles: Tiles) -> int:
        """The most bytes in use on the device at a time."""


@contextmanager
def explained(stage: str, plan: MemoryPlan, free: Callable[[], int | None]) -> Iterator[None]:
    """Raise OutOfMemory in place of torch's own errors.

    Args:
        stage: what the `with` block does.
        free: called for the free bytes of the device; None where it has no memory of its own.
    """
    try:
        yield
    except OutOfMemory:
        raise  # of a stage inside this one
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        requested = requested_size(error)
        if requested is None:
            raise
        available = free()
        left = "" if available is None else f", {giga(available)} are free"
        message = f"out of memory while {stage}: {requested} more were asked for{left}"
        raise OutOfMemory(f"{message}; {advice(plan, available is not None)}") from error


def requested_size(error: Exception) -> str | None:
    """The size in an error that is about memory; None for any other error."""
    if host := HOST.search(str(error)):
        return f"{giga(int(host[1]))} of host memory"
    if isinstance(error, MemoryError):
        return "some host memory"
    if isinstance(error, torch.OutOfMemoryError) or DEVICE.search(str(error)):
        found = REQUESTED.search(str(error))
        return found[1] if found else "some memory"
    return None


def advice(plan: MemoryPlan, device_memory: bool) -> str:
    """What needs less memory than the plan. Moving weights helps only a device with memory of its own."""
    request = plan.request
    smaller = MEMORY_MODES[MEMORY_MODES.index(plan.policy.mode) + 1 :] if device_memory else ()
    size = "--resolution" if request.task.size is None else "--height and --width"
    length = "--duration" if request.num_frames is None else "--num_frames"
    ways = {
        **{f"--memory {name} (about {giga(plan.peak(name, TILINGS[-1]))})": True for name in smaller},
        "--low_vram (streamed, in FP8)": request.quant is None,
        "--vae_dtype bfloat16": request.vae_dtype == "float32",
        f"a smaller {size}": request.task.size is not None or request.resolution != RESOLUTIONS[0],
        # with several passes a shorter video has fewer of them, which need as much
        f"a smaller {length}": request.duration > request.task.min_duration > 0 and len(plan.passes) == 1,
    }
    useful = ", ".join(way for way, helps in ways.items() if helps)
    return f"ask for less with {useful}" if useful else "it takes a machine with more memory"
