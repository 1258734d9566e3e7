"""Images of every kind become 8-bit RGB; both ways of fitting them match the recordings bit for bit."""

from __future__ import annotations

import logging
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from safetensors.numpy import load_file

from skyreels_v3.media.image import NOTES, cover_crop, crop_resize, full_size, letterbox, open_image
from tests.media.clips import check_refused, cut, ffmpeg

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "misc"


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    return load_file(REFERENCE / "cases.safetensors")


refused = partial(check_refused, open_image)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def sample(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    """A smooth image without any symmetry, uint8 [height, width, channels]."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [255 * x, 255 * y, 200 * (1 - x) * (0.3 + y), 40 + 180 * x]
    return np.stack(planes[:channels], -1).astype(np.uint8)


@pytest.mark.parametrize("index", range(3))
def test_letterbox_matches_recording(cases: dict[str, np.ndarray], index: int) -> None:
    expected = cases[f"letterbox{index}.out"]
    image = open_image(REFERENCE / f"image{index}.png")
    assert np.array_equal(pixels(letterbox(image, *expected.shape[:2])), expected)


@pytest.mark.parametrize("index", range(3))
def test_cover_crop_matches_recording(cases: dict[str, np.ndarray], index: int) -> None:
    expected = cases[f"centercrop{index}.out"][0, :, 0].transpose(1, 2, 0)
    image = open_image(REFERENCE / f"image{index}.png")
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


RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
PALETTE = Image.fromarray(sample()).convert("P", palette=Image.Palette.ADAPTIVE)
MODES = {
    **{f"rgb.{suffix}": (Image.fromarray(sample()), sample(), 0) for suffix in ("png", "bmp", "webp", "tiff")},
    "rgb.jpeg": (Image.fromarray(sample()), sample(), 16),
    "palette.png": (PALETTE, np.asarray(PALETTE.convert("RGB")), 0),
    "bits.png": (Image.fromarray(RAMP > 0.3), (RAMP > 0.3) * 255, 0),
    "gray.png": (Image.fromarray(sample()[..., 0]), sample()[..., 0], 0),
    "16bit.png": (Image.fromarray((RAMP * 65535).astype(np.uint16)), RAMP * 255, 0.6),
    "16bit.tiff": (Image.fromarray((RAMP * 65535).astype(np.uint16)), RAMP * 255, 0.6),
    "32bit.tiff": (Image.fromarray((RAMP * 65535).astype(np.int32)), RAMP * 255, 0.6),
    "float.tiff": (Image.fromarray(RAMP), RAMP * 255, 0.6),
    "half-transparent.png": (Image.new("RGBA", (4, 4), (100, 0, 200, 51)), np.full((4, 4, 3), (224, 204, 244)), 1),
    "cyan.jpg": (Image.new("CMYK", (16, 16), (255, 0, 0, 0)), np.full((16, 16, 3), (0, 255, 255)), 4),
    "cmyk.tiff": (Image.new("CMYK", (16, 16), (0, 0, 0, 51)), np.full((16, 16, 3), 204), 1),
}


@pytest.mark.parametrize("name", MODES)
def test_formats_and_modes(tmp_path: Path, name: str) -> None:
    image, expected, tolerance = MODES[name]
    options = {"lossless": True} if name.endswith("webp") else {"quality": 95} if "jp" in name else {}
    image.save(tmp_path / name, **options)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert np.abs(pixels(open_image(tmp_path / name)) - expected).max() <= tolerance


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
    assert np.array_equal(pixels(open_image(tmp_path / "a.png")), ORIENTATIONS[orientation](sample()))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.new("RGB", (20, 10), color) for color in ((200, 30, 40), (0, 0, 255)))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], duration=100, **options)
    image = open_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels(image), np.asarray(first))
    assert image.info[NOTES] == ["holds several pictures; the first one is taken"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    """The left half is opaque (80, 80, 80), the right half transparent."""
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
    opened = pixels(open_image(tmp_path / "a.png"))
    assert (opened[:, :10] == 80).all()
    assert (opened[:, 10:] == 255).all()


def test_16_bit_color_is_scaled(tmp_path: Path) -> None:
    values = np.ascontiguousarray(np.linspace(0, 65535, 16 * 16 * 3).reshape(16, 16, 3)).astype(">u2")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48be", "-s", "16x16", "-i", "-", "-pix_fmt", "rgb48be"]
    ffmpeg(*source, "-frames:v", 1, "-update", 1, tmp_path / "a.png", data=values.tobytes())
    assert np.abs(pixels(open_image(tmp_path / "a.png")) - values / 257.0).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    refused(cut(path, kept), "damaged", "complete file")


def test_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello, this is not a picture")
    (tmp_path / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path / "text.png", "not a picture", "give a")
    refused(tmp_path / "header.png", "give a")


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr("skyreels_v3.media.image.MAX_FILE_PIXELS", 800)
    refused(tmp_path / "big.png", "too many pixels", "scale it down")
    monkeypatch.setattr("skyreels_v3.media.image.MAX_FILE_PIXELS", 1200)  # Pillow only warns
    assert open_image(tmp_path / "big.png").size == (30, 30)


def test_pillow_settings_of_the_host_program_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    monkeypatch.setattr(logging.getLogger("PIL"), "level", logging.DEBUG)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (30, 30)
    assert (Image.MAX_IMAGE_PIXELS, logging.getLogger("PIL").level) == (12, logging.DEBUG)


# colors


def adapted(primaries: list[tuple[float, float]]) -> np.ndarray:
    """The matrix from linear RGB (these primaries, D65 white) to D50 XYZ as in ICC profiles, by Bradford adaptation."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    d65, d50 = np.array([0.95046, 1, 1.08906]), np.array([0.9642, 1, 0.8249])
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    matrix = xyz * np.linalg.solve(xyz, d65)
    return np.linalg.inv(cones) @ np.diag(cones @ d50 / (cones @ d65)) @ cones @ matrix


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """A version 2 ICC profile."""
    white = fixed(0.9642, 1, 0.8249)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, b"cprt": b"text\0\0\0\0none\0", **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12x4s28x", start + len(body), b"test", 0x02400000, kind, space, pcs, b"acsp")
    return head + white + bytes(48) + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


SRGB = [(0.64, 0.33), (0.3, 0.6), (0.15, 0.06)]
WIDE = {
    "P3": [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)],
    "Adobe RGB": [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)],
}


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_wide_gamuts_become_srgb(tmp_path: Path, name: str, mode: str) -> None:
    """The same colors in a wider space with its profile; without conversion a P3 photograph looks pale."""
    expected = np.array([(200, 60, 40), (40, 90, 200), (230, 230, 230), (90, 180, 60)], np.uint8)[None].repeat(8, 0)
    matrix = np.linalg.solve(adapted(WIDE[name]), adapted(SRGB))
    stored = np.rint(255 * (srgb_to_linear(expected / 255) @ matrix.T).clip(0, 1) ** (1 / 2.2)).astype(np.uint8)
    assert np.abs(stored.astype(int) - expected).max() > 10
    columns = {
        color: b"XYZ \0\0\0\0" + fixed(*column)
        for color, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted(WIDE[name]).T, strict=True)
    }
    data = profile(b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(2.2)))
    image = Image.fromarray(stored)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=data)
    assert np.abs(pixels(open_image(tmp_path / "a.png")) - expected).max() <= 2  # rounding to 8 bits in between


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_gray_profile(tmp_path: Path, mode: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = profile(b"GRAY", b"XYZ ", {b"kTRC": curve(1.8)})
    Image.fromarray(levels).convert(mode).save(tmp_path / "a.png", icc_profile=data)
    opened = pixels(open_image(tmp_path / "a.png"))
    assert np.abs(opened[..., 1] - 255 * linear_to_srgb((levels / 255) ** 1.8)).max() <= 2


def test_cmyk_profile(tmp_path: Path) -> None:
    """The profile of a printer that uses only the black channel, and maps it to lightness."""
    ramp = bytes(range(256))
    lightness = b"".join(bytes([255 * (1 - index % 2), 128, 128]) for index in range(16))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + lightness + ramp * 3
    data = profile(b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table}, b"prtr")
    black = np.arange(0, 256, 17, dtype=np.uint8)
    stored = np.zeros((8, 16, 4), np.uint8)
    stored[..., 3], stored[..., 0] = black, 200
    Image.fromarray(stored, "CMYK").save(tmp_path / "a.tiff", icc_profile=data)
    lightness = 100 * (1 - black / 255)
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    opened = pixels(open_image(tmp_path / "a.tiff"))
    assert np.abs(opened - 255 * linear_to_srgb(luminance)[:, None]).max() <= 2


