"""Extensions of any length, with the toy model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.cli import parse_request
from skyreels_v3.components import load_components
from skyreels_v3.inputs import open_inputs
from skyreels_v3.resume import RunRecord, open_state
from skyreels_v3.runtime import start
from skyreels_v3.stages import Pass, Stages, frames_to_video
from skyreels_v3.wan.single_shot_extension import PIPELINE, in_colors_of
from tests.planning import planned

CLIP = Path(__file__).resolve().parents[2] / "assets" / "boat.mp4"


@pytest.mark.slow
@pytest.mark.parametrize("duration", [6, 11, 26])
def test_exactly_the_seconds_asked_for(tmp_path, monkeypatch, duration):
    """For 26 s, five passes already make more than enough, but a sixth is made as in the official code."""
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path))
    request = parse_request(
        ["--task_type", "single_shot_extension", "--model_id", "tiny", "--prompt", "a", "--input_video", str(CLIP),
         "--height", "16", "--width", "32", "--num_inference_steps", "1", "--duration", str(duration)]
    )  # fmt: skip
    request, inputs = open_inputs(request, tmp_path)
    plan = planned(replace(request, device="cpu"), make_tiny(request.task), inputs=inputs)
    runtime = start(plan)
    components = load_components(plan, runtime)
    state = open_state(RunRecord(tmp_path / "a.mp4", {}))
    passes, frames = 0, 0
    for event in PIPELINE.run(Stages(components, runtime, plan, state)):
        if isinstance(event, Pass):
            passes += 1
            frames += sum(1 for _ in event.frames)
    assert frames == duration * 24
    assert passes == (duration + 4) // 5


def test_new_frames_get_the_colors_of_the_clip():
    """The condition frames, which are not written, are left as decoded."""
    y, x = np.indices((32, 48))
    picture = np.stack([40 + 3 * x, 60 + 4 * y, 200 - 2 * x], axis=-1)
    scene = np.stack([picture * (1 - frame / 200) for frame in range(17)]).astype(np.uint8)
    decoded = frames_to_video(scene) * 0.9 + torch.tensor([0.04, 0.0, -0.04])[:, None, None, None]
    pieces = [*decoded.split([1, 4, 4, 4, 4], dim=2)]
    assert [*in_colors_of(scene[:9], iter(pieces), 0.0)] == pieces
    video = torch.cat([*in_colors_of(scene[:9], iter(pieces), 1.0)], dim=2)
    assert torch.equal(video[:, :, :9], decoded[:, :, :9])
    off, before = ((each - frames_to_video(scene))[:, :, 9:].mean((3, 4)).abs().max() for each in (video, decoded))
    assert before > 0.06 and off < 0.04  # the scene itself keeps changing within the sample
