"""Fetching a checkpoint: only what the task needs, cached for next time, with a clear error when it fails.

The hub is a local server that answers as much of the API as huggingface_hub uses. Each fetch runs in its own process,
because the library reads its settings from the environment at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from safetensors.torch import load_file

from skyreels_v3.checkpoints import hub
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.families import family_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, task_spec
from tests.checkpoints.writers import write_cast

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
DRIVER = """
import sys
from skyreels_v3.console import set_up_logging
from skyreels_v3.checkpoints.hub import LORA, download, download_file
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.families import family_of
request = parse_request(sys.argv[1:])
set_up_logging(request.verbosity)
try:
    if request.lora:
        print(download_file(request.lora[0].source, request, LORA))
    else:
        print(download(request, family_of(request.task).repositories(request.task)[0]))
except UserError as error:
    sys.exit(str(error))
assert "torch" not in sys.modules
"""
REFERENCE = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "a.png", "--model_id", "some/model"]
EXTENSION = ["--task_type", "single_shot_extension", "--prompt", "a", "--input_video", "a", "--model_id", "some/model"]
UNNEEDED = (
    "original.ckpt",
    "vae_old/weights.bin",
    "image_encoder/model.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
)


def locate(request: GenerationRequest) -> Path | None:
    return hub.locate(request, family_of(request.task).repositories(request.task)[0])


class Hub:
    """A hub that serves one model and records the requested paths."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.slow = ""  # the file that stops after 1000 bytes until `released` is set
        self.reached, self.released = threading.Event(), threading.Event()
        self.status = 0  # the status of every answer, if not 0
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
        path = unquote(handler.path.split("?")[0])
        name = path.partition("/resolve/")[2].partition("/")[2]
        headers = {"Content-Type": "application/json"}
        if self.status:
            handler.send_error(self.status)
            return
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
            slow = name != "" and name == self.slow
            if slow:
                handler.wfile.write(body[:1000])
                self.reached.set()
                self.released.wait(30)
            with suppress(OSError):
                handler.wfile.write(body[1000 * slow :])

    def entry(self, name: str) -> dict[str, object]:
        body = self.files[name]
        return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def read_all(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def serve(reference) -> Iterator[Callable[..., Hub]]:
    """Serve a small checkpoint plus files that no task needs, or a model that consists of the named files."""
    hubs = []

    def serve(*names: str) -> Hub:
        if names[0] in ("reference_to_video", "video_extension"):
            files = read_all(reference / "pipelines" / "checkpoints" / names[0])
            files |= dict.fromkeys(UNNEEDED, b"x" * 1_000_000)
        else:
            files = {name: tensor_file(name) if name.endswith(".safetensors") else b"{}" for name in names}
        hubs.append(Hub(files))
        return hubs[-1]

    yield serve
    for server in hubs:
        server.close()


def environment(url: str, home: Path) -> dict[str, str]:
    """This process's environment, with the hub's address and an empty cache."""
    kept = {key: v for key, v in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def fetch(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Fetch in a new process from `url`, into this test's cache."""

    def fetch(url: str, *argv: str, driver: str = DRIVER, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", driver, *argv], env=environment(url, tmp_path / "home") | more, cwd=tmp_path,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    return fetch


@pytest.mark.slow
def test_only_what_the_task_needs_is_fetched_and_found_again_offline(serve, fetch):
    server = serve("reference_to_video")
    run = fetch(server.url, *REFERENCE)
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip())
    assert read_all(folder).keys() == server.files.keys() - set(UNNEEDED) - {
        "scheduler/scheduler_config.json",
        "model_index.json",
    }
    assert set(server.asked) == read_all(folder).keys()
    assert "fetching some/model from huggingface" in run.stderr
    assert "Fetching" in run.stderr  # the library's progress bar
    server.asked.clear()
    server.status = 500
    again = fetch(server.url, *REFERENCE, HTTP_PROXY=NOWHERE)
    assert (again.stdout, again.stderr) == (run.stdout, "")  # neither the hub nor a proxy is asked
    offline = fetch(NOWHERE, *REFERENCE, "--quiet")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == run.stdout


@pytest.mark.slow
def test_the_extension_needs_one_of_two_transformers(serve, fetch):
    server = serve("video_extension")
    run = fetch(server.url, *EXTENSION, "--quiet")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert {name.split("/")[0] for name in server.asked} == {
        "transformer", "google", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
    }  # fmt: skip


@pytest.mark.slow
def test_an_incomplete_model_on_the_hub(serve, fetch):
    server = serve("reference_to_video")
    del server.files["vae/config.json"]
    run = fetch(server.url, *REFERENCE, "--quiet")
    assert run.returncode == 1
    assert re.search(
        r"--model_id: .*is not a complete reference_to_video checkpoint: missing vae/config.json", run.stderr
    )


@pytest.mark.slow
def test_a_snapshot_that_is_only_partly_cached(serve, fetch, tmp_path):
    server = serve("reference_to_video")
    folder = Path(fetch(server.url, *REFERENCE, "--quiet").stdout.strip())
    (folder / "vae" / "config.json").unlink()
    run = fetch(NOWHERE, *REFERENCE, "--quiet")
    assert run.returncode == 1
    assert "vae/config.json" in run.stderr
    assert "download" in run.stderr
    again = fetch(server.url, *REFERENCE, "--quiet")  # resumes where it stopped
    assert again.stdout.strip() == str(folder)


@pytest.mark.slow
def test_offline_without_a_cache_says_what_to_do(fetch):
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        run = fetch(NOWHERE, *REFERENCE, **more)
        assert run.returncode == 1
        message = run.stderr.splitlines()[-1]
        assert message.startswith("--model_id: some/model could not be fetched from huggingface (")
        assert "check the id and the connection" in message
        assert "try --model_source modelscope, or download it elsewhere and give its folder" in message


@pytest.mark.slow
def test_an_interrupted_download_ends_at_once_and_goes_on(serve, fetch, tmp_path):
    server = serve("reference_to_video")
    server.slow = max(server.files.keys() - set(UNNEEDED), key=lambda name: len(server.files[name]))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "generate_video.py"), *REFERENCE, "--height", "32", "--width", "32"],
        env=environment(server.url, tmp_path / "home"), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert server.reached.wait(60)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=25)  # the server would only answer after 30 s
    assert (run.returncode, stderr.splitlines()[-1]) == (130, "interrupted")
    server.released.set()
    server.slow = ""
    server.asked.clear()
    again = fetch(server.url, *REFERENCE, "--quiet")
    assert again.returncode == 0, again.stderr
    assert server.asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "ways"),
    [
        (401, ("license accepted on its page", "`hf auth login`", "HF_TOKEN")),
        (403, ("license accepted on its page", "`hf auth login`", "HF_TOKEN")),
        (404, ("check the id and the connection",)),
    ],
)
def test_a_model_that_the_hub_does_not_give(serve, fetch, status, ways):
    server = serve("reference_to_video")
    server.status = status
    run = fetch(server.url, *REFERENCE, "--quiet")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("--model_id: some/model could not be fetched from huggingface (")
    assert all(way in run.stderr for way in ways)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["a.safetensors"], "some/typo", "some/typo could not be fetched from huggingface ("),
        (["a.safetensors"], "some/model/b.safetensors", "some/model on huggingface has no b.safetensors; check the"),
        (["a.safetensors", "c.safetensors"], "some/model",
         "some/model holds 2 .safetensors files (a.safetensors, c.safetensors); give the LoRA's own file, "
         "some/model/FILE.safetensors"),
        (["a.bin"], "some/model", "some/model holds no .safetensors file"),
    ],
)  # fmt: skip
def test_a_lora_that_is_not_on_the_hub(serve, fetch, files, name, message):
    """The error comes before anything is fetched."""
    server = serve(*files)
    main = "import sys; from skyreels_v3.main import main; sys.exit(main(sys.argv[1:]))"
    run = fetch(server.url, *REFERENCE, "--dry_run", "--lora", name, driver=main)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"error: --lora: {message}")
    assert len(run.stderr.splitlines()) == 1
    assert server.asked == []


