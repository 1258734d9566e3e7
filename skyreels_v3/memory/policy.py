"""Where the components live while a run works: decided once, from what the plan needs and what the machine has.

- resident: every component goes to the device when it is first used, and stays.
- offload: a component is on the device only while it works.
- stream: as offload, and of the transformer and the text encoder only the blocks that work.

Nothing here touches a device; `runtime.start` asks it what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from skyreels_v3.plan import TILINGS, Plan, giga
from skyreels_v3.tasks import MEMORY_MODES

MARGIN = 1.1  # for what kernels need for themselves and for fragmentation
RESERVE = 500_000_000  # bytes: the driver's own
PINNED_SHARE = 0.7  # of the host's free memory at most


@dataclass(frozen=True)
class Policy:
    """What was decided.

    Attributes:
        mode: one of `tasks.MEMORY_MODES`.
        reason: for people.
        keep: blocks of the transformer that stay on the device when it is streamed.
        pinned: the transformer's blocks are held in pinned memory.
        tiles: rows and columns that the VAE works in.
    """

    mode: str
    reason: str
    keep: int = 0
    pinned: bool = False
    tiles: tuple[int, int] = (1, 1)


def choose(plan: Plan, free_device: int | None, free_host: int) -> Policy:
    """The policy for a run.

    Args:
        free_device: free bytes of a device with memory of its own, None where it has none.
        free_host: free bytes of the host's memory.
    """
    wanted = plan.request.memory
    if free_device is None:
        mode = "resident" if wanted == "auto" else wanted
        return Policy(mode, "asked for" if mode == wanted else "the device has no memory of its own", keep_of(plan))
    usable = int((free_device - RESERVE) / MARGIN)
    mode, reason = (wanted, "asked for") if wanted != "auto" else fitting(plan, usable)
    share = 1.0 if plan.request.high_cpu_memory else PINNED_SHARE
    pinned = mode == "stream" and plan.streamed_from_host <= share * free_host
    return Policy(mode, f"{reason}; {giga(free_device)} free", keep_of(plan), pinned, tiling(plan, mode, usable))


def keep_of(plan: Plan) -> int:
    return plan.request.stream_blocks


def fitting(plan: Plan, usable: int) -> tuple[str, str]:
    """The fastest mode that fits into `usable` bytes, or the smallest one."""
    for mode in MEMORY_MODES:
        need = plan.peak(mode, TILINGS[-1])
        if need <= usable:
            return mode, f"needs about {giga(need)}"
    return MEMORY_MODES[-1], f"needs about {giga(plan.peak(MEMORY_MODES[-1], TILINGS[-1]))}, which may be too much"


def tiling(plan: Plan, mode: str, usable: int) -> tuple[int, int]:
    """The fewest tiles that fit."""
    return next((tiles for tiles in TILINGS if plan.peak(mode, tiles) <= usable), TILINGS[-1])
