"""Paths and addresses, good and bad; the web is a server thread on this machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from skyreels_v3.errors import UserError
from skyreels_v3.media import sources
from skyreels_v3.media.sources import localise

FLAG = "--ref_imgs"


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
HTML = b"\n<!-- hi -->\n<!DOCTYPE html><html><body>sign in</body></html>"
RELEASE = threading.Event()  # lets waiting handlers end


class Handler(BaseHTTPRequestHandler):
    """Answers by the path's first folder."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, kind: str = "image/png", status: int = 200, length: int | None = -1) -> None:
        self.send_response(status)
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

    def trickle(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not RELEASE.wait(0.05):
            self.wfile.write(b"x")

    def do_GET(self) -> None:
        case = urlsplit(self.path).path.split("/")[1]
        hop = int(case[4:]) if case.startswith("hops") else 0
        try:
            {
                "red": lambda: self.answer(RED),
                "blue": lambda: self.answer(BLUE),
                "bare": lambda: self.answer(RED, kind=""),
                "html": lambda: self.answer(HTML, kind="text/html; charset=utf-8"),
                "disguised": lambda: self.answer(HTML),
                "empty": lambda: self.answer(b""),
                "big": lambda: self.answer(b"x", length=10**6),
                "endless": lambda: self.answer(b"x" * 200_000, length=None),
                "short": lambda: self.answer(RED[:40], length=len(RED)),
                "silent": lambda: RELEASE.wait(10),
                "stalls": lambda: (self.answer(RED[:40], length=len(RED)), self.wfile.flush(), RELEASE.wait(10)),
                "trickle": self.trickle,
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


def check_refused(source: str, folder: Path, *words: str, timeout: float = 5, **options: int) -> None:
    with pytest.raises(UserError) as caught:
        localise(source, FLAG, folder, timeout, **options)
    message = str(caught.value)
    assert message.startswith(FLAG)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not folder.exists() or not os.listdir(folder)


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd: name, with = signs.png"
    path.write_bytes(RED)
    assert localise(str(path), FLAG, tmp_path / "downloads", 1) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert localise("~/odd: name, with = signs.png", FLAG, tmp_path / "downloads", 1) == path
    assert not (tmp_path / "downloads").exists()


def test_bad_path(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    (tmp_path / "empty.png").touch()
    check_refused(str(tmp_path / "missing.png"), downloads, "missing.png", "does not exist")
    check_refused(str(tmp_path), downloads, "is a folder")
    check_refused(str(tmp_path / "empty.png"), downloads, "is empty")
    check_refused("", downloads, "empty path")
    check_refused("x" * 100_000, downloads, "xxx...xxx")
    check_refused("a\nb.png", downloads, "a\\nb.png")


@pytest.mark.parametrize(
    "source", ["ftp://a.example/b.png", "file:///etc/hostname", "s3://a/b", "data:image/png;base64,AA"]
)
def test_other_schemes(tmp_path: Path, source: str) -> None:
    check_refused(source, tmp_path / "downloads", "only http and https", source)


def test_download(tmp_path: Path, server: str) -> None:
    folder = tmp_path / "run" / "downloads"
    red = localise(f"{server}/red/a.png?size=8&x=.html", FLAG, folder, 5)
    blue = localise(f"{server}/blue/a.png", FLAG, folder, 5)
    again = localise(f"{server}/red/a.png".replace("http", "HTTP"), FLAG, folder, 5)
    assert [path.read_bytes() for path in (red, blue, again)] == [RED, BLUE, RED]
    assert len({red, blue, again}) == 3
    assert {path.parent for path in (red, blue, again)} == {folder}
    assert {path.suffix for path in (red, blue, again)} == {".png"}


def test_suffix(tmp_path: Path, server: str) -> None:
    assert localise(f"{server}/red/no-suffix", FLAG, tmp_path, 5).suffix == ".png"  # from the content type
    assert localise(f"{server}/red/a.php-script", FLAG, tmp_path, 5).suffix == ".png"
    assert localise(f"{server}/red/a.W%65bP", FLAG, tmp_path, 5).suffix == ".WebP"
    assert localise(f"{server}/bare/x", FLAG, tmp_path, 5).suffix == ""


def test_redirects(tmp_path: Path, server: str) -> None:
    path = localise(f"{server}/hops5/a.png", FLAG, tmp_path / "ok", 5)
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
    check_refused(f"{server}/big/a.png", downloads, "larger than the limit of", max_bytes=2**19)  # says so itself
    check_refused(f"{server}/endless/a.png", downloads, "0.125 MiB", max_bytes=2**17)  # must be counted
    assert localise(f"{server}/endless/a.png", FLAG, tmp_path / "ok", 5, max_bytes=200_000).stat().st_size == 200_000


@pytest.mark.parametrize("case", ["silent", "stalls"])
def test_server_that_does_not_answer(tmp_path: Path, server: str, case: str) -> None:
    begin = time.monotonic()
    check_refused(f"{server}/{case}/a.png", tmp_path / "downloads", "0.5 s", "--url_timeout", timeout=0.5)
    assert 0.4 < time.monotonic() - begin < 4


def test_server_that_trickles(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SECONDS", 0.5)
    begin = time.monotonic()
    check_refused(f"{server}/trickle/a.png", tmp_path / "downloads", "more than 0.5 s")
    assert time.monotonic() - begin < 4


def test_no_server(tmp_path: Path) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.server_close()  # nobody listens on its port any more
    downloads = tmp_path / "downloads"
    check_refused(f"http://127.0.0.1:{web.server_port}/a.png", downloads, "cannot be downloaded", "network")
    for malformed in ("http://", "http:///a.png", "http://[/a.png", "http://127.0.0.1:99999/a.png"):
        check_refused(malformed, downloads, malformed)


def test_unknown_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources.socket, "getaddrinfo", unknown)
    check_refused("http://no-such-host.invalid/a.png", tmp_path / "downloads", "Name or service not known", "network")


def test_slow_name_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(sources.socket, "getaddrinfo", lambda *_, **__: done.wait(10))
    begin = time.monotonic()
    check_refused("http://slow.invalid/a.png", tmp_path / "downloads", "slow.invalid", "--url_timeout", timeout=0.3)
    assert time.monotonic() - begin < 4
    done.set()
