"""Where the components live during a run: decided once, from what the plan needs and what the machine has. No torch.

- resident: each component moves to the device when it is first used, and stays.
- offload: a component is on the device only while it works.
- stream: as offload, with only the working blocks of the transformer and the text encoder on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skyreels_v3.media.files import giga
from skyreels_v3.tasks import MEMORY_MODES

BYTES = {"bfloat16": 2, "float32": 4}
SCALE = "weight_scale"  # name of the scales beside FP8 weights; a checkpoint that has them is quantized
STREAM_SLOTS = 2  # blocks on the device at a time while a model streams: the working one and the next
Tiles = tuple[int, int]  # rows and columns of the VAE's tiles
TILINGS: tuple[Tiles, ...] = ((1, 1), (1, 2), (2, 2), (2, 3))  # with more, the halos cost more than is saved
Peak = Callable[[str, Tiles], int]  # bytes on the device in a memory mode, with a tiling of the VAE
MARGIN = 1.1  # for the kernels' workspaces and for fragmentation
RESERVE = 500_000_000  # bytes of the driver
PINNED_SHARE = 0.7  # of the host's free memory at most


@dataclass(frozen=True)
class Policy:
    """The decision.

    Attributes:
        mode: one of `tasks.MEMORY_MODES`.
        reason: for the log.
        resident_blocks: blocks of a streamed transformer that stay on the device.
        pinned: whether the streamed blocks are held in pinned memory.
        tiles: of the VAE.
    """

    mode: str
    reason: str
    resident_blocks: int = 0
    pinned: bool = False
    tiles: Tiles = TILINGS[0]


RESIDENT = Policy("resident", "")


def choose_policy(
    wanted: str,
    peak: Peak,
    streamed: int,
    stream_blocks: int,
    pin_all: bool,
    free_device: int | None,
    free_host: int,
) -> Policy:
    """The fastest mode and the fewest tiles that fit, or the smallest there are.

    Args:
        wanted: a memory mode, or "auto".
        peak: bytes on the device in a mode, with a tiling.
        streamed: bytes of the blocks that stay in host memory in mode "stream".
        stream_blocks: resident blocks in mode "stream".
        pin_all: pin what is streamed, however much of the host's memory that is.
        free_device: free bytes of a device with its own memory, None if it has none.
        free_host: free bytes of the host's memory.
    """
    mode, reason = wanted, "asked for"
    if free_device is None:
        if wanted == "auto":
            mode, reason = "resident", "the device has no memory of its own"
        return Policy(mode, reason, stream_blocks)
    usable = int((free_device - RESERVE) / MARGIN)
    if wanted == "auto":
        mode = next((mode for mode in MEMORY_MODES if peak(mode, TILINGS[-1]) <= usable), MEMORY_MODES[-1])
        need = peak(mode, TILINGS[-1])
        reason = f"needs about {giga(need)}" + (", which may be too much" if need > usable else "")
    tiles = next((tiles for tiles in TILINGS if peak(mode, tiles) <= usable), TILINGS[-1])
    pinned = mode == "stream" and streamed <= (1.0 if pin_all else PINNED_SHARE) * free_host
    return Policy(mode, f"{reason}; {giga(free_device)} free", stream_blocks, pinned, tiles)


def resident_blocks(blocks: int, count: int) -> set[int]:
    """Which of so many blocks stay on the device: evenly spaced, which gives the others more time to arrive."""
    count = min(count, blocks)
    return {index * blocks // count for index in range(count)}
