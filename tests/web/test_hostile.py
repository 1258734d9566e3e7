"""Malicious requests: each gets an error in OpenAI's form that reveals nothing, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from skyreels_v3.web.queue import State
from tests.conftest import ASSETS
from tests.web.conftest import HINT, SMALL, Served, error_of, png

ID = "video_" + "0" * 32
SCRIPT = "<script>alert(1)</script>"
POST = "/v1/videos"


def case(method: str, path: str, status: int, words: str = "", name: str = "", **more: Any) -> Any:
    """A request, the expected status, and words in the error."""
    return pytest.param(method, path, status, words, more, id=name or f"{method} {path[:40]} {str(more)[:40]}")


def job(status: int, words: str, name: str = "", **fields: Any) -> Any:
    """A request for a new video in JSON."""
    return case("POST", POST, status, words, name or str(fields)[:60], json={"prompt": "a", **fields})


def upload(status: int, words: str, field: str, name: str, content: bytes, **more: Any) -> Any:
    """A request for a new video with an uploaded file."""
    files = {field: (name, content), "prompt": (None, "a")}
    return case("POST", POST, status, words, f"upload {field} {name[:30]!r} {content[:12]!r}", files=files, **more)


def raw(status: int, words: str, content: bytes, kind: str = "application/json") -> Any:
    """A request with an arbitrary body."""
    label = f"raw {kind[:30]} {content[:20]!r} {len(content)}"
    return case("POST", POST, status, words, label, content=content, headers={"Content-Type": kind})


FORM = "multipart/form-data; boundary=x"
FIELD = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
NO_FILE = "send the file itself"
NOT_FOUND = "no video"
PATHS = [
    *(case("GET", f"/v1/videos/{id}", 404, NOT_FOUND) for id in (
        ID, ID.upper(), "video_1", "x" * 3000, "%00", "' OR 1=1",
    )),
    *(case("GET", f"/v1/videos/{ID}/{what}", 404, NOT_FOUND) for what in ("content", "events", "preview")),
    *(case("POST", f"/v1/videos/{ID}/{what}", 404, NOT_FOUND, json={"prompt": "a"}) for what in ("cancel", "remix")),
    case("DELETE", f"/v1/videos/{ID}", 404, NOT_FOUND),
    case("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
    case("GET", "/v1/videos/%2e%2e/%2e%2e/etc/passwd", 404),
    case("GET", "/v1/videos//etc/passwd/content", 404),
    case("GET", f"/v1/videos/{ID}/content?variant=../../queue.sqlite", 400, "variant"),
    case("GET", f"/v1/videos?after={ID}", 404, NOT_FOUND),
    *(case("GET", f"/v1/videos?limit={limit}", 400, "limit") for limit in ("-1", "1e3", "9" * 5000, "%00", "NaN")),
    case("PUT", "/v1/videos", 405),
    case("TRACE", "/v1/videos", 405),
    case("GET", f"/{'a' * 5000}", 404),
    case("GET", f"/v1/videos/{SCRIPT}", 404),
]  # fmt: skip
FIELDS = [
    *(job(400, NO_FILE, image=path) for path in ("/etc/passwd", "../../queue.sqlite", "file:///etc/passwd", "~/a.png")),
    *(job(400, NO_FILE, image=value) for value in ("", " ", 5, True, [], ["a"], {"path": "/etc/passwd"}, "a\0b")),
    job(400, NO_FILE, task_type="reference_to_video", ref_imgs="/etc/passwd,/etc/hosts"),
    job(400, NO_FILE, task_type="talking_avatar", keyframes=["/etc/passwd@1"]),
    *(job(400, "not a data URL", image=value) for value in (
        "data:,a", "data:image/png;base64,%%%", "data:text/html,a",
    )),
    job(415, "not a picture", image="data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="),
    *(job(400, "set by the server", **{name: value}) for name, value in (
        ("output", "/tmp/a.mp4"), ("outdir", "../x"), ("save_latents", "a.safetensors"), ("save_quantized", "/tmp/q"),
        ("base_model_id", "/etc"), ("allow_private_urls", True), ("host", "0.0.0.0"), ("api_key", "x"),
        ("config", "/etc"), ("device", "cpu"), ("model_source", "modelscope"), ("high_cpu_memory", True),
        ("url_timeout", 600), ("checkpoint_every", 0.001), ("use_usp", True), ("keep_days", 1),
        ("jobs", "/etc/passwd"), ("gpu_num", 64), ("video_num", 10000), ("serve", True), ("dry_run", True),
    )),
    *(job(400, "is not served", model=value) for value in (
        "/etc", "../..", "evil/model", "", 5, ["tiny"], SCRIPT, "a\r\nb",
    )),
    *(job(400, "give OWNER/NAME", lora=value) for value in (
        "/etc/passwd", "../a", ["a/b", "/x"], "~/a", "https://a.b/c",
    )),
    *(job(400, "", prompt=value) for value in (None, [], {}, "x" * 20_000, "\ud800", True)),
    *(job(400, "", seed=value) for value in (-2, 2**64, "x", 1.5, [1], {}, True, "9" * 5000)),
    *(job(400, "", num_inference_steps=value) for value in ("nan", "1e9", "-1", None or "inf")),
    job(400, "unknown", **{"__class__": "x"}),
    job(400, "unknown", **{f"{SCRIPT}\r\nX-Evil: 1": "x"}),
    job(400, "", extra_body={"extra_body": {"output": "/tmp/a"}}),
    job(400, "", extra_body='{"a":' * 3000),
    job(400, "", size="1x99999"),
    job(400, "", size={"width": 1}),
    job(404, NOT_FOUND, video={"id": "../../x"}),
]  # fmt: skip
BODIES = [
    raw(400, "not valid", b""),
    raw(400, "not valid", b"[]"),
    raw(400, "not valid", b"\xff\xfe"),
    raw(400, "not valid", b"[" * 100_000),
    raw(400, "given twice", b'{"prompt": "a", "prompt": "b"}'),
    raw(400, "not valid", b'{"seed": ' + b"9" * 10_000 + b"}"),
    raw(413, "larger than", b'"' + b"a" * (1 << 20)),
    *(raw(415, "Content-Type", b"a=b", kind) for kind in (
        "text/plain", "application/x-www-form-urlencoded", "", "a" * 999,
    )),
    raw(400, "no boundary", b"--x--", "multipart/form-data"),
    raw(400, "not valid", b"junk", FORM),
    raw(400, "not valid", FIELD % (b"prompt", b"a"), FORM),  # unterminated
    raw(400, "no name", FIELD.replace(b'; name="%b"', b"") % b"a" + b"--x--\r\n", FORM),
    raw(400, "two ways", FIELD % (b"a[b]", b"a") + FIELD % (b"a", b"a") + b"--x--\r\n", FORM),
    raw(400, "unknown", FIELD % (b"a[b][c]", b"a") + b"--x--\r\n", FORM),
    raw(413, "fields and files", b"".join(FIELD % (b"f%d" % n, b"a") for n in range(200)) + b"--x--\r\n", FORM),
    raw(413, "larger than", FIELD % (b"prompt", b"a" * 100_000) + b"--x--\r\n", FORM),
    raw(400, "not valid", b"--x\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n", FORM),
    raw(400, "not valid", b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n\r\n", FORM),
]  # fmt: skip
PLAYLIST = b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"
UPLOADS = [
    *(upload(415, "image", "image", "a.png", content) for content in (b"", b"MZ\x90", PLAYLIST, b"<svg/>", png()[:60])),
    *(upload(415, "input_video", "input_video", "a.mp4", content) for content in (PLAYLIST, CONCAT, png(), b"\0" * 64)),
    upload(415, "input_audio", "input_audio", "a.wav", b"RIFF\xff\xff\xff\xffWAVEfmt "),
    *(upload(415, "not a picture", "image", name, b"x") for name in (
        "../../../etc/passwd", "..\\..\\a.png", "a.png\r\nX-Evil: 1", 'a"; filename="b', "/etc/passwd", SCRIPT,
        "\0", "x" * 3000,
    )),
    upload(413, "larger than", "image", "a.png", b"\x89PNG" + b"\0" * (3 << 20)),
    upload(400, "unknown", "../../x", "a.png", png()),
]  # fmt: skip
URLS = [
    *(job(400, "", f"url {url[:40]}", input_reference={"image_url": url}) for url in (
        "http://127.0.0.1/a", "http://localhost:1/a", "http://[::1]/a", "http://0.0.0.0/a",
        "http://169.254.169.254/meta",
        "http://10.0.0.1/a", "http://192.168.1.1/a", "http://[fe80::1]/a", "http://[::ffff:127.0.0.1]/a",
        "http://[64:ff9b::7f00:1]/a", "http://2130706433/a", "http://0x7f.1/a", "http://127.1/a",
        "http://a@127.0.0.1/a",
        "http://localhost./a", "http://a.localhost/a", "ftp://example.org/a", "gopher://127.0.0.1/a",
        "http://", "https://\0/",
        "http://[/a", "http://127.0.0.1:99999/a", "dict://127.0.0.1:11211/",
        "http://user:secret@127.0.0.1/a?token=secret",
    )),
]  # fmt: skip
HEADERS = [
    *(case("GET", "/v1/videos", 403, "Host", headers={"Host": host}) for host in (
        "evil.example", "127.0.0.1.evil.example", "evil.example:8000", "127.0.0.1@evil.example", "",
        "10.0.0.1", "[::1", "a b", "localhost:port",
    )),
    *(case("POST", POST, 403, "Origin", headers={"Origin": origin}, json={"prompt": "a"}) for origin in (
        "http://evil.example", "null", "http://127.0.0.1:9000", "https://127.0.0.1.evil.example", "file://", "http://[",
    )),
    case("GET", "/v1/videos", 403, "pages of other sites", headers={"Sec-Fetch-Site": "cross-site"}),
    case("POST", f"/v1/videos/{ID}/cancel", 403, "", headers={"Host": "evil.example"}),
]  # fmt: skip


def test_what_a_page_sends(serve, monkeypatch):
    """By default Gradio would fetch files from any address with no size limit; and request bodies may never end."""
    pytest.importorskip("gradio", reason=HINT)
    from starlette.requests import Request

    from skyreels_v3.web import page_access
    from skyreels_v3.web.errors import ApiError

    served = serve(page=True, defaults={"model_id": "tiny", "device": "cpu"}, keys=("first",))
    cookies = {"Cookie": f"{page_access.COOKIE}=first"}
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/queue/join/"):
        for address in ("https://1.1.1.1/", " HTTP://name.example/a", "ftp://name.example/a", "file:///etc/passwd"):
            data = [{"list": [{"path": address, "meta": {"_type": "gradio.FileData"}}]}]
            answer = served.client.post(path, json={"fn_index": 0, "data": data}, headers=cookies)
            assert "not fetched" in error_of(answer, 403)["message"]
        assert error_of(served.client.post(path, content=b"[" * 100_000, headers=cookies), 400)
    monkeypatch.setattr(page_access, "MAX_EVENT_BYTES", 1000)
    assert error_of(served.client.post("/gradio_api/queue/join", json={"a": "a" * 1000}, headers=cookies), 413)
    monkeypatch.setattr(page_access, "BODY_SECONDS", 0.1)

    async def stalled() -> Any:
        await asyncio.sleep(60)

    with pytest.raises(ApiError) as caught:
        asyncio.run(page_access.read_all(Request({"type": "http", "method": "POST"}, stalled), 100))
    assert caught.value.status == 408
    signed_out = served.client.get(page_access.SIGN_OUT, headers=cookies, follow_redirects=False)
    assert signed_out.status_code == 303 and "Max-Age=0" in signed_out.headers["set-cookie"]


def test_names_of_a_proxy(serve):
    served = serve(defaults={"model_id": "tiny"}, allowed_hosts=("Video.example",))
    for host, status in (("video.example:443", 200), ("www.video.example", 403), ("example", 403)):
        assert served.client.get("/health", headers={"Host": host}).status_code == status


@pytest.fixture
def small(serve) -> Served:
    """A server with low limits."""
    pytest.importorskip("fastapi", reason=HINT)
    from skyreels_v3.web.settings import Limits

    limits = Limits(file_bytes=2 << 20, body_bytes=4 << 20, json_bytes=1 << 20, stall_seconds=0.5)
    return serve(defaults={"model_id": "tiny", "device": "cpu"}, limits=limits)


@pytest.mark.parametrize(
    ("method", "path", "status", "words", "more"), [*PATHS, *FIELDS, *BODIES, *UPLOADS, *URLS, *HEADERS]
)
def test_refused(small, method, path, status, words, more):
    if (body := more.get("json")) is not None:  # including values that the client's own encoder rejects
        import json

        more = {name: value for name, value in more.items() if name != "json"}
        more["content"] = json.dumps(body)
        more["headers"] = {"Content-Type": "application/json", **more.get("headers", {})}
    answer = small.client.request(method, path, **more)
    error = error_of(answer, status)
    assert words in error["message"] + str(error["param"])
    assert "secret" not in answer.text and "root:" not in answer.text and "x-evil" not in answer.headers
    assert (
        answer.headers["content-type"] == "application/json" and answer.headers["x-content-type-options"] == "nosniff"
    )
    assert not [*(small.folder / "jobs").iterdir()]
    assert small.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "asked",
    ["bytes=", "bytes=-", "bytes=-0", "bytes=9-1", "bytes=999999999-", "bytes=a-b", "bytes=0-1,2-3",
     "bytes=0-" + "9" * 5000, "bytes=" + "0-0," * 2000, "bytes=--1", "bytes=0x0-1"],
)  # fmt: skip
def test_nonsense_ranges(served, asked):
    url = f"/v1/videos/{served.done()}/content"
    answer = served.client.get(url, headers={"Range": asked})
    assert error_of(answer, 416)["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(served.video)}"


@pytest.mark.parametrize("headers", [
    {"Range": "bits=0-1"}, {"Range": "0-1"}, {"Range": "bytes=9999999-", "If-Range": '"another"'},
    {"If-None-Match": '"another"'}, {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"Range": "bits=0-1", "If-Modified-Since": "nonsense"},
])  # fmt: skip
def test_what_is_ignored(served, headers):
    answer = served.client.get(f"/v1/videos/{served.done()}/content", headers=headers)
    assert answer.status_code == 200 and answer.content == served.video


def test_what_a_client_has_already(served):
    url = f"/v1/videos/{served.done()}/content"
    first = served.client.get(url)
    tag, date = first.headers["etag"], first.headers["last-modified"]
    for headers in ({"If-None-Match": f'"x", W/{tag}'}, {"If-Modified-Since": date}, {"If-None-Match": "*"}):
        answer = served.client.get(url, headers=headers | {"Range": "bytes=0-1"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert served.client.get(url, headers={"Range": "bytes=0-1", "If-Range": tag}).content == served.video[:2]


def test_a_video_that_is_deleted_while_it_is_sent(served, caplog):
    """Between the response's headers and its first byte."""
    from starlette.requests import Request
    from starlette.testclient import TestClient

    from skyreels_v3.web.api import send_file

    caplog.set_level("INFO")
    path = served.job(served.done()).video
    request = Request({"type": "http", "method": "GET", "headers": []})
    answer = asyncio.run(send_file(path, "video/mp4", request, "a.mp4"))
    path.unlink()
    error_of(TestClient(answer).get("/"), 404)
    assert [record.getMessage() for record in caplog.records if "skyreels" in record.name][-1] == (
        "video.mp4 was deleted before it could be sent"
    )


