"""The built-in model is unpacked once, identically everywhere, into the published layouts."""

from __future__ import annotations

import hashlib

import pytest
import torch

from skyreels_v3.checkpoints.tiny import make_tiny, packed
from skyreels_v3.components import load_components
from skyreels_v3.families import family_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.runtime import start
from skyreels_v3.tasks import TASK_NAMES, task_spec
from tests.planning import planned


def digest(folder):
    """Names and hashes of all files in a folder, to compare two builds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_it_is_a_complete_checkpoint(task, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path))
    spec = task_spec(task)
    folder = make_tiny(spec)
    for repository in family_of(spec).repositories(spec):
        repository.check(folder, repository.flag)
    request = GenerationRequest(
        task=spec, model_id="tiny", prompt="p", device="cpu", height=32, width=32, audio_seconds=1.0
    )
    plan = planned(request, folder)
    components = load_components(plan, start(plan))
    context = components.text_encoder.encode("A b")["context"]
    assert context.shape[0] == 1 and 0 < context.shape[1] < 512 and context.shape[2] == 64
    stamp = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_tiny(spec) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("task", ["single_shot_extension", "i2v"])
def test_it_is_the_same_everywhere(task, tmp_path, monkeypatch):
    made = []
    for name in ("one", "two"):
        monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / name))
        torch.manual_seed(len(made))  # the global seed must not matter
        made.append(digest(make_tiny(task_spec(task))))
    assert made[0] == made[1]


def test_it_is_small():
    files = {packed(task_spec(task)) for task in TASK_NAMES}
    assert sum(file.stat().st_size for file in files) <= 24e6