def test_a_hub_that_never_answers(tmp_path, monkeypatch):
    """The hub's client would wait forever."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "LIST_SECONDS", 0.2)
        request = parse_request(REFERENCE)
        repository = family_of(request.task).repositories(request.task)[0]
        assert hub.bytes_to_fetch(request, repository) is None
        with pytest.raises(UserError, match=r"--model_id: some/model could not .* \(no answer within 0\.2 s\); check"):
            hub.download(request, repository)


def test_the_folder_of_a_model_in_the_hubs_cache(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    request = parse_request([*REFERENCE, "--model_id", str(snapshot.parent.parent)])
    with pytest.raises(
        UserError, match=r"--model_id: .*/models--some--model is .*; give a folder in .*/snapshots, or the model's id"
    ):
        locate(request)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_published_ids_are_hub_ids(name):
    spec = task_spec(name)
    for model_id in (spec.model_id, *spec.also_published_as):
        source = [word for flag in spec.inputs for word in (f"--{flag}", "a")]
        request = parse_request(["--task_type", name, "--prompt", "a", *source, "--model_id", model_id])
        assert locate(request) is None


def test_modelscope_gets_the_same_patterns(monkeypatch, reference, tmp_path):
    """modelscope is not installed here, so only the calls to it are tested."""
    root = reference / "pipelines" / "checkpoints" / "reference_to_video"
    (tmp_path / "style.safetensors").write_bytes(tensor_file())
    calls = []
    package = type(sys)("modelscope")
    folders = {"some/model": str(root), "a/b": str(tmp_path)}
    package.snapshot_download = lambda name, **options: calls.append((name, options)) or folders[name]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    request = parse_request([*REFERENCE, "--model_source", "modelscope"])
    (repository,) = family_of(request.task).repositories(request.task)
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: object())
    assert hub.download(request, repository) == root
    assert hub.download_file("a/b/style.safetensors", request, hub.LORA) == tmp_path / "style.safetensors"
    assert calls == [
        ("some/model", {"allow_patterns": ["transformer/*", "vae/*", "text_encoder/*", "tokenizer/*"]}),
        ("a/b", {"allow_patterns": ["style.safetensors", "adapter_config.json"]}),
    ]
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--model_source: modelscope: needs the package modelscope"):
        hub.download_file("a/style", request, hub.LORA)


def tensor_file(*names: str) -> bytes:
    """A safetensors file of empty tensors, built by hand to avoid importing torch."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names or ("a",), entry)).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.fixture
