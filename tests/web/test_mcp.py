"""MCP with the SDK's own client: against a process over stdio, over HTTP, and in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import imageio_ffmpeg
import psutil
import pytest
from PIL import Image

from skyreels_v3.main import run_command
from skyreels_v3.tasks import TASK_NAMES
from skyreels_v3.web.queue import Queue, State
from tests.conftest import ASSETS, ROOT
from tests.web.conftest import BASE, HINT, Served
from tests.web.test_runner import wait

pytest.importorskip("mcp", reason=HINT)
pytest.importorskip("fastapi", reason=HINT)
import httpx2
from anyio import create_memory_object_stream
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from starlette.applications import Starlette

from skyreels_v3.web.api import app_of
from skyreels_v3.web.mcp import server as module
from skyreels_v3.web.mcp.tools import Tools
from skyreels_v3.web.settings import Settings

TINY = {"model_id": "tiny", "device": "cpu"}
SMALL = {"prompt": "a cat", "num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 2}
CAT = {"task_type": "t2v", **SMALL}
FOX = {"task_type": "i2v", **SMALL}
KEYS = ("a" * 20, "b" * 20)
NOBODY = "video_" + "0" * 32


@dataclass
class Agent:
    """A client, and the notifications that it received from a server."""

    client: Client
    told: list[tuple[float, str]] = field(default_factory=list)

    async def call(self, tool: str, **arguments: Any) -> Any:
        """Call a tool; returns the result."""

        async def progress(part: float, total: float | None, message: str | None) -> None:
            self.told.append((part, message or ""))

        return await self.client.call_tool(tool, arguments, progress_callback=progress)

    async def get(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The JSON of a tool's answer, which models read as text."""
        answer = await self.call(tool, **arguments)
        assert not answer.is_error, answer.content
        assert answer.structured_content is None  # with it, Claude Code would show models no image and no text
        return json.loads(answer.content[0].text)

    async def error(self, tool: str, **arguments: Any) -> str:
        """The error message of a refused call."""
        answer = await self.call(tool, **arguments)
        assert answer.is_error and len(answer.content) == 1
        assert answer.content[0].text.isprintable()
        return answer.content[0].text

    async def read(self, uri: str) -> bytes:
        (content,) = (await self.client.read_resource(uri)).contents
        return base64.b64decode(content.blob)


