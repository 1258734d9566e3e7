"""--serve and --mcp: check a server's flags, and run it until Ctrl-C or the end of its client."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.hub import local_folder, locate_file, single_files
from skyreels_v3.console import show
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.forms import initial_request
from skyreels_v3.inputs import check_voice
from skyreels_v3.media.files import check_readable, reason_of
from skyreels_v3.packages import check_packages, has_packages
from skyreels_v3.parallel.ranks import choose_degrees
from skyreels_v3.plan import terms_of
from skyreels_v3.request import BY_NAME, GenerationRequest
from skyreels_v3.runtime import check_device, likely_device
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from skyreels_v3.web.queue import Queue
    from skyreels_v3.web.settings import Settings
    from skyreels_v3.web.supervisor import Slot, Supervisor

logger = logging.getLogger(__name__)

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "sse_starlette", "prometheus_client")
FOLDER = "result/server"
MAX_KEYS_BYTES = 64 << 10
MIN_KEY = 16  # characters of a key on the command line
FILE_NAME = re.compile(r".+\.\w{1,5}")
NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
GRACE = 5  # seconds for open responses at shutdown
MAX_HEADER_BYTES = 64 << 10
MAX_CONNECTIONS = 1000
KEEP_ALIVE = 75  # seconds; longer than load balancers' 60, which would otherwise send into a closed connection


def serve(flags: Mapping[str, Any]) -> int:
    """Serve until the process is told to stop or its client closes stdin; returns the exit code.

    Raises:
        UserError: it cannot start.
        KeyboardInterrupt: it was told to stop, and everything is closed.
    """
    is_http, is_mcp = flags.get("serve", False), flags.get("mcp", False)
    if is_mcp:
        check_packages("--mcp", "'mcp>=2'", "mcp", "mcp_types", otherwise="use --serve")
    missing = [name for name in PACKAGES if not has_packages(name)]
    if missing:
        command = "--serve" if is_http else "--mcp"
        raise UserError(command, f"needs pip install -r requirements-web.txt ({', '.join(missing)} not found)")
    host, port = flags.get("host", GenerationRequest.host).strip("[]"), flags.get("port", GenerationRequest.port)
    if not flags.get("outdir", FOLDER).strip():
        raise UserError("--outdir", "an empty value; give a folder for the server's files")
    keys = keys_of(flags)
    check_access(host, keys, flags.get("no_auth", False))
    check_names(flags.get("allowed_hosts", ()))
    check_device(flags.get("device", GenerationRequest.device))
    defaults = defaults_of(flags)
    if not is_http:
        group = workers_of(flags)[1] if flags.get("use_usp") else {}
        return converse(flags, settings_of(flags, host, keys, defaults, group))
    workers = workers_of(flags)
    with listen(host, port) as listener:
        return run(flags, settings_of(flags, host, keys, defaults, workers[1]), workers, listener)


Workers = tuple[Sequence["Slot"], Mapping[str, Any]]  # their slots, and flags for all jobs


def settings_of(
    flags: Mapping[str, Any], host: str, keys: tuple[str, ...], defaults: Mapping[str, Any], group: Mapping[str, Any]
) -> Settings:
    """The settings of a server; raises UserError for defaults that no job could use."""
    from skyreels_v3.web.settings import Settings

    folder, private = Path(os.path.expanduser(flags.get("outdir", FOLDER))), flags.get("allow_private_urls", False)
    settings = Settings(
        folder.absolute(), defaults, host, keys, private, keep_days=flags.get("keep_days"),
        allowed_hosts=flags.get("allowed_hosts", ()), files=files_of(flags, folder), group=group,
    )  # fmt: skip
    for task in TASK_NAMES:
        _, made = initial_request(task, settings.defaults)
        check_voice(made)
        for name, kind in single_files(made):
            locate_file(name, kind)
    return settings


def run(flags: Mapping[str, Any], settings: Settings, workers: Workers, listener: socket.socket) -> int:
    """Serve HTTP on a socket. The web packages are imported only now."""
    from skyreels_v3.web.api import app_of
    from skyreels_v3.web.queue import Queue

    queue = Queue(settings.folder, server=True)
    app = app_of(settings, queue)
    if flags.get("mcp"):
        from skyreels_v3.web.mcp.server import mount_mcp

        mount_mcp(app)
    if has_packages("gradio"):
        from skyreels_v3.web.page import mount_page

        mount_page(app)
    try:
        with supervisor_of(flags, queue, workers):
            host, port = settings.host, listener.getsockname()[1]
            show(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            server_of(app).run(sockets=[listener])
    finally:
        queue.close()
    return 0


def converse(flags: Mapping[str, Any], settings: Settings) -> int:
    """Serve one MCP client over stdin and stdout. Several such processes, and a server, may share a folder.

    The client gets answers before the GPUs are counted, which imports torch.
    """
    from skyreels_v3.web.queue import FolderInUse, Queue

    try:
        queue = Queue(settings.folder, server=True)
    except FolderInUse:
        queue = Queue(settings.folder)
    from skyreels_v3.web.mcp.server import serve_stdio  # takes a second: only after errors are reported

    return serve_stdio(settings, queue, lambda: supervisor_of(flags, queue, workers_of(flags)))


def supervisor_of(flags: Mapping[str, Any], queue: Queue, workers: Workers) -> Supervisor:
    from skyreels_v3.web.retention import Retention
    from skyreels_v3.web.supervisor import Supervisor

    return Supervisor(queue, *workers, retention=Retention(queue, flags.get("keep_days"), flags.get("keep_gb")))


def files_of(flags: Mapping[str, Any], outdir: Path) -> Path | None:
    """The folder of --files, with symbolic links in its path resolved; raises UserError."""
    if (given := flags.get("files")) is None:
        return None
    folder = os.path.realpath(os.path.expanduser(given))
    if not given.strip() or not os.path.isdir(folder):
        raise UserError("--files", f"{format_value(given) or 'an empty value'} is not a folder; give one")
    if Path(folder).is_relative_to(outdir.resolve()):
        raise UserError("--files", f"{format_value(given)} is in the server's own folder; give another one")
    return Path(folder)


def workers_of(flags: Mapping[str, Any]) -> tuple[list[Slot], dict[str, Any]]:
    """The slots of the workers, and flags for all jobs; raises UserError."""
    from skyreels_v3.web.supervisor import gpus_of, group_size, slots_of

    device = likely_device(GenerationRequest(task_spec(TASK_NAMES[0]), device=flags.get("device", "auto")))
    gpus = gpus_of(device)
    if not flags.get("use_usp"):
        return slots_of(gpus, flags.get("workers")), {}
    size = group_size(gpus, flags.get("gpu_num"))
    check_degrees(flags, size)
    shared = {name: value for name, value in flags.items() if BY_NAME[name].usp}
    return slots_of([",".join(gpus[:size])] if gpus else []), {
        **shared,
        "use_usp": True,
        "gpu_num": size,
        "device": device,
    }


def check_degrees(flags: Mapping[str, Any], size: int) -> None:
    """Raise UserError if a group of `size` processes cannot divide any video by the requested degrees.

    Attention heads are checked with each job, since they depend on its model.
    """
    requests = [GenerationRequest(task_spec(name)) for name in TASK_NAMES]
    degrees: dict[str, Any] = {name: flags.get(name) for name in ("cfg_degree", "ring_degree", "ulysses_degree")}
    errors = []
    for terms in sorted({1, *map(terms_of, requests)}):
        try:
            choose_degrees(replace(requests[0], **degrees), size, heads=size, terms=terms)
        except UserError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def server_of(app: FastAPI) -> uvicorn.Server:
    """The uvicorn server of an application."""
    import uvicorn

    from skyreels_v3.web.connection import Connection

    config = uvicorn.Config(
        app, http=Connection, ws="none", log_config=None, access_log=False, proxy_headers=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    return uvicorn.Server(config)


def keys_of(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys in --api_key, or in the file that it names; raises UserError."""
    from skyreels_v3.web.security import KEY

    given = flags.get("api_key")
    if given is None:
        return ()
    if flags.get("no_auth"):
        raise UserError("--api_key", "conflicts with --no_auth; give one of them")
    lines, place = [given], "it"
    if not os.path.exists(os.path.expanduser(given)):
        check_literal(given)
    else:
        path = Path(os.path.expanduser(given))
        check_readable(path, "--api_key")
        if path.stat().st_size > MAX_KEYS_BYTES:
            raise UserError(
                "--api_key", f"{format_value(path)} has more than {MAX_KEYS_BYTES >> 10} KiB; give one key per line"
            )
        lines, place = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), "line {}"
    keys = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            if not KEY.fullmatch(line):
                reason = f"{place.format(number)} is not a key"
                raise UserError("--api_key", f"{reason}; give letters, digits and any of - . _ ~ + /")
            keys.append(line)
    if not keys:
        raise UserError("--api_key", f"{format_value(given)} holds no key; give one")
    return tuple(dict.fromkeys(keys))


