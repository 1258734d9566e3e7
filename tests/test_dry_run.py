"""What --dry_run prints."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import DryRunFileInfo

from skyreels_v3 import throughput
from skyreels_v3.dry_run import describe
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import task_spec
from tests.planning import planned


def described(request: GenerationRequest, checkpoint: Path | None = None) -> dict[str, str]:
    text = describe(planned(request, checkpoint, "bfloat16"))
    return {line[:14].strip(): line[14:] for line in text.splitlines()}


def test_the_download_and_the_room_for_it(monkeypatch, tmp_path):
    """From the hub, or from the published sizes if the hub cannot be reached."""
    files = [DryRunFileInfo("c", size, n, "", size < 9e9, size > 9e9) for n, size in (("a", 3e9), ("b", 40e9))]

    def snapshot_download(name: str, allow_patterns: list[str], dry_run: bool) -> list[DryRunFileInfo]:
        if not files:
            raise OSError
        return files

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    request = GenerationRequest(
        task=task_spec("reference_to_video"), model_id="Skywork/SkyReels-V3-R2V-14B", prompt="p", height=720, width=1280
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=41e9))
    name = "Skywork/SkyReels-V3-R2V-14B from huggingface (transformer/*, vae/*, text_encoder/*, tokenizer/*)"
    room = f"41.0 GB free in {tmp_path}"
    assert described(request)["download"] == f"{name}: 40.0 GB of 43.0 GB to fetch; {room}"
    files.clear()
    # 14.3 and 5.7 billion parameters of two bytes each, 0.13 billion of four
    assert described(request)["download"] == f"{name}: about 40.8 GB in bfloat16; {room}"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e8))
    plan_ = described(request)
    assert plan_["download"].endswith(f"0.1 GB free in {tmp_path}: not enough; set HF_HOME to another folder")
    assert plan_["disk"] == "0.1 GB free for the output"
    assert "GB free for the output: it may need" in described(replace(request, frame_folder=True))["disk"]


@pytest.mark.parametrize("task", ["t2v", "talking_avatar"])
def test_the_toy_downloads_nothing_and_is_told_in_small_units(task):
    request = GenerationRequest(task=task_spec(task), model_id="tiny", prompt="p", height=64, width=64, audio_seconds=1)
    told = described(request)
    assert not {"download", "time"} & told.keys()  # no speed has been measured
    assert not any(re.search(r"\b0\.0 GB|0\.0\d+ TFLOP", text) for text in told.values())


def test_the_time_is_told_where_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "cache"))
    size = {"height": 480, "width": 480, "audio_seconds": 8, "device": "cpu"}
    request = GenerationRequest(task=task_spec("talking_avatar"), model_id="a/b", prompt="p", **size)
    made = planned(request)
    assert throughput.seconds_of(made) is None
    throughput.store(made, 21, 100.0)
    assert throughput.seconds_of(made) == pytest.approx(100 * len(made.passes))
    assert f"{'time':14}about 6 min 40 s of denoising" in describe(made)  # for four passes
    longer = planned(replace(request, audio_seconds=100, num_inference_steps=16))
    assert throughput.seconds_of(longer) == pytest.approx(200 * len(longer.passes))
    assert throughput.seconds_of(planned(replace(request, quant="fp8"))) is None  # not measured in FP8
    throughput.path().write_text("damaged")
    assert throughput.seconds_of(made) is None
    throughput.store(made, 21, 50.0)
    assert throughput.seconds_of(made) == pytest.approx(50 * len(made.passes))
