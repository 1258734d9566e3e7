"""Sizes and counts against the official tables."""

from __future__ import annotations

import json

import pytest

from skyreels_v3.tasks import (
    CONFIG_DIR,
    RESOLUTIONS,
    TASK_NAMES,
    choose_size,
    latent_frames,
    load_yaml,
    plan_roll_outs,
    task_spec,
)


@pytest.fixture(scope="module")
def tables(reference):
    return json.loads((reference / "misc" / "tables.json").read_text())


CHOICES = [(name, size, size) for name in TASK_NAMES if name.endswith(("video", "extension")) for size in RESOLUTIONS]
CHOICES += [("talking_avatar", size, f"avatar_{size}") for size in ("480P", "720P")]


@pytest.mark.parametrize(("task", "resolution", "column"), CHOICES)
def test_sizes(tables, task, resolution, column):
    for row in tables["size_choice"]:
        assert choose_size(task_spec(task), resolution, row["height"], row["width"]) == tuple(row[column])


def test_roll_outs(tables):
    for duration, row in tables["extension_rollouts"].items():
        rolls = plan_roll_outs(int(duration))
        assert rolls == row["latent_frames"]
        assert 4 * sum(rolls) == row["output_frames"]


def test_roll_outs_are_never_too_short():
    spec = task_spec("single_shot_extension")
    for duration in range(spec.min_duration, spec.max_duration + 1):
        assert 4 * sum(plan_roll_outs(duration)) >= duration * spec.fps


def test_condition_frames():
    spec = task_spec("shot_switching_extension")
    assert [spec.condition_frames_for(duration) for duration in (2, 3, 4, 5)] == [9, 17, 25, 33]
    assert task_spec("single_shot_extension").condition_frames_for(30) == 25


def test_latent_frames():
    assert [latent_frames(frames) for frames in (1, 5, 25, 121)] == [1, 2, 7, 31]


def test_avatar_540p_is_made_like_the_others():
    """Sides are multiples of 16, areas within 3 % of 544 x 960, aspect ratios as their keys say."""
    buckets = load_yaml(CONFIG_DIR / "size_buckets.yaml")["talking_avatar"]["540P"]
    assert len(buckets) > 10
    for ratio, (height, width) in buckets.items():
        assert height % 16 == width % 16 == 0
        assert height * width == pytest.approx(544 * 960, rel=0.03)
        assert height / width == pytest.approx(ratio, abs=0.006)
    assert choose_size(task_spec("talking_avatar"), "540P", 1080, 1920) == (544, 960)