def with_agent(server: Any, do: Callable[[Agent], Awaitable[None]], **options: Any) -> None:
    """Connect to a server and run a function with the agent."""

    async def run() -> None:
        async with Client(server, **options) as client:
            await do(Agent(client))

    asyncio.run(run())


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder of files, with links to and from a private folder beside it."""
    folder = tmp_path / "files"
    (folder / "inner").mkdir(parents=True)
    for name in ("files/fox.png", "files/inner/a, b.png", "secret.png"):
        shutil.copy(ASSETS / "fox.png", tmp_path / name)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "same.png").symlink_to("fox.png")
    (folder / "text.png").write_text("root:x:0:0")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def local(serve, files) -> Iterator[tuple[Any, Served]]:
    """A server in this process without workers, and what is behind it."""
    served = serve(defaults=TINY, files=files)
    yield Tools(served.client.app.state.api, is_local=True).server(), served


def test_tools_are_made_from_the_table_of_flags(local):
    async def do(agent: Agent) -> None:
        tools = {tool.name: tool for tool in (await agent.client.list_tools()).tools}
        assert [*tools] == ["generate", "plan", "get", "cancel", "list", "models"]
        schema = tools["generate"].input_schema
        fields = schema["properties"]
        assert schema["required"] == ["task_type", "prompt"] and tools["plan"].input_schema == schema
        assert fields["task_type"]["enum"] == [*TASK_NAMES] and fields["model"]["enum"][0] == "tiny"
        assert fields["width"].items() >= {"type": "integer", "minimum": 16, "maximum": 2048}.items()
        assert fields["ref_imgs"]["items"] == {"type": "string"} and fields["no_riflex"]["type"] == "boolean"
        assert "single_shot_extension: default 5, 5 to 30" in fields["duration"]["description"]
        assert not fields.keys() & {"output", "device", "model_id", "offload", "api_key", "files", "no_metadata"}
        assert "below the server's folder of files" in tools["generate"].description
        assert "--" not in json.dumps([tool.model_dump() for tool in tools.values()])

    with_agent(local[0], do)


def test_files_that_are_refused(local, tmp_path):
    server, served = local
    cases = (
        *((name, "is not below the server's folder of files; give a path in it") for name in (
            "/etc/passwd", "../secret.png", "inner/../fox.png", "link.png", "up/secret.png", f"{tmp_path}/secret.png",
            "up/server/queue.sqlite", f"{tmp_path}/files/../secret.png",
        )),
        *((name, "cannot be read") for name in ("pipe", "inner", "nothing.png", "a\0b", "x" * 5000, "~/a.png")),
        *((name, "is not an http(s) URL, a data URL, a path") for name in ("", " ", "file:///etc/passwd", "ftp://a/b")),
        ("text.png", "text.png is not a picture"),
        ("http://127.0.0.1/a.png", "is an address of this machine"),
        (NOBODY, "there is no video"),
        (f"skyreels://{NOBODY}/last.png", "there is no video"),
        ({"path": "/etc/passwd"}, "is not a file; give a string"),
    )  # fmt: skip

    async def do(agent: Agent) -> None:
        for image, words in cases:
            assert words in await agent.error("generate", **FOX, image=image), image

    with_agent(server, do)
    assert not [*(served.folder / "jobs").iterdir()]


def test_without_a_folder_no_file_is_read(serve):
    served = serve(defaults=TINY)

    async def do(agent: Agent) -> None:
        error = await agent.error("generate", **FOX, image=str(ASSETS / "fox.png"))
        assert error.endswith("the server reads no files: it was started without a folder for them)")

    with_agent(Tools(served.client.app.state.api, is_local=True).server(), do)


def test_a_link_that_is_put_there_meanwhile(files, tmp_path, monkeypatch):
    """Between checking a path and opening the file."""
    from skyreels_v3.web.mcp.files import open_below

    realpath = os.path.realpath

    def exchange(path: Path) -> str:
        real = realpath(path)
        (files / "fox.png").unlink()
        (files / "fox.png").symlink_to(tmp_path / "secret.png")
        return real

    monkeypatch.setattr(os.path, "realpath", exchange)
    with pytest.raises(OSError, match="symbolic links"):
        open_below(files, "fox.png", tmp_path / "server")


def test_wrong_arguments_are_tool_errors(local):
    cases = (
        ("generate", CAT | {"width": 33}, "width: 33: not a multiple of 16; give 32 or 48"),
        ("generate", CAT | {"num_frames": 10**30}, f"num_frames: {10**30} is out of range; give a whole number from 1"),
        ("generate", CAT | {"duration": 3}, "duration: 3: conflicts with num_frames; give one of them"),
        ("generate", FOX, "image: missing; i2v needs first frame of the video"),
        ("generate", CAT | {"ref_imgs": ["fox.png"] * 4}, "ref_imgs: t2v does not take it; leave it out"),
        ("generate", CAT | {"output": "/tmp/a.mp4"}, "output: is set by the server; leave it out"),
        ("generate", CAT | {"model": "/etc"}, "model: /etc is not served; choose one of tiny, "),
        ("generate", CAT | {"lora": ["/etc/passwd"]}, "lora: passwd is not a hub id; give OWNER/NAME"),
        ("plan", CAT | {"zzz": 1}, "unknown key zzz; see the tool's schema"),
        ("get", {"id": NOBODY}, f"there is no video {NOBODY}"),
        ("get", {}, "id: missing; give the id of the video"),
        ("get", {"id": NOBODY, "wait": 301}, "wait: 301 is out of range; give a number from 0 to 300"),
        ("cancel", {"id": "../x"}, "there is no video ../x"),
        ("list", {"status": "done"}, "status: done: choose queued, in_progress, completed, failed or cancelled"),
        ("models", {"x": 1}, "x: models does not take it; leave it out"),
    )

    async def do(agent: Agent) -> None:
        for tool, arguments, words in cases:
            assert (await agent.error(tool, **arguments)).startswith(words)
        with pytest.raises(MCPError, match="there is no tool rm"):
            await agent.call("rm")
        for uri in (f"skyreels://{NOBODY}/video.mp4", "file:///etc/passwd"):
            with pytest.raises(MCPError, match=r"there is no video|is not skyreels://ID/NAME"):
                await agent.read(uri)

    with_agent(local[0], do)


def test_what_was_made_is_seen_and_used(local):
    """The test makes the video in place of a worker."""
    server, served = local

    async def do(agent: Agent) -> None:
        made = await agent.get("generate", **FOX, image="same.png", seed=7)
        assert (made["status"], made["videos_before"], made["seed"], made["size"]) == ("queued", 0, 7, "32x32")
        id = made["id"]
        assert (served.folder / "jobs" / id / "image.png").read_bytes() == (ASSETS / "fox.png").read_bytes()
        with pytest.raises(MCPError, match=f"there is no video.mp4 of {id}, which is queued"):
            await agent.read(f"skyreels://{id}/video.mp4")
        served.finish(id)
        answer = await agent.call("get", id=id)
        text, picture, clip = answer.content
        facts = json.loads(text.text)
        assert (facts["status"], facts["num_frames"], facts["fps"]) == ("completed", 5, 24)
        assert Path(facts["path"]).read_bytes() == await agent.read(clip.uri) == served.video
        assert (clip.uri, clip.size) == (facts["video"], len(served.video))
        sheet = Image.open(BytesIO(base64.b64decode(picture.data)))
        assert sheet.format == "JPEG" and picture.mime_type == "image/jpeg" and sheet.size > (32, 32)
        last = await agent.read(facts["last_frame"])
        assert Image.open(BytesIO(last)).size == (32, 32)
        (resource,) = (await agent.client.list_resources()).resources
        assert (resource.uri, resource.description) == (facts["video"], "a cat")
        more = [
            await agent.get("generate", **FOX, image=id),  # uses the video's last frame
            await agent.get("generate", **FOX, image=facts["last_frame"]),
            await agent.get("generate", task_type="single_shot_extension", prompt="a", duration=5, input_video=id),
        ]
        inputs = [served.folder / "jobs" / each["id"] for each in more]
        assert (inputs[0] / "image.png").read_bytes() == (inputs[1] / "image.png").read_bytes() == last
        assert (inputs[2] / "input_video.mp4").read_bytes() == served.video
        assert {each["made_from"] for each in more} == {id}
        assert (await agent.get("cancel", id=more[2]["id"]))["status"] == "cancelled"
        listed = await agent.get("list", limit=2, after=more[2]["id"])
        assert [each["id"] for each in listed["videos"]] == [more[1]["id"], more[0]["id"]] and listed["has_more"]
        assert [each["id"] for each in (await agent.get("list", status="completed"))["videos"]] == [id]

    with_agent(server, do)


def test_models(local):
    async def do(agent: Agent) -> None:
        tasks = {task["task_type"]: task for task in (await agent.get("models"))["tasks"]}
        assert [*tasks] == [*TASK_NAMES]
        task = tasks["single_shot_extension"]
        assert task["needs"] == ["prompt", "input_video"] and task["duration"] == {"default": 5, "min": 5, "max": 30}
        tiny, published = task["models"][:2]
        assert tiny == {"model": "tiny", "on_this_machine": True}
        assert published["to_download"] == ["Skywork/SkyReels-V3-V2V-14B"] and published["about_gigabytes"] > 30

    with_agent(local[0], do)


def test_plan(local, monkeypatch):
    """The plan is stubbed: real ones need a process that imports torch, and are covered by the API's tests."""
    server, served = local

    async def plan(flags: dict[str, Any], folder: Path) -> dict[str, Any]:
        assert flags["image"] == "image.png" and (folder / "image.png").is_file()
        return {"text": f"output {folder}/video.mp4", "frames": 5}

    monkeypatch.setattr(served.client.app.state.api.planner, "plan", plan)

    async def do(agent: Agent) -> None:
        answer = await agent.call("plan", **FOX, image="fox.png")
        assert (answer.content[0].text, answer.structured_content) == ("output video.mp4", None)

    with_agent(server, do)
    assert not [*(served.folder / "jobs").iterdir()]


