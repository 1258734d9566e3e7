"""The window plan against the official tables."""

from __future__ import annotations

import json

import pytest

from skyreels_v3.wan.windows import WINDOW_FRAMES, plan_windows


def test_the_official_plans(reference):
    tables = json.loads((reference / "misc" / "tables.json").read_text())["avatar_plan"]
    for frames, row in tables.items():
        plan = plan_windows(int(frames))
        assert (not plan.windows) == row["single"]
        if plan.windows:
            assert plan.padded_frames == row["padded_length"]
            assert plan.padded_frames - plan.audio_frames == row["mirrored_tail"]
            assert [window.start for window in plan.windows] == row["window_starts"]
            assert [window.key_frame for window in plan.windows] == row["key_indices"]


@pytest.mark.parametrize("frames", [81, 82, 100, 144, 145, 146, 208, 209, 210, 1000, 4999, 5000])
def test_the_windows_lay_end_to_end(frames):
    """Each frame is written once and in order, from the window that contains it."""
    written = [
        window.start + frame for window in plan_windows(frames).windows for frame in range(window.first, window.end)
    ]
    assert written == list(range(frames))
    assert all(window.end <= WINDOW_FRAMES for window in plan_windows(frames).windows)
