"""Where the weights live during a run, decided once, and what to advise when memory runs out. No torch.

- resident: each component moves to the device when it is first used, and stays there.
- offload: a component is on the device only while it works.
- stream: like offload, but of the transformer and the text encoder only the working blocks are on the device.

The decision (`choose_policy`) follows from the plan's estimates and the machine's free memory. If an estimate was too
low after all, `explained` turns the error into one that names the flags that need less.
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
SCALE = "weight_scale"  # of the rows of an FP8 weight, beside it; a checkpoint with such keys is quantized
STREAM_SLOTS = 2  # blocks on the device at a time while a model streams: the working one and the next
Tiles = tuple[int, int]  # rows and columns of the VAE's tiles
TILINGS: tuple[Tiles, ...] = ((1, 1), (1, 2), (2, 2), (2, 3))  # more tiles would cost more in halos than they save
Peak = Callable[[str, Tiles], int]  # bytes on the device in a memory mode, with a tiling of the VAE
MARGIN = 1.1  # for the kernels' workspaces and for fragmentation
RESERVE = 500_000_000  # bytes that the driver takes
PINNED_SHARE = 0.7  # of the host's free memory, at most
# torch has an error class for allocations on a device only. Host allocations, drivers and libraries beside torch raise
# plain RuntimeErrors, told apart by their messages, such as CUBLAS_STATUS_ALLOC_FAILED.
HOST_ERROR = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
DEVICE_ERROR = re.compile(r"out ?of ?memory|ALLOC(ATION)?_?FAILED", re.IGNORECASE)
REQUESTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


@dataclass(frozen=True)
class Policy:
    """The decision.

    Attributes:
        mode: one of `tasks.MEMORY_MODES`.
        reason: for the log.
        resident_blocks: how many blocks of a streamed transformer stay on the device.
        pinned: hold the streamed blocks in pinned memory.
        tiles: of the VAE.
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
    """The fastest mode and the fewest tiles that fit; where none fit, the ones that need least.

    Args:
        request: names a memory mode or "auto", the number of resident blocks, and what to pin.
        peak: bytes on the device in a mode, with a tiling.
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
    """Which `count` of a model's blocks stay on the device: evenly spaced, to give the others more time to arrive."""
    count = min(count, blocks)
    return {index * blocks // count for index in range(count)}


class MemoryPlan(Protocol):
    """What advice about memory needs to know of a plan."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def passes(self) -> Sized: ...

    def peak(self, mode: str, tiles: Tiles) -> int:
        """Bytes in use on the device at the peak."""


@contextmanager
def explain_oom(stage: str, plan: MemoryPlan, free: Callable[[], int | None]) -> Iterator[None]:
    """Turn out-of-memory errors within a `with` block into `OutOfMemory` errors that say what to change.

    Args:
        stage: what the block does.
        free: gives the free bytes on the device, None where it has no memory of its own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        requested = requested_size(error)
        if requested is None or isinstance(error, OutOfMemory):  # the latter of a stage within this one
            raise
        available = free()
        left = "" if available is None else f", {giga(available)} are free"
        message = f"out of memory while {stage}: {requested} more were requested{left}"
        raise OutOfMemory(f"{message}; {advice(plan, available is not None)}") from error


def requested_size(error: Exception) -> str | None:
    """How much memory an out-of-memory error is about; None for any other error."""
    text = f"{type(error).__name__}: {error}"  # the name, since the message of an OutOfMemoryError may say anything
    if host := HOST_ERROR.search(text):
        return f"{giga(int(host[1]))} of host memory"
    if isinstance(error, MemoryError):
        return "some host memory"
    found = REQUESTED.search(text)
    return None if not DEVICE_ERROR.search(text) else found[1] if found else "some memory"


def advice(plan: MemoryPlan, device_memory: bool) -> str:
    """The flags that need less memory than the plan. Moving weights helps only a device with memory of its own."""
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
        # with several passes, a shorter video has fewer of them, each as large
        f"a smaller {length}": request.duration > request.task.min_duration > 0 and len(plan.passes) == 1,
    }
    useful = ", ".join(way for way, helps in ways.items() if helps)
    return f"ask for less with {useful}" if useful else "a machine with more memory is needed"
