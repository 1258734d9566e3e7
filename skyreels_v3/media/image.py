"""Pictures: any file that Pillow opens becomes 8-bit RGB, and is fitted into the size that a task needs.

Three ways to fit, each its models' own: `letterbox` shows the whole picture between white borders (reference images);
`cover_crop` scales until the frame is filled, then cuts off what stands out (clips, portraits); `crop_resize` cuts
first (i2v's picture). The last two differ by a fraction of a pixel, and at the edges.
"""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable

logger = logging.getLogger(__name__)

WHITE = (255, 255, 255)
LANCZOS = Image.Resampling.LANCZOS


def open_image(path: Path, flag: str) -> Image.Image:
    """The picture in a file, upright, 8-bit RGB and fully decoded; the first one if there are several.

    Transparent parts become white, 16-bit values are scaled to 8 bits.

    Raises:
        UserError: the file is missing, empty, damaged, far too large or not a picture.
    """
    check_readable(path, flag)
    try:
        with warnings.catch_warnings():
            # Pillow warns at half the size that it refuses; a user can do nothing about the warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise UserError(flag, f"{shown(path)} has too many pixels; scale it down first") from error
    except UnidentifiedImageError as error:
        raise UserError(flag, f"{shown(path)} is not a picture; give a JPEG, PNG, WebP, GIF or BMP file") from error
    except Exception as error:  # on damaged data decoders raise whatever they run into
        reason = shown(str(error) or type(error).__name__)
        raise UserError(flag, f"{shown(path)} is damaged or cut off ({reason}); give a complete file") from error


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole of `image` in the middle of a white RGB picture of `height` x `width` pixels."""
    if image.size == (width, height):
        return image
    ratio = image.width / image.height
    if ratio > width / height:
        size = (width, max(1, int(width / ratio)))
    else:
        size = (max(1, int(height * ratio)), height)
    canvas = Image.new("RGB", (width, height), WHITE)
    canvas.paste(_resize(image, size, LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def cover_crop(image: Image.Image, height: int, width: int, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """The centre of `image`, scaled so that it just covers `height` x `width` pixels; unchanged if it has that size."""
    if image.size == (width, height):
        return image
    size, left, top = _cover(image.size, height, width)
    return _resize(image, size, resample).crop((left, top, left + width, top + height))


def crop_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of `image`, cut to the shape of `height` x `width` and then resized to it.

    The cut keeps one side of the picture; the other one is rounded down to whole pixels, and then each edge to the
    nearest pixel, halves to even.
    """
    wide = min(image.width, max(1, image.height * width // height))
    high = min(image.height, max(1, image.width * height // width))
    left, top, right, bottom = (
        round(edge / 2) for edge in (image.width - wide, image.height - high, image.width + wide, image.height + high)
    )
    cut = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return _resize(cut, (width, height), LANCZOS)


def covered_box(
    box: tuple[int, int, int, int], size: tuple[int, int], height: int, width: int
) -> tuple[float, float, float, float]:
    """Where a box (x0, y0, x1, y1) of a picture of `size` (width, height) ends up after `cover_crop`, cut to it."""
    (wide, high), left, top = _cover(size, height, width)
    across, down = wide / size[0], high / size[1]
    x0, x1 = (min(max(x * across - left, 0.0), width) for x in (box[0], box[2]))
    y0, y1 = (min(max(y * down - top, 0.0), height) for y in (box[1], box[3]))
    return x0, y0, x1, y1


def _cover(size: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], int, int]:
    """The size (width, height) at which a picture just covers the frame, and what is cut off left and above."""
    scale = max(height / size[1], width / size[0])
    wide, high = math.ceil(scale * size[0]), math.ceil(scale * size[1])
    return (wide, high), round((wide - width) / 2), round((high - height) / 2)  # halves to even, like torchvision


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Antialiased resize to (width, height), the horizontal pass first.

    Pillow rounds to 8 bits between its two passes, and from version 13 on it chooses their order by the sizes. Two
    calls fix the order, so that every version gives the pixels of the recordings.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned the way its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        logger.debug("EXIF data ignored: %s", error)
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha onto white, more than 8 bits scaled down."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, WHITE + (255,))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A one-channel integer or float picture as 8-bit grey; Pillow's own conversion would clip instead of scale."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = float(values.max())
    if image.mode == "F":
        full_scale = 1.0 if peak <= 1 else 255.0
    else:
        full_scale = 65535.0 if peak <= 65535 else 2.0**31 - 1  # mode "I" mostly holds 16-bit files
    return Image.fromarray(np.clip(np.rint(values * (255 / full_scale)), 0, 255).astype(np.uint8))
