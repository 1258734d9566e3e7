"""The built-in model is unpacked once, into the published layouts."""

from __future__ import annotations

import pytest

from skyreels_v3.checkpoints.tiny import make_tiny, packed
from skyreels_v3.components import load_components
from skyreels_v3.families import family_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.runtime import start
from skyreels_v3.tasks import TASK_NAMES, task_spec
from tests.planning import planned


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


def test_it_is_small():
    files = {packed(task_spec(task)) for task in TASK_NAMES}
    assert sum(file.stat().st_size for file in files) <= 24e6
