"""Pictures: reading them as 8-bit sRGB, and fitting them to the size that a task needs.

There are three ways to fit, each as its models were trained: `letterbox` shows the whole picture between white borders
(reference images); `cover_crop` scales until the frame is filled, then crops (clips, portraits); `crop_resize` crops
first (the picture of i2v). The last two differ by a fraction of a pixel, and at the edges.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from skyreels_v3.errors import format_value
from skyreels_v3.media.files import MediaError

# No others: Pillow runs external programs for some, and the decoders of the rest have had little review.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 72_000_000  # cameras make up to 62 million
# Phones make JPEGs of 108 and 200 million pixels. They are decoded at a half, a quarter or an eighth of their size,
# still twice the longest side of any video, which makes no difference after the final resampling.
REDUCED_SIDE = 4096
MAX_FILE_PIXELS = 256_000_000  # of a JPEG before it is reduced
MAX_SCANS = 500  # of a progressive JPEG, which has about ten; each covers the whole picture
# keys of `Image.info`
REDUCTION = "reduction"  # 1, 2, 4 or 8
NOTES = "notes"  # warnings for the user, shown after the file's name

WHITE = (255, 255, 255)
LANCZOS = Image.Resampling.LANCZOS

# A picture's mode and its profile's color space -> the mode to convert it in.
PROFILED = {("L", "GRAY"): "L", ("L", "RGB"): "RGB", ("RGB", "RGB"): "RGB", ("CMYK", "CMYK"): "CMYK"}


def open_image(path: Path) -> Image.Image:
    """Read the first picture in a file as fully decoded, upright 8-bit sRGB.

    Colors are converted from the embedded profile, transparent areas become white, 16-bit values are scaled to 8 bits.
    Very large JPEGs are reduced, see `full_size`. Notes for the user are in the `info` of the picture.

    Raises:
        MediaError: the file is damaged, far too large or not a picture of a known format.
    """
    notes: list[str] = []
    try:
        with quiet_pillow(), Image.open(path, formats=FORMATS) as image:
            width = image.width
            image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
            reduction = round(width / image.width)
            if math.prod(image.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.info.get("progressive") and path.read_bytes().count(b"\xff\xda") > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} scans")
            image.load()
            if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with a preview
                notes.append("holds several pictures; the first one is taken")
            with suppress(Exception):  # damaged EXIF data
                ImageOps.exif_transpose(image, in_place=True)
            picture = on_white(to_srgb(to_8_bit(image), image.info.get("icc_profile"), notes))
            picture.info = {REDUCTION: reduction, NOTES: notes}
            return picture
    except Image.DecompressionBombError as error:
        limit = f"{MAX_PIXELS // 10**6} million"
        raise MediaError(path, f"has too many pixels, more than {limit}; scale it down first") from error
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS:
            raise MediaError(path, "is HEIC, which is not supported; export it as JPEG") from error
        raise MediaError(path, "is not a picture; give a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file") from error
    except Exception as error:  # decoders may raise anything on damaged data
        reason = format_value(str(error) or type(error).__name__)
        raise MediaError(path, f"is damaged or cut off ({reason}); give a complete file") from error


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings and log and set our pixel limit in a `with` block, then restore the old settings."""
    log, level, pixels = logging.getLogger("PIL"), logging.getLogger("PIL").level, Image.MAX_IMAGE_PIXELS
    try:
        log.setLevel(logging.CRITICAL)  # its exceptions say it all
        Image.MAX_IMAGE_PIXELS = MAX_FILE_PIXELS // 2  # Pillow refuses pictures of more than twice as many
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        Image.MAX_IMAGE_PIXELS = pixels


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height, in its file, of a picture from `open_image`; approximate if it was reduced."""
    reduction = image.info.get(REDUCTION, 1)
    return image.width * reduction, image.height * reduction


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """Fit all of `image` into a white RGB picture of `height` x `width` pixels, centered."""
    if image.size == (width, height):
        return image
    ratio = image.width / image.height
    wide = ratio > width / height
    size = (width, max(1, int(width / ratio))) if wide else (max(1, int(height * ratio)), height)
    canvas = Image.new("RGB", (width, height), WHITE)
    canvas.paste(resize(image, size, LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def cover_crop(image: Image.Image, height: int, width: int, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """The center of `image`, scaled to just cover `height` x `width` pixels; unchanged if it has that size."""
    if image.size == (width, height):
        return image
    size, left, top = cover(image.size, height, width)
    return resize(image, size, resample).crop((left, top, left + width, top + height))


def crop_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The center of `image`, cropped to the aspect ratio of `height` x `width` and then resized to it.

    The crop keeps one side of the picture. The other is rounded down to whole pixels, and then each edge to the nearest
    pixel, ties to even.
    """
    wide = min(image.width, max(1, image.height * width // height))
    high = min(image.height, max(1, image.width * height // width))
    left, top = round((image.width - wide) / 2), round((image.height - high) / 2)
    right, bottom = round((image.width + wide) / 2), round((image.height + high) / 2)
    crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return resize(crop, (width, height), LANCZOS)


def covered_box(
    box: tuple[int, int, int, int], size: tuple[int, int], height: int, width: int
) -> tuple[float, float, float, float]:
    """Map a box (x0, y0, x1, y1) in a picture of `size` (width, height) through `cover_crop`, clamped to its result."""
    (wide, high), left, top = cover(size, height, width)
    across, down = wide / size[0], high / size[1]
    x0, x1 = (min(max(x * across - left, 0.0), width) for x in (box[0], box[2]))
    y0, y1 = (min(max(y * down - top, 0.0), height) for y in (box[1], box[3]))
    return x0, y0, x1, y1


def cover(size: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], int, int]:
    """The size (width, height) at which a picture just covers the frame, and the pixels cropped at the left and top."""
    scale = max(height / size[1], width / size[0])
    wide, high = math.ceil(scale * size[0]), math.ceil(scale * size[1])
    return (wide, high), round((wide - width) / 2), round((high - height) / 2)  # ties to even, like torchvision


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Antialiased resize to (width, height), horizontally first.

    Pillow rounds to 8 bits between its two passes, and since version 13 their order depends on the sizes. Two calls fix
    the order, so that every version gives the same pixels.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def to_8_bit(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to L, LA, RGB, RGBA or CMYK, with palettes resolved and values scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.array(image, dtype=np.float32))
        usual, larger = (1.0, 255.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)  # mode "I" mostly has 16 bits
        full_scale = usual if values.max() <= usual else larger
        # Pillow's own conversion would clip instead of scale
        return Image.fromarray(np.rint(values * (255 / full_scale)).clip(0, 255).astype(np.uint8))
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image.convert(mode + "A" * image.has_transparency_data)


def to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Convert a picture from `to_8_bit` to RGB or RGBA, and its colors from an ICC profile to sRGB."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image.convert(image.mode.removesuffix("A")) if alpha is not None else image
    if profile:
        try:
            colors = convert_profile(colors, ImageCms.ImageCmsProfile(BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, KeyError, ImportError):
            notes.append("has a color profile that cannot be used; it is read as sRGB")
    colors = colors.convert("RGB")
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def convert_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Convert an L, RGB or CMYK picture to sRGB.

    With relative colorimetric intent and black point compensation, colors within sRGB stay the same.

    Raises:
        KeyError: the profile is for another kind of picture.
        ImageCms.PyCMSError: it is damaged.
    """
    mode = PROFILED[image.mode, profile.profile.xcolor_space.strip()]
    if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(profile):
        return image  # without rounding
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    return cast(Image.Image, ImageCms.applyTransform(image.convert(mode), transform))  # None only in place


def on_white(image: Image.Image) -> Image.Image:
    """Composite an RGB or RGBA picture over white; returns RGB."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def encode_image(image: Image.Image, format: str, **options: int) -> bytes:
    """Encode a picture in a file format, with Pillow's options for it."""
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
