"""A download from an http or https address. It distrusts the other side.

Bounded in size and time as a whole, redirects only to http and https, no web pages in place of media, nothing from
private networks unless that is asked for: every host is resolved here, looked at, and connected to by that address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import mimetypes
import re
import socket
import tempfile
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import httpx

from skyreels_v3.errors import UserError, redact_url, shown

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
MAX_SECONDS = 300.0  # for one download with its redirects, however steadily it trickles
MAX_PORT = 65535
BAR_BYTES = 4 << 20  # larger downloads show a progress bar
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")
HTML_START = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
NO_MEDIA_TYPE = re.compile(r"text/|application/(json|xhtml|xml)")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def download(
    url: str, flag: str, folder: Path, timeout: float, max_bytes: int, progress: bool, allow_private: bool
) -> Path:
    """The new file of `folder` that an address was downloaded to; the arguments and errors are those of `localise`."""
    return asyncio.run(_Download(url, flag, timeout, max_bytes, progress, allow_private).into(folder))


@dataclass(frozen=True)
class _Download:
    """One download and its limits. Every failure is a UserError that names the address."""

    url: str
    flag: str
    timeout: float
    max_bytes: int
    progress: bool
    allow_private: bool

    async def into(self, folder: Path) -> Path:
        """Download into a new file of `folder`, which is made if need be; nothing is left there on failure."""
        try:
            async with asyncio.timeout(MAX_SECONDS):
                transport = _Transport(self.timeout, self.allow_private)
                headers = {"User-Agent": "skyreels-v3", "Accept": "*/*"}
                async with (
                    httpx.AsyncClient(
                        transport=transport, follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=self.timeout
                    ) as client,
                    client.stream("GET", self.url, headers=headers) as response,
                ):
                    return await self._save(response, folder)
        except TimeoutError as error:
            raise self._error(f"took more than {MAX_SECONDS:g} s; download it and give the path") from error
        except httpx.TimeoutException as error:
            raise self._error(f"no answer within {self.timeout:g} s; try again or raise --url_timeout") from error
        except _Refused as error:
            raise self._error(f"{error}; download it and give the path, or add --allow_private_urls") from error
        except httpx.UnsupportedProtocol as error:
            raise self._error(
                "it leads to an address that is not http or https; download it and give the path"
            ) from error
        except httpx.TooManyRedirects as error:
            raise self._error(f"more than {MAX_REDIRECTS} redirects; give the final address") from error
        except (httpx.InvalidURL, UnicodeError) as error:  # their text is a part of the address, at times a secret
            raise self._error("not a valid address; check it") from error
        except _BadProxy as error:
            raise self._error(str(error)) from error
        except httpx.HTTPError as error:
            raise self._error(f"cannot be downloaded ({shown(error)}); check address and network") from error

    async def _save(self, response: httpx.Response, folder: Path) -> Path:
        length = self._check_headers(response)
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="download-", suffix=_suffix(response), dir=folder)
        path = Path(name)
        try:
            with open(handle, "wb") as file:
                await self._copy(response, file, length)
            self._check_content(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        logger.debug("downloaded %s (%d bytes)", redact_url(self.url), path.stat().st_size)
        return path

    async def _copy(self, response: httpx.Response, file: IO[bytes], length: int | None) -> None:
        from skyreels_v3.progress import progress_bar  # only addresses pay for it

        hidden = not self.progress or (length is not None and length < BAR_BYTES)
        received = 0
        # a download of unknown length shows its bar when it takes more than a second
        units = {"unit": "B", "unit_scale": True, "delay": 1.0 * (not length)}
        with progress_bar("download", length, not hidden, **units) as bar:
            async for chunk in response.aiter_bytes():
                received += len(chunk)
                self._check_size(received)
                file.write(chunk)
                bar.update(len(chunk))

    def _check_headers(self, response: httpx.Response) -> int | None:
        """The announced length in bytes, if any, after a look at status, length and kind."""
        if not response.is_success:
            status = f"{response.status_code} {response.reason_phrase}".strip()
            raise self._error(f"the server answers {status}; check the address")
        kind = response.headers.get("Content-Type", "").lower()
        if NO_MEDIA_TYPE.match(kind):
            raise self._error(f"this is {shown(kind)}, not media; give the address of the file itself")
        announced = response.headers.get("Content-Length", "")
        if not announced.isdecimal():
            return None
        self._check_size(int(announced))
        return int(announced)

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            limit = f"{self.max_bytes / 2**20:g} MiB"
            raise self._error(f"larger than the limit of {limit}; scale it down, or download it and give the path")

    def _check_content(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(1024)
        if not start:
            raise self._error("the answer is empty; check the address")
        if HTML_START.match(start):
            raise self._error("this is a web page (HTML), not media; give the address of the file itself")

    def _error(self, message: str) -> UserError:
        return UserError(self.flag, f"{shown(self.url)}: {message}")


class _Refused(Exception):
    """An address that is not fetched from."""


class _BadProxy(Exception):
    """A proxy that cannot be used."""


class _Transport(httpx.AsyncBaseTransport):
    """Carries the requests of one download, redirects too: each to an address that was looked at, or to a proxy."""

    def __init__(self, timeout: float, allow_private: bool) -> None:
        self.timeout = timeout
        self.allow_private = allow_private
        self.carriers: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        if request.url.scheme not in ("http", "https", ""):  # httpx drops the scheme of an address without a host
            raise httpx.UnsupportedProtocol("another scheme")
        if not host or not 0 <= (request.url.port or 0) <= MAX_PORT:
            raise httpx.InvalidURL("no host, or no port")
        variable, proxy = _proxy_of(request.url.scheme, host)
        if proxy is not None:
            _check_unresolved(host, self.allow_private)
            return await self.through_proxy(request, variable, proxy)
        self.carriers.append(httpx.AsyncHTTPTransport())
        failure: Exception | None = None
        for address in await _addresses(host, self.timeout, self.allow_private):
            there = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self.carriers[-1].handle_async_request(there)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def through_proxy(self, request: httpx.Request, variable: str, proxy: str) -> httpx.Response:
        try:
            self.carriers.append(httpx.AsyncHTTPTransport(proxy=proxy))
            return await self.carriers[-1].handle_async_request(request)
        except ImportError as error:
            raise _BadProxy(f"the proxy of {variable} needs the package socksio; pip install socksio") from error
        except (ValueError, httpx.InvalidURL) as error:
            raise _BadProxy(f"{variable} is no proxy's address; give http://HOST:PORT or socks5://HOST:PORT") from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise _BadProxy(f"the proxy of {variable} fails ({shown(error)}); correct or unset it") from error

    async def aclose(self) -> None:
        for carrier in self.carriers:
            await carrier.aclose()


def _proxy_of(scheme: str, host: str) -> tuple[str, str | None]:
    """The environment's proxy for a host, after the name of its variable; None for none."""
    proxies = getproxies()
    name = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(name)
    if not proxy or proxy_bypass(host):
        return "", None
    return f"{name}_proxy", proxy if "://" in proxy else f"http://{proxy}"


