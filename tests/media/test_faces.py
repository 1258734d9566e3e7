"""Two speakers in a portrait are parted between their faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.errors import UserError
from skyreels_v3.media import faces

MIDDLE = (224, 113)  # of the face in the 512 x 512 photograph that scikit-image has


def photograph(*places: tuple[int, int, int], size: tuple[int, int] = (1280, 720)) -> Image.Image:
    """Prints of the photograph on green: left, top and side of each."""
    skimage = pytest.importorskip("skimage")
    woman = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    picture = Image.new("RGB", size, (90, 120, 90))
    for left, top, side in places:
        picture.paste(woman.resize((side, side)), (left, top))
    return picture


def test_two_faces_are_found() -> None:
    places = ((20, 100, 500), (700, 180, 450))
    found = faces.find_faces(photograph(*places))
    expected = [
        ((left + MIDDLE[0] * side / 512) / 1280, (top + MIDDLE[1] * side / 512) / 720) for left, top, side in places
    ]
    np.testing.assert_allclose(sorted(map(tuple, found)), expected, atol=0.02)
    (_, _, cut, _), (other, *_) = faces.divide(photograph(*places))
    assert cut == other and abs(cut - 1280 * (expected[0][0] + expected[1][0]) / 2) < 20


@pytest.mark.parametrize(("places", "count"), [((), "0 faces"), (((300, 100, 500),), "1 face")])
def test_other_numbers_of_faces(places: tuple[tuple[int, int, int], ...], count: str) -> None:
    with pytest.raises(UserError, match=f"--speaker_boxes: auto: finds {count} in the portrait.*; give the boxes"):
        faces.divide(photograph(*places))


@pytest.mark.parametrize(
    ("middles", "parts"),
    [
        (((0.2, 0.5), (0.6, 0.4)), ((0, 0, 40, 50), (40, 0, 100, 50))),
        (((0.9, 0.5), (0.6, 0.4)), ((0, 0, 75, 50), (75, 0, 100, 50))),
        (((0.4, 0.7), (0.6, 0.1)), ((0, 0, 100, 20), (0, 20, 100, 50))),
    ],
)
def test_a_portrait_is_cut_between_the_faces(monkeypatch: pytest.MonkeyPatch, middles, parts) -> None:
    monkeypatch.setattr(faces, "find_faces", lambda picture: [np.array(middle) for middle in middles])
    assert faces.divide(Image.new("RGB", (100, 50))) == parts