def fetch_lora(fetch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Fetch a LoRA for a request that uses a different model."""

    def fetch_lora(url: str, name: str, **more: str) -> subprocess.CompletedProcess[str]:
        return fetch(url, *REFERENCE, "--model_id", "other/model", "--quiet", "--lora", name, **more)

    return fetch_lora


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "name", "asked"),
    [
        (["style.safetensors", "README.md", "shards/1.safetensors"], "some/model", ["style.safetensors"]),
        (["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"], "some/model",
         ["adapter_config.json", "adapter_model.safetensors"]),
        (["pytorch_lora_weights.safetensors", "model.safetensors"], "some/model", ["pytorch_lora_weights.safetensors"]),
        (["a.safetensors", "b [v2].safetensors"], "some/model/b [v2].safetensors", ["b [v2].safetensors"]),
        (["one/a.safetensors", "one/adapter_config.json", "two/a.safetensors"], "some/model/one/a.safetensors",
         ["one/a.safetensors", "one/adapter_config.json"]),
    ],
)  # fmt: skip
def test_a_lora_is_fetched_alone_and_found_again_offline(serve, fetch_lora, files, name, asked):
    server = serve(*files)
    run = fetch_lora(server.url, name)
    assert run.returncode == 0, run.stderr
    file = Path(run.stdout.strip())
    assert file.read_bytes() in server.files.values()
    assert sorted(set(server.asked)) == asked
    again = fetch_lora(NOWHERE, name)
    assert (again.stdout, again.stderr) == (run.stdout, "")
    assert fetch_lora(NOWHERE, name, HF_HUB_OFFLINE="1").stdout == run.stdout


@pytest.mark.slow
def test_a_transformer_is_fetched_instead_of_the_models_own(serve, fetch, tmp_path):
    server, file = serve("reference_to_video"), tmp_path / "cast.safetensors"
    weights = {name for name in server.files if name.startswith("transformer/") and name.endswith(".safetensors")}
    for name in weights:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(server.files[name])
    tensors = {key: tensor for name in weights for key, tensor in load_file(tmp_path / name).items()}
    write_cast(file, tensors)
    server.files["r2v/cast.safetensors"] = file.read_bytes()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    main = "import sys; from skyreels_v3.main import main; sys.exit(main(sys.argv[1:]))"
    argv = (*REFERENCE, "--device", "cpu", "--height", "32", "--width", "32", "--num_frames", "5", "--quiet")
    argv += ("--num_inference_steps", "1", "--transformer", "some/model/r2v/cast.safetensors")
    plan = fetch(server.url, *argv, "--dry_run", driver=main)
    assert plan.returncode == 0, plan.stderr
    assert "transformer   some/model/r2v/cast.safetensors: to be fetched" in plan.stdout
    assert not weights & {*server.asked}
    run = fetch(server.url, *argv, driver=main)
    assert run.returncode == 0, run.stderr
    assert "r2v/cast.safetensors" in server.asked and "transformer/config.json" in server.asked
    assert not weights & {*server.asked}
    wrong = fetch(server.url, *argv[:-1], "some/model/r2v/none.gguf", driver=main)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --transformer: some/model on huggingface has no r2v/none.gguf")


def test_loras_on_this_machine(tmp_path, monkeypatch):
    file = tmp_path / "owner" / "style" / "b.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(tensor_file())
    (file.parent / "optimizer.pt").write_bytes(b"x")
    assert hub.locate_file(str(file), hub.LORA) == file
    assert hub.locate_file(str(file.parent), hub.LORA) == file
    assert hub.locate_file(f"{file.parent}/", hub.LORA) == file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.locate_file("owner/style", hub.LORA) == Path("owner/style/b.safetensors")  # local folders come first
    assert hub.locate_file("~/owner/style/b.safetensors", hub.LORA) == file
    for usual in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        (file.parent / usual).write_bytes(tensor_file())
        assert hub.locate_file("owner/style", hub.LORA) == Path("owner/style") / usual


@pytest.mark.parametrize(
    "name", ["owner/name", "o-1/n.a_me-v1.5", "owner/name/a.safetensors", "owner/name/dir/some style (v2).safetensors"]
)
def test_loras_on_a_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()  # a folder that is just called `owner` makes no difference
    assert hub.locate_file(name, hub.LORA) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "an empty value is not a file or folder; give a .safetensors file, a folder with one, or a hub id"),
        (" ", "an empty value is"),
        ("style", "style is not a file or folder"),
        ("style.safetensors", "style.safetensors is not a file or folder"),
        ("loras/style.safetensors", "loras/style.safetensors is not a file or folder"),  # unlikely to be a hub id
        ("loras/style.pt", "loras/style.pt is not a file or folder"),
        ("owner/name/style.pt", "owner/name/style.pt is not a file or folder"),
        ("owner/name/../a.safetensors", "owner/name/../a.safetensors is not a file or folder"),
        ("/owner/name", "/owner/name is not a file or folder"),
        ("https://hub/owner/name", "https://hub/owner/name is not a file or folder"),
        ("here/now/a.safetensors", "here/now/a.safetensors is not a file or folder"),  # because the folder exists
        ("a\0b/c\n", r"a\x00b/c\n is not a file or folder"),
        ("here", "here holds no .safetensors file; give the LoRA's own file, here/FILE.safetensors"),
        ("here/two/", "here/two/ holds 2 .safetensors files (a.safetensors, b.safetensors); give the LoRA's own file, "
         "here/two/FILE.safetensors"),
        ("here/a.pt", "here/a.pt is not a .safetensors file; convert it, as other formats can run code"),
        ("here/cut/a.safetensors", "here/cut/a.safetensors is truncated or damaged ("),
        ("here/cut", "here/cut/a.safetensors is truncated or damaged ("),
    ],
)  # fmt: skip
def test_loras_that_are_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ("a.pt", "now/b", "cut/a.safetensors", "two/a.safetensors", "two/b.safetensors")
    for file in (tmp_path / "here" / path for path in files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tensor_file())
    (tmp_path / "here/cut/a.safetensors").write_bytes(tensor_file() + b"x")
    with pytest.raises(UserError) as caught:
        hub.locate_file(name, hub.LORA)
    assert str(caught.value).startswith(f"--lora: {message}")


def test_a_lora_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(tensor_file())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr("skyreels_v3.checkpoints.files.safe_open", refuse)
    with pytest.raises(UserError, match=r"--lora: .*a\.safetensors cannot be read \(Permission denied\)"):
        hub.locate_file(str(tmp_path / "a.safetensors"), hub.LORA)
