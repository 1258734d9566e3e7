"""The processes of a run meet, wait for each other and end together. torch is imported when they meet.

`torchrun` ends all processes when one of them fails. What is left to do here: the one that failed first says so and
nobody else does, and nobody takes longer to go than it takes to tidy up, even if it hangs in an exchange with a process
that is no more. A launcher that is killed takes its processes with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from skyreels_v3.console import say
from skyreels_v3.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

EXCHANGE_TIMEOUT = timedelta(hours=2)  # the first process may be reading weights or encoding a prompt meanwhile
LEADER_TIMEOUT = timedelta(days=7)  # it may be fetching a checkpoint
GRACE = 15.0  # seconds from a signal to the end; torchrun itself waits 30
LEADER_FIRST = 5.0  # seconds in which a leader has spoken
OTHERS_FIRST = 2.0  # seconds in which a launcher has seen that another process is no more, and ends this one
INTERRUPTED = 130
ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
LAUNCHER = "SKYREELS_LAUNCHER"  # the id of `launch`'s process, which says itself that a run was interrupted
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_store: Store | None = None


def prepare_to_end(ranks: Ranks) -> None:
    """Have this process end soon after SIGINT, SIGTERM or SIGHUP; torchrun sends one when another process has failed.

    Whoever has something to tidy up is interrupted as by Ctrl-C, and has `GRACE` seconds for it; the others go at once.
    """
    for number in ENDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    if ranks.world == 1:
        return
    if not ranks.leads:
        for number in (signal.SIGINT, *ENDS):
            signal.signal(number, signal.SIG_DFL)
        return
    # a handler in Python does not run while an exchange waits; the byte that the signal leaves here is always written
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1)[0] not in (signal.SIGINT, *ENDS):
            pass
        time.sleep(GRACE)
        os._exit(INTERRUPTED)

    Thread(target=watch, daemon=True).start()


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that does what Ctrl-C does, and says which signal it was."""
    raise KeyboardInterrupt(number)


def end_with_launcher() -> None:
    """Have the system send SIGTERM when the process that has started this one ends, however it does."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it was too late
        os.kill(os.getpid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """End this process; after an interrupt without waiting for threads, which may be downloading for long."""
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


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


def ended(text: str, code: int, ranks: Ranks, error: BaseException | None = None) -> int:
    """Say on stderr how this process ended, unless it was for another one's end, of which is told already.

    Returns:
        The exit code. Where processes have met it does not return: what Python and the others' absence do at the end
        would only be noise.
    """
    if isinstance(error, KeyboardInterrupt):  # all is tidied up; another one would only break into Python's own end
        for number in (signal.SIGINT, *ENDS):
            signal.signal(number, signal.SIG_IGN)
    try:
        if speaks(ranks, error):
            if ranks.world > 1:
                place = "" if ranks.world == ranks.local_world else f" (local rank {ranks.local_rank})"
                text = text.replace("error: ", f"error: rank {ranks.rank}{place}: ", 1)
            if not ranks.main:  # the first one's progress bar stands there
                text = f"\n{text}"
            say(text)
    except KeyboardInterrupt:  # while it waited for others to speak: one of them is no more, and the launcher ends all
        pass
    if _store is not None:
        os._exit(code)
    return code


def speaks(ranks: Ranks, error: BaseException | None) -> bool:
    """Whether it is this process that says how a run has ended."""
    if isinstance(error, KeyboardInterrupt):
        # what a launcher sends, or lets a user send, it tells itself
        quiet = LAUNCHER in os.environ or (error.args and "TORCHELASTIC_RUN_ID" in os.environ)
        if quiet and ranks.world > 1:
            return False
    elif _store is not None:  # it may be another one's end that it has met with
        time.sleep(OTHERS_FIRST)
    if _store is None:  # what goes wrong before they meet goes wrong in each, or in a leader
        if not ranks.leads:
            time.sleep(LEADER_FIRST)  # and torchrun ends them all as soon as one has
        return True
    try:
        return next_number("ended") == 0
    except RuntimeError:  # whoever keeps the store is gone
        return ranks.main
