"""Where the components live while a run works: decided once, from what the plan needs and what the machine has.

- resident: every component goes to the device when it is first used, and stays.
- offload: a component is on the device only while it works.
- stream: as offload, and of the transformer and the text encoder only the blocks that work.

Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skyreels_v3.media.files import giga
from skyreels_v3.tasks import MEMORY_MODES

Tiles = tuple[int, int]  # rows and columns
TILINGS: tuple[Tiles, ...] = ((1, 1), (1, 2), (2, 2), (2, 3))  # with more, the halos cost more than is saved
Peak = Callable[[str, Tiles], int]  # bytes in a memory mode, with a tiling of the VAE
MARGIN = 1.1  # for what kernels need for themselves and for fragmentation
RESERVE = 500_000_000  # bytes: the driver's own
PINNED_SHARE = 0.7  # of the host's free memory at most


@dataclass(frozen=True)
class Policy:
    """What was decided.

    Attributes:
        mode: one of `tasks.MEMORY_MODES`.
        reason: for people.
        resident_blocks: blocks of the transformer that stay on the device when it is streamed.
        pinned: the transformer's blocks are held in pinned memory.
        tiles: rows and columns that the VAE works in.
    """

    mode: str
    reason: str
    resident_blocks: int = 0
    pinned: bool = False
    tiles: tuple[int, int] = (1, 1)


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
    """The policy of a run.

    Args:
        wanted: a memory mode, or "auto".
        peak: bytes on the device in a mode, with a tiling.
        streamed: bytes of the blocks that stay in host memory in mode "stream".
        stream_blocks: resident blocks in mode "stream".
        pin_all: pin what is streamed, however much of the host's memory that is.
        free_device: free bytes of a device with memory of its own, None where it has none.
        free_host: free bytes of the host's memory.
    """
    if free_device is None:
        reason = "the device has no memory of its own" if wanted == "auto" else "asked for"
        return Policy("resident" if wanted == "auto" else wanted, reason, stream_blocks)
    usable = int((free_device - RESERVE) / MARGIN)
    mode, reason = (wanted, "asked for") if wanted != "auto" else fitting(peak, usable)
    pinned = mode == "stream" and streamed <= (1.0 if pin_all else PINNED_SHARE) * free_host
    tiles = next((tiles for tiles in TILINGS if peak(mode, tiles) <= usable), TILINGS[-1])
    return Policy(mode, f"{reason}; {giga(free_device)} free", stream_blocks, pinned, tiles)


def fitting(peak: Peak, usable: int) -> tuple[str, str]:
    """The fastest mode that fits into `usable` bytes, or the smallest one."""
    for mode in MEMORY_MODES:
        need = peak(mode, TILINGS[-1])
        if need <= usable:
            return mode, f"needs about {giga(need)}"
    return mode, f"needs about {giga(need)}, which may be too much"
