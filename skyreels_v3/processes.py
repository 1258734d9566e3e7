"""The processes of a run meet, wait for each other and end together. torch is imported when they meet.

`torchrun` ends all processes when one of them fails. What is left to do here: the one that failed first says so and
nobody else does, and nobody takes longer to go than it takes to tidy up, even if it hangs in an exchange with a process
that is no more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any

from skyreels_v3.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

EXCHANGE_TIMEOUT = timedelta(hours=2)  # the first process may be reading weights or encoding a prompt meanwhile
LEADER_TIMEOUT = timedelta(days=7)  # it may be fetching a checkpoint
GRACE = 15.0  # seconds from a signal to the end; torchrun itself waits 30
LEADER_FIRST = 5.0  # seconds in which a leader has spoken
INTERRUPTED = 130

_store: Store | None = None


def prepare_to_end(ranks: Ranks) -> None:
    """Have this process end soon after SIGTERM, which torchrun sends when another one has failed, or SIGINT.

    Whoever has something to tidy up is interrupted as by Ctrl-C, and has `GRACE` seconds for it; the others go at once.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
    if ranks.world == 1:
        return
    if not ranks.leads:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return
    # a handler in Python does not run while an exchange waits; the byte that the signal leaves here is always written
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        time.sleep(GRACE)
        os._exit(INTERRUPTED)

    Thread(target=watch, daemon=True).start()


def meet(ranks: Ranks, device: str) -> None:
    """Wait for all processes, and be able to talk to them from then on; `device` is that of the request."""
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", ranks.rank, ranks.world, timeout=LEADER_TIMEOUT))
    _store = store
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=EXCHANGE_TIMEOUT)


def part() -> None:
    """The end of a run that went well, together."""
    global _store
    if _store is None:  # they have not met: one that is alone
        return
    import torch.distributed as dist

    dist.barrier()  # whoever keeps the others' store goes last
    dist.destroy_process_group()
    _store = None


def tell(what: str, value: Any) -> None:
    """Have the other processes `hear` a JSON value; `what` is a name that is used once."""
    if _store is not None:
        _store.set(what, json.dumps(value))


def hear(what: str) -> Any:
    """What another process tells, as soon as it does."""
    assert _store is not None
    _store.wait([what], LEADER_TIMEOUT)
    return json.loads(_store.get(what))


def agreed(what: str, value: Any, ranks: Ranks) -> Any:
    """The first process's `value`."""
    if ranks.main:
        tell(what, value)
        return value
    return hear(what)


def next_number(what: str) -> int:
    """0, 1, 2 ...: another one for whichever process asks."""
    assert _store is not None
    return _store.add(what, 1) - 1


def say(text: str, ranks: Ranks) -> None:
    """Say on stderr how this process ended, unless it was for another one's end that is told of already."""
    if _store is None:  # what goes wrong before they meet goes wrong in each, or in a leader
        if not ranks.leads:
            time.sleep(LEADER_FIRST)  # and torchrun ends them all as soon as one has
        first = True
    else:
        try:
            first = next_number("ended") == 0
        except RuntimeError:  # whoever keeps the store is gone
            first = ranks.main
    if first:
        if ranks.world > 1:
            text = text.replace("error: ", f"error: rank {ranks.rank}: ", 1)
        if not ranks.main:  # the first one's progress bar stands there
            text = f"\n{text}"
        sys.stderr.write(text)
        sys.stderr.flush()