# HTTP


def test_http_needs_a_key(tmp_path):
    """The same authentication as for the API, and owners cannot see each other's videos."""
    queue = Queue(tmp_path, server=True)
    app = app_of(Settings(tmp_path, TINY, keys=KEYS), queue)
    module.mount_mcp(app)

    def http(app: Starlette, key: str) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), headers=headers, base_url=BASE)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            ids = []
            for key in KEYS:
                async with http(app, key) as client:
                    transport = streamable_http_client(f"{BASE}/mcp", http_client=client)
                    async with Client(transport) as connected:
                        agent = Agent(connected)
                        ids.append((await agent.get("generate", **CAT))["id"])
                        await agent.get("get", id=ids[-1], wait=0.2, picture=False)
                        assert agent.told == [(0.0, "queued")]
                        assert [each["id"] for each in (await agent.get("list"))["videos"]] == ids[-1:]
                        if ids[1:]:
                            assert await agent.error("cancel", id=ids[0]) == f"there is no video {ids[0]}"
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            for key, headers, status in (
                ("c" * 20, {}, 401),
                (KEYS[0], {"Host": "evil.com"}, 403),
                (KEYS[0], {"Origin": "http://evil.com"}, 403),
            ):
                async with http(app, key) as client:
                    assert (await client.post("/mcp", json=body, headers=headers)).status_code == status
            async with http(app, KEYS[0]) as client:
                assert (await client.get("/mcp")).status_code == 405
                assert (await client.post("/mcp", content=b" " * (33 << 20))).status_code == 413

    try:
        asyncio.run(run())
    finally:
        queue.close()