async def _addresses(host: str, timeout: float, allow_private: bool) -> list[str]:
    """The addresses of a host, all of which may be fetched from.

    The system's resolver knows no timeout of ours and cannot be cancelled: it is left behind in a thread.
    """
    found: Future[list[str]] = Future()
    Thread(target=_look_up, args=(host, found), daemon=True).start()
    try:
        addresses = await asyncio.wait_for(asyncio.wrap_future(found), timeout)
    except TimeoutError as error:
        raise httpx.ConnectTimeout(f"{host} is not found") from error
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"{host}: {error}") from error
    for address in addresses:
        if not (allow_private or is_public(address)):
            raise _Refused(_private(host, address))
    return addresses


def _look_up(host: str, found: Future[list[str]]) -> None:
    with suppress(InvalidStateError):  # nobody waits any more
        try:
            entries: list[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            found.set_result(list(dict.fromkeys(entry[4][0] for entry in entries)))
        except Exception as error:
            found.set_exception(error)


def _check_unresolved(host: str, allow_private: bool) -> None:
    """Raise _Refused for what is private by its name alone: the rest is resolved by a proxy."""
    if allow_private:
        return
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        raise _Refused(_private(host, host))
    with suppress(OSError):  # a name
        for entry in socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST):
            if not is_public(str(entry[4][0])):
                raise _Refused(_private(host, str(entry[4][0])))


def _private(host: str, address: str) -> str:
    leads = "is" if host == address else f"leads to {shown(address)},"
    return f"{shown(host)} {leads} an address of this machine, of a private or a reserved network"


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet; of those that carry an IPv4 address, whether that is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ipaddress.IPv4Address(int(ip) % 2**32) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour or ip
    if isinstance(ip, ipaddress.IPv6Address) and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast


def _suffix(response: httpx.Response) -> str:
    """A plausible file suffix for a download: its address's, else that of its kind, else none."""
    suffix = Path(unquote(response.url.path)).suffix
    if SUFFIX.fullmatch(suffix):
        return suffix
    return mimetypes.guess_extension(response.headers.get("Content-Type", "").split(";")[0].strip()) or ""
