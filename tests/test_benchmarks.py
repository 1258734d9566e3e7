"""Every benchmark runs, at the smallest size there is, and ends in its JSON line. What it measures is not looked at.

`memory_vs_length.py` is left out: it has no small size, its lengths are what it is about.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--dim", "128", "--layers", "3", "--frames", "1", "--height", "4", "--width", "4", "--rounds", "2")
COMMON = {"benchmark", "command", "torch", "device", "threads", "title", "table", "notes"}
CASES = {
    "transformer_step": ((*SMALL, "--modes", "exact,fp8,stream"), {"modes", "ceiling_tflops", "met", "tokens"}),
    "offload": (SMALL, {"ways", "baseline", "tokens"}),
    "vae": (("--base_dim", "4", "--frames", "1", "--height", "32", "--width", "32"), {"encode", "decode"}),
    "end_to_end": (
        ("--num_frames", "5", "--height", "32", "--width", "32", "--num_inference_steps", "2"),
        {"stages", "steps", "total", "memory"},
    ),
    "hunyuan": (SMALL, {"ways", "baseline", "met", "tokens"}),
    "step_cache": (
        ("--dim", "64", "--layers", "1", "--frames", "1", "--height", "4", "--width", "4")
        + ("--steps", "6", "--rounds", "2"),
        {"loops", "baseline"},
    ),
}
WRONG = (
    ("transformer_step", "--modes", "fast"),
    ("transformer_step", "--dim", "200"),
    ("transformer_step", "--device", "nowhere"),
    ("transformer_step", "--rounds", "1"),
    ("offload", "--layers", "2"),
    ("offload", "--official", "r2v-4k"),
    ("vae", "--frames", "4"),
    ("end_to_end", "--model_id", "full", "--task_type", "talking_avatar"),
    ("end_to_end", "--model_id", "full", "--task_type", "t2v"),
    ("hunyuan", "--layers", "1"),
    ("hunyuan", "--dim", "200"),
    ("step_cache", "--width", "5"),
    ("load", "--size-gb", "-1"),
    ("memory_vs_length", "--side", "20"),
)


def run(name: str, arguments: tuple[str, ...], cache: Path) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        env=os.environ | {"SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},  # on a busy machine threads wait
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_json(name, tmp_path, cache):
    arguments, keys = CASES[name]
    file = tmp_path / "line.json"
    made = run(name, (*arguments, "--json", str(file)), cache)
    assert made.returncode == 0, made.stderr
    last = made.stdout.splitlines()[-1]
    assert file.read_text(encoding="utf-8").strip() == last
    line = json.loads(last)
    assert line["benchmark"] == name
    assert line.keys() >= COMMON | keys
    assert all(len(row) == len(line["table"][0]) for row in line["table"])


@pytest.mark.slow
def test_load_ends_in_json(tmp_path, monkeypatch, capsys):
    load = importlib.import_module("benchmarks.load")
    monkeypatch.setattr(load, "BLOCKS", {"14B": load.Blocks(128, 1, 128)})
    monkeypatch.setattr(load, "TEXT_DIM", 64)
    monkeypatch.setattr(load, "run_fresh", load.compare)  # processes of its own would take their seconds to start
    monkeypatch.setattr(sys, "argv", ["load", "--size-gb", "1e-6", "--runs", "2"])
    with torch.set_grad_enabled(True):  # taken back at the end
        load.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line.keys() >= COMMON | {"loads", "limits", "met"}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_nonsense_is_a_usage_error(arguments, monkeypatch, capsys):
    name, *flags = arguments
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").parse_arguments()
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("cpu", "--table", "x"), ("--table", "nowhere.json")], ids=" ".join)
def test_nonsense_for_run_all(arguments, cache):
    made = run("run_all", arguments, cache)
    assert made.returncode == 2
    assert "Traceback" not in made.stderr


def test_tables_as_markdown(tmp_path, cache):
    line = {"benchmark": "load", "command": "c", "title": "t", "device": "cpu", "torch": "2", "diffusers": "1"}
    line |= {"threads": 2, "table": [["", "s"], ["ours", "1.0"]], "notes": ["fine"]}
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"load": line}), encoding="utf-8")
    made = run("run_all", ("--table", str(file)), cache)
    assert made.returncode == 0, made.stderr
    assert "|  | s |\n| --- | ---: |\n| ours | 1.0 |\n\nfine\n" in made.stdout
