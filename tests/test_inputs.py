"""Unusual images and sounds are accepted, as the plan shows."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from skyreels_v3.tasks import task_spec
from tests import toys
from tests.conftest import ASSETS, write_tone

TINY = ("--prompt", "a", "--model_id", "tiny", "--device", "cpu", "--dry_run")
GRAY = np.linspace(0, 255, 64 * 48).reshape(48, 64)
RGB = Image.fromarray(GRAY.astype(np.uint8)).convert("RGB")
FRAMES = {"save_all": True, "append_images": [RGB.rotate(180)]}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: rotated by 90 degrees
PICTURES: dict[str, Callable[[Path], object]] = {
    "animated.gif": lambda path: RGB.save(path, **FRAMES),
    "animated.webp": lambda path: RGB.save(path, **FRAMES),
    "animated.png": lambda path: RGB.save(path, **FRAMES),
    "cmyk.jpg": lambda path: RGB.convert("CMYK").save(path),
    "cmyk.tiff": lambda path: RGB.convert("CMYK").save(path),
    "gray16.png": lambda path: Image.fromarray((GRAY * 257).astype(np.uint16)).save(path),
    "float.tiff": lambda path: Image.fromarray((GRAY / 255).astype(np.float32)).save(path),
    "alpha.png": lambda path: RGB.convert("RGBA").save(path),
    "gray-alpha.png": lambda path: RGB.convert("LA").save(path),
    "palette.png": lambda path: RGB.quantize(8).save(path, transparency=3),
    "one-bit.png": lambda path: RGB.convert("1").save(path),
    "plain.bmp": lambda path: RGB.save(path),
    "turned.jpg": lambda path: RGB.save(path, exif=TURNED),
}


SQUARE = ("--height", "64", "--width", "64")


def plan(main: Callable[..., tuple[int, str, str]], *arguments: object) -> str:
    code, stdout, stderr = main(*TINY, *arguments)
    assert (code, stderr) == (0, "")
    return stdout


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(main, tmp_path, name):
    PICTURES[name](tmp_path / name)
    assert "reference_to_video" in plan(main, "--task_type", "reference_to_video", "--ref_imgs", name)
    sound = ("--input_audio", write_tone(tmp_path / "a.wav", 1))
    made = plan(main, "--task_type", "talking_avatar", "--input_image", name, *sound, "--resolution", "720P")
    assert ("832 x 1088" if name == "turned.jpg" else "1088 x 832") in made and "25 new frames at 25 fps" in made


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.flac", "a.ogg", "a.mp4"])
def test_sounds(main, tmp_path, name):
    picture = ["-f", "lavfi", "-i", "color=size=64x48:duration=1"] if name == "a.mp4" else []
    command = [get_ffmpeg_exe(), "-v", "error", "-i", write_tone(tmp_path / "1s.wav", 1), *picture, tmp_path / name]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    task = ("--task_type", "talking_avatar", "--input_image", ASSETS / "portrait.png")
    frames = int(plan(main, *task, "--input_audio", name).split(" new frames")[0].split()[-1])
    assert 25 <= frames <= 27  # encoders pad their last block


@pytest.mark.parametrize(
    ("size", "expected"), [((1920, 1080), "960 x 544"), ((800, 810), "720 x 720"), ((600, 900), "544 x 960")]
)
def test_v1s_size_is_that_of_the_pictures_shape(main, tmp_path, size, expected):
    Image.new("RGB", size).save(tmp_path / "a.png")
    toys.write(tmp_path / "toy", task_spec("i2v"))
    made = plan(main, "--task_type", "i2v", "--image", "a.png", "--model_id", tmp_path / "toy")
    assert f"{expected}, 97 new frames at 24 fps" in made


@pytest.mark.parametrize(
    ("flags", "expected"), [((), "160 x 96"), (("--resolution", "480P"), "640 x 640"), (SQUARE, "64 x 64")], ids=str
)
def test_the_built_in_models_size(main, tmp_path, flags, expected):
    """The size it was trained at, whatever the image's aspect ratio, unless a size is given."""
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    made = plan(main, "--task_type", "reference_to_video", "--ref_imgs", "a.png", *flags)
    assert f"video         {expected}, " in made
