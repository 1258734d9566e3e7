"""Downloading from good and bad URLs; the web is a server thread on this machine."""

from __future__ import annotations

import gzip
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from skyreels_v3.errors import UserError
from skyreels_v3.media import download
from skyreels_v3.media.download import is_public
from skyreels_v3.media.files import local_file

FLAG = "--ref_imgs"


def png(color: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
HTML = b"\n<!-- hi -->\n<!DOCTYPE html><html><body>sign in</body></html>"
SEEN: list[Message] = []  # headers of the requests
RELEASE = threading.Event()  # lets blocked handlers finish


class Handler(BaseHTTPRequestHandler):
    """Answers according to the first folder of the path."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, kind: str = "image/png", status: int = 200, length: int | None = -1) -> None:
        self.send_response(status)
        if self.path.startswith("/packed/"):
            self.send_header("Content-Encoding", "gzip, gzip")
        if kind:
            self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def drip(self, head: bytes, piece: bytes) -> None:
        """Send an endless answer whose pieces come faster than any timeout between bytes."""
        self.wfile.write(head)
        while not RELEASE.wait(0.05):
            self.wfile.write(piece)

    def do_GET(self) -> None:
        SEEN.append(self.headers)
        case = urlsplit(self.path).path.split("/")[1]
        hop = int(case[4:]) if case.startswith("hops") else 0
        try:
            {
                "red": lambda: self.answer(RED),
                "blue": lambda: self.answer(BLUE),
                "bare": lambda: self.answer(RED, kind=""),
                "html": lambda: self.answer(HTML, kind="text/html; charset=utf-8"),
                "disguised": lambda: self.answer(HTML),
                "packed": lambda: self.answer(gzip.compress(gzip.compress(bytes(10**7)))),
                "empty": lambda: self.answer(b""),
                "big": lambda: self.answer(b"x", length=10**6),
                "endless": lambda: self.answer(b"x" * 200_000, length=None),
                "short": lambda: self.answer(RED[:40], length=len(RED)),
                "silent": lambda: RELEASE.wait(10),
                "stalls": lambda: (self.answer(RED[:40], length=len(RED)), self.wfile.flush(), RELEASE.wait(10)),
                "trickle": lambda: self.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
                "headers": lambda: self.drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
                "slowhops": lambda: (time.sleep(0.2), self.redirect(f"/slowhops/{len(SEEN)}")),
                "inside": lambda: self.redirect(f"http://127.0.0.2:{self.server.server_port}/red/a.png"),
                "tofile": lambda: self.redirect("file:///etc/hostname"),
                "toftp": lambda: self.redirect("ftp://127.0.0.1/a.png"),
                "loop": lambda: self.redirect("/loop/a.png"),
                f"hops{hop}": lambda: self.redirect(f"/hops{hop - 1}/a.png" if hop > 1 else "/red/final.webp"),
            }.get(case, lambda: self.answer(b"not here", kind="text/plain", status=404))()
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    yield f"http://127.0.0.1:{web.server_port}"
    RELEASE.set()
    web.shutdown()
    web.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def fetch(source: str, folder: Path, **options: int) -> Path:
    """Download from this machine."""
    return local_file(source, FLAG, folder, **({"timeout": 5, "allow_private": True} | options))


def check_refused(source: str, folder: Path, *words: str, **options: int) -> None:
    with pytest.raises(UserError) as caught:
        fetch(source, folder, **options)
    message = str(caught.value)
    assert message.startswith(FLAG)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not folder.exists() or not os.listdir(folder)


def test_download(tmp_path: Path, server: str) -> None:
    folder = tmp_path / "run" / "downloads"
    red = fetch(f"{server}/red/a.png?size=8&x=.html", folder)
    blue = fetch(f"{server}/blue/a.png", folder)
    again = fetch(f"{server}/red/a.png".replace("http", "HTTP"), folder)
    assert [path.read_bytes() for path in (red, blue, again)] == [RED, BLUE, RED]
    assert len({red, blue, again}) == 3
    assert {path.parent for path in (red, blue, again)} == {folder}
    assert {path.suffix for path in (red, blue, again)} == {".png"}


def test_suffix(tmp_path: Path, server: str) -> None:
    assert fetch(f"{server}/red/no-suffix", tmp_path).suffix == ".png"  # from the content type
    assert fetch(f"{server}/red/a.php-script", tmp_path).suffix == ".png"
    assert fetch(f"{server}/red/a.W%65bP", tmp_path).suffix == ".WebP"
    assert fetch(f"{server}/bare/x", tmp_path).suffix == ""


def test_redirects(tmp_path: Path, server: str) -> None:
    path = fetch(f"{server}/hops5/a.png", tmp_path / "ok")
    assert path.read_bytes() == RED
    assert path.suffix == ".webp"
    downloads = tmp_path / "downloads"
    check_refused(f"{server}/hops6/a.png", downloads, "redirects")
    check_refused(f"{server}/loop/a.png", downloads, "redirects")
    check_refused(f"{server}/tofile/a.png", downloads, "not http or https")
    check_refused(f"{server}/toftp/a.png", downloads, "not http or https")


def test_not_media(tmp_path: Path, server: str) -> None:
    downloads = tmp_path / "downloads"
    check_refused(f"{server}/missing/a.png", downloads, "404", "check the address")
    check_refused(f"{server}/html/a.png", downloads, "text/html", "file itself")
    check_refused(f"{server}/disguised/a.png", downloads, "HTML", "file itself")
    check_refused(f"{server}/empty/a.png", downloads, "empty")
    check_refused(f"{server}/short/a.png", downloads, "cannot be downloaded")


def test_oversize(tmp_path: Path, server: str) -> None:
    downloads = tmp_path / "downloads"
    check_refused(f"{server}/big/a.png", downloads, "larger than the limit of", max_bytes=2**19)  # by Content-Length
    check_refused(f"{server}/endless/a.png", downloads, "0.125 MiB", max_bytes=2**17)  # must be counted
    assert fetch(f"{server}/endless/a.png", tmp_path / "ok", max_bytes=200_000).stat().st_size == 200_000


def test_compressed(tmp_path: Path, server: str) -> None:
    """A few hundred compressed bytes could expand to gigabytes before they are counted."""
    check_refused(f"{server}/packed/a.png", tmp_path / "no", "the server sends it compressed", max_bytes=2**19)
    assert SEEN[-1]["Accept-Encoding"] == "identity"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["silent", "stalls"])
def test_server_that_does_not_answer(tmp_path: Path, server: str, case: str) -> None:
    begin = time.monotonic()
    check_refused(f"{server}/{case}/a.png", tmp_path / "downloads", "0.5 s", "--url_timeout", timeout=0.5)
    assert 0.4 < time.monotonic() - begin < 4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["trickle", "headers", "slowhops"])
def test_server_that_takes_its_time(tmp_path: Path, server: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_SECONDS", 0.5)  # shorter than the timeout between two bytes
    begin = time.monotonic()
    check_refused(f"{server}/{case}/a.png", tmp_path / "downloads", "more than 0.5 s", timeout=3)
    assert time.monotonic() - begin < 2.5


def test_no_server(tmp_path: Path) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.server_close()  # nothing listens on its port any more
    downloads = tmp_path / "downloads"
    check_refused(f"http://127.0.0.1:{web.server_port}/a.png", downloads, "cannot be downloaded", "network")
    ports = [f"http://127.0.0.1:{port}/a.png" for port in (-1, 99999)]
    for malformed in ("http://", "http:///a.png", *ports):
        check_refused(malformed, downloads, malformed, "not a valid address")


def test_unknown_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(download.socket, "getaddrinfo", unknown)
    check_refused("http://no-such-host.invalid/a.png", tmp_path / "downloads", "Name or service not known", "network")


def test_slow_name_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def look_up(*_: object, flags: int = 0, **__: object) -> None:
        if not flags:  # resolving a name, not parsing an address
            done.wait(10)
        raise OSError

    monkeypatch.setattr(download.socket, "getaddrinfo", look_up)
    begin = time.monotonic()
    check_refused("http://slow.invalid/a.png", tmp_path / "downloads", "slow.invalid", "--url_timeout", timeout=0.3)
    assert time.monotonic() - begin < 4
    done.set()


def test_public_addresses() -> None:
    public = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
    assert [address for address in public if not is_public(address)] == []
    private = [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "::127.0.0.1"),
    ]
    assert [address for address in private if is_public(address)] == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_private_hosts(tmp_path: Path, server: str, host: str) -> None:
    url = f"{server}/red/a.png".replace("127.0.0.1", host)
    check_refused(url, tmp_path, "a private or a reserved network", "--allow_private_urls", allow_private=False)


def test_redirect_inside(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    words = ("127.0.0.2", "--allow_private_urls")
    check_refused(f"{server}/inside/a.png", tmp_path / "downloads", *words, allow_private=False)
    assert fetch(f"{server}/red/a.png", tmp_path / "ok", allow_private=False).read_bytes() == RED


def test_name_that_changes_its_meaning(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when checked but private when connected to: nothing is sent."""
    answers = iter(["127.0.0.2", "127.0.0.1"])
    resolve = socket.getaddrinfo

    def changing(host: str | bytes, *arguments: object, flags: int = 0, **options: object) -> object:
        asked = host in ("changing.example", b"changing.example") and not flags
        return resolve(next(answers) if asked else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.2")
    seen = len(SEEN)
    url = f"{server}/red/a.png".replace("127.0.0.1", "changing.example")
    check_refused(url, tmp_path, "changing.example leads to 127.0.0.1", "--allow_private_urls", allow_private=False)
    assert len(SEEN) == seen


def test_password_of_a_url(tmp_path: Path, server: str) -> None:
    fetch(f"{server}/red/a.png".replace("//", "//me:secret@"), tmp_path)
    assert SEEN[-1]["Authorization"] == "Basic bWU6c2VjcmV0"


def test_proxy(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server)
    assert fetch("http://far.example/red/a.png", tmp_path / "far", allow_private=False).read_bytes() == RED
    assert SEEN[-1]["Host"] == "far.example"
    for host in ("127.1", "localhost", "169.254.169.254", "[::1]"):
        check_refused(f"http://{host}/red/a.png", tmp_path / "no", "--allow_private_urls", allow_private=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # same host, different port
    check_refused(f"{server}/red/a.png", tmp_path / "no", "--allow_private_urls", allow_private=False)


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [
        ("http://me:secret@127.0.0.1:9", "cannot be downloaded (All connection attempts failed); check address"),
        ("quic://me:secret@h:1", "http_proxy, https_proxy or all_proxy cannot be used (Unknown scheme for proxy"),
        ("http://me:secret@h:bad", "http_proxy, https_proxy or all_proxy cannot be used (Port could not be cast"),
    ],
)
def test_bad_proxy(tmp_path: Path, proxy: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=f"--ref_imgs: http://far.example/a.png: {re.escape(reason)}") as caught:
        fetch("http://far.example/a.png", tmp_path, allow_private=False)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing?a=secret b=secret", "missing?X-Amz-Signature=secret#secret"])
def test_secrets_stay_out(tmp_path: Path, server: str, path: str) -> None:
    for url in (f"{server}/{path}", f"http://me:pa:ss@127.0.0.1:9/{path}", f"http://me:pa/ss@127.0.0.1:9/{path}"):
        with pytest.raises(UserError) as caught:
            fetch(url, tmp_path)
        assert "secret" not in str(caught.value)
        assert "ss@" not in str(caught.value)
