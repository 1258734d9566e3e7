"""Where two speakers are in a portrait, by the faces that scikit-image finds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from skyreels_v3.errors import UserError, counted
from skyreels_v3.media.image import full_size
from skyreels_v3.packages import check_packages

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

SEARCHED = 1024  # pixels of the longer side that faces are searched in
SMALLEST = 14  # times that a face fits into the shorter side
SPEAKERS = 2


def check_faces() -> None:
    """Raise UserError if nothing on this machine finds faces."""
    check_packages("--speaker_boxes", "scikit-image", "skimage", value="auto", otherwise="give the boxes")


def divide(picture: Image.Image) -> tuple[Box, ...]:
    """A portrait's parts, from the left or from above, that have a face each: cut midway between the two.

    Raises:
        UserError: there are not two faces.
    """
    faces = find_faces(picture)
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


def find_faces(picture: Image.Image) -> list[np.ndarray]:
    """The middles (x, y) of all faces, as shares of the picture's sides."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    small = picture.convert("RGB")
    small.thumbnail((SEARCHED, SEARCHED))
    shorter = min(small.size)
    least = max(24, shorter // SMALLEST)  # the detector was trained at 24
    found = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        img=np.asarray(small), scale_factor=1.2, step_ratio=1, min_size=(least, least), max_size=(shorter, shorter)
    )
    middles = [(face["c"] + face["width"] / 2, face["r"] + face["height"] / 2) for face in found]
    return [np.array(middle) / small.size for middle in middles]