def check_literal(key: str) -> None:
    """Raise UserError for a key that looks like the name of a missing file, or is easily guessed."""
    if "/" in key or FILE_NAME.fullmatch(key):
        shown = f" {format_value(key)}" if key[0] in "/.~" or FILE_NAME.fullmatch(key) else ""  # else maybe a secret
        raise UserError("--api_key", f"there is no such file{shown}; put a key that has a / or a suffix into a file")
    if len(key) < MIN_KEY:
        reason = f"it is not a file, and a key of fewer than {MIN_KEY} characters is easily guessed"
        raise UserError("--api_key", f"{reason}; make one with openssl rand -hex 16")


def check_access(host: str, keys: tuple[str, ...], no_auth: bool) -> None:
    """Raise UserError if other machines could use the server without a key and --no_auth does not allow it."""
    from skyreels_v3.web.security import is_loopback

    if not is_loopback(host) and not keys and not no_auth:
        raise UserError(
            "--host", f"{format_value(host)}: other machines could use this server; add --api_key, or --no_auth"
        )


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a name that is not a valid host name."""
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                "--allowed_hosts", f"{format_value(name)} is not a host name; give one such as video.example.com"
            )


def defaults_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that apply to jobs, with model folders as absolute paths."""
    defaults = {name: value for name, value in flags.items() if BY_NAME[name].in_line and name != "outdir"}
    for name in ("model_id", "base_model_id"):
        model = defaults.get(name, TINY)
        if model != TINY and local_folder(model, f"--{name}", f"give a folder, or an id of a hub{NOT_BASE[name]}"):
            defaults[name] = os.path.abspath(os.path.expanduser(model))
    return defaults


NOT_BASE = {"model_id": f", or {TINY}", "base_model_id": ""}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; raises UserError if that is not possible."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = f"{format_value(host)} is not an address of this machine ({reason_of(error)})"
        raise UserError("--host", f"{reason}; give 127.0.0.1, 0.0.0.0 or another one") from error
    # asyncio disables Nagle's algorithm only if the socket's protocol is given
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        flag, value = ("--host", host) if error.errno == errno.EADDRNOTAVAIL else ("--port", port)
        raise UserError(flag, f"{value} cannot be listened on ({reason_of(error)}); give another one") from error
    return listener
