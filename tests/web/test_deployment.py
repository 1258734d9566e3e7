"""The deployment files match the server: the image, the systemd unit, the Compose file, the load balancer."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.serve_load import running_server
from skyreels_v3.cli import parse_flags
from skyreels_v3.parallel.processes import GRACE, INTERRUPTED
from skyreels_v3.web import serve
from skyreels_v3.web.queue import Queue
from skyreels_v3.web.serve import check_access, listen
from tests.conftest import ROOT
from tests.web.conftest import HINT

fastapi = pytest.importorskip("fastapi", reason=HINT)

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = (ROOT / "cluster" / "skyreels.service").read_text(encoding="utf-8")
PYTHON = "/opt/skyreels/.venv/bin/python"
ENDS_WITHIN = serve.GRACE + GRACE  # seconds: for open responses, then for workers
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "compose.yaml").read_text(encoding="utf-8"))


def unit_value(name: str) -> str:
    """The value of a setting that appears once in the unit, with continuation lines joined."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.replace("\\\n", ""), re.MULTILINE)
    return value


def check_command(words: list[str]) -> dict[str, Any]:
    """The flags of a `serve` command, parsed and checked as the program does."""
    flags = parse_flags(words)
    assert flags["serve"]
    check_access(flags["host"], (flags["api_key"],), no_auth=False)
    return flags


def healthcheck() -> list[str]:
    (command,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*?\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    return json.loads(command)


def test_the_image_has_all_that_a_server_needs():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [word for words in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in words.split()]
    assert "requirements-web.txt" in sources
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in sources)
    assert "--requirement requirements-web.txt" in DOCKERFILE
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE) == [str(serve.GenerationRequest.port)]
    (example,) = re.findall(r"skyreels serve (.*)$", DOCKERFILE, re.MULTILINE)
    check_command(["--serve", *shlex.split(example)])