def test_scripts_stay_text(served):
    """A prompt is returned as JSON and not shown on any page."""
    made = served.post(prompt=f"{SCRIPT}\r\nX-Evil: 1\0")
    answer = served.client.get(f"/v1/videos/{made['id']}")
    assert answer.json()["prompt"].startswith(SCRIPT) and "x-evil" not in answer.headers
    assert answer.headers["content-type"] == "application/json"
    assert SCRIPT not in served.client.get("/docs").text + served.client.get("/metrics").text


def test_a_bomb_is_not_unpacked(small):
    bomb = BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    answer = small.client.post(POST, data={"prompt": "a"}, files={"image": ("a.png", bomb.getvalue())})
    assert "too many pixels" in error_of(answer, 415)["message"]


# The web


class Handler(BaseHTTPRequestHandler):
    """Redirects elsewhere, or returns an image."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        target = self.path.partition("?to=")[2]
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(b"" if target else png())


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    """A server on all addresses of this machine; returns its port and a list of the requested paths."""
    server = ThreadingHTTPServer(("", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield str(server.server_port), server.seen
    server.shutdown()
    server.server_close()


PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"  # as far as these tests go


@pytest.fixture
def names(monkeypatch) -> Callable[[Sequence[str]], None]:
    """Make name.example resolve to each of these addresses in turn, and then to the last one."""
    monkeypatch.setattr("skyreels_v3.media.download.is_public", lambda address: address == PUBLIC)
    real = socket.getaddrinfo

    def lead(addresses: Sequence[str]) -> None:
        left = [*addresses]

        def look_up(host: Any, *args: Any, **options: Any) -> Any:
            if host in ("name.example", b"name.example"):
                host = left.pop(0) if len(left) > 1 else left[0]
            return real(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return lead


@pytest.mark.parametrize(
    ("url", "addresses", "seen"),
    [
        ("http://name.example:{port}/a", [PUBLIC], 1),
        ("http://name.example:{port}/a", [PRIVATE], 0),
        ("http://name.example:{port}/a", [PUBLIC, PRIVATE], 0),
        ("http://name.example:{port}/?to=http://127.0.0.1:{port}/a", [PUBLIC], 1),
        ("http://name.example:{port}/?to=http://localhost:{port}/a", [PUBLIC], 1),
        ("http://name.example:{port}/?to=//127.0.0.1:{port}/a", [PUBLIC], 1),
        ("http://name.example:{port}/?to=file:///etc/passwd", [PUBLIC], 1),
        ("http://127.0.0.2:{port}/?to=http://name.example:{port}/a", [PRIVATE], 1),
        ("http://name.example:{port}/?to=/?to=/?to=/?to=/?to=/?to=/?to=/a", [PUBLIC], 6),
    ],
)
def test_where_urls_lead(small, web, names, url, addresses, seen):
    names(addresses)
    answer = small.client.post(POST, json={"prompt": "a", "image": url.format(port=web[0])})
    fetched = web[1]
    assert len(fetched) == seen
    if addresses == [PUBLIC] and "to=" not in url:
        assert answer.status_code == 200
        return
    assert error_of(answer, 400)["param"] == "image"
    assert not [*(small.folder / "jobs").iterdir()]


# Races


def test_cancel_against_the_end(served):
    def ended(id: str) -> bool:
        return served.queue.complete(id, "0", {})

    for _ in range(15):
        id = served.post()["id"]
        claimed = served.queue.claim("0")
        claimed.video.write_bytes(served.video)
        with ThreadPoolExecutor(3) as pool:
            cancel = [pool.submit(served.client.post, f"/v1/videos/{id}/cancel") for _ in range(2)]
            completed = pool.submit(ended, id).result()
            assert all(answer.result().status_code == 200 for answer in cancel)
        video = served.client.get(f"/v1/videos/{id}").json()
        assert (video["status"] == "completed") == completed
        assert completed or video["error"]["code"] == "cancelled"
        content = served.client.get(f"/v1/videos/{id}/content")
        assert content.status_code == (200 if completed else 409)


def test_delete_against_everything(served):
    for _ in range(10):
        id = served.done()
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(served.client.get, f"/v1/videos/{id}/content") for _ in range(2)]
            answers += [pool.submit(served.client.delete, f"/v1/videos/{id}") for _ in range(2)]
            answers += [pool.submit(served.client.get, f"/v1/videos/{id}/events")]
            statuses = [answer.result().status_code for answer in answers]
        assert set(statuses) <= {200, 404, 409} and 200 in statuses[2:4]
        assert served.client.get(f"/v1/videos/{id}").status_code == 404
    assert not [*(served.folder / "jobs").iterdir()] and served.queue.counts()[State.COMPLETED] == 0


# Below HTTP


@pytest.fixture
def port(small) -> Iterator[int]:
    """Run the same application on the real server; returns its port."""
    import uvicorn

    from skyreels_v3.web.serve import server_of

    listener = socket.create_server(("127.0.0.1", 0))
    server = server_of(small.client.app)
    server.config.lifespan = "off"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    assert isinstance(server, uvicorn.Server)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def say(port: int, *parts: bytes, pause: float = 0.0, shut: bool = False) -> bytes:
    """Send parts to a server; returns all it sends until it closes the connection or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(2)
            while more := connection.recv(65536):
                answer += more
                if b"\r\n\r\n" in answer and b"close" not in answer.lower():
                    break
        except OSError:
            pass
        return answer


HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
UPLOAD = (
    b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    b'Content-Length: 100000\r\n\r\n--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    + b"a" * 1000
)  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n"], (400, 403)),
        ([b"GET /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"], (400, 403)),
        ([b"GET /v1/videos HTTP/1.0\r\n\r\n"], (403,)),
        ([b"GET http://evil.example/v1/videos HTTP/1.1\r\nHost: evil.example\r\n\r\n"], (400, 403)),
        ([b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"], (400, 431, 0)),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], (400, 0)),
        ([b"GET /health\r\n\r\n"], (400, 0)),
        ([HEAD + b"Content-Length: -5\r\n\r\n"], (400,)),
        ([HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde"], (400,)),
        ([HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"], (400, 413)),
        ([HEAD + b"Content-Length: 99999999\r\n\r\n"], (413,)),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], (400, 0)),
        ([HEAD + b"Content-Length: 50\r\n\r\n{"], (408,)),
        ([HEAD + b"Content-Length: 50\r\n\r\n", *[b"a"] * 20], (408, 0)),  # 0: the connection was closed
        ([b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\r\n\tb\r\nX-A: \x01\r\n\r\n"], (200, 400)),
        ([b"GET /v1/videos/a%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"], (404,)),
        ([b"GET /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"], (200,)),
        ([UPLOAD], (408,)),
    ],
    ids=lambda value: value[0][:24].decode("latin-1") + f"...{len(value[0])}" if isinstance(value, list) else "",
)  # fmt: skip
def test_below_http(small, port, parts, statuses):
    answer = say(port, *parts, pause=0.1)
    status = int(answer.split()[1]) if answer else 0
    assert status in statuses, answer
    assert b"Traceback" not in answer and b"\r\nx-evil" not in answer.lower()
    assert not [*(small.folder / "jobs").iterdir()]
    assert b" 200 " in say(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


def test_headers_that_never_end(port, monkeypatch):
    monkeypatch.setattr("skyreels_v3.web.connection.HEAD_SECONDS", 0.3)
    for begin in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(begin)
            assert connection.recv(1) == b""  # closed
    assert b" 200 " in say(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


def test_an_upload_that_is_broken_off_leaves_nothing(small, port):
    say(port, UPLOAD, shut=True)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(UPLOAD)
    both_ended = 'skyreels_requests_total{method="POST",route="/v1/videos",status="400"} 2.0'
    end = time.monotonic() + 20
    while both_ended not in (text := small.client.get("/metrics").text) and time.monotonic() < end:
        time.sleep(0.1)
    assert both_ended in text
    assert not [*(small.folder / "jobs").iterdir()]


def test_a_clip_is_probed_only(served):
    """ffmpeg reads a single file, whose format is detected by content."""
    content = (ASSETS / "boat.mp4").read_bytes()
    files = {"input_video": ("a.m3u8", content), "prompt": (None, "a")}
    made = served.client.post(POST, data=SMALL | {"num_frames": []}, files=files)
    assert made.status_code == 200, made.text
    flags = served.job(made.json()["id"]).flags
    assert flags["input_video"] == "input_video.m3u8"
