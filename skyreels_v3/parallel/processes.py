"""How the processes of a run connect, exchange small values, and exit together. Connecting imports torch.

`torchrun` stops all processes when one fails. This module ensures that only the process that failed first reports it;
that a process asked to stop does so in time, even while waiting for one that is gone; and that processes exit when
their launcher is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from skyreels_v3.console import say
from skyreels_v3.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the main process may be reading weights or encoding a prompt
STORE_TIMEOUT = timedelta(days=7)  # it may be downloading a checkpoint
GRACE = 15.0  # seconds to exit after a signal; torchrun itself waits 30
LOCAL_MAIN_REPORTS = 5.0  # seconds for a local main process to report an error that all processes have
LAUNCHER_ENDS = 2.0  # seconds for a launcher to notice that a process is gone and stop the others
INTERRUPTED = 130
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LAUNCHER = "SKYREELS_LAUNCHER"  # process id of `launch`, which reports an interrupt itself
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_store: Store | None = None  # after `init_process_group`


def handle_signals(ranks: Ranks) -> None:
    """Make this process exit in time on SIGINT, SIGTERM and SIGHUP; torchrun sends one when another process fails.

    Local main processes, which may have to clean up, are interrupted and get `GRACE` seconds; the others exit at once.
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
    # Python handlers do not run while a collective waits, but a signal always writes a byte to this pipe
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
    """A signal handler that acts like Ctrl-C and passes on the signal's number."""
    raise KeyboardInterrupt(number)


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this process when its launcher exits for any reason."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it is gone already
        os.kill(os.getpid(), signal.SIGTERM)


def exit_process(code: int, at_once: bool = False) -> NoReturn:
    """Exit this process; after an interrupt, or `at_once`, without waiting for threads, which may be downloading.

    It also does not wait for other processes that it is still connected to: they may be gone.
    """
    if at_once or code == INTERRUPTED or _store is not None:
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
    """Disconnect the processes after a successful run; does nothing in a single process."""
    global _store
    if _store is None:
        return
    import torch.distributed as dist

    dist.barrier()  # the process that holds the store must exit last
    dist.destroy_process_group()
    _store = None


def store_set(key: str, value: Any) -> None:
    """Publish a JSON value to the other processes; use each key once. Does nothing in a single process."""
    if _store is not None:
        _store.set(key, json.dumps(value))


def store_get(key: str) -> Any:
    """Wait for a value that another process sets, and return it."""
    assert _store is not None
    _store.wait([key], STORE_TIMEOUT)
    return json.loads(_store.get(key))


def store_next(key: str) -> int:
    """Count calls from all processes: 0, 1, 2, ..."""
    assert _store is not None
    return _store.add(key, 1) - 1


def broadcast_object(key: str, value: Any, ranks: Ranks) -> Any:
    """The main process's JSON value, on all processes; use each key once."""
    if ranks.is_main:
        store_set(key, value)
        return value
    return store_get(key)


def connect_flags(ranks: Ranks) -> Callable[[bool], bool]:
    """Return a function that tells whether its argument is true on any rank; all ranks call it together.

    Other collectives may run meanwhile, in another thread.
    """
    if ranks.world_size == 1:
        return bool
    import torch
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def is_any(flag: bool) -> bool:
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        return bool(flags)

    return is_any


def report_exit(text: str, code: int, ranks: Ranks, error: BaseException | None = None) -> int:
    """Write to stderr how this process ends, unless another process caused that and reports it.

    Returns:
        The exit code. After `init_process_group` it exits instead: Python's own cleanup would complain that the other
        processes are gone.
    """
    if isinstance(error, KeyboardInterrupt):  # cleanup is done; another signal would only disturb Python's exit
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    with suppress(KeyboardInterrupt):  # while waiting for others to report: the launcher stops all
        if is_reporter(ranks, error):
            if ranks.world_size > 1:
                place = "" if ranks.world_size == ranks.local_world_size else f" (local rank {ranks.local_rank})"
                text = text.replace("error: ", f"error: rank {ranks.rank}{place}: ", 1)
            say(text if ranks.is_main else f"\n{text}")  # below the main process's progress bar
    if _store is not None:
        exit_process(code)
    return code


def is_reporter(ranks: Ranks, error: BaseException | None) -> bool:
    """Whether this process is the one that reports how the run ends."""
    if isinstance(error, KeyboardInterrupt):
        # our launcher reports an interrupt itself, torchrun a signal that it passes on
        launched = LAUNCHER in os.environ or (error.args and "TORCHELASTIC_RUN_ID" in os.environ)
        if launched and ranks.world_size > 1:
            return False
    elif _store is not None:  # another process's exit may have caused the error
        time.sleep(LAUNCHER_ENDS)
    if _store is None:  # before connecting, all have the same error, or only a local main process has one
        if not ranks.is_local_main:
            time.sleep(LOCAL_MAIN_REPORTS)  # torchrun stops them all as soon as one exits
        return True
    try:
        return store_next("reported") == 0
    except RuntimeError:  # the process that holds the store is gone
        return ranks.is_main
