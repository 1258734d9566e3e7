"""Retention: which ended jobs a server deletes, and when it checks for them."""

from __future__ import annotations

import logging
import time
from time import monotonic

from skyreels_v3.web.queue import Queue

logger = logging.getLogger(__name__)

DAY_SECONDS = 86400.0
LOOK_SECONDS = 600.0  # between checks
JUMP_SECONDS = 3600.0  # drift from the monotonic clock between checks that means the clock was set
IDLE_SECONDS = 7 * DAY_SECONDS  # without a new job: the server was off, or its clock is wrong


class Retention:
    """Deletes ended jobs, oldest first.

    A clock that was set, or at the start is a week ahead of the newest job, may be wrong: no job is then deleted for
    its age until the clock has been steady for a day. A job that ended in the future stays.

    Args:
        days: to keep a job after it has ended; None: forever.
        gigabytes: maximum total size of all jobs' files (1 GB = 10^9 bytes); None: no limit.
    """

    def __init__(self, queue: Queue, days: float | None = None, gigabytes: float | None = None) -> None:
        self.queue = queue
        self.max_age = None if days is None else days * DAY_SECONDS
        self.max_bytes = None if gigabytes is None else round(gigabytes * 1e9)
        self._next = monotonic()
        self._offset = time.time() - monotonic()
        newest, _ = queue.list(limit=1)
        is_ahead = any(time.time() - job.created > IDLE_SECONDS for job in newest)
        self._steady_since = monotonic() if is_ahead else -DAY_SECONDS

    def apply(self) -> None:
        """Delete jobs that are due; does nothing within `LOOK_SECONDS` of the last check."""
        if (self.max_age is None and self.max_bytes is None) or monotonic() < self._next:
            return
        self._next = monotonic() + LOOK_SECONDS  # also after an error
        for id in self.queue.expire(self.max_age if self._is_steady() else None, self.max_bytes):
            logger.info("%s is deleted because of --keep_days or --keep_gb", id)

    def _is_steady(self) -> bool:
        """Whether the clock has been steady for a day."""
        offset = time.time() - monotonic()
        if abs(offset - self._offset) > JUMP_SECONDS:
            self._steady_since = monotonic()
            logger.warning("the clock jumped by %.1f h; --keep_days waits for a day", (offset - self._offset) / 3600)
        self._offset = offset
        return monotonic() - self._steady_since >= DAY_SECONDS
