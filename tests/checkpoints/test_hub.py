"""Fetching a checkpoint: only what the task needs, kept for the next time, and what is said when it cannot be had.

The hub is a server on this machine that answers as much of the API as huggingface_hub asks for. Each fetch is a
process of its own: the library reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from skyreels_v3.checkpoints import hub
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import CheckpointError, UserError
from skyreels_v3.tasks import TASK_NAMES, task_spec

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
DRIVER = """
import sys
from generate_video import set_up_logging
from skyreels_v3.checkpoints.hub import download
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
request = parse_request(sys.argv[1:])
set_up_logging(request.verbosity)
try:
    print(download(request))
except UserError as error:
    sys.exit(str(error))
assert "torch" not in sys.modules
"""
REFERENCE = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "a.png", "--model_id", "some/model"]
EXTENSION = ["--task_type", "single_shot_extension", "--prompt", "a", "--input_video", "a", "--model_id", "some/model"]
UNNEEDED = ("original.ckpt", "vae_old/weights.bin", "image_encoder/model.safetensors", "README.md")


class Hub:
    """A hub with one model, and the paths that were asked of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        name = path.partition("/resolve/")[2].partition("/")[2]
        headers = {"Content-Type": "application/json"}
        if name in self.files:
            self.asked.append(name)
            body = self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        elif path.startswith("/api/models/some/model/tree/"):
            body = json.dumps([self.entry(name) for name in self.files]).encode()
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            handler.send_error(404)
            return
        handler.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    def entry(self, name: str) -> dict[str, object]:
        body = self.files[name]
        return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def read_all(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def served(reference) -> Iterator[Callable[[str], Hub]]:
    """Serve a small checkpoint with files beside it that no task needs."""
    hubs = []

    def serve(name: str) -> Hub:
        files = read_all(reference / "pipelines" / "checkpoints" / name)
        hubs.append(Hub(files | dict.fromkeys(UNNEEDED, b"x" * 1_000_000)))
        return hubs[-1]

    yield serve
    for server in hubs:
        server.close()


@pytest.fixture
def fetch(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Fetch in a process of its own, from `url`, into this test's cache."""

    def fetch(url: str, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {key: v for key, v in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
        places = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DRIVER, *argv]
        return subprocess.run(
            command, env=kept | places | more, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )

    return fetch


def test_only_what_the_task_needs_is_fetched_and_found_again_offline(served, fetch):
    server = served("reference_to_video")
    run = fetch(server.url, *REFERENCE)
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip())
    assert read_all(folder).keys() == server.files.keys() - set(UNNEEDED) - {"scheduler/scheduler_config.json"}
    assert set(server.asked) == read_all(folder).keys()
    assert "fetching some/model from huggingface" in run.stderr
    assert "Fetching" in run.stderr  # the library's progress bar
    server.asked.clear()
    again = fetch(server.url, *REFERENCE, "--quiet")
    assert (again.stdout, again.stderr) == (run.stdout, "")
    assert server.asked == []
    offline = fetch(NOWHERE, *REFERENCE, "--quiet")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == run.stdout


def test_the_extension_needs_one_of_two_transformers(served, fetch):
    server = served("video_extension")
    run = fetch(server.url, *EXTENSION, "--quiet")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert {name.split("/")[0] for name in server.asked} == {
        "transformer", "google", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
    }  # fmt: skip


def test_an_incomplete_model_on_the_hub(served, fetch):
    server = served("reference_to_video")
    del server.files["vae/config.json"]
    run = fetch(server.url, *REFERENCE, "--quiet")
    assert run.returncode == 1
    assert re.search(r"--model_id: .*is no complete reference_to_video checkpoint: missing vae/config.json", run.stderr)


def test_a_snapshot_that_is_only_partly_cached(served, fetch, tmp_path):
    server = served("reference_to_video")
    folder = Path(fetch(server.url, *REFERENCE, "--quiet").stdout.strip())
    (folder / "vae" / "config.json").unlink()
    run = fetch(NOWHERE, *REFERENCE, "--quiet")
    assert run.returncode == 1
    assert "vae/config.json" in run.stderr
    assert "download" in run.stderr
    again = fetch(server.url, *REFERENCE, "--quiet")  # goes on where it stopped
    assert again.stdout.strip() == str(folder)


def test_offline_without_a_cache_says_what_to_do(fetch):
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        start = time.perf_counter()
        run = fetch(NOWHERE, *REFERENCE, **more)
        assert time.perf_counter() - start < 5
        assert run.returncode == 1
        message = run.stderr.splitlines()[-1]
        assert message.startswith("--model_id: some/model could not be fetched from huggingface (")
        assert "check the id and the connection" in message
        assert "try --model_source modelscope, or download it elsewhere and give its folder" in message


def test_a_model_that_is_not_on_the_hub(served, fetch):
    run = fetch(served("reference_to_video").url, *REFERENCE, "--model_id", "some/other", "--quiet")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert "some/other could not be fetched from huggingface (" in run.stderr


@pytest.mark.parametrize("name", TASK_NAMES)
def test_published_ids_are_hub_ids(name):
    spec = task_spec(name)
    for model_id in (spec.model_id, *spec.also_published_as):
        source = [word for flag in spec.inputs for word in (f"--{flag}", "a")]
        request = parse_request(["--task_type", name, "--prompt", "a", *source, "--model_id", model_id])
        assert hub.locate(request) is None


def test_a_folder_that_is_complete_is_taken(reference):
    root = reference / "pipelines" / "checkpoints"
    assert hub.locate(parse_request([*REFERENCE, "--model_id", f"{root}/reference_to_video"]))
    assert hub.locate(parse_request([*EXTENSION, "--model_id", f"{root}/video_extension/"]))
    with pytest.raises(CheckpointError, match=r"missing transformer/config\.json, vae/config\.json"):
        hub.locate(parse_request([*REFERENCE, "--model_id", str(root)]))


def test_modelscope_needs_its_package(monkeypatch):
    argv = [*REFERENCE, "--model_source", "modelscope"]
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--model_source: modelscope needs its package; pip install modelscope"):
        hub.locate(parse_request(argv))
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: object())
    assert hub.locate(parse_request(argv)) is None


def test_modelscope_gets_the_same_patterns(monkeypatch, reference):
    """The package is not installed here: what is tested is the call."""
    root = reference / "pipelines" / "checkpoints" / "reference_to_video"
    calls = []
    package = type(sys)("modelscope")
    package.snapshot_download = lambda *args, **options: calls.append((args, options)) or str(root)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert hub.download(parse_request([*REFERENCE, "--model_source", "modelscope"])) == root
    patterns = ["model_index.json", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*"]
    assert calls == [(("some/model",), {"allow_patterns": patterns})]
