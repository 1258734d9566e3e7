"""How the processes of a run meet, exchange small values, and end together. torch is imported when they meet.

`torchrun` ends all processes when one fails. What is left to do here: the process that failed first reports it, and the
others do not; a process that was told to end does so in time, even while it waits for one that is gone; and processes
end with a launcher that was killed.
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

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the main process may be reading weights or encoding a prompt meanwhile
STORE_TIMEOUT = timedelta(days=7)  # it may be downloading a checkpoint
GRACE = 15.0  # seconds from a signal to the end; torchrun itself waits 30
LOCAL_MAIN_REPORTS = 5.0  # seconds in which a local main process has reported an error that all meet
LAUNCHER_ENDS = 2.0  # seconds in which a launcher has seen that another process is gone, and ends this one
INTERRUPTED = 130
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LAUNCHER = "SKYREELS_LAUNCHER"  # the process id of `launch`, which itself says that a run was interrupted
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_store: Store | None = None  # after `init_process_group`


def handle_signals(ranks: Ranks) -> None:
    """Have SIGINT, SIGTERM and SIGHUP end this process in time; torchrun sends one when another process has failed.

    Local main processes, which may have something to tidy up, are interrupted and given `GRACE` seconds; the others end
    at once.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup
            continue
        if not ranks.is_local_main:
            signal.signal(number, signal.SIG_DFL)
        elif number != signal.SIGINT:
            signal.signal(number, interrupt)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    if ranks.world_size == 1 or not ranks.is_local_main:
        return
    # a Python handler does not run while a collective waits; the byte that a signal leaves here is always written
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1)[0] not in STOP_SIGNALS:
            pass
        time.sleep(GRACE)
        os._exit(INTERRUPTED)

    Thread(target=watch, daemon=True).start()


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that does what Ctrl-C does, and says which signal it was."""
    raise KeyboardInterrupt(number)


def end_with_launcher() -> None:
    """Have the system send SIGTERM when the process that has started this one ends, however it ends."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)


def exit_process(code: int) -> NoReturn:
    """End this process; after an interrupt without waiting for threads, which may be downloading."""
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def init_process_group(ranks: Ranks, device: str) -> None:
    """Wait for all processes and connect them; `device` is that of the request."""
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    _store, rank, world_size = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=STORE_TIMEOUT))
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


def destroy() -> None:
    """End a run that went well, together; nothing in a single process."""
    global _store
    if _store is None:
        return
    import torch.distributed as dist

    dist.barrier()  # the process that keeps the store has to end last
    dist.destroy_process_group()
    _store = None


def store_set(key: str, value: Any) -> None:
    """Give the other processes a JSON value; a key is used once. Nothing in a single process."""
    if _store is not None:
        _store.set(key, json.dumps(value))


def store_get(key: str) -> Any:
    """The value that another process sets, as soon as it does."""
    assert _store is not None
    _store.wait([key], STORE_TIMEOUT)
    return json.loads(_store.get(key))


def store_next(key: str) -> int:
    """0, 1, 2, ...: a different number for each call, whichever process calls."""
    assert _store is not None
    return _store.add(key, 1) - 1


def broadcast_object(key: str, value: Any, ranks: Ranks) -> Any:
    """The main process's JSON value; a key is used once."""
    if ranks.is_main:
        store_set(key, value)
        return value
    return store_get(key)


def report_exit(text: str, code: int, ranks: Ranks, error: BaseException | None = None) -> int:
    """Write on stderr how this process ends, unless it ends because another one did, which reports itself.

    Returns:
        The exit code. After `init_process_group` it does not return but exits: Python's own clean-up would report that
        the other processes are gone.
    """
    if isinstance(error, KeyboardInterrupt):  # all is tidied up; another signal would only break into Python's own end
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    with suppress(KeyboardInterrupt):  # while it waits for others to report: the launcher ends all
        if is_reporter(ranks, error):
            if ranks.world_size > 1:
                place = "" if ranks.world_size == ranks.local_world_size else f" (local rank {ranks.local_rank})"
                text = text.replace("error: ", f"error: rank {ranks.rank}{place}: ", 1)
            say(text if ranks.is_main else f"\n{text}")  # below the main process's progress bar
    if _store is not None:
        os._exit(code)
    return code


def is_reporter(ranks: Ranks, error: BaseException | None) -> bool:
    """Whether it is for this process to report how a run ends."""
    if isinstance(error, KeyboardInterrupt):
        # our launcher reports an interrupt itself, and torchrun a signal that it passes on
        launched = LAUNCHER in os.environ or (error.args and "TORCHELASTIC_RUN_ID" in os.environ)
        if launched and ranks.world_size > 1:
            return False
    elif _store is not None:  # the error may come of another process's end
        time.sleep(LAUNCHER_ENDS)
    if _store is None:  # an error before they meet is the same in all processes, or a local main one's alone
        if not ranks.is_local_main:
            time.sleep(LOCAL_MAIN_REPORTS)  # and torchrun ends them all as soon as one has ended
        return True
    try:
        return store_next("reported") == 0
    except RuntimeError:  # the process that keeps the store is gone
        return ranks.is_main
