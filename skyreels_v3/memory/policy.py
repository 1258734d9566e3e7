"""Where weights live during a run, decided once, and what to advise when memory runs out. No torch.

- resident: each component moves to the device when first used, and stays there.
- offload: a component is on the device only while it runs.
- stream: like offload, but only the running blocks of the transformer and the text encoder are on the device.

`choose_policy` decides from the plan's estimates and the machine's free memory. If an estimate was too low,
`explain_oom` turns the error into one that names the flags that need less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from skyreels_v3.errors import OutOfMemory
from skyreels_v3.media.files import giga
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, RESOLUTIONS

BYTES = {"bfloat16": 2, "float32": 4}
SCALE = "weight_scale"  # of the rows of an FP8 weight, next to it; a checkpoint with such keys is quantized
STREAM_SLOTS = 2  # blocks on the device at a time while a model streams: the running one and the next
Tiles = tuple[int, int]  # rows and columns of the VAE's tiles
TILINGS: tuple[Tiles, ...] = ((1, 1), (1, 2), (2, 2), (2, 3))  # more tiles would cost more in halos than they save
Peak = Callable[[str, Tiles], int]  # peak bytes on the device for a memory mode and a tiling of the VAE
MARGIN = 1.1  # for kernel workspaces and fragmentation
RESERVE = 500_000_000  # bytes that the driver uses
PINNED_SHARE = 0.7  # of the host's free memory, at most
# torch has an error class for device allocations only. Host allocations, drivers and other libraries raise plain
# RuntimeErrors, recognized by their messages, such as CUBLAS_STATUS_ALLOC_FAILED.
HOST_ERROR = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
DEVICE_ERROR = re.compile(r"out ?of ?memory|ALLOC(ATION)?_?FAILED", re.IGNORECASE)
REQUESTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


@dataclass(frozen=True)
class Policy:
    """The memory mode of a run and its settings.

    Attributes:
        mode: one of `tasks.MEMORY_MODES`.
        reason: why this mode was chosen, for the log.
        resident_blocks: how many blocks of a streamed transformer stay on the device.
        pinned: keep the streamed blocks in pinned memory.
        tiles: rows and columns of the VAE's tiles.
    """

    mode: str
    reason: str
    resident_blocks: int = 0
    pinned: bool = False
    tiles: Tiles = TILINGS[0]


RESIDENT = Policy("resident", "")


def choose_policy(
    request: GenerationRequest, peak: Peak, streamed: int, free_device: int | None, free_host: int
) -> Policy:
    """Choose the fastest mode and the fewest tiles that fit; if none fit, those that need the least memory.

    Args:
        request: has the memory mode or "auto", the number of resident blocks, and how much to pin.
        peak: peak bytes on the device for a mode and a tiling.
        streamed: bytes of the blocks that stay in host memory in mode "stream".
        free_device: free bytes on the device, None if it has no memory of its own.
        free_host: free bytes of host memory.
    """
    mode, reason, blocks = request.memory, "asked for", request.stream_blocks
    if free_device is None:
        if mode == "auto":
            mode, reason = "resident", "the device has no memory of its own"
        return Policy(mode, reason, blocks)
    usable = int((free_device - RESERVE) / MARGIN)
    if mode == "auto":
        mode = next((mode for mode in MEMORY_MODES if peak(mode, TILINGS[-1]) <= usable), MEMORY_MODES[-1])
        need = peak(mode, TILINGS[-1])
        reason = f"needs about {giga(need)}" + (", which may be too much" if need > usable else "")
    tiles = next((tiles for tiles in TILINGS if peak(mode, tiles) <= usable), TILINGS[-1])
    pinned = mode == "stream" and streamed <= (1.0 if request.high_cpu_memory else PINNED_SHARE) * free_host
    return Policy(mode, f"{reason}; {giga(free_device)} free", blocks, pinned, tiles)


def resident_blocks(blocks: int, count: int) -> set[int]:
    """Indices of the `count` blocks that stay on the device, evenly spaced to leave time to prefetch the others."""
    count = min(count, blocks)
    return {index * blocks // count for index in range(count)}


class MemoryPlan(Protocol):
    """What memory advice needs to know about a plan."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def passes(self) -> Sized: ...

    def peak(self, mode: str, tiles: Tiles) -> int:
        """Peak bytes in use on the device."""


@contextmanager
def explain_oom(stage: str, plan: MemoryPlan, free: Callable[[], int | None]) -> Iterator[None]:
    """Turn out-of-memory errors within a `with` block into `OutOfMemory` errors that say what to change.

    Args:
        stage: what the block does.
        free: returns the free bytes on the device, None if it has no memory of its own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        requested = requested_size(error)
        if requested is None or isinstance(error, OutOfMemory):  # the latter comes from a nested stage
            raise
        available = free()
        left = "" if available is None else f", with {giga(available)} free"
        message = f"out of memory while {stage}: {requested} was requested{left}"
        raise OutOfMemory(f"{message}; {advice(plan, available is not None)}") from error


def requested_size(error: Exception) -> str | None:
    """The amount of memory that an out-of-memory error reports; None for any other error."""
    text = f"{type(error).__name__}: {error}"  # with the name, since an OutOfMemoryError's message may say anything
    if host := HOST_ERROR.search(text):
        return f"{giga(int(host[1]))} of host memory"
    if isinstance(error, MemoryError):
        return "some host memory"
    found = REQUESTED.search(text)
    return None if not DEVICE_ERROR.search(text) else found[1] if found else "some memory"


def advice(plan: MemoryPlan, device_memory: bool) -> str:
    """Flags that need less memory than the plan. Offloading helps only if the device has its own memory."""
    request = plan.request
    smaller = MEMORY_MODES[MEMORY_MODES.index(plan.policy.mode) + 1 :] if device_memory else ()
    sized = request.task.size is not None or "height" in request.flags
    size = "--height and --width" if sized else "--resolution"
    length = "--duration" if request.num_frames is None else "--num_frames"
    ways = {
        **{f"--memory {name} (about {giga(plan.peak(name, TILINGS[-1]))})": True for name in smaller},
        "--low_vram (streamed, in FP8)": request.quant is None,
        "--vae_dtype bfloat16": request.vae_dtype == "float32",
        f"a smaller {size}": sized or request.resolution != RESOLUTIONS[0],
        # with several passes, a shorter video has fewer of them, but not smaller ones
        f"a smaller {length}": request.duration > request.task.min_duration > 0 and len(plan.passes) == 1,
    }
    useful = ", ".join(way for way, helps in ways.items() if helps)
    return f"reduce memory use with {useful}" if useful else "a machine with more memory is needed"
