"""Pictures: files of a few formats become 8-bit sRGB, and are fitted into the size that a task needs.

Three ways to fit, each its models' own: `letterbox` shows the whole picture between white borders (reference images);
`cover_crop` scales until the frame is filled, then cuts off what stands out (clips, portraits); `crop_resize` cuts
first (i2v's picture). The last two differ by a fraction of a pixel, and at the edges.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable

logger = logging.getLogger(__name__)
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a file is in its exceptions

# No others: Pillow starts programs for some, and few eyes have looked at the decoders of the rest.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMATS_NAMED = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Cameras make up to 62 million, a square of 8192 has 67.
MAX_PIXELS = 72_000_000
# Telephones make JPEGs of 108 and 200 million. Decoded at a half, a quarter or an eighth, to no less than twice the
# longest side of a video, they show no difference after the final resampling.
REDUCED_SIDE = 4096
Image.MAX_IMAGE_PIXELS = 128_000_000  # Pillow does not open what has more than twice as many
MAX_SCANS = 500  # of a progressive JPEG, which has about ten: each goes over the whole picture
REDUCTION = "reduction"  # in `Image.info`: that half, quarter or eighth, as a whole number

WHITE = (255, 255, 255)
LANCZOS = Image.Resampling.LANCZOS

# What a picture of a mode can have a profile for, and in which mode it is then converted.
PROFILED = {("L", "GRAY"): "L", ("L", "RGB"): "RGB", ("RGB", "RGB"): "RGB", ("CMYK", "CMYK"): "CMYK"}
SRGB_TOLERANCE = 2  # of 255: profiles that differ less from sRGB are it
USUAL_GAMMA = 1 / 2.2  # of a PNG file's gAMA chunk: sRGB's, nearly


def open_image(path: Path, flag: str, say: Callable[[str], object] = logger.warning) -> Image.Image:
    """The picture in a file, upright, 8-bit sRGB and fully decoded; the first one if there are several.

    Colours are converted from the profile in the file, transparent parts become white, 16-bit values are scaled to 8
    bits. Very large JPEGs come reduced, see `full_size`.

    Args:
        say: called with what the user should know of the picture.

    Raises:
        UserError: the file is missing, empty, damaged, far too large or not a picture of a known format.
    """
    check_readable(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user can do nothing about Pillow's
            with Image.open(path, formats=FORMATS) as image:
                width = image.width
                image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
                reduction = round(width / image.width)
                if math.prod(image.size) > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if image.info.get("progressive") and path.read_bytes().count(b"\xff\xda") > MAX_SCANS:
                    raise ValueError(f"more than {MAX_SCANS} scans")
                image.load()
                if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo and what goes with it
                    say(f"{shown(path)} holds several pictures; the first one is taken")
                picture = _plain(_upright(image))
                picture = _on_white(_to_srgb(picture, image.info, lambda note: say(f"{shown(path)} {note}")))
                picture.info = {REDUCTION: reduction}
                return picture
    except Image.DecompressionBombError as error:
        limit = f"{MAX_PIXELS // 10**6} million"
        raise UserError(flag, f"{shown(path)} has too many pixels, more than {limit}; scale it down first") from error
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS:
            raise UserError(flag, f"{shown(path)}: HEIC is not supported; export it as JPEG") from error
        raise UserError(flag, f"{shown(path)} is not a picture; give a {FORMATS_NAMED} file") from error
    except Exception as error:  # on damaged data decoders raise whatever they run into
        reason = shown(str(error) or type(error).__name__)
        raise UserError(flag, f"{shown(path)} is damaged or cut off ({reason}); give a complete file") from error


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in its file of a picture that `open_image` has opened, up to rounding where it was reduced."""
    reduction = image.info.get(REDUCTION, 1)
    return image.width * reduction, image.height * reduction


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
    """`image` itself, turned the way its EXIF orientation says."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:
        logger.debug("EXIF data ignored: %s", error)
    return image


def _plain(image: Image.Image) -> Image.Image:
    """Any mode as L, LA, RGB, RGBA or CMYK: palettes looked up, more than 8 bits scaled down."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image)
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image.convert(mode + "A" * image.has_transparency_data)


def _to_srgb(
    image: Image.Image, info: dict[str | tuple[int, int], object], say: Callable[[str], object]
) -> Image.Image:
    """An image of a plain mode as RGB or RGBA with the colours that its file's `info` tells.

    Profiles are followed by relative colorimetric intent with black point compensation: what sRGB has keeps its colour.
    """
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha is not None else image
    if profile := info.get("icc_profile"):
        try:
            colours = _convert(colours, ImageCms.ImageCmsProfile(BytesIO(profile)))  # type: ignore[arg-type]
        except (ImageCms.PyCMSError, OSError, KeyError, ImportError):
            say("has a colour profile that cannot be used; it is read as sRGB")
    elif (gamma := info.get("gamma")) and "srgb" not in info and abs(gamma - USUAL_GAMMA) > 0.01:
        linear = (np.arange(256) / 255) ** (1 / gamma)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        colours = colours.point([round(value) for value in 255 * encoded] * len(colours.getbands()))
    colours = colours.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def _convert(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """An L, RGB or CMYK image of a profile in sRGB; KeyError if the profile is for other images."""
    mode = PROFILED[image.mode, profile.profile.xcolor_space.strip()]
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode == "RGB":
        levels = np.linspace(0, 255, 18, dtype=np.uint8)
        samples = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3))
        changes = ImageChops.difference(samples, ImageCms.applyTransform(samples, transform)).getextrema()
        if max(high for _, high in changes) <= SRGB_TOLERANCE:
            return image
    return ImageCms.applyTransform(image.convert(mode), transform)


def _on_white(image: Image.Image) -> Image.Image:
    """An RGB or RGBA image as RGB, over white where it is transparent."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE + (255,)), image).convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A one-channel integer or float picture as 8-bit grey; Pillow's own conversion would clip instead of scale."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False)
    peak = float(values.max())
    if image.mode == "F":
        full_scale = 1.0 if peak <= 1 else 255.0
    else:
        full_scale = 65535.0 if peak <= 65535 else 2.0**31 - 1  # mode "I" mostly holds 16-bit files
    values *= 255 / full_scale
    return Image.fromarray(np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8))
