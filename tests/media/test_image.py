"""Pictures of every kind become 8-bit RGB; the two ways of fitting them agree with the recordings to the bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.numpy import load_file

from skyreels_v3.errors import UserError
from skyreels_v3.media.image import cover_crop, crop_resize, letterbox, open_image

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "misc"
FLAG = "--ref_imgs"


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    return load_file(REFERENCE / "cases.safetensors")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def sample(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    """A smooth picture without any symmetry, uint8 [height, width, channels]."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [255 * x, 255 * y, 200 * (1 - x) * (0.3 + y), 40 + 180 * x]
    return np.stack(planes[:channels], -1).astype(np.uint8)


@pytest.mark.parametrize("index", range(3))
def test_letterbox_matches_recording(cases: dict[str, np.ndarray], index: int) -> None:
    expected = cases[f"letterbox{index}.out"]
    image = open_image(REFERENCE / f"image{index}.png", FLAG)
    assert np.array_equal(pixels(letterbox(image, *expected.shape[:2])), expected)


@pytest.mark.parametrize("index", range(3))
def test_cover_crop_matches_recording(cases: dict[str, np.ndarray], index: int) -> None:
    expected = cases[f"centercrop{index}.out"][0, :, 0].transpose(1, 2, 0)
    image = open_image(REFERENCE / f"image{index}.png", FLAG)
    assert np.array_equal(pixels(cover_crop(image, *expected.shape[:2], Image.Resampling.BILINEAR)), expected)


@pytest.mark.parametrize("fit", [letterbox, cover_crop, crop_resize])
@pytest.mark.parametrize("size", [(48, 64), (720, 1280), (592, 832)])
def test_picture_of_the_right_size_is_unchanged(fit, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(noise), *size)), noise)


@pytest.mark.parametrize("fit", [letterbox, cover_crop, crop_resize])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (17, 23)])
def test_extreme_shapes_fit(fit, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.full((*size, 3), 7, np.uint8))
    fitted = pixels(fit(image, 48, 64))
    assert fitted.shape == (48, 64, 3)
    assert set(np.unique(fitted)) <= {7, 255}
    assert 7 in fitted


def test_cover_crop_keeps_the_centre_and_antialiases() -> None:
    stripes = np.zeros((64, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the target can show: must become grey, not stripes
    stripes[:, :60] = stripes[:, -60:] = 0  # what is outside the centre square is cut off
    fitted = pixels(cover_crop(Image.fromarray(stripes), 16, 16))
    assert fitted[:, 2:-2].min() > 100
    assert fitted[:, 2:-2].max() < 155


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((101, 80), (0, 12, 101, 68)),  # 56.8 rows: 56, from 12 to 68
        ((103, 80), (0, 12, 103, 68)),  # 57.9: 57, from 11.5 to 68.5, and both halves go to the even neighbour
        ((80, 40), (4, 0, 76, 40)),  # 71.1 columns: 71, from 4.5 to 75.5
        ((192, 108), (0, 0, 192, 108)),
        ((192, 109), (0, 0, 192, 108)),
    ],
)
def test_crop_resize_cuts_first(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """What is seen is what Pillow makes of the cut picture: nothing from beyond its edges is blended in."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = picture.crop(box).resize((96, 54), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(crop_resize(picture, 54, 96)), pixels(expected))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(sample()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(open_image(path, FLAG)), sample())


def test_jpeg(tmp_path: Path) -> None:
    Image.fromarray(sample()).save(tmp_path / "a.jpeg", quality=95)
    assert np.abs(pixels(open_image(tmp_path / "a.jpeg", FLAG)) - sample()).max() < 16


ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(sample()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(open_image(tmp_path / "a.png", FLAG)), ORIENTATIONS[orientation](sample()))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ((200, 30, 40), (0, 0, 255)))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], duration=100, **options)
    assert np.array_equal(pixels(open_image(tmp_path / f"a.{suffix}", FLAG)), np.asarray(first))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    """Left half opaque (80, 80, 80), right half transparent."""
    options: dict[str, object] = {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (20, 10), (0,) * len(mode))
        image.paste(Image.new(mode, (10, 10), (80,) * (len(mode) - 1) + (255,)), (0, 0))
    else:
        image = Image.new("RGB", (20, 10), (1, 2, 3))
        image.paste((80, 80, 80), (0, 0, 10, 10))
        options["transparency"] = (1, 2, 3)
        if mode == "P":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
            options["transparency"] = image.getpixel((15, 5))
    image.save(tmp_path / "a.png", **options)
    opened = pixels(open_image(tmp_path / "a.png", FLAG))
    assert (opened[:, :10] == 80).all()
    assert (opened[:, 10:] == 255).all()


def test_half_transparent_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (100, 0, 200, 51)).save(tmp_path / "a.png")  # alpha 0.2
    assert np.abs(pixels(open_image(tmp_path / "a.png", FLAG))[0, 0] - [224, 204, 244]).max() <= 1


def test_palette(tmp_path: Path) -> None:
    image = Image.fromarray(sample()).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(open_image(tmp_path / "a.png", FLAG)), np.asarray(image.convert("RGB")))


def test_one_bit_and_grey(tmp_path: Path) -> None:
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    Image.fromarray(bits).save(tmp_path / "bits.png")
    Image.fromarray(sample()[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(open_image(tmp_path / "bits.png", FLAG))[..., 1], bits * 255)
    assert np.array_equal(pixels(open_image(tmp_path / "grey.png", FLAG))[..., 2], sample()[..., 0])


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=95)
    Image.new("CMYK", (16, 16), (0, 0, 0, 51)).save(tmp_path / "grey.tiff")
    assert np.abs(pixels(open_image(tmp_path / "cyan.jpg", FLAG)) - [0, 255, 255]).max() <= 4
    assert np.abs(pixels(open_image(tmp_path / "grey.tiff", FLAG)) - 204).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 600).round().astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    opened = pixels(open_image(tmp_path / f"a.{suffix}", FLAG))
    assert np.array_equal(opened[..., 0], np.rint(values / 257).astype(int))


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    values = np.ascontiguousarray(np.linspace(0, 65535, 16 * 16 * 3).reshape(16, 16, 3)).astype(">u2")
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb48be", "-s", "16x16", "-i", "-"]
    command += ["-c:v", "png", "-pix_fmt", "rgb48be", "-frames:v", "1", "-update", "1", str(tmp_path / "a.png")]
    subprocess.run(command, input=values.tobytes(), check=True)
    assert np.abs(pixels(open_image(tmp_path / "a.png", FLAG)) - values / 257.0).max() <= 1


def test_32_bit_is_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    Image.fromarray((ramp * 65535).astype(np.int32)).save(tmp_path / "int.tiff")
    for name in ("float.tiff", "int.tiff"):
        assert np.abs(pixels(open_image(tmp_path / name, FLAG))[..., 0] - ramp * 255).max() <= 1


def check_refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_image(path, FLAG)
    message = str(caught.value)
    assert message.startswith(FLAG)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    check_refused(path, "damaged", "complete file")


def test_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello, this is no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    check_refused(tmp_path / "text.png", "not a picture", "give a")
    check_refused(tmp_path / "empty.png", "empty")
    check_refused(tmp_path / "folder.png", "is a folder")
    check_refused(tmp_path / "header.png", "give a")
    check_refused(tmp_path / "missing.png", "does not exist")


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    check_refused(tmp_path / "big.png", "too many pixels", "scale it down")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # only a warning of Pillow's
    assert open_image(tmp_path / "big.png", FLAG).size == (30, 30)
