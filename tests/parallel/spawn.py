"""Ranks in real processes that communicate over gloo, and a counter of the bytes that they send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from skyreels_v3.parallel.groups import Group

WORLD_SIZE = 4
DEGREES = [(1, 2), (3, 1), (2, 2), (1, 4)]  # ring and Ulysses degrees


def spawn(test: Callable[[], None], folder: Path) -> None:
    """Run a function of a test module on all ranks."""
    mp.get_context("forkserver").set_forkserver_preload([test.__module__])  # import once for all ranks
    mp.start_processes(run_rank, (test, folder), WORLD_SIZE, start_method="forkserver")


def run_rank(rank: int, test: Callable[[], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE)
    with torch.no_grad():
        test()
    dist.destroy_process_group()


def groups(ring: int, ulysses: int) -> dict[str, Group]:
    """This rank's groups if the first ring * ulysses ranks share the work, else none; every rank must call this."""
    ranks = torch.arange(ring * ulysses).view(ring, ulysses)
    own: dict[str, Group] = {}
    for name, members in (("ulysses", ranks), ("ring", ranks.T), ("sequence", ranks.view(1, -1))):
        for some in members.tolist():
            group = dist.new_group(some)
            if dist.get_rank() in some:
                own[name] = Group(group)
    return own


KINDS = {  # of a collective: its name, the argument with the whole tensor, the fraction that each of n ranks sends
    "alltoall_base_": ("all_to_all", 1, lambda n: (n - 1) / n),
    "_allgather_base_": ("all_gather", 0, lambda n: (n - 1) / n),
    "allreduce_": ("all_reduce", 0, lambda n: 2 * (n - 1) / n),
}


class BytesSent(TorchDispatchMode):
    """Counts the bytes that this rank sends in torch collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            kind, place, share = KINDS[function._schema.name.removeprefix("c10d::")]
            tensor = args[place][0] if isinstance(args[place], list) else args[place]
            group = next(ProcessGroup.unbox(each) for each in args if isinstance(each, torch.ScriptObject))
            self.sent[kind] += share(group.size()) * tensor.nbytes
        return function(*args, **(kwargs or {}))
