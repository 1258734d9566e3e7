"""Face detection with scikit-image: where two speakers are in a portrait, and how large the faces in a shot are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, counted
from skyreels_v3.media.image import full_size
from skyreels_v3.packages import check_packages, has_packages

PACKAGE, MODULE = "scikit-image", "skimage"
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

SEARCHED = 1024  # pixels of the longer side of the picture that is searched
SMALLEST, LARGE = 1 / 14, 1 / 5  # as fractions of the picture's shorter side: a face that is found, that fills a shot
SPEAKERS = 2


class Face(NamedTuple):
    """A face: its center (x, y) as fractions of width and height, its side as a fraction of the shorter of the two."""

    middle: np.ndarray
    side: float


def check_faces() -> None:
    """Raise UserError if no face detector is installed."""
    check_packages("--speaker_boxes", PACKAGE, MODULE, value="auto", otherwise="give the boxes")


def can_find_faces() -> bool:
    """Whether a face detector is installed."""
    return has_packages(MODULE)


def divide(picture: Image.Image) -> tuple[Box, ...]:
    """Split a portrait midway between its two faces; returns the parts, the left or upper one first.

    Raises:
        UserError: there are not exactly two faces.
    """
    faces = [face.middle for face in find_faces(picture)]
    if len(faces) != SPEAKERS:
        reason = f"auto: finds {counted(len(faces), 'face')} in the portrait, which should have {SPEAKERS}"
        raise UserError("--speaker_boxes", f"{reason}; give the boxes, or leave it out for the portrait's halves")
    sides = np.array(full_size(picture))
    axis = int(np.argmax(np.abs(faces[1] - faces[0]) * sides))
    cut = round(float((faces[0] + faces[1])[axis] / 2 * sides[axis]))
    width, height = map(int, sides)
    if axis == 0:
        return (0, 0, cut, height), (cut, 0, width, height)
    return (0, 0, width, cut), (0, cut, width, height)


def largest_face(pictures: Iterable[Image.Image]) -> float:
    """The side of the largest face, as a fraction of its picture's shorter side; 0 if none is `LARGE`."""
    return max((face.side for picture in pictures for face in find_faces(picture, LARGE)), default=0.0)


def find_faces(picture: Image.Image, smallest: float = SMALLEST) -> list[Face]:
    """All upright frontal faces whose sides are at least `smallest` times the picture's shorter side."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    small = picture.convert("RGB")
    small.thumbnail((SEARCHED, SEARCHED))
    shorter = min(small.size)
    least = max(24, int(shorter * smallest))  # the detector was trained on faces of 24 pixels
    found = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        img=np.asarray(small), scale_factor=1.2, step_ratio=1, min_size=(least, least), max_size=(shorter, shorter)
    )
    middles = [(face["c"] + face["width"] / 2, face["r"] + face["height"] / 2) for face in found]
    sides = [face["height"] / shorter for face in found]
    return [Face(np.array(middle) / small.size, side) for middle, side in zip(middles, sides, strict=True)]
