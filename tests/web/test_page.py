"""The page in a browser: forms, plans, progress, cancelling, settings, extensions; as wide as a desktop and a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skyreels_v3.media.video_reader import read_frames
from tests.conftest import ASSETS, ROOT

pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-web.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
TABS = {
    **{"t2v": "Text", "i2v": "Image", "reference_to_video": "References", "talking_avatar": "Avatar"},
    **{"single_shot_extension": "Extend", "shot_switching_extension": "New shot"},
}
FILES = {
    "i2v": {"image-0": "fox.png"},
    "reference_to_video": {"ref_imgs-0": "fox.png", "ref_imgs-1": "lantern.png"},
    "talking_avatar": {"input_image-0": "portrait.png", "input_audio-0": "speech.mp3"},
    "single_shot_extension": {"input_video-0": "boat.mp4"},
    "shot_switching_extension": {"input_video-0": "boat.mp4"},
}
SMALL = {"width": 48, "height": 32, "num_inference_steps": 2}
LENGTH = {
    **{"t2v": {"num_frames": 5}, "i2v": {"num_frames": 5}, "reference_to_video": {"num_frames": 5}},
    "shot_switching_extension": {"duration": 2},
}
DESKTOP, PHONE = (1280, 900), (390, 844)
EVIL = "<script>alert(1)</script> ${1 + 1} {{value}} <img src=x onerror=alert(2)>"

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory, cache) -> Iterator[Serve]:
    """Start a server; gives its address."""
    processes = []

    def serve(*arguments: str) -> str:
        folder = tmp_path_factory.mktemp("server")
        command = [sys.executable, str(ROOT / "generate_video.py"), "--serve", "--port", "0", "--model_id", "tiny"]
        process = subprocess.Popen(
            [*command, "--outdir", str(folder), *arguments], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, env=os.environ | {"SKYREELS_CACHE": str(cache)}, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        line = process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), line
        return line

    yield serve
    for process in processes:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(serve) -> str:
    return serve()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium


@pytest.fixture
def browse(chromium, tmp_path) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end there must have been no error in its console, and no request to another host."""
    contexts, problems = [], []

    def browse(address: str, size: tuple[int, int] = DESKTOP, ready: str = "#t2v-start") -> Any:
        context = chromium.launch_persistent_context(
            tmp_path / f"profile-{len(contexts)}", executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": size[0], "height": size[1]},
        )  # fmt: skip
        contexts.append(context)
        page = context.pages[0]
        page.set_default_timeout(60_000)
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        own = (f"{address}/", f"blob:{address}/", "data:")
        page.on("request", lambda sent: None if sent.url.startswith(own) else problems.append(sent.url))
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield browse
    for context in contexts:
        context.close()
    assert not problems


