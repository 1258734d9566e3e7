"""Makes the documentation's screenshots of the web page: `python docs/page_pictures.py [FLAGS OF THE SERVER]`.

Starts a server with the built-in model, generates some videos and captures docs/page_*.png with Chromium. Needs
requirements-dev.txt.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# tabs, and the index of the example to run
EXAMPLES = (("reference_to_video", 0), ("i2v", 0), ("single_shot_extension", 0), ("talking_avatar", 0))
RUNNING = ("single_shot_extension", 0)
SECONDS = "30"  # of RUNNING: long enough to capture it running
MAX_COLORS = 256  # screenshots have few colors; files are a third as large


def run_example(page: Any, task: str, number: int, seconds: str = "") -> None:
    """Start an example of a tab, with a duration of `seconds` if given."""
    page.click(f"#tab-{task}-button")
    page.locator(f"#{task}-examples button").nth(number).click()
    page.wait_for_function(f"document.querySelector('#{task}-prompt textarea').value")
    page.wait_for_timeout(1000)  # for its files to load
    if seconds:
        page.fill(f"#{task}-duration input", seconds)
    page.click(f"#{task}-start")
    page.wait_for_selector(f"#{task}-notice .message")
    page.wait_for_timeout(1000)


def take(page: Any, name: str) -> None:
    """Save what is in view as docs/NAME.png."""
    path = DOCS / f"{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(MAX_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def take_all(address: str, chromium: Any) -> None:
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    page.goto(address)
    page.wait_for_selector("#t2v-start")
    for task, number in EXAMPLES:
        run_example(page, task, number)
    page.wait_for_function(f"document.querySelectorAll('#gallery video').length == {len(EXAMPLES)}", timeout=900_000)
    for _ in range(2):
        run_example(page, *RUNNING, SECONDS)
    page.wait_for_selector("#queue img", timeout=120_000)
    page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
    take(page, "page_desktop")
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("#gallery video")
    page.click("#tab-talking_avatar-button")
    page.locator("#talking_avatar-examples button").first.click()
    page.wait_for_selector("#talking_avatar-input_audio-0 .waveform-container")
    page.wait_for_timeout(2000)
    take(page, "page_dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="light")
    page.reload()
    page.wait_for_selector("#gallery video")
    page.click("a[href='#jobs']")
    page.wait_for_timeout(2000)
    take(page, "page_phone")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--serve", "--port", "0", "--model_id", "tiny", "--outdir", folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(
            [sys.executable, "generate_video.py", *flags, *sys.argv[1:]],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            with sync_playwright() as playwright:
                path = shutil.which("chromium")  # the system's, or else Playwright's own
                take_all(address, playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
