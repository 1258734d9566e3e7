"""Where inputs come from: a path is checked, an http or https address is downloaded into a folder of the run.

Downloads distrust the other side: bounded in size and time, redirects only to http and https, no web pages in place of
media. The folder belongs to one run and every download in it gets a new name: nothing is mistaken for something else.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import os
import re
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 64 << 20
MAX_VIDEO_BYTES = 1 << 30
MAX_REDIRECTS = 5
MAX_SECONDS = 300.0  # for one download, however steadily it trickles
BAR_BYTES = 4 << 20  # larger downloads show a progress bar
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file|mailto):", re.IGNORECASE)
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")
HTML_START = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
NO_MEDIA_TYPE = re.compile(r"text/|application/(json|xhtml|xml)")


def localise(
    source: str,
    flag: str,
    folder: Path,
    timeout: float,
    max_bytes: int = MAX_VIDEO_BYTES,
    progress: bool = True,
) -> Path:
    """A readable, non-empty local file for a path or an http(s) address.

    Args:
        folder: where downloads go; the caller owns and removes it. Not touched for a path.
        timeout: seconds to wait for the connection and for each answer of the server (`--url_timeout`).
        max_bytes: largest download.
        progress: show a bar on stderr for large downloads.

    Raises:
        UserError: no such file, another scheme, or anything that goes wrong with a download.
    """
    scheme = SCHEME.match(source)
    if scheme is None:
        if not source.strip():
            raise UserError(flag, "an empty path; give a file or an http(s) address")
        path = Path(os.path.expanduser(source))
        check_readable(path, flag)
        return path
    if (scheme[1] or scheme[2]).lower() not in ("http", "https"):
        raise UserError(
            flag, f"{shown(source)}: only http and https addresses are fetched; download it and give the path"
        )
    there = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.path"
    if not there.is_file():  # not fetched before, by this process or the one that leads it
        there.write_text(_Download(source, flag, timeout, max_bytes, progress).into(folder).name)
    return folder / there.read_text()


def is_url(source: str) -> bool:
    """Whether a source is an address, not a path."""
    return SCHEME.match(source) is not None


class _Download:
    """One download and its limits. Every failure is a UserError that names the address."""

    def __init__(self, url: str, flag: str, timeout: float, max_bytes: int, progress: bool) -> None:
        self.url = url
        self.flag = flag
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.progress = progress
        self.deadline = time.monotonic() + MAX_SECONDS

    def into(self, folder: Path) -> Path:
        """Download into a new file of `folder`, which is made if need be; nothing is left there on failure."""
        import httpx  # only addresses pay for it

        self._check_name_lookup()
        try:
            with (
                httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=self.timeout) as client,
                client.stream("GET", self.url, headers={"User-Agent": "skyreels-v3", "Accept": "*/*"}) as response,
            ):
                return self._save(response, folder)
        except httpx.TimeoutException as error:
            raise self._error(f"no answer within {self.timeout:g} s; try again or raise --url_timeout") from error
        except httpx.UnsupportedProtocol as error:
            raise self._error(
                "it leads to an address that is not http or https; download it and give the path"
            ) from error
        except httpx.TooManyRedirects as error:
            raise self._error(f"more than {MAX_REDIRECTS} redirects; give the final address") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise self._error(f"cannot be downloaded ({shown(error)}); check address and network") from error

    def _save(self, response: httpx.Response, folder: Path) -> Path:
        length = self._check_headers(response)
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="download-", suffix=_suffix(response), dir=folder)
        path = Path(name)
        try:
            with open(handle, "wb") as file:
                self._copy(response, file, length)
            self._check_content(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        logger.debug("downloaded %s (%d bytes)", self.url, path.stat().st_size)
        return path

    def _copy(self, response: httpx.Response, file: IO[bytes], length: int | None) -> None:
        from tqdm import tqdm

        hidden = not self.progress or (length is not None and length < BAR_BYTES)
        received = 0
        # a download of unknown length shows its bar when it takes more than a second
        with tqdm(
            desc="download", total=length, unit="B", unit_scale=True, disable=hidden, delay=1.0 * (not length)
        ) as bar:
            for chunk in response.iter_bytes():
                received += len(chunk)
                self._check_size(received)
                if time.monotonic() > self.deadline:
                    raise self._error(f"took more than {MAX_SECONDS:g} s; download it and give the path")
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

    def _check_name_lookup(self) -> None:
        """Give up when the host's name is not looked up in time: the system's resolver knows no timeout of ours."""
        try:
            host = urlsplit(self.url).hostname
        except ValueError as error:
            raise self._error("not a valid address; check it") from error
        if not host or getproxies():  # a proxy looks names up itself
            return
        lookup = threading.Thread(target=_look_up, args=(host,), daemon=True)
        lookup.start()
        lookup.join(self.timeout)
        if lookup.is_alive():
            raise self._error(f"{shown(host)} is not found within {self.timeout:g} s; check it or raise --url_timeout")

    def _error(self, message: str) -> UserError:
        return UserError(self.flag, f"{shown(self.url)}: {message}")


def _look_up(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        pass  # connecting fails with the same error, and says so


def _suffix(response: httpx.Response) -> str:
    """A plausible file suffix for a download: its address's, else that of its kind, else none."""
    suffix = Path(unquote(response.url.path)).suffix
    if SUFFIX.fullmatch(suffix):
        return suffix
    return mimetypes.guess_extension(response.headers.get("Content-Type", "").split(";")[0].strip()) or ""
