"""Roll-outs of any length, with the toy model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.cli import parse_request
from skyreels_v3.components import load_components
from skyreels_v3.inputs import open_inputs
from skyreels_v3.resume import RunRecord, open_state
from skyreels_v3.runtime import start
from skyreels_v3.stages import Pass, Stages
from skyreels_v3.wan.single_shot_extension import PIPELINE
from tests.planning import planned

CLIP = Path(__file__).resolve().parents[2] / "assets" / "boat.mp4"


@pytest.mark.slow
@pytest.mark.parametrize("duration", [6, 11, 26])
def test_exactly_the_seconds_asked_for(tmp_path, monkeypatch, duration):
    """After 26 s five roll-outs have already made more than enough, and the sixth is made all the same, as official."""
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