def test_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(sample()).save(tmp_path / "a.png", icc_profile=data)
    assert np.array_equal(pixels(open_image(tmp_path / "a.png")), sample())


def test_unusable_profile_is_said(tmp_path: Path) -> None:
    for data in (b"nothing", profile(b"CMYK", b"Lab ", {})):
        Image.fromarray(sample()).save(tmp_path / "a.png", icc_profile=data)
        image = open_image(tmp_path / "a.png")
        assert np.array_equal(pixels(image), sample())
        assert image.info[NOTES] == ["has a color profile that cannot be used; it is read as sRGB"]


# unsupported files


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n", b"P6 1 1 255\nabc"]
)
def test_other_formats_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """For the first one Pillow would start a program, whatever the file's name is."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "is not a picture", "TIFF or AVIF file")
    assert not (tmp_path / "started").exists()


def test_heic(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    refused(tmp_path / "a.heic", "is HEIC, which is not supported; export it as JPEG")


def test_large_jpeg_is_decoded_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyreels_v3.media.image.REDUCED_SIDE", 30)
    monkeypatch.setattr("skyreels_v3.media.image.MAX_PIXELS", 40 * 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sample(120, 160)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = open_image(tmp_path / "a.jpg")
    assert (image.size, full_size(image)) == ((30, 40), (120, 160))
    assert np.abs(pixels(image) - np.rot90(sample(), -1)).max() < 16
    Image.fromarray(sample(120, 160)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "too many pixels")


def test_jpeg_of_many_scans(tmp_path: Path) -> None:
    """Each scan takes time to decode but only a few bytes."""
    Image.new("L", (160, 160), 90).save(tmp_path / "a.jpg", progressive=True)
    assert pixels(open_image(tmp_path / "a.jpg")).max() <= 91
    content = (tmp_path / "a.jpg").read_bytes()
    last = content.rindex(b"\xff\xda")
    (tmp_path / "b.jpg").write_bytes(content[:-2] + content[last:-2] * 500 + content[-2:])
    refused(tmp_path / "b.jpg", "more than 500 scans")