def ask(address: str, path: str, **headers: str) -> tuple[int, Any]:
    """An answer of the API, without a browser."""
    sent = urllib.request.Request(f"{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(sent, timeout=60) as answer:
            body = answer.read()
            return answer.status, json.loads(body) if answer.headers["content-type"] == "application/json" else body
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def videos(address: str, **headers: str) -> list[dict[str, Any]]:
    return ask(address, "/v1/videos?limit=100", **headers)[1]["data"]


def open_tab(page: Any, task: str) -> None:
    tab = page.locator(f"#tab-{task}-button:visible")
    if not tab.count():  # behind the tabs that have room
        page.click(".overflow-menu > button")
        tab = page.locator(f".overflow-dropdown button:text-is('{TABS[task]}')")
    tab.click()
    page.wait_for_selector(f"#{task}-start:visible")


def fill(page: Any, task: str, prompt: str, **values: Any) -> None:
    """Fill in a form of small size."""
    open_tab(page, task)
    page.fill(f"#{task}-prompt textarea", prompt)
    for name, file in FILES.get(task, {}).items():
        page.set_input_files(f"#{task}-{name} input[type=file]", str(ASSETS / file))
        page.wait_for_selector(f"#{task}-{name} :is(img, video, .waveform-container)")
    for name, value in (SMALL | LENGTH.get(task, {}) | values).items():
        page.fill(f"#{task}-{name} :is(input, textarea)", str(value))


LIST = "async () => (await (await fetch('/v1/videos?limit=100')).json()).data.map((video) => video.id)"


def start(page: Any, task: str) -> str:
    """Start the form's video; returns its id."""
    before = page.evaluate(LIST)
    page.click(f"#{task}-start")
    page.wait_for_function(f"async (before) => (await ({LIST})()).length > before", arg=len(before))
    page.wait_for_selector(f"#{task}-notice .message")
    return page.evaluate(LIST)[0]


def wait_for_end(page: Any, id: str) -> str:
    """Wait for a video in the gallery; returns its card's selector."""
    card = f"#gallery li[data-job='{id}']"
    page.wait_for_selector(f"{card} video", timeout=120_000)
    return card


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_from_prompt_to_video_and_back(server, browse, size):
    page = browse(server, size)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    before = len(videos(server))
    fill(page, "t2v", f"A cat {EVIL}", seed=7)
    page.click("#t2v-plan")
    plan = page.wait_for_selector("#t2v-notice .plan").inner_text()
    assert "48 x 32" in plan and "5 (0.21 s at 24 fps)" in plan
    page.click("#t2v-notice summary")
    assert "passes" not in plan and "latents [1, 16, 2, 4, 6]" in page.inner_text("#t2v-notice pre")
    assert len(videos(server)) == before
    id = start(page, "t2v")
    card = wait_for_end(page, id)
    made = ask(server, f"/v1/videos/{id}")[1]
    assert made["details"]["seed"] == 7 and made["size"] == "48x32"
    assert EVIL in page.inner_text(card)
    assert page.evaluate(f'fetch(document.querySelector("{card} video").src).then(answer => answer.status)') == 200

    page.fill("#t2v-prompt textarea", "something else")
    page.click(f"{card} button[data-do=reload]")
    page.wait_for_function(f"document.querySelector('#t2v-prompt textarea').value == {json.dumps(made['prompt'])}")
    assert page.input_value("#t2v-seed input") == "7" and page.input_value("#t2v-width input") == "48"
    page.click(f"{card} button[data-do=again]")
    page.wait_for_function(f"document.querySelectorAll('#gallery li').length == {before + 2}", timeout=120_000)
    again = videos(server)[0]
    assert again["remixed_from_video_id"] == made["id"] and again["details"]["seed"] != 7
    page.click(f"{card} button[data-do=compare]")
    page.wait_for_selector("#compare video")
    page.click(f"#gallery li[data-job='{again['id']}'] button[data-do=compare]")
    page.wait_for_function("document.querySelectorAll('#compare video').length == 2")
    assert "Seed" in page.inner_text("#compare")
    page.click("#compare button[data-do=play]")
    page.click("#compare button[data-do=close]")
    page.wait_for_selector("#compare video", state="detached")
    page.click(f"{card} button[data-do=delete]")
    page.wait_for_selector(card, state="detached")
    assert ask(server, f"/v1/videos/{made['id']}")[0] == 404


@pytest.mark.parametrize("task", list(FILES))
def test_each_task(server, browse, task):
    page = browse(server, PHONE if task == "i2v" else DESKTOP)
    fill(page, task, "A boat sails on")
    page.click(f"#{task}-plan")
    assert "48 x 32" in page.wait_for_selector(f"#{task}-notice .plan").inner_text()
    id = start(page, task)
    card = wait_for_end(page, id)
    assert ask(server, f"/v1/videos/{id}")[1]["details"]["task_type"] == task
    page.reload()  # an empty form
    page.click(f"{card} button[data-do=reload]")
    for name in FILES[task]:
        page.wait_for_selector(f"#{task}-{name} :is(img, video, .waveform-container):visible")
    page.fill(f"#{task}-seed input", "8")
    again = start(page, task)  # with the files of the first one
    wait_for_end(page, again)


def test_extend_and_metadata(server, browse, tmp_path):
    page = browse(server)
    fill(page, "t2v", "A red lantern rises", num_frames=49)
    first = start(page, "t2v")
    page.click(f"{wait_for_end(page, first)} button[data-do=extend]")
    page.wait_for_selector("#single_shot_extension-input_video-0 video:visible")
    assert page.input_value("#single_shot_extension-prompt textarea") == "A red lantern rises"
    for name, value in (SMALL | {"num_inference_steps": 1}).items():
        page.fill(f"#single_shot_extension-{name} :is(input, textarea)", str(value))
    longer = start(page, "single_shot_extension")
    wait_for_end(page, longer)
    file = tmp_path / "longer.mp4"
    file.write_bytes(ask(server, f"/v1/videos/{longer}/content")[1])
    assert sum(1 for _ in read_frames(file, 24)) == 49 + 5 * 24  # both in one

    file = tmp_path / "clip.mp4"
    file.write_bytes(ask(server, f"/v1/videos/{first}/content")[1])
    page.click("#record-box > button")
    page.set_input_files("#record input[type=file]", str(file))
    page.wait_for_selector("#t2v-prompt textarea:visible")
    page.wait_for_function("document.querySelector('#t2v-num_frames input, #t2v-num_frames textarea').value == '49'")
    page.set_input_files("#record input[type=file]", str(ASSETS / "boat.mp4"))
    page.wait_for_selector("#record-notice .notice")
    assert "does not say how it was made" in page.inner_text("#record-notice")


def test_errors_stand_above_the_buttons(server, browse):
    page = browse(server)
    fill(page, "t2v", "A cat", num_frames=5000)
    page.click("#t2v-start")
    error = page.wait_for_selector("#t2v-notice .notice")
    assert error.inner_text().startswith("Frames: 5000: out of range; t2v makes up to 385 frames")
    assert page.evaluate("getComputedStyle(document.querySelector('#t2v-num_frames')).outlineStyle") == "solid"
    open_tab(page, "reference_to_video")
    page.fill("#reference_to_video-prompt textarea", "A fox")
    page.click("#reference_to_video-plan")
    assert page.wait_for_selector("#reference_to_video-notice .notice").inner_text().startswith("Reference: missing")
    assert not page.locator("#reference_to_video-fps").count()  # not for this task


def test_examples_fill_the_form(server, browse):
    page = browse(server)
    open_tab(page, "reference_to_video")
    page.locator("#reference_to_video-examples tbody tr:visible").first.click()
    for number in (0, 1):
        page.wait_for_selector(f"#reference_to_video-ref_imgs-{number} img")
    assert page.input_value("#reference_to_video-prompt textarea") == "A fox carries a red lantern through the snow"


def test_queue_cancel_and_keyboard(server, browse):
    page = browse(server)
    fill(page, "t2v", "A cat", num_frames=97, num_inference_steps=200)
    for _ in range(3):
        start(page, "t2v")
    page.wait_for_selector("#queue progress")
    page.wait_for_function("/step [0-9]+ of 200/.test(document.querySelector('#queue').innerText)", timeout=120_000)
    page.wait_for_selector("#queue img")
    last = page.locator("#queue li").last.get_attribute("data-job")
    page.click(f"#queue li[data-job='{last}'] button[data-do=up]")
    page.wait_for_function(f"document.querySelectorAll('#queue li')[1].dataset.job == '{last}'")
    while (count := page.locator("#queue li").count()) > 0:  # by the keyboard alone
        page.locator("#queue button[data-do=cancel]").last.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            f"document.querySelectorAll('#queue li').length < {count} || !document.querySelector('#queue button')"
        )
        if not page.locator("#queue button").count():
            break
    page.wait_for_selector("#queue li", state="detached")
    assert {video["details"]["state"] for video in videos(server)[:3]} == {"cancelled"}


def test_keys(serve, browse):
    address = serve("--api_key", "first-key")
    assert ask(address, "/config")[0] == 401 and ask(address, "/gradio_api/startup-events")[0] == 401
    page = browse(address, PHONE, "#key")
    page.fill("#key", "first-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#t2v-start")
    fill(page, "t2v", "A cat")
    wait_for_end(page, start(page, "t2v"))
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert len(videos(address, Authorization="Bearer first-key")) == 1


def test_gradio_gives_no_other_files(server):
    for path in ("/etc/passwd", str(ASSETS / "fox.png"), "../queue.sqlite", "http://example.org/"):
        assert ask(server, f"/gradio_api/file={path}")[0] == 404
    for path in ("/gradio_api/proxy=http://example.org/", "/monitoring", "/gradio_api/vibe-code", "/v1/nothing"):
        assert ask(server, path)[0] == 404
    html = ask(server, "/")[1].decode()
    assert not re.search(r'<(script|link)[^>]+(src|href)="https?://', html)


def test_the_command_needs_no_gradio():
    code = "import sys, skyreels_v3.main, skyreels_v3.web.serve; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
