"""`benchmarks/quality.py`: the truth scores full marks and anything else does not; it runs and writes its page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import quality
from skyreels_v3.quality import Meter
from training import sound, world
from training.tasks import CONDITION_FRAMES, CUT_LENGTHS

START = 0.5  # start of the clips in their scenes, in seconds


def truth_of(subject: str, seed: int, wrong: bool = False) -> torch.Tensor:
    """What a perfect model would generate; from a wrong input, if asked."""
    scene = quality.scene_of(seed + wrong)
    if subject == "single_shot_extension":
        seen = 2 * CONDITION_FRAMES - 1
        return quality.rendered(scene, 120, START + seen / quality.FPS)
    if subject == "shot_switching_extension":
        cut = START + (CUT_LENGTHS[2] + quality.FPS) / quality.FPS
        return quality.rendered(world.cut_to(quality.scene_of(seed), cut, world.CUTS[(seed + wrong) % 2]), 49, cut)
    if subject == "talking_avatar":
        mouth = sound.mouth_of(sound.make_voice(quality.HELD_OUT + seed + wrong, 4.0))
        face = world.make_face(quality.HELD_OUT + seed, mouth, blinks=False)
        return world.render_faces([face], quality.FACE, quality.FACE)[0]
    if subject == "talking_avatar, two speakers":
        _, faces = quality.pair_of(seed)
        if wrong:
            faces = [replace(face, mouth=other.mouth) for face, other in zip(faces, faces[::-1], strict=True)]
        return torch.cat([*world.render_faces(faces, quality.FACE, quality.FACE)], dim=-1)
    return quality.rendered(scene, 49)


def test_a_long_avatar_is_measured_at_its_rate(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(quality, "Meter", lambda fps: rates.append(fps) or Meter(fps))
    monkeypatch.setattr(sound, "make_voice", lambda seed, seconds: np.zeros(16_000))
    quality.SUBJECTS["talking_avatar, 100 s"].case(0, tmp_path, False).judge(torch.zeros(3, 30, 32, 32))
    assert rates == [25]


WORST = {  # the worst scores that the truth may get: minimum, or maximum where less is better
    "first frame, dB": 60,
    "SSIM": 0.9999,
    "video, dB": 60,
    "first new frame, dB": 60,
    "jump at the seam": 1.5,
    "correlation of mouth and speech": 0.9,
    "correlation of mouths and speech": 0.9,
    "mouth movement in silence": 0.02,
}
LOWER_IS_BETTER = ("jump at the seam", "mouth movement in silence")


@pytest.mark.slow
@pytest.mark.parametrize("subject", [name for name in quality.SUBJECTS if not name.endswith(" s")])
def test_the_truth_scores_full_marks(subject, tmp_path):
    found: dict[str, list[float]] = {}
    wrong: dict[str, list[float]] = {}
    for seed in range(2):
        case = quality.SUBJECTS[subject].case(seed, tmp_path, False)
        for name, value in case.judge(truth_of(subject, seed)).items():
            found.setdefault(name, []).append(value)
        for name, value in case.judge(truth_of(subject, seed, wrong=True)).items():
            wrong.setdefault(name, []).append(value)
    for name, values in found.items():
        bound = WORST.get(name, 1)
        assert all(value <= bound if name in LOWER_IS_BETTER else value >= bound for value in values), (name, values)
    for name in found.keys() - set(quality.SUBJECTS[subject].unaffected):
        better, worse = np.mean(found[name]), np.mean(wrong[name])
        assert worse > better if name in LOWER_IS_BETTER else worse < better, name


def test_speakers_who_speak_in_the_wrong_order_are_noticed(tmp_path):
    _, faces = quality.pair_of(0)
    exchanged = [replace(face, mouth=other.mouth) for face, other in zip(faces, faces[::-1], strict=True)]
    video = torch.cat([*world.render_faces(exchanged, quality.FACE, quality.FACE)], dim=-1)
    found = quality.two_speakers(0, tmp_path, wrong=False).judge(video)
    assert not found["the one who speaks moves more"]
    assert found["correlation of mouths and speech"] < 0.3


def test_a_mouth_that_never_moves_is_noticed(tmp_path):
    face = world.make_face(quality.HELD_OUT, np.zeros(99), blinks=False)
    still = world.render_faces([face], quality.FACE, quality.FACE)[0]
    found = quality.avatar(0, tmp_path, wrong=False).judge(still)
    assert not found["lag of 0 or 1"] and found["correlation of mouth and speech"] < 0.1


@pytest.mark.parametrize("level", [-1.0, 0.5])
def test_a_long_video_of_one_color_is_noticed(level):
    found = quality.drifting(torch.full((3, 50, 32, 32), level))
    assert found["noisy, black or of one color, %"] == 100 and found["frozen, %"] == 98


@pytest.mark.slow
def test_it_makes_its_page(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    out, page = tmp_path / "made", tmp_path / "quality.md"
    only = ("--only", "shot_switching_extension")
    for flags in ((*only, "--scenes", "1"), ("--page", str(page))):
        monkeypatch.setattr(sys, "argv", ["quality", "--out", str(out), *flags])
        quality.main()
    lines = [json.loads(line) for line in (out / quality.MADE).read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["", "wrong"]
    text = page.read_text()
    assert "| target |  | 1 | 0.8 |" in text and "| wrong tag | 1 |  |" in text
    assert (tmp_path / "quality" / "shot_switching_extension.webp").is_file()
    assert "shot_switching_extension" in capsys.readouterr().out
