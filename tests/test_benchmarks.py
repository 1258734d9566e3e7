"""Every benchmark runs at its smallest size and ends with its JSON line. The measurements are not checked.

`memory_vs_length.py` is left out: measuring long videos is its purpose, so it has no small size.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check, run_all

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"benchmark", "command", "torch", "device", "threads", "title", "table", "notes"}
KEYS = {
    "transformer_step": {"modes", "ceiling_tflops", "met", "tokens"},
    "offload": {"ways", "baseline", "tokens"},
    "vae": {"encode", "decode"},
    "end_to_end": {"stages", "steps", "total", "memory", "step_of_all_blocks"},
    "hunyuan": {"ways", "baseline", "met", "tokens"},
    "step_cache": {"loops", "baseline"},
}
WRONG = (
    ("transformer_step", "--modes", "fast"),
    ("transformer_step", "--dim", "200"),
    ("transformer_step", "--device", "nowhere"),
    ("transformer_step", "--rounds", "1"),
    ("offload", "--layers", "2"),
    ("offload", "--official", "r2v-4k"),
    ("vae", "--frames", "4"),
    ("end_to_end", "--model_id", "small", "--task_type", "i2v"),
    ("end_to_end", "--model_id", "full", "--task_type", "t2v"),
    ("hunyuan", "--layers", "1"),
    ("hunyuan", "--dim", "200"),
    ("step_cache", "--width", "5"),
    ("load", "--size-gb", "-1"),
    ("memory_vs_length", "--side", "20"),
    ("serve_load", "--jobs", "5"),
    ("serve_load", "--jobs", "101", "--clients", "1"),
)


def run(name: str, arguments: tuple[str, ...], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in a new process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        env=os.environ | {"SKYREELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},  # busy machine: threads would wait
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.extended
def test_the_gpus_set_at_toy_size(tmp_path, cache):
    """The whole set runs, each benchmark on its GPU code path, and each writes its line when it ends."""
    made = run("run_all", ("gpu", "--toy", "--out", str(tmp_path)), cache)
    assert made.returncode == 0, made.stdout + made.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["name"] for record in records] == [*run_all.SETS["gpu"]]
    for record in records:
        line = record["line"]
        assert record["status"] == "done" and line["benchmark"] == record["script"]
        assert line.keys() >= COMMON | KEYS[record["script"]]
        assert all(len(row) == len(line["table"][0]) for row in line["table"])
    assert {record["script"] for record in records} == KEYS.keys()
    ways = next(record["line"]["ways"] for record in records if record["script"] == "hunyuan")
    assert ways["resident"]["predicted_bytes"] < 1e8  # of the model that was timed, not of the published one
    made = run("run_all", ("--table", str(tmp_path / "results.jsonl")), cache)
    assert made.stdout.count("### ") == len(records)


@pytest.mark.parametrize(
    ("call", "status", "seconds"),
    [(("benchmarks.run_all", "main", "no-such-set"), "failed", 60), (("signal", "pause"), "timed out", 0.5)],
)
def test_one_that_fails_or_hangs_costs_itself_only(tmp_path, call, status, seconds):
    how, said = run_all.run(multiprocessing.get_context("fork"), "a", call, tmp_path, seconds)
    assert how == status
    assert ("no-such-set" in said and "exit code 2" in said) == (status == "failed")


def test_what_does_not_fit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all.signal, "signal", lambda *_: None)
    entries = {"a": run_all.Entry("common", (), 50)}
    assert run_all.run_set(entries, tmp_path, minutes=0.5, toy=False, gpu=False) == 0
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines())
    assert (record["name"], record["status"]) == ("a", "no time left")


@pytest.mark.extended
def test_load_ends_in_json(tmp_path, monkeypatch, capsys):
    load = importlib.import_module("benchmarks.load")
    monkeypatch.setattr(load, "BLOCKS", {"14B": load.Blocks(128, 1, 128)})
    monkeypatch.setattr(load, "TEXT_DIM", 64)
    monkeypatch.setattr(load, "run_fresh", load.compare)  # starting new processes would take seconds
    monkeypatch.setattr(sys, "argv", ["load", "--size-gb", "1e-6", "--runs", "2"])
    with torch.set_grad_enabled(True):  # to undo what the benchmark changes
        load.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line.keys() >= COMMON | {"loads", "limits", "met"}


@pytest.mark.extended
def test_a_server_under_load(tmp_path, cache):
    """Unless all jobs are completed once and no process is left, it fails; on a busy machine answers may be slow."""
    pytest.importorskip(
        "fastapi", reason="the server's packages are not installed: pip install -r requirements-dev.txt"
    )
    made = run("serve_load", ("--clients", "5", "--jobs", "6", "--json", str(tmp_path / "line.json")), cache)
    assert made.returncode == 0, made.stdout + made.stderr
    line = json.loads((tmp_path / "line.json").read_text(encoding="utf-8"))
    assert line.keys() >= COMMON | {"latency_ms", "rss_bytes", "open_files", "limits", "met"}
    assert line["problems"] == [] and line["latency_ms"]["POST a video"]["requests"] == 6
    assert line["open_files"]["ratio"] <= line["limits"]["growth"]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_nonsense_is_a_usage_error(arguments, monkeypatch, capsys):
    name, *flags = arguments
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").parse_arguments()
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


NONSENSE = ((), ("cpu", "--table", "x"), ("--table", "nowhere.json"), ("cpu", "--toy"), ("gpu", "--only", "vae-8k"))


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_for_run_all(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_all.main()
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


LINE = {"benchmark": "load", "command": "c", "title": "t", "device": "cpu", "torch": "2", "diffusers": "1"}
LINE |= {"threads": 2, "table": [["", "s"], ["ours", "1.0"]], "notes": ["fine"]}


def test_tables_as_markdown(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.jsonl"
    records = ({"name": "load", "status": "done", "line": LINE}, {"name": "vae", "status": "failed", "said": "no"})
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_all", "--table", str(file)])
    assert run_all.main() == 0
    assert "|  | s |\n| --- | ---: |\n| ours | 1.0 |\n\nfine\n" in capsys.readouterr().out


def results_with(file, device, **line):
    line = {"device": device, **line}
    file.write_text(json.dumps({"name": "run", "status": "done", "line": line}) + "\n", encoding="utf-8")
    return file


FASTER_AND_SLOWER = (  # seconds of the run and of its denoising, peak bytes, ratio to a peer; the number of regressions
    ((100, 50, 1000, 1.0), 0),
    ((50, 20, 500, 0.5), 0),
    ((114, 54, 1019, 1.2), 0),
    ((116, 50, 1000, 1.0), 1),
    ((100, 56, 1000, 1.0), 1),
    ((100, 50, 1021, 1.0), 1),
    ((100, 50, 1000, 1.3), 1),
)


@pytest.mark.parametrize("device", ["H100", "cpu"])
@pytest.mark.parametrize(("figures", "worse"), FASTER_AND_SLOWER)
def test_what_got_worse(figures, worse, device, tmp_path, monkeypatch, capsys):
    def of(file, total, denoising, peak, ratio):
        stages = {"denoising": {"seconds": denoising, "peak_bytes": peak}}
        return results_with(
            tmp_path / file, device, total=total, stages=stages, modes={"exact": {"ratio": {"median": ratio}}}
        )

    before, now = of("before", 100, 50, 1000, 1.0), of("now", *figures)
    monkeypatch.setattr(sys, "argv", ["check", str(now), "--baseline", str(before)])
    only_time = figures[2:] == (1000, 1.0)
    worse = 0 if device == "cpu" and only_time else worse  # timings from another CPU are not compared
    assert check.main() == worse
    assert f"{worse} of {2 if device == 'cpu' else 4} figures are worse" in capsys.readouterr().out


def test_what_failed_or_is_no_number_is_worse(tmp_path, monkeypatch, capsys):
    before, now = (results_with(tmp_path / file, "H100", total=1.0) for file in ("before", "now"))
    now.write_text(now.read_text().replace("1.0", "NaN") + json.dumps({"name": "vae", "status": "timed out"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["check", str(now), "--baseline", str(before)])
    assert check.main() == 1
    assert capsys.readouterr().out.endswith("1 of 1 figures are worse\nfailed or stopped: vae\n")


def test_nothing_to_compare_with(tmp_path, monkeypatch, capsys):
    now = results_with(tmp_path / "now", "a GPU that nobody has", total=1.0)
    monkeypatch.setattr(sys, "argv", ["check", str(now)])
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 2
    assert "no results of a GPU that nobody has" in capsys.readouterr().err
