"""A server's settings and its limits on clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from skyreels_v3.media.files import MAX_VIDEO_BYTES
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec


@dataclass(frozen=True)
class Limits:
    """Limits on clients.

    Attributes:
        file_bytes, body_bytes, json_bytes: size of one file, of a form with its files, of a JSON body.
        parts: number of files and fields in a form.
        field_bytes: size of one field that is not a file.
        stall_seconds: longest wait for the next bytes of a body; body_seconds: time for all of it.
        slowest: minimum average bytes per second of a body, checked after `stall_seconds`.
        uploads: requests read at once; streams: event streams and waiting MCP calls open at once.
        requests, posts: per minute, for each key, or for each address where no key is needed.
        plan_seconds: time for one plan.
    """

    file_bytes: int = MAX_VIDEO_BYTES
    body_bytes: int = 2 * MAX_VIDEO_BYTES
    json_bytes: int = 32 << 20
    parts: int = 100
    field_bytes: int = 64 << 10
    stall_seconds: float = 20.0
    body_seconds: float = 1800.0
    slowest: int = 1024
    uploads: int = 16
    streams: int = 100
    requests: int = 1200
    posts: int = 120
    plan_seconds: float = 120.0


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    Attributes:
        folder: holds the queue and the jobs' files.
        defaults: default flags of all jobs, converted.
        host: address to listen on; allowed_hosts: other host names that clients may use.
        files: folder whose files MCP clients may use as inputs, without symbolic links in its path; None: no files.
        group: --use_usp and related flags for all jobs, if several processes share each job.
        keys: clients must send one of them; empty: none is needed.
        allow_private_urls: also fetch inputs from private networks.
        keep_days: days to keep a job after it has ended; None: forever.
    """

    folder: Path
    defaults: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    allow_private_urls: bool = False
    keep_days: float | None = None
    allowed_hosts: tuple[str, ...] = ()
    files: Path | None = None
    group: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()

    @cached_property
    def models(self) -> dict[str, str]:
        """The values of `model` that clients may send, and the --model_id of each; the default first."""
        default = self.defaults.get("model_id", TINY)
        names = {Path(default).name if Path(default).is_dir() else default: default}
        for spec in map(task_spec, TASK_NAMES):
            names |= {name: name for name in (spec.model_id, *spec.also_published_as)}
        return names | {TINY: TINY}

    def model_name(self, model_id: str) -> str:
        """The name of a --model_id for clients, who must not see the server's folders."""
        return next((name for name, id in self.models.items() if id == model_id), Path(model_id).name)