# A process


@pytest.mark.slow
def test_a_video_over_stdio(tmp_path, cache, files):
    """Made, watched and read, with another job left unfinished: no process is left, but the job is."""
    command = ["mcp", "--model_id", "tiny", "--device", "cpu", "--outdir", str(tmp_path / "out"), "--files", str(files)]
    environment = {"PYTHONPATH": str(ROOT), "SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    server = StdioServerParameters(command=sys.executable, args=["-m", "skyreels_v3", *command], env=environment)
    noise: list[Exception] = []
    left = ""

    async def listen(message: object) -> None:
        if isinstance(message, Exception):
            noise.append(message)  # a line on stdout that is not part of the protocol

    async def do(agent: Agent) -> None:
        nonlocal left
        made = await agent.get("generate", **FOX, image="fox.png")
        ended = await agent.get("get", id=made["id"], wait=120)
        assert ended["status"] == "completed", ended
        assert agent.told == sorted(agent.told) and {"queued", "denoising"} & {message for _, message in agent.told}
        (tmp_path / "read.mp4").write_bytes(await agent.read(ended["video"]))
        frames, _ = imageio_ffmpeg.count_frames_and_secs(tmp_path / "read.mp4")
        assert frames == 5
        left = (await agent.get("generate", **FOX | {"num_inference_steps": 200}, image=made["id"]))["id"]
        while (await agent.get("get", id=left, wait=0))["status"] == "queued":
            await asyncio.sleep(0.1)

    before = {process.pid for process in psutil.process_iter()}
    with_agent(server, do, message_handler=listen)
    assert not noise
    wait(lambda: not [each for each in new_processes(before) if str(tmp_path) in each], 20)
    queue = Queue(tmp_path / "out")
    try:
        assert queue.get(left).state is State.QUEUED
    finally:
        queue.close()


def new_processes(before: set[int]) -> Iterator[str]:
    """The command lines of processes started since `before`."""
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["pid"] not in before and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield " ".join(process.info["cmdline"] or ())


def test_one_of_several_processes_makes_the_videos(tmp_path, monkeypatch):
    """Each process has a client; when the one that makes videos ends, another takes over."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    makes: list[str] = []

    @contextmanager
    def supervise(name: str) -> Iterator[None]:
        makes.append(name)
        try:
            yield
        finally:
            makes.append(f"{name} ended")

    async def run() -> None:
        first, second = Queue(tmp_path, server=True), Queue(tmp_path)
        tasks = [
            asyncio.create_task(module.work(queue, lambda name=name: supervise(name)))
            for name, queue in (("first", first), ("second", second))
        ]
        await asyncio.sleep(0.1)
        assert makes == ["first"]
        tasks[0].cancel()
        first.close()
        while len(makes) < 3:
            await asyncio.sleep(0.1)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        second.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert makes == ["first", "first ended", "second", "second ended"]


def test_a_failure_is_no_interrupt(tmp_path, monkeypatch, capsys):
    """If no GPU is found, one line says so and the exit code is 1."""

    def supervise() -> NoReturn:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(module, "stdio_server", lambda: nullcontext(reversed(create_memory_object_stream[Any]())))
    monkeypatch.setattr(module.processes, "exit_process", lambda code, at_once=False: sys.exit(code))
    with pytest.raises(SystemExit) as end:
        module.serve_stdio(Settings(tmp_path), Queue(tmp_path, server=True), supervise)
    assert end.value.code == 1 and capsys.readouterr().err == "error: RuntimeError: no GPU\n"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["mcp", "--port", "1"], "--port: is for an HTTP server; add --serve"),
        (["mcp", "--files", "/nothing"], "--files: /nothing is not a folder; give one"),
        (
            ["mcp", "--prompt", "a"],
            "--prompt: a: cannot be combined with --mcp, whose requests say what to make; leave it",
        ),
        (["mcp", "--serve", "--host", "0.0.0.0"], "--host: 0.0.0.0: other machines could use this server; add --api"),
        (["serve", "--files", "/"], "--files: is for MCP; add --mcp"),
        (["generate", "--task_type", "t2v", "--prompt", "a", "--files", "/"], "--files: is for a server; add --mcp"),
    ],
)
def test_flags(capsys, argv, error):
    assert run_command([*argv, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_a_missing_package(capsys, monkeypatch):
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: None)
    assert run_command(["mcp"]) == 2
    assert capsys.readouterr().err == (
        "error: --mcp: needs the package 'mcp>=2'; pip install 'mcp>=2', or use --serve\n"
    )
