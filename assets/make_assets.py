#!/usr/bin/env python3
"""Generates the sample inputs in this folder: reference images, a portrait, a clip and speech.

The speech needs the program espeak-ng; everything else is drawn here.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from skyreels_v3.media.video_writer import write_video  # noqa: E402  needs the path above

SCALE = 2  # drawn larger and scaled down, for smooth edges
FPS, SECONDS = 24, 3
SPEECH = "Good morning. The boat leaves at nine, and the fox has found its lantern."


def canvas(width: int, height: int, top: str, bottom: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A picture with a vertical gradient, and a pen to draw on it."""
    ends = np.array([Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in (top, bottom)], dtype=float)
    weight = np.linspace(0, 1, height * SCALE)[:, None]
    column = (ends[0] * (1 - weight) + ends[1] * weight).round().astype(np.uint8)
    picture = Image.fromarray(np.repeat(column[:, None], width * SCALE, axis=1))
    return picture, ImageDraw.Draw(picture)


def finish(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // SCALE, picture.height // SCALE), Image.Resampling.LANCZOS)


def scaled(*numbers: float) -> list[float]:
    return [number * SCALE for number in numbers]


def fox() -> Image.Image:
    """A fox's face."""
    picture, pen = canvas(512, 512, "white", "#f4f4f4")
    for side in (-1, 1):
        pen.polygon(scaled(256 + side * 170, 60, 256 + side * 190, 260, 256 + side * 40, 170), fill="#d9601a")
        pen.polygon(scaled(256 + side * 155, 100, 256 + side * 168, 220, 256 + side * 80, 170), fill="#5c2a12")
    pen.ellipse(scaled(80, 130, 432, 430), fill="#e9731f")
    pen.polygon(scaled(90, 300, 256, 470, 422, 300, 256, 330), fill="#fff3e2")
    for x in (180, 332):
        pen.ellipse(scaled(x - 26, 240, x + 26, 300), fill="#20140e")
        pen.ellipse(scaled(x - 4, 248, x + 14, 266), fill="white")
    pen.ellipse(scaled(228, 405, 284, 450), fill="#20140e")
    return finish(picture)


def lantern() -> Image.Image:
    """A red paper lantern."""
    picture, pen = canvas(384, 512, "#fbfbfb", "#ececec")
    pen.line(scaled(192, 20, 192, 110), fill="#333333", width=4 * SCALE)
    pen.ellipse(scaled(62, 120, 322, 400), fill="#c8201f")
    for width in (60, 140, 210):
        pen.ellipse(scaled(192 - width / 2, 120, 192 + width / 2, 400), outline="#8a1214", width=3 * SCALE)
    for y in (104, 388):
        pen.rectangle(scaled(132, y, 252, y + 26), fill="#caa23a")
    for x in range(150, 240, 12):
        pen.line(scaled(x, 414, x, 480), fill="#caa23a", width=4 * SCALE)
    return finish(picture)


def boat(frame: int) -> Image.Image:
    """A frame of a boat that crosses a bay at sunset."""
    picture, pen = canvas(480, 272, "#203a6b", "#f2a65a")
    time = frame / (FPS * SECONDS)
    sun = 90 + 70 * time
    pen.ellipse(scaled(330, sun, 400, sun + 70), fill="#ffe08a")
    pen.polygon(scaled(0, 190, 90, 120, 170, 175, 260, 105, 370, 180, 480, 140, 480, 200, 0, 200), fill="#3b3350")
    pen.rectangle(scaled(0, 195, 480, 272), fill="#1d4e78")
    for row in range(5):
        points = [(x, 205 + 14 * row + 3 * math.sin(x / 18 + row + 12 * time)) for x in range(0, 481, 8)]
        pen.line(scaled(*(value for point in points for value in point)), fill="#4c86b0", width=2 * SCALE)
    x, y = 60 + 260 * time, 205 + 3 * math.sin(14 * time)
    pen.polygon(scaled(x - 45, y, x + 45, y, x + 30, y + 22, x - 30, y + 22), fill="#7a3b1d")
    pen.line(scaled(x, y, x, y - 80), fill="#3a2413", width=3 * SCALE)
    pen.polygon(scaled(x + 4, y - 78, x + 4, y - 8, x + 48, y - 8), fill="#f7f3e8")
    pen.polygon(scaled(x - 4, y - 66, x - 4, y - 8, x - 36, y - 8), fill="#e4d7bd")
    return finish(picture)


def portrait() -> Image.Image:
    """A person who faces the viewer."""
    picture, pen = canvas(480, 480, "#b8d4e3", "#e6eef2")
    pen.ellipse(scaled(110, 60, 370, 400), fill="#3a2317")
    pen.rectangle(scaled(200, 330, 280, 420), fill="#e0ad8c")
    pen.polygon(scaled(60, 480, 100, 410, 200, 385, 240, 420, 280, 385, 380, 410, 420, 480), fill="#a3262e")
    pen.ellipse(scaled(150, 100, 330, 365), fill="#efc1a1")
    pen.pieslice(scaled(140, 70, 340, 300), 180, 360, fill="#3a2317")
    for x in (203, 277):
        pen.ellipse(scaled(x - 18, 205, x + 18, 229), fill="white")
        pen.ellipse(scaled(x - 8, 208, x + 8, 226), fill="#3b5b2e")
        pen.ellipse(scaled(x - 4, 212, x + 4, 222), fill="black")
        pen.arc(scaled(x - 24, 182, x + 24, 215), 200, 340, fill="#3a2317", width=4 * SCALE)
    pen.line(scaled(240, 225, 233, 270, 246, 272), fill="#c98f6d", width=3 * SCALE)
    pen.ellipse(scaled(210, 298, 270, 322), fill="#b5474d")
    pen.line(scaled(212, 310, 268, 310), fill="#7d2a30", width=2 * SCALE)
    return finish(picture)


def speak(path: Path) -> None:
    """Write SPEECH, spoken by espeak-ng, to an mp3 file."""
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder) / "speech.wav"
        subprocess.run(["espeak-ng", "-v", "en-gb", "-s", "150", "-w", str(wave), SPEECH], check=True)
        subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(wave), "-b:a", "96k", str(path)], check=True)


def frames() -> Iterator[np.ndarray]:
    for frame in range(FPS * SECONDS):
        yield np.asarray(boat(frame))


def main() -> None:
    fox().save(ASSETS / "fox.png", optimize=True)
    lantern().save(ASSETS / "lantern.png", optimize=True)
    portrait().save(ASSETS / "portrait.png", optimize=True)
    speak(ASSETS / "speech.mp3")
    (ASSETS / "boat.mp4").unlink(missing_ok=True)
    write_video(frames(), ASSETS / "boat.mp4", height=272, width=480, fps=FPS, comment="made by make_assets.py")


if __name__ == "__main__":
    main()
