"""In a portrait of two speakers, the boundary is placed between their faces."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.checks import request_of
from skyreels_v3.errors import UserError
from skyreels_v3.inputs import open_inputs
from skyreels_v3.media import faces
from skyreels_v3.media.video_writer import write_video
from skyreels_v3.prompts import transitions
from skyreels_v3.request import GenerationRequest

MIDDLE, SIDE = (224, 113), 109  # of the face in scikit-image's 512 x 512 photograph


def photograph(*places: tuple[int, int, int], size: tuple[int, int] = (1280, 720)) -> Image.Image:
    """A green picture with copies of the photograph at the given (left, top, side)."""
    skimage = pytest.importorskip("skimage")
    woman = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    picture = Image.new("RGB", size, (90, 120, 90))
    for left, top, side in places:
        picture.paste(woman.resize((side, side)), (left, top))
    return picture


def test_two_faces_are_found() -> None:
    places = ((20, 100, 500), (700, 180, 450))
    found, sides = zip(*faces.find_faces(photograph(*places)), strict=True)
    expected = [
        ((left + MIDDLE[0] * side / 512) / 1280, (top + MIDDLE[1] * side / 512) / 720) for left, top, side in places
    ]
    np.testing.assert_allclose(sorted(map(tuple, found)), expected, atol=0.02)
    np.testing.assert_allclose(sorted(sides), [SIDE * side / 512 / 720 for side in (450, 500)], rtol=0.15)
    (_, _, cut, _), (other, *_) = faces.divide(photograph(*places))
    assert cut == other and abs(cut - 1280 * (expected[0][0] + expected[1][0]) / 2) < 20


@pytest.mark.parametrize(("places", "count"), [((), "0 faces"), (((300, 100, 500),), "1 face")])
def test_other_numbers_of_faces(places: tuple[tuple[int, int, int], ...], count: str) -> None:
    with pytest.raises(UserError, match=f"--speaker_boxes: auto: finds {count} in the portrait.*; give the boxes"):
        faces.divide(photograph(*places))


def shot(tmp_path: Path, side: int, prompt: str = "She waits") -> GenerationRequest:
    """The request that --transition auto makes for a clip that ends in a photograph of `side` pixels; 0 for none."""
    picture = photograph(*([(100, 30, side)] if side else []), size=(640, 360))
    frames = [np.zeros((360, 640, 3), np.uint8)] * 20 + [np.asarray(picture)] * 6
    clip = write_video(frames, tmp_path / "clip.mp4", height=360, width=640, fps=24, comment=str)
    flags = {"task_type": "shot_switching_extension", "input_video": str(clip), "prompt": prompt, "transition": "auto"}
    return open_inputs(request_of(flags | {"duration": 2, "height": 352, "width": 640}), tmp_path)[0]


@pytest.mark.parametrize(
    ("side", "name", "reason"),
    [(330, "cut_out", "a face takes 2. %"), (0, "cut_in", "no face is large"), (100, "cut_in", "no face is large")],
)
def test_a_transition_suits_the_clip(tmp_path, side, name, reason) -> None:
    request = shot(tmp_path, side)
    chosen = transitions()[name]
    assert request.prompt == request.flags["prompt"] == f"{chosen.tag} {chosen.sentence} She waits"
    assert request.given == {"prompt": "She waits", "transition": "auto"}
    (note,) = request.notes
    assert re.match(
        f"--transition auto: no word in the prompt names one: {name}, since {reason} .*; the prompt beg", note
    )


def test_words_win_over_faces_and_no_package(tmp_path, monkeypatch) -> None:
    assert "from another angle" in shot(tmp_path / "a", 330, "The boat from another angle").prompt
    monkeypatch.setattr("skyreels_v3.inputs.can_find_faces", lambda: False)
    request = shot(tmp_path, 330)
    assert (request.prompt, request.given) == ("She waits", {})
    (note,) = request.notes
    assert "scikit-image, which finds faces in the clip, is not installed" in note and note.endswith(
        "; the prompt stays as it is"
    )


@pytest.mark.parametrize(
    ("middles", "parts"),
    [
        (((0.2, 0.5), (0.6, 0.4)), ((0, 0, 40, 50), (40, 0, 100, 50))),
        (((0.9, 0.5), (0.6, 0.4)), ((0, 0, 75, 50), (75, 0, 100, 50))),
        (((0.4, 0.7), (0.6, 0.1)), ((0, 0, 100, 20), (0, 20, 100, 50))),
    ],
)
def test_a_portrait_is_cut_between_the_faces(monkeypatch: pytest.MonkeyPatch, middles, parts) -> None:
    monkeypatch.setattr(faces, "find_faces", lambda picture: [faces.Face(np.array(middle), 0.2) for middle in middles])
    assert faces.divide(Image.new("RGB", (100, 50))) == parts
