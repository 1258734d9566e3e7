"""Downloading an input from an http or https URL, without trusting the server.

Size and total time are limited, redirects may lead to http and https only, and web pages are refused. So are private
networks, unless allowed; the address that is really connected to is checked, whatever the name resolved to before.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import mimetypes
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import httpx

from skyreels_v3.errors import UserError, format_value, redact_url

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
DEFAULT_PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080}  # of proxies; else 80
MAX_SECONDS = 300.0  # for one download with its redirects
BAR_DELAY = 1.0  # seconds; quicker downloads show no progress bar
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")
HTML_START = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
NOT_MEDIA = re.compile(r"text/|application/(json|xhtml|xml)")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """Raised if a URL is not downloaded; says why, and what to do instead."""


def download(
    url: str, flag: str, folder: Path, timeout: float, max_bytes: int, progress: bool, allow_private: bool
) -> Path:
    """Run `download_async` in its own event loop."""
    return asyncio.run(download_async(url, flag, folder, timeout, max_bytes, progress, allow_private))


async def download_async(
    url: str, flag: str, folder: Path, timeout: float, max_bytes: int, progress: bool, allow_private: bool
) -> Path:
    """Download a URL into a new file in `folder`, which is created if needed; a failure leaves no file.

    Args and Raises: as in `files.local_file`.
    """
    try:
        path = await fetch(url, folder, timeout, max_bytes, progress, allow_private)
    except Refused as error:
        reason = str(error)
    except TimeoutError:
        reason = f"took more than {MAX_SECONDS:g} s; download it and give the path"
    except httpx.TimeoutException:
        reason = f"no answer within {timeout:g} s; try again or raise --url_timeout"
    except httpx.UnsupportedProtocol:
        reason = "it leads to an address that is not http or https; download it and give the path"
    except httpx.TooManyRedirects:
        reason = f"more than {MAX_REDIRECTS} redirects; give the final address"
    except (httpx.InvalidURL, UnicodeError):  # their text has a part of the URL, which may be secret
        reason = "not a valid address; check it"
    except httpx.HTTPError as error:
        reason = (
            f"cannot be downloaded ({format_value(error)}); check address and network, and the proxy if there is one"
        )
    else:
        logger.debug("downloaded %s (%d bytes)", redact_url(url), path.stat().st_size)
        return path
    raise UserError(flag, f"{format_value(url)}: {reason}")


async def fetch(url: str, folder: Path, timeout: float, max_bytes: int, progress: bool, allow_private: bool) -> Path:
    """Like `download_async`, but failures are exceptions of httpx, TimeoutError or Refused."""
    try:
        check = ConnectionCheck(timeout, allow_private)
        client = httpx.AsyncClient(
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=timeout,
            event_hooks={"request": [check.on_request]},
            headers={"User-Agent": "skyreels-v3", "Accept": "*/*", "Accept-Encoding": "identity"},
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # about the proxies in the environment
        remedy = "give http://HOST:PORT or socks5://HOST:PORT, or unset it"
        raise Refused(
            f"http_proxy, https_proxy or all_proxy cannot be used ({format_value(error)}); {remedy}"
        ) from error
    request = client.stream("GET", url, extensions={"trace": check.on_event})
    async with asyncio.timeout(MAX_SECONDS), client, request as response:
        if not response.is_success:
            status = f"{response.status_code} {response.reason_phrase}".strip()
            raise Refused(f"the server answers {status}; check the address")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":  # it may expand to any size
            raise Refused("the server sends it compressed; download it and give the path")
        kind = response.headers.get("Content-Type", "").lower()
        if NOT_MEDIA.match(kind):
            raise Refused(f"this is {format_value(kind)}, not media; give the address of the file itself")
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="download-", suffix=suffix_of(response), dir=folder)
        try:
            with open(handle, "w+b") as file:
                await save(response, file, max_bytes, progress)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return Path(name)


async def save(response: httpx.Response, file: IO[bytes], max_bytes: int, progress: bool) -> None:
    """Write a response to a file, checking its size and its first bytes."""
    from skyreels_v3.progress import progress_bar  # imported for URLs only

    def check_size(size: int) -> None:
        if size > max_bytes:
            limit = f"{max_bytes / 2**20:g} MiB"
            raise Refused(f"larger than the limit of {limit}; scale it down, or download it and give the path")

    announced = response.headers.get("Content-Length", "")
    length = int(announced) if announced.isdecimal() else None
    check_size(length or 0)
    with progress_bar("download", length, progress, unit="B", unit_scale=True, delay=BAR_DELAY) as bar:
        async for chunk in response.aiter_raw():
            check_size(file.tell() + len(chunk))
            file.write(chunk)
            bar.update(len(chunk))
    file.seek(0)
    start = file.read(1024)
    if not start:
        raise Refused("the answer is empty; check the address")
    if HTML_START.match(start):
        raise Refused("this is a web page (HTML), not media; give the address of the file itself")


def suffix_of(response: httpx.Response) -> str:
    """A plausible file suffix: that of the final URL, else of the content type, else none."""
    suffix = Path(unquote(response.url.path)).suffix
    if SUFFIX.fullmatch(suffix):
        return suffix
    return mimetypes.guess_extension(response.headers.get("Content-Type", "").split(";")[0].strip()) or ""


class ConnectionCheck:
    """Makes sure that a download and its redirects send nothing to private networks."""

    def __init__(self, timeout: float, allow_private: bool) -> None:
        self.timeout = timeout
        self.allow_private = allow_private
        proxies = (urlsplit(url if "://" in url else f"//{url}") for name, url in getproxies().items() if name != "no")
        # these may be in a private network
        self.proxies = {(url.hostname, url.port or DEFAULT_PORTS.get(url.scheme, 80)) for url in proxies}
        self.address = ("", 0)

    async def on_request(self, request: httpx.Request) -> None:
        """httpx's hook before each request: checks numeric addresses, since a proxy would resolve names itself."""
        if not request.url.host or not 0 <= (request.url.port or 0) <= 65535:
            raise httpx.InvalidURL("no host, or an impossible port")
        with suppress(OSError):  # not a numeric address
            self.require_public(request.url.host, addresses_of(request.url.host, socket.AI_NUMERICHOST))
        if request.url.host.rstrip(".").lower().endswith("localhost"):
            self.require_public(request.url.host, ["127.0.0.1"])

    async def on_event(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx's trace hook: for direct connections, checks the host's addresses, then the one that was reached."""
        if event == "connection.connect_tcp.started":
            self.address = (info["host"], info["port"])
            if self.address not in self.proxies:
                self.require_public(info["host"], await resolve(info["host"], self.timeout))
        if event == "connection.connect_tcp.complete" and self.address not in self.proxies:
            self.require_public(self.address[0], [info["return_value"].get_extra_info("server_addr")[0]])

    def require_public(self, host: str, addresses: Sequence[str]) -> None:
        for address in addresses:
            if not (self.allow_private or is_public(address)):
                leads = "is" if host == address else f"leads to {format_value(address)},"
                reason = f"{format_value(host)} {leads} an address of this machine, of a private or a reserved network"
                raise Refused(f"{reason}; download it and give the path, or add --allow_private_urls")


async def resolve(host: str, timeout: float) -> list[str]:
    """The addresses of a host.

    Looked up in a daemon thread: the system's resolver cannot be cancelled, and may take far longer than `timeout`.
    """
    found: Future[list[str]] = Future()

    def look_up() -> None:
        with suppress(InvalidStateError):  # nobody is waiting any more
            try:
                found.set_result(addresses_of(host))
            except Exception as error:
                found.set_exception(error)

    Thread(target=look_up, daemon=True).start()
    try:
        return await asyncio.wait_for(asyncio.wrap_future(found), timeout)
    except TimeoutError as error:
        raise httpx.ConnectTimeout(f"{host} is not found") from error
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"{host}: {error}") from error


def addresses_of(host: str, flags: int = 0) -> list[str]:
    entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def is_public(address: str) -> bool:
    """Whether a numeric address, or the IPv4 address that it embeds, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ipaddress.IPv4Address(int(ip) % 2**32) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour or ip
    if isinstance(ip, ipaddress.IPv6Address) and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast
