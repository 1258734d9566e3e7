"""A server application with its queue and a client; skipped if the server's packages are not installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.web.queue import Job, Queue

HINT = "the server's packages are not installed: pip install -r requirements-dev.txt"
BASE = "http://127.0.0.1:8000"
SMALL = {"size": "32x32", "num_frames": "5"}


def png(side: int = 32) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side), (200, 80, 20)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Served:
    """A client, the queue behind it, and methods that end jobs in place of a worker."""

    client: Any
    queue: Queue
    video: bytes
    short: bytes  # a video of 5 frames

    @property
    def folder(self) -> Path:
        return self.queue.folder

    def post(self, **fields: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/videos", json={"prompt": "a cat", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job(self, id: str) -> Job:
        job = self.queue.get(id)
        assert job is not None
        return job

    def finish(self, id: str) -> str:
        """Complete a job, which must be the next in the queue."""
        job = self.queue.claim("0")
        assert job is not None and job.id == id
        job.video.write_bytes(self.video)
        facts = {"seed": 42, "width": 32, "height": 32, "frames": 5, "fps": 24, "seconds": 1.0}
        assert self.queue.complete(id, "0", facts)
        return id

    def done(self, **fields: Any) -> str:
        return self.finish(self.post(**SMALL, **fields)["id"])


@pytest.fixture(scope="session")
def clip(tmp_path_factory, write_lossless) -> bytes:
    """Two seconds of video."""
    frames = np.random.default_rng(0).integers(0, 255, (48, 32, 32, 3), np.uint8)
    return write_lossless(tmp_path_factory.mktemp("clip") / "clip.mp4", frames).read_bytes()


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory, write_lossless) -> bytes:
    """Five frames."""
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    return write_lossless(tmp_path_factory.mktemp("clip") / "short.mp4", frames).read_bytes()


@pytest.fixture
def serve(tmp_path, clip, short_clip) -> Iterator[Callable[..., Served]]:
    """Create an application with the given settings."""
    pytest.importorskip("fastapi", reason=HINT)
    pytest.importorskip("httpx2", reason=HINT)
    from starlette.testclient import TestClient

    from skyreels_v3.web.api import app_of
    from skyreels_v3.web.settings import Settings

    opened: list[Any] = []

    def serve(page: bool = False, **settings: Any) -> Served:
        queue = Queue(tmp_path / "server", server=True)
        app = app_of(Settings(tmp_path / "server", **settings), queue)
        if page:
            from skyreels_v3.web.page import mount_page

            mount_page(app)
        client = TestClient(app, BASE, raise_server_exceptions=False)
        client.__enter__()
        opened.extend((client, queue))
        return Served(client, queue, clip, short_clip)

    yield serve
    for each in opened:
        each.close() if isinstance(each, Queue) else each.__exit__()


@pytest.fixture
def served(serve) -> Served:
    return serve(defaults={"model_id": "tiny", "device": "cpu"})


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """Check that a response is an error in OpenAI's form without internal details; returns the error."""
    assert answer.status_code == status, answer.text
    error = json.loads(answer.text)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["message"].isprintable() and error["code"]
    assert "Traceback" not in answer.text and "/tmp/" not in answer.text and "/server/" not in answer.text
    return error
