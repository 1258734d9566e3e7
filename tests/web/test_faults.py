"""A whole server whose parts are killed, whose clients disconnect, or whose folder is in use or damaged.

After each fault: finished videos are there, each video is made once, no process is left, and the next job is made.
Faults of single parts are tested with each part: a full disk and clock jumps in test_queue.py and test_supervisor.py,
a worker out of memory in test_runner.py, aborted uploads in test_hostile.py.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from skyreels_v3.web.queue import DATABASE, Queue, State
from tests.conftest import ROOT, files_in
from tests.web.conftest import HINT
from tests.web.test_runner import FAULTY, ended, is_alive, log_of, set_faults, wait

pytestmark = pytest.mark.slow
# the real server with workers that can have faults, but without the page, which is slow to import
SERVER = """
import sys
from functools import partial
from skyreels_v3.main import main
from skyreels_v3 import packages
from skyreels_v3.web import supervisor

find_spec = packages.find_spec
packages.find_spec = lambda name: None if name == "gradio" else find_spec(name)
supervisor.Supervisor = partial(supervisor.Supervisor, command=sys.argv[1:3])
sys.exit(main(["--serve", "--port", "0", "--outdir", sys.argv[3], "--model_id", "tiny", "--device", "cpu"]))
"""
SMALL = {"prompt": "a cat", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3}
PLACES = ("loading", "denoising 1 2", "decoding 1", "written")


@dataclass
class Served:
    """A folder, its queue, and the server processes that have used it."""

    folder: Path
    queue: Queue
    address: str = ""
    process: subprocess.Popen[str] | None = None
    seen: set[int] = field(default_factory=set)

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, *FAULTY, str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.seen.add(self.process.pid)
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")

    def worker(self) -> psutil.Process:
        """The worker's process, once it runs."""
        children = wait(psutil.Process(self.process.pid).children)
        self.seen |= {child.pid for child in children}
        return children[0]

    def kill(self, what: str) -> None:
        """Kill the server, the worker or both at once, and start a new server if needed."""
        worker = self.worker()
        if what != "worker":
            self.process.kill()
        if what != "server":
            worker.kill()
        if what != "worker":
            self.stop()
            self.start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self.process.stdout.close()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=10) as answer:
            return answer.read()

    def post(self) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/videos", json.dumps(SMALL).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["id"]

    def make(self) -> str:
        """Make a video."""
        id = self.post()
        assert ended(self.queue, id).state == State.COMPLETED
        return id


@pytest.fixture
def served(tmp_path, cache, monkeypatch) -> Iterator[Served]:
    pytest.importorskip("fastapi", reason=HINT)
    for name, value in {"SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    queue = Queue(tmp_path / "server")
    served = Served(tmp_path / "server", queue)
    served.start()
    yield served
    if served.process.poll() is None:
        served.worker()
        served.stop()
    queue.close()
    wait(lambda: not any(map(is_alive, served.seen)), 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["both", *(pytest.param(what, marks=pytest.mark.extended) for what in ("server", "worker"))]
)
def test_kills_at_each_stage(served, what):
    made = {"queued": served.post()}  # before the worker has started, which takes seconds
    assert served.queue.get(made["queued"]).state == State.QUEUED
    served.kill(what)
    assert ended(served.queue, made["queued"]).state == State.COMPLETED
    videos = {made["queued"]: served.get(f"/v1/videos/{made['queued']}/content")}
    for place in PLACES if what != "worker" else PLACES[1:2]:  # test_runner.py covers the others
        set_faults(served.queue, (place, "hang"))
        id = made[place] = served.post()
        wait(lambda id=id, place=place: place in log_of(served.queue, id))
        assert served.queue.get(id).state == State.IN_PROGRESS
        served.kill(what)
        job = ended(served.queue, id)
        assert (job.state, files_in(job.folder)) == (State.COMPLETED, {"video.mp4", "preview.png"})
        videos[id] = served.get(f"/v1/videos/{id}/content")
    assert [log_of(served.queue, id).count("written") for id in made.values()] == [1] * len(made)
    assert {log_of(served.queue, id).count("claimed") for id in made.values()} <= {1, 2}
    for id, video in videos.items():
        assert served.get(f"/v1/videos/{id}/content") == video
    served.make()


@pytest.mark.extended
def test_clients_that_are_gone_and_folders_that_are_taken(served):
    """Clients that disconnect from event streams, a second server, a killed upload, then a damaged database."""
    set_faults(served.queue, ("denoising 1 2", "hang"))
    id = served.post()
    wait(lambda: "denoising 1 2" in log_of(served.queue, id))
    host, port = served.address.removeprefix("http://").split(":")
    server = psutil.Process(served.process.pid)
    before = len(server.net_connections())
    gone = [socket.create_connection((host, int(port)), timeout=10) for _ in range(20)]
    for each in gone:
        each.sendall(f"GET /v1/videos/{id}/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert b"200 OK" in each.recv(1000)
    assert len(server.net_connections()) >= before + len(gone)
    for each in gone[::2]:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    for each in gone:
        each.close()
    wait(lambda: len(server.net_connections()) <= before, 30)
    second = run_server(served.folder)
    assert second.returncode == 2 and "is in use by another server; stop it, or give another folder" in second.stderr
    served.kill("worker")
    assert ended(served.queue, id).state == State.COMPLETED
    assert log_of(served.queue, id).count("written") == 1
    served.stop()
    served.queue.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{served.folder / DATABASE}{suffix}").unlink(missing_ok=True)
    (served.folder / DATABASE).write_bytes(b"no database" * 1000)
    refused = run_server(served.folder)
    assert refused.returncode == 2 and f"{DATABASE} is damaged" in refused.stderr
    assert "start again with an empty queue" in refused.stderr and (served.folder / f"{DATABASE}.damaged-1").exists()
    assert (served.folder / "jobs" / id / "video.mp4").exists()
    served.queue = Queue(served.folder)
    served.start()
    served.make()


def run_server(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a server that cannot start."""
    command = [sys.executable, "-c", SERVER, *FAULTY, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
