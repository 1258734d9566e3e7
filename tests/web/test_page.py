"""The page in a browser: forms, plans, progress, canceling, settings, extensions; at desktop and phone widths."""

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.video_reader import read_frames
from tests.conftest import ASSETS, ROOT
from tests.web.conftest import png

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
EXTENSIONS = ("single_shot_extension", "shot_switching_extension")
SMALL = {"width": 48, "height": 32, "num_inference_steps": 2}
LENGTH = {
    **{"t2v": {"num_frames": 5}, "i2v": {"num_frames": 5}, "reference_to_video": {"num_frames": 5}},
    "shot_switching_extension": {"duration": 2},
}
DESKTOP, PHONE = (1400, 900), (390, 844)
EVIL = "<script>alert(1)</script> ${1 + 1} {{value}} <img src=x onerror=alert(2)>"

# {text: contrast} of visible text below the WCAG AA contrast for small text
CONTRAST = """() => {
    const parse = (color) => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
    const over = (top, below) => below.map((level, i) => level * (1 - top[3]) + top[i] * top[3]);
    const linear = (level) => level <= 10 ? level / 3295 : ((level / 255 + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const background = (node) => node
        ? over(parse(getComputedStyle(node).backgroundColor), background(node.parentElement)) : [255, 255, 255];
    const poor = {};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), node = walker.currentNode.parentElement;
        const shown = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
        if (!text || !shown || !node.getBoundingClientRect().width) continue;
        const below = background(node);
        const levels = [luminance(below), luminance(over(parse(getComputedStyle(node).color), below))];
        const contrast = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
        if (contrast < 4.5) poor[text] = contrast;
    }
    return poor;
}"""
SHIFTS = """() => new Promise((done) => new PerformanceObserver((list) => {
    done(list.getEntries().reduce((sum, entry) => sum + (entry.hadRecentInput ? 0 : entry.value), 0));
}).observe({ type: 'layout-shift', buffered: true }) || setTimeout(() => done(0), 1000))"""
# Gradio sets a tab's or group's initial values one frame after showing it, which overwrites earlier typing
SETTLED = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"""

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve(cache) -> Iterator[Serve]:
    """Start a server; returns its address."""
    processes = []

    def serve(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "generate_video.py"), "--serve", "--port", "0", "--model_id", "tiny"]
        process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"SKYREELS_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
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
def folder(tmp_path_factory) -> Path:
    """The folder of `server`."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(serve, folder) -> str:
    return serve("--outdir", str(folder))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium) -> Iterator[Callable[..., Any]]:
    """Open a page; fails at the end if there were console errors or requests to other hosts."""
    contexts, problems = [], []

    def browse(address: str, size: tuple[int, int] = DESKTOP, ready: str = "#t2v-start", **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        own = (f"{address}/", f"blob:{address}/", "data:")
        page.on("request", lambda sent: None if sent.url.startswith(own) else problems.append(sent.url))
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    browse.refused = re.compile("$^")  # errors that a test provokes on purpose
    yield browse
    for context in contexts:
        context.close()
    assert not [problem for problem in problems if not browse.refused.search(problem)]


def ask(address: str, path: str, **headers: str) -> tuple[int, Any]:
    """Call the API without a browser."""
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
    if not tab.count():  # in the overflow menu
        page.click(".overflow-menu > button")
        tab = page.locator(f".overflow-dropdown button:text-is('{TABS[task]}')")
    tab.click()
    page.wait_for_selector(f"#{task}-start:visible")
    page.evaluate(SETTLED)


def open_group(page: Any, group: str, field: str) -> None:
    page.click(f"#{group} .label-wrap")
    page.wait_for_selector(f"#{field}:visible")
    page.evaluate(SETTLED)


def fill(page: Any, task: str, prompt: str, own: Any = None, **values: Any) -> None:
    """Fill in a form for a small video, with the task's files or with `own` in place of each."""
    open_tab(page, task)
    page.fill(f"#{task}-prompt textarea", prompt)
    for name, file in FILES.get(task, {}).items():
        page.set_input_files(f"#{task}-{name} input[type=file]", own or str(ASSETS / file))
        page.wait_for_selector(f"#{task}-{name} :is(img, video, .waveform-container)")
    for name, value in (SMALL | LENGTH.get(task, {}) | values).items():
        page.fill(f"#{task}-{name} :is(input, textarea)", str(value))


LIST = "async () => (await (await fetch('/v1/videos?limit=100')).json()).data.map((video) => video.id)"


def start(page: Any, task: str) -> str:
    """Start the form's video; returns its id."""
    message = f"#{task}-notice .message"
    before = page.locator(message).get_attribute("data-time") if page.locator(message).count() else ""
    page.click(f"#{task}-start")
    page.wait_for_function(f"![undefined, '{before}'].includes(document.querySelector('{message}')?.dataset.time)")
    return page.evaluate(LIST)[0]


def wait_for_end(page: Any, id: str) -> str:
    """Wait for a video in the gallery; returns its card's selector."""
    card = f"#gallery li[data-job='{id}']"
    page.wait_for_selector(f"{card} video", timeout=120_000)
    return card


def cancel(server: str, id: str) -> None:
    sent = urllib.request.Request(f"{server}/v1/videos/{id}/cancel", method="POST")
    with urllib.request.urlopen(sent, timeout=60) as answer:
        assert answer.status == 200


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
    assert size == DESKTOP or page.locator("#t2v-notice summary").bounding_box()["height"] >= 40
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
    assert page.input_value("#t2v-seed input") == "7" and page.input_value("#t2v-width textarea") == "48"
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
    delete = page.locator(f"{card} button[data-do=delete]")
    delete.click()
    assert delete.inner_text() == "Delete it?" and ask(server, f"/v1/videos/{made['id']}")[0] == 200
    delete.click()
    page.wait_for_selector(card, state="detached")
    assert ask(server, f"/v1/videos/{made['id']}")[0] == 404


@pytest.mark.parametrize(
    "task",
    [
        "reference_to_video",
        "talking_avatar",
        *(pytest.param(task, marks=pytest.mark.extended) for task in ("i2v", *EXTENSIONS)),
    ],
)
def test_each_task(server, browse, folder, task):
    page = browse(server, PHONE if task == "i2v" else DESKTOP)
    fill(page, task, "A boat sails on")
    page.click(f"#{task}-plan")
    assert "48 x 32" in page.wait_for_selector(f"#{task}-notice .plan").inner_text()
    id = start(page, task)
    card = wait_for_end(page, id)
    assert ask(server, f"/v1/videos/{id}")[1]["details"]["task_type"] == task
    page.reload()  # resets the form
    page.click(f"{card} button[data-do=reload]")
    for name in FILES[task]:
        page.wait_for_selector(f"#{task}-{name} :is(img, video, .waveform-container):visible")
    page.fill(f"#{task}-seed input", "8")
    again = start(page, task)  # with the files of the first video
    assert all([*(folder / "jobs" / again).glob(f"{name.rpartition('-')[0]}*")] for name in FILES[task])
    cancel(server, again)
    page.wait_for_selector(f"#gallery li[data-job='{again}']")  # canceled, unless it had finished before


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
    assert sum(1 for _ in read_frames(file, 24)) == 49 + 5 * 24  # both in one video

    file = tmp_path / "clip.mp4"
    file.write_bytes(ask(server, f"/v1/videos/{first}/content")[1])
    page.click("#record-box > button")
    page.set_input_files("#record input[type=file]", str(file))
    page.wait_for_selector("#t2v-prompt textarea:visible")
    page.wait_for_function("document.querySelector('#t2v-num_frames input, #t2v-num_frames textarea').value == '49'")
    page.wait_for_function("document.querySelector('#head').getBoundingClientRect().top >= 0")  # the form is in view
    assert page.inner_text("#t2v-notice .message") == "The settings are in the form."
    page.set_input_files("#record input[type=file]", str(ASSETS / "boat.mp4"))
    page.wait_for_selector("#record-notice .notice")
    assert page.inner_text("#record-notice").endswith("does not say how it was made; give a video that was made here")


def test_trimmed_files_are_sent(server, browse, folder):
    page = browse(server)
    fill(page, "single_shot_extension", "The boat sails on")
    page.fill("#single_shot_extension-input_video-from textarea", "0.5")
    page.fill("#single_shot_extension-input_video-to textarea", "9")
    page.click("#single_shot_extension-plan")
    error = page.wait_for_selector("#single_shot_extension-input_video .field-error").inner_text()
    assert error == "Clip: 0.5 to 9: give two times within its 3.00 s, such as 0.5 to 2"
    page.fill("#single_shot_extension-input_video-to textarea", "2.5")
    id = start(page, "single_shot_extension")
    sent = [*read_frames(folder / "jobs" / id / "input_video.mp4", 24)]
    whole = [*read_frames(ASSETS / "boat.mp4", 24)]
    assert len(sent) == 48
    for frame, number in ((sent[0], 12), (sent[-1], 59)):
        errors = [np.abs(frame.astype(int) - other).mean() for other in whole[number - 2 : number + 3]]
        assert np.argmin(errors) == 2 and errors[2] < 2
    cancel(server, id)

    fill(page, "talking_avatar", "A woman talks")
    sound = "#talking_avatar-input_audio-0"
    page.click(f"{sound} button[aria-label^='Trim audio']")
    page.wait_for_function(f"/[1-9]$/.test(document.querySelector('{sound} #trim-duration').textContent)")
    page.wait_for_timeout(1000)  # until the sound is decoded, which nothing indicates
    page.click(f"{sound} button:text-is('Trim')")
    page.wait_for_function(f"parseInt(document.querySelector('{sound} #duration').textContent.slice(-2)) < 3")
    id = start(page, "talking_avatar")
    (sent,) = (folder / "jobs" / id).glob("input_audio*")
    assert 0.5 < probe_audio(sent).seconds < probe_audio(ASSETS / "speech.mp3").seconds / 2
    cancel(server, id)


def test_errors_stand_at_their_fields(server, browse):
    page = browse(server)
    browse.refused = re.compile("^Waveform load error")  # for a file that is not audio
    fill(page, "t2v", "A cat", num_frames=5000)
    page.click("#t2v-start")
    text = "Frames: 5000: out of range; t2v makes up to 385 frames"
    assert page.wait_for_selector("#t2v-notice .notice").inner_text().startswith(text)
    assert page.wait_for_selector("#t2v-num_frames .field-error").inner_text().startswith(text)
    assert page.evaluate("document.querySelector('#t2v-notice').offsetHeight") == 0  # the error is shown only once
    assert page.evaluate("getComputedStyle(document.querySelector('#t2v-num_frames .info-text')).opacity") == "0"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "t2v-num_frames-error"
    page.keyboard.press("Backspace")
    assert not page.locator(".field-error, .notice, [aria-invalid]").count()
    page.fill("#t2v-num_frames textarea", "5")
    page.fill("#t2v-duration input", "3")
    page.click("#t2v-start")
    error = page.wait_for_selector("#t2v-duration .field-error").inner_text()
    assert error.startswith("Duration: 3: conflicts with frames;")  # by the field's label
    page.fill("#t2v-duration input", "5")

    open_group(page, "t2v-sampling", "t2v-shift")
    page.fill("#t2v-shift :is(input, textarea)", "1000")
    page.keyboard.press("Tab")
    page.click("#t2v-sampling .label-wrap")
    page.wait_for_selector("#t2v-shift", state="hidden")
    page.click("#t2v-plan")
    page.wait_for_selector("#t2v-shift .field-error:visible")  # its group has been reopened

    open_tab(page, "reference_to_video")
    page.fill("#reference_to_video-prompt textarea", "A fox")
    page.click("#reference_to_video-plan")
    error = page.wait_for_selector("#reference_to_video-ref_imgs .field-error")
    assert error.inner_text().startswith("Reference: missing")
    picture, sound = "#reference_to_video-ref_imgs-0", "#talking_avatar-input_audio-0"
    fox = (ASSETS / "fox.png").read_bytes()
    for name, content, text in (
        ("cut.png", fox[:3000], "is damaged or cut off"),
        ("empty.png", b"", "is empty (0 bytes)"),
        ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(300), "is HEIC"),
    ):
        page.set_input_files(f"{picture} input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})
        page.wait_for_selector(f"{picture} img", state="attached")
        assert not page.locator(
            "#tab-reference_to_video :is(.field-error, .notice)"
        ).count()  # from the file that was there before
        page.click("#reference_to_video-plan")
        error = page.wait_for_selector("#reference_to_video-ref_imgs .field-error").inner_text()
        assert error.startswith(f"Reference: {name} {text}")
        page.click(f"{picture} button")
    open_tab(page, "talking_avatar")
    labels = page.locator("#tab-talking_avatar [data-testid=block-label]").all_inner_texts()
    assert [label.strip() for label in labels[:4]] == [
        *("Portrait", "Clip (instead of the portrait)", "Speech 1", "Speech 2 (optional)"),
    ]
    page.fill("#talking_avatar-prompt textarea", "A woman")
    page.set_input_files("#talking_avatar-input_image-0 input[type=file]", str(ASSETS / "portrait.png"))
    page.wait_for_selector("#talking_avatar-input_image-0 img")
    page.set_input_files(f"{sound} input[type=file]", {"name": "a.mp3", "mimeType": "audio/mpeg", "buffer": b"a" * 99})
    page.wait_for_selector(f"{sound} :is(audio, .waveform-container)", state="attached")
    page.click("#talking_avatar-plan")
    page.wait_for_selector("#talking_avatar-input_audio .field-error")
    assert page.locator("#talking_avatar-input_video-from").is_hidden()  # no clip to cut
    places = page.evaluate(  # at one moment, since the page scrolls
        "(ids) => ids.map((id) => document.querySelector(id).getBoundingClientRect())",
        ["#talking_avatar-input_audio .field-error", sound],
    )
    assert places[0]["top"] > places[1]["bottom"]
    assert not page.locator("#reference_to_video-fps").count()  # not offered for this task


def test_the_keyboard_is_enough(server, browse):
    page = browse(server)
    page.locator("#tab-t2v-button").focus()
    for key in ("Tab", "Tab", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#reference_to_video-start:visible")
    page.evaluate(SETTLED)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        id, marked = page.evaluate("""() => {
            const node = document.activeElement;
            const styles = [node, node.closest('.wrap') ?? node].map((part) => getComputedStyle(part));
            const marked = styles.some((style) => style.outlineStyle != 'none' || style.boxShadow != 'none');
            return [node.closest('[id^=reference_to_video]')?.id, marked];
        }""")
        assert marked, page.evaluate("document.activeElement.outerHTML")
        page.wait_for_function("""() => {
            const node = document.activeElement, { x, y, width, height } = node.getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + height / 2);
            return top && (node.contains(top) || top.contains(node));
        }""")  # visible and not covered
        seen.append(id)
        if id == "reference_to_video-examples" and seen.count(id) == 1:
            page.keyboard.press("Enter")
            for number in (0, 1):
                page.wait_for_selector(f"#reference_to_video-ref_imgs-{number} img")
            page.evaluate(SETTLED)
        if id == "reference_to_video-plan":
            page.keyboard.press("Enter")
            break
    expected = ("prompt", "ref_imgs-0", "examples", "width", "seed", "model_id", "sampling", "plan")
    assert [id for id in dict.fromkeys(seen) if id and id.removeprefix("reference_to_video-") in expected] == [
        f"reference_to_video-{name}" for name in expected
    ]
    assert page.wait_for_selector("#reference_to_video-notice .plan").inner_text()
    assert page.input_value("#reference_to_video-prompt textarea") == "A fox carries a red lantern through the snow"


def test_one_size_is_shown_and_made(server, browse):
    page = browse(server)
    fill(page, "reference_to_video", "A fox")
    parts = [f"#reference_to_video-{name}" for name in ("resolution", "width", "height")]

    def shows(*values: str) -> None:
        for part, value in zip(parts, values, strict=True):
            playwright.expect(page.locator(f"{part} :is(input, textarea)").first).to_have_value(value)

    def plan() -> str:
        page.click("#reference_to_video-plan")
        return page.wait_for_selector("#reference_to_video-notice .plan").inner_text()

    page.reload()
    page.wait_for_selector("#reference_to_video-start:visible")  # the same tab
    shows("", "48", "32")  # the values typed before are kept
    assert page.input_value("#reference_to_video-prompt textarea") == "A fox"
    for part in parts[1:]:
        page.fill(f"{part} textarea", "")
    page.click("#reference_to_video-prompt textarea")
    shows("", "160", "96")  # the initial values
    page.click(f"{parts[0]} input")
    page.click(f"{parts[0]} [role=option]:has-text('480P')")
    shows("480P", "", "")
    for number in (0, 1):
        page.set_input_files(f"#reference_to_video-ref_imgs-{number} input[type=file]", str(ASSETS / "fox.png"))
        page.wait_for_selector(f"#reference_to_video-ref_imgs-{number} img")
    assert "640 x 640" in plan()
    page.fill(f"{parts[1]} textarea", "64")
    shows("", "64", "")
    page.fill(f"{parts[2]} textarea", "48")
    page.wait_for_timeout(500)
    page.click("#reference_to_video-plan")
    page.wait_for_function("document.querySelector('#reference_to_video-notice').innerText.includes('64 x 48')")


@pytest.mark.parametrize("theme", [pytest.param("light", marks=pytest.mark.extended), "dark"])
def test_contrast_motion_and_shifts(server, browse, theme):
    page = browse(server, PHONE, color_scheme=theme, reduced_motion="reduce")
    page.wait_for_selector("#gallery :is(li, .empty)")
    assert page.evaluate(SHIFTS) < 0.1
    for task in TABS:
        open_tab(page, task)
        page.locator(f"#{task}-examples button").first.click()
        page.wait_for_function(f"document.querySelector('#{task}-prompt textarea').value")
        for group in page.locator(f"#tab-{task} .label-wrap").all():
            group.click()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        assert page.evaluate(CONTRAST) == {}
    assert page.evaluate("getComputedStyle(document.querySelector('#t2v-start')).transitionDuration") in ("0s", "")


@pytest.mark.extended
def test_queue_by_keyboard(server, browse):
    page = browse(server)
    fill(page, "t2v", "A cat", num_frames=97, num_inference_steps=200, width=320, height=192)
    first, second = (start(page, "t2v") for _ in range(2))
    page.hover("#t2v-start")
    for count in (1, 2):  # a slow double click starts one video
        page.mouse.down(click_count=count)
        page.mouse.up(click_count=count)
        page.wait_for_timeout(300)
    page.wait_for_function("document.querySelectorAll('#queue li').length >= 3")
    last = page.evaluate(LIST)[0]
    page.wait_for_selector("#queue progress")
    page.wait_for_function("/step [0-9]+ of 200/.test(document.querySelector('#queue').innerText)", timeout=120_000)
    page.wait_for_selector("#queue img")
    assert not page.locator("#queue [data-state=queued] .picture").count()
    assert "1 running (denoising), 2 waiting" in page.inner_text("#status [role=status]").lower()
    row = f"#queue li[data-job='{last}']"
    useless = [page.locator("#queue [aria-disabled=true]").nth(number).get_attribute("data-id") for number in (0, 1)]
    assert useless == [second, last]  # up for the first waiting job, down for the last
    for do, place in (("up", 1), ("down", 2), ("up", 1)):
        page.locator(f"{row} button[data-do={do}]").focus()
        page.keyboard.press("Enter")
        page.wait_for_function(f"document.querySelectorAll('#queue li')[{place}].dataset.job == '{last}'")
        assert page.evaluate("[document.activeElement.dataset.do, document.activeElement.dataset.id]") == [do, last]
    for id in (second, last, first):
        page.locator(f"#queue li[data-job='{id}'] button[data-do=cancel]").focus()
        page.keyboard.press("Enter")
        card = page.wait_for_selector(f"#gallery li[data-job='{id}']")
        assert card.inner_text().startswith("Cancelled")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#gallery [data-state=cancelled]')).alignSelf")
        == "start"
    )
    assert {video["details"]["state"] for video in videos(server)[:3]} == {"cancelled"}


def test_gallery_keeps_its_place(server, browse):
    page = browse(server)
    fill(page, "t2v", "A lantern")
    card = wait_for_end(page, start(page, "t2v"))
    page.evaluate(f'document.querySelector("{card} video").mine = true')
    page.click(f"{card} summary")
    page.click(f"{card} button[data-do=again]")
    page.wait_for_function(f"!document.querySelector('#gallery li:first-child').matches(\"{card}\")")
    wait_for_end(page, videos(server)[0]["id"])
    assert page.evaluate(f'document.querySelector("{card} video").mine')
    assert page.locator(f"{card} details[open]").count() == 1


def test_scripts_in_names_are_text(server, browse):
    page = browse(server)
    page.click("#record-box > button")
    file = {"name": "<img src=x onerror=alert(3)>.mp4", "mimeType": "video/mp4", "buffer": b"no video"}
    page.set_input_files("#record input[type=file]", file)
    page.wait_for_selector("#record-notice .notice")
    page.set_input_files("#record input[type=file]", file | {"buffer": (ASSETS / "boat.mp4").read_bytes()})
    page.wait_for_function("document.querySelector('#record-notice').innerText.includes('does not say')")
    assert not page.locator("#record-notice img").count()


def test_keys_do_not_see_each_other(serve, browse, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("first/key+==\nsecond-key\n")
    address = serve("--outdir", str(tmp_path / "server"), "--api_key", str(keys))
    assert ask(address, "/config")[0] == 401 and ask(address, "/gradio_api/startup-events")[0] == 401
    pages = []
    for key in ("first/key+==", "second-key"):
        page = browse(address, PHONE, "#key")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#t2v-start")
        pages.append(page)
    first, second = pages
    (cookie,) = first.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["value"] == "first/key+=="
    fill(first, "i2v", "A square", {"name": "own.png", "mimeType": "image/png", "buffer": png(40)})
    id = start(first, "i2v")
    dropped = first.get_attribute("#i2v-image-0 img", "src")
    wait_for_end(first, id)
    status = "address => fetch(address).then(answer => answer.status)"
    assert first.evaluate(status, dropped) == 200
    first.click(f"#gallery li[data-job='{id}'] button[data-do=reload]")
    first.wait_for_function(f"![undefined, '{dropped}'].includes(document.querySelector('#i2v-image-0 img')?.src)")
    shown = first.get_attribute("#i2v-image-0 img", "src")
    assert first.evaluate(status, shown) == 200

    assert not second.locator("#gallery li").count() and second.evaluate(LIST) == []
    browse.refused = re.compile("status of 404")
    for path in (dropped, shown, f"/v1/videos/{id}/content", f"/v1/videos/{id}/preview"):
        assert second.evaluate(status, path) == 404
    fill(second, "i2v", "A lantern")
    mine, theirs = (
        address.partition("file=")[2] for address in (second.get_attribute("#i2v-image-0 img", "src"), shown)
    )
    second.route(
        "**/queue/join*", lambda route: route.continue_(post_data=route.request.post_data.replace(mine, theirs))
    )
    second.click("#i2v-start")
    assert "drop the file again" in second.wait_for_selector("#i2v-image .field-error").inner_text()
    assert second.evaluate(LIST) == []
    assert "A lantern" in second.evaluate("sessionStorage.forms")
    second.click("text=Sign out")
    second.wait_for_selector("#key")
    assert not second.context.cookies() and second.evaluate("sessionStorage.forms") is None


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