@pytest.mark.slow
def test_the_health_of_a_server(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    (tmp_path / "keys").write_text("a-key", encoding="utf-8")
    _, option, code = healthcheck()
    with running_server(tmp_path, workers=1) as (_, address):
        port = address.rpartition(":")[2]
        assert "8000" in code
        command = [sys.executable, option, code.replace("8000", port)]
        assert subprocess.run(command, check=False).returncode == 0
        unknown = [word.replace("/health", "/v1/videos") for word in command]  # requires a key
        assert subprocess.run(unknown, check=False).returncode == 1
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "skyreels.service"
    unit.write_text(UNIT.replace(PYTHON, sys.executable), encoding="utf-8")
    verify = [ANALYZE, "verify", "--recursive-errors=no", str(unit)]  # other units on this machine may have errors
    checked = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    hardened = [ANALYZE, "security", "--offline=true", "--threshold=25", str(unit)]  # 2.5 out of 10
    assert subprocess.run(hardened, capture_output=True, check=False).returncode == 0


def test_the_units_command():
    python, script, *words = shlex.split(unit_value("ExecStart"))
    assert (python, script) == (PYTHON, "/opt/skyreels/generate_video.py")
    flags = check_command(words)
    assert flags["api_key"] == "${CREDENTIALS_DIRECTORY}/" + unit_value("LoadCredential").partition(":")[0]
    assert flags["outdir"].startswith("${STATE_DIRECTORY}/")
    assert unit_value("KillMode") == "mixed" and int(unit_value("TimeoutStopSec")) > ENDS_WITHIN
    assert str(INTERRUPTED) in unit_value("SuccessExitStatus").split()
    assert int(unit_value("LimitNOFILE")) > 2 * serve.MAX_CONNECTIONS


def test_the_compose_file(compose):
    (server,) = compose["services"].values()
    command, *words = server["command"]
    flags = check_command([f"--{command}", *words])
    assert flags["api_key"] == f"/run/secrets/{server['secrets'][0]}" and server["secrets"] == [*compose["secrets"]]
    mounts = dict(volume.split(":") for volume in server["volumes"])
    assert mounts.keys() == compose["volumes"].keys() and flags["outdir"].startswith(mounts["videos"])
    assert server["ports"] == [f"127.0.0.1:8000:{flags.get('port', 8000)}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > ENDS_WITHIN
    (devices,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert (ROOT / "cluster" / server["build"] / "Dockerfile").is_file()
    kept = subprocess.run(["git", "check-ignore", "cluster/api_key"], cwd=ROOT, check=False, capture_output=True)
    assert kept.returncode in (0, 128)  # 128: not a checkout


def test_small_answers_are_sent_at_once():
    """asyncio disables Nagle's algorithm only for sockets whose protocol is set; it would cost 40 ms per response."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


# The load balancer

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
# what a distribution's nginx.conf surrounds it with, for any user and any folder
AROUND = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/skyreels.conf;
}}
"""
KEYS = [f"client+/{number}==" for number in range(16)]  # all land on one server with a probability below 1 in 10,000
FOLLOWED = 5  # keys whose videos the test waits for


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_balancer(folder: Path, addresses: list[str]) -> Iterator[str]:
    """Run nginx with the configuration for servers on this machine; returns its address."""
    names = ("-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem"))
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", *names]
    subprocess.run(certificate, check=True, capture_output=True)
    port = free_port()
    text = (ROOT / "cluster" / "nginx.conf").read_text(encoding="utf-8")
    changes = {"listen 443": f"listen 127.0.0.1:{port}", "video.example.com": "localhost"}
    changes |= {"/etc/ssl/skyreels": str(folder), "10.0.0.11:8000": addresses[0], "10.0.0.12:8000": addresses[1]}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "skyreels.conf").write_text(text, encoding="utf-8")
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder), encoding="utf-8")
    command = [NGINX, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(command)
    try:
        end = monotonic() + 30
        while not is_open(port):
            assert process.poll() is None and monotonic() < end
            sleep(0.05)
        yield f"https://localhost:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory, cache) -> Iterator[tuple[str, list[Queue]]]:
    """Two servers behind nginx; returns the address and their queues."""
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip("needs nginx and openssl")
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two", "balancer")]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SKYREELS_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        addresses = []
        for folder in folders[:2]:
            (folder / "keys").write_text("\n".join(KEYS), encoding="utf-8")
            _, address = stack.enter_context(running_server(folder, workers=1))
            addresses.append(address.removeprefix("http://"))
        address = stack.enter_context(running_balancer(folders[2], addresses))
        queues = [stack.enter_context(closing(Queue(folder / "server"))) for folder in folders[:2]]
        yield address, queues


@pytest.mark.slow
@pytest.mark.extended
def test_two_servers_behind_a_balancer(balanced):
    """Clients and their pages find their videos again; streaming, downloads and uploads work through the balancer."""
    from skyreels_v3.web.page_access import COOKIE
    from skyreels_v3.web.security import owner_of

    address, queues = balanced
    for number, key in enumerate(KEYS):
        headers = {"Authorization": f"Bearer {key}", "Origin": address}
        with httpx.Client(base_url=address, headers=headers, verify=False, timeout=60, trust_env=False) as client:
            files = {"input_reference": ("fox.png", (ROOT / "assets" / "fox.png").read_bytes())}
            asked = {"prompt": "a fox", "num_frames": 5, "size": "32x32", "num_inference_steps": 1, "task_type": "i2v"}
            made = client.post("/v1/videos", data=asked, files=files)
            assert made.status_code == 200, made.text
            id = made.json()["id"]
            if number >= FOLLOWED:
                continue
            with client.stream("GET", f"/v1/videos/{id}/events") as events:
                arrived = [(line, monotonic()) for line in events.iter_lines() if line.startswith("event: ")]
            assert arrived[0][0] == "event: progress" and arrived[-1][0] == "event: end"
            assert arrived[-1][1] - arrived[0][1] > 0.4  # not buffered until the end
            assert [video["id"] for video in client.get("/v1/videos").json()["data"]] == [id]
            content = client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=4-7"})
            assert (content.status_code, content.content) == (206, b"ftyp")
        with httpx.Client(base_url=address, cookies={COOKIE: key}, verify=False, trust_env=False) as page:
            assert [video["id"] for video in page.get("/v1/videos").json()["data"]] == [id]
    jobs = [[job.owner for job in queue.list(limit=100)[0]] for queue in queues]
    assert sorted(jobs[0] + jobs[1]) == sorted(map(owner_of, KEYS)) and all(jobs)


def test_idle_connections_are_ended_by_the_balancer():
    """If the server closed them, it could do so just as the balancer sends a request, which would fail."""
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", (ROOT / "cluster" / "nginx.conf").read_text(encoding="utf-8"))
    config = serve.server_of(fastapi.FastAPI()).config
    assert config.timeout_keep_alive > int(seconds)


@pytest.mark.slow
def test_the_balancer_refuses_what_a_server_refuses(balanced):
    address, _ = balanced
    with httpx.Client(base_url=address, verify=False, trust_env=False) as client:
        assert client.get("/v1/videos").status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"Origin": "https://example.com"}).status_code == 403
        assert client.get("/health", headers={"Host": "example.com"}).status_code == 403
        signed_in = client.post("/", data={"key": KEYS[0]}, headers={"Origin": address})
        assert signed_in.status_code == 303
        assert "Secure" in signed_in.headers["set-cookie"] and "HttpOnly" in signed_in.headers["set-cookie"]


@pytest.mark.slow
def test_the_page_behind_a_balancer(balanced):
    """From signing in to a finished video, with requests only to the balancer's address."""
    from tests.web import test_page  # skips if its packages are not installed

    if test_page.CHROMIUM is None:
        pytest.skip("no chromium is installed")
    address, _ = balanced
    asked, errors = [], []
    with test_page.playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=test_page.CHROMIUM, args=test_page.FLAGS)
        page = browser.new_page(ignore_https_errors=True)
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda answer: errors.append(f"{answer.status} {answer.url}") if not answer.ok else None)
        page.on("requestfailed", lambda request: errors.append(f"{request.failure} {request.url}"))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.fill("#key", KEYS[0])
        page.click("button")
        with suppress(test_page.playwright.TimeoutError):
            page.wait_for_selector("#t2v-start", timeout=120_000)
        assert page.locator("#t2v-start").is_visible(), "\n".join(errors)
        test_page.fill(page, "t2v", "a boat")
        test_page.wait_for_end(page, test_page.start(page, "t2v"))
        browser.close()
    assert all(url.startswith((f"{address}/", f"blob:{address}/", "data:")) for url in asked)
