"""--jobs: many videos in one run: by one process, by several that share the jobs, and by several that work together."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from skyreels_v3 import batch as jobs
from skyreels_v3 import generate as session
from skyreels_v3 import resolve, runtime
from skyreels_v3.batch import Results, choose_jobs, group_by_model, parse_results, read_jobs, results_file
from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.cli import parse_flags, parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.generate import Generator
from skyreels_v3.parallel.ranks import SINGLE
from skyreels_v3.plan import Plan
from skyreels_v3.resolve import AssetResolver
from skyreels_v3.stages import Stages
from tests.conftest import ASSETS, ROOT, files_in
from tests.planning import planned

TOY = ("--model_id", "tiny", "--device", "cpu", "--height", 32, "--width", 48, "--num_inference_steps", 2)
FOX = {"task_type": "reference_to_video", "ref_imgs": [str(ASSETS / "fox.png")], "num_frames": 5, "prompt": "a fox"}
BOAT = {
    "task_type": "shot_switching_extension", "input_video": str(ASSETS / "boat.mp4"), "duration": 2, "prompt": "a boat",
}  # fmt: skip
NOT_IN_A_LINE = (
    *("jobs", "config", "use_usp", "ulysses_degree", "resume", "dry_run", "quiet", "verbose", "gpu_num", "video_num"),
)
MISSING = BOAT | {"input_video": "nowhere.mp4"}


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Write jobs.jsonl from objects or lines of text."""
    monkeypatch.chdir(tmp_path)

    def write(*lines: Any) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file = Path("jobs.jsonl")
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return file

    return write


def results_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results_file(str(file)).read_text(encoding="utf-8").splitlines()]


# The file


def test_defaults_and_what_overrules_them(write):
    file = write(
        FOX,
        FOX | {"memory": "stream", "seed": 7, "duration": 3} | {"num_frames": 9},
        {name: value for name, value in FOX.items() if name != "num_frames"} | {"duration": 3},
        FOX | {"offload": True},
    )
    one, wrong, other, last = read_jobs(str(file), {"offload": True, "num_frames": 13, "seed": 5, "quiet": True})
    made = one.request
    assert (made.memory, made.num_frames, made.seed, made.verbosity) == ("offload", 5, 5, -1)
    assert wrong.request is None and wrong.problem.startswith("--duration: 3: conflicts with --num_frames")
    assert (other.request.num_frames, other.request.duration, other.number) == (None, 3, 3)
    assert last.request.memory == "offload"
    (streamed,) = read_jobs(str(write(FOX | {"memory": "stream"})), {"offload": True})
    assert streamed.request.memory == "stream"


def test_ids(write):
    """An id depends on the flags, but not on their order, the line number, or flags that only say how to do the job."""
    turned = dict(reversed(FOX.items()))
    first, again, other = read_jobs(str(write("", FOX, turned, FOX | {"seed": 1})), {})
    assert len({first.id, again.id, other.id}) == 3
    assert [job.number for job in (first, again, other)] == [2, 3, 4]
    moved = read_jobs(str(write(FOX | {"seed": 1}, "[]", turned, FOX)), {"quiet": True, "memory": "stream"})
    assert [job.id for job in moved if job.request is not None] == [other.id, first.id, again.id]
    assert read_jobs(str(write(FOX)), {"seed": 1})[0].id == other.id
    assert read_jobs(str(write(FOX | {"output": "a.mp4"})), {})[0].id != first.id


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "--jobs: { is not JSON (Expecting property name"),
        ("[1, 2]", "--jobs: [1, 2] is not a JSON object; write flags as keys"),
        ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        ('{"seed": %s}' % ("[" * 100_000), "is not JSON (maximum recursion depth exceeded"),
        ('{"seed": %s}' % ("9" * 5000), "is not JSON (Exceeds the limit"),
        (b"\xff\xfe\x00".decode("latin-1"), "is not JSON"),
        (FOX | {"sed": 1}, "--jobs: unknown key sed; did you mean seed?"),
        (FOX | {"seed": float("nan")}, "--seed: nan is not a whole number"),
        (FOX | {"seed": None}, "--seed: an empty value is not a whole number"),
        (FOX | {"prompt": "\ud800"}, "is not UTF-8"),
        (FOX | {"num_inference_steps": 0}, "--num_inference_steps: 0 is out of range"),
        (FOX | {"ref_imgs": ["a", 1]}, "--ref_imgs: 1 is not text"),
        ({"prompt": "a"}, "--task_type: missing"),
        *((FOX | {name: True}, f"--{name}: is not allowed in a line of --jobs") for name in NOT_IN_A_LINE),
    ],
)
def test_bad_lines(write, line, problem):
    bad, good = read_jobs(str(write(line, FOX)), {})
    assert bad.request is None and problem in bad.problem
    assert bad.problem.isprintable() and len(bad.problem) < 600
    assert good.request is not None


def test_v1s_flags_can_stand_in_a_line(write):
    line = {
        "task_type": "i2v", "prompt": "a", "image": "a.png", "outdir": "films", "base_model_id": "a/b", "fps": 30,
        "embedded_guidance_scale": 2, "no_riflex": True, "offload": True, "parameters_level": True, "quant": "fp8",
    }  # fmt: skip
    (job,) = read_jobs(str(write(line)), {})
    assert (job.request.image, job.request.base_model_id, job.request.task.fps) == ("a.png", "a/b", 30)


def test_paths_begin_where_the_file_is(write, tmp_path, monkeypatch):
    write(FOX | {"ref_imgs": "a.png", "output": "a.mp4"})
    monkeypatch.chdir(tmp_path.parent)
    (job,) = read_jobs(f"{tmp_path.name}/jobs.jsonl", {})
    assert job.request.ref_imgs == (f"{tmp_path.name}/a.png",)
    assert job.request.output == Path(tmp_path.name) / "a.mp4"


def test_an_output_that_is_another_ones(write):
    outputs = [FOX | {"output": name} for name in ("a.mp4", "a.mp4", "c.mp4", "./b/../a.mp4")]
    first, second, third, fourth = read_jobs(str(write(*outputs)), {})
    assert second.problem == "--output: a.mp4 is already the output of line 1; give another name"
    assert first.request is not None and third.request is not None
    assert "is already the output of line 1" in fourth.problem


def test_as_windows_editors_write_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(FOX).encode()] * 2) + b"\r\n")
    assert all(job.request is not None for job in read_jobs(str(tmp_path / "a.jsonl"), {}))


def test_many_writers_and_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "jobs.results.jsonl"
    file.write_text('{"id": "a", "status": "done"}\n["\n{"id": "b", "status": "do')
    writers = [Results(file) for _ in range(4)]
    assert [*writers[0].before] == ["a"]

    def write(writer: int) -> None:
        for number in range(50):
            writers[writer].add({"id": f"{writer}{number:04x}", "status": "done", "output": "\u00fc" * 500})

    with ThreadPoolExecutor() as threads:
        [*threads.map(write, range(4))]
    ids = {f"{writer}{number:04x}" for writer in range(4) for number in range(50)}
    assert parse_results(file.read_bytes()).keys() == {"a", *ids}


def test_what_is_left_to_do(write, tmp_path, caplog):
    """Previously failed jobs come last; finished ones are left out unless their video is gone."""
    file = write(*(FOX | {"seed": seed} for seed in range(5)))
    lines, results = read_jobs(str(file), {}), Results(results_file(str(file)))
    (tmp_path / "there").mkdir()  # a folder of frames
    for job, status, video in ((0, "error", ""), (1, "error", ""), (1, "done", "there"), (2, "done", "gone")):
        named = {"output": str(tmp_path / video)} if video else {}
        results.add({"id": lines[job].id, "status": status} | named)
    assert [job.number for job in choose_jobs(lines, Results(results.path), SINGLE)] == [3, 4, 5, 1]
    assert f"line 3: {tmp_path}/gone is gone; making it again" in caplog.messages


CLAIMING = """
import sys
from pathlib import Path
from skyreels_v3.batch import Job, Results

results = Results(Path(sys.argv[1]))
print(results.claim(Job(1, sys.argv[2], None)), flush=True)
input()
"""


@pytest.mark.slow
def test_a_job_is_one_runs(write, tmp_path):
    """A run holds a job until the run ends; then another may claim it, unless it started before the job was done."""
    (job, other) = read_jobs(str(write(FOX, BOAT)), {})
    results = Results(tmp_path / "jobs.results.jsonl")

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLAIMING, str(results.path), job.id]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    runs = [begin(), begin()]
    said = {run.stdout.readline(): run for run in runs}
    assert said.keys() == {"True\n", "False\n"}
    assert not results.claim(job) and results.claim(other)
    for run in runs:
        run.kill()
        run.communicate()
    assert results.claim(job)
    begun_before = Results(results.path)
    results.add({"id": job.id, "status": "error"})
    assert not begun_before.claim(job) and Results(results.path).claim(job)


def test_a_disk_without_locks(write, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.fcntl, "lockf", refuse)
    (job,) = read_jobs(str(write(FOX)), {})
    results = Results(Path("jobs.results.jsonl"))
    assert results.claim(job)
    results.add({"id": job.id, "status": "done"})
    said = "jobs.results.jsonl cannot be locked (No locks available); do not start a second run of these jobs"
    assert caplog.messages == [said] and len(results.read()[job.id]) == 1


def test_results_of_files_elsewhere(tmp_path, monkeypatch):
    """Paths of videos are relative to the results file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    results = Results(Path("jobs/a.results.jsonl"))
    for output in ("result/a.mp4", "jobs/b.mp4", f"{tmp_path}/c.mp4"):
        results.add({"id": "a", "status": "done", "output": output})
    expected = ["../result/a.mp4", "b.mp4", f"{tmp_path}/c.mp4"]
    assert [entry["output"] for entry in results.read()["a"]] == expected


def test_those_that_need_the_same_come_together(write):
    lines = [
        FOX, BOAT, FOX | {"seed": 1}, "x", BOAT | {"seed": 1}, FOX | {"quant": "fp8"}, FOX | {"resolution": "480P"},
        FOX | {"dtype": "float32"}, FOX | {"memory": "offload"}, FOX | {"no_cache": True}, FOX | {"model_id": "a/b"},
    ]  # fmt: skip
    ordered = group_by_model(read_jobs(str(write(*lines)), {"device": "cpu"}))
    assert [job.number for job in ordered] == [4, 1, 3, 7, 8, 2, 5, 6, 9, 10, 11]


def test_what_is_fetched_is_fetched_once(monkeypatch, tmp_path):
    asked = []

    def download(request: Any, _: object) -> Path:
        asked.append(request.model_id)
        if request.model_id == "no/where":
            raise UserError("--model_id", "no/where: is nowhere; look elsewhere")
        return tmp_path

    monkeypatch.setattr(resolve, "download", download)
    monkeypatch.setattr(resolve, "follow_weights", lambda request, _: request)
    request = parse_request(["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "a.png"])
    stock, other = AssetResolver(), AssetResolver()
    wanted = [replace(request, model_id=name) for name in ("a/b", "no/where", "a/b", "no/where", "c/d")]
    stock.resolve_all(wanted)
    other.merge_outcomes(json.loads(json.dumps(stock.outcomes)))  # as another process receives them
    for known in (stock, other):
        assert known.resolve(wanted[0], None) == (wanted[0], tmp_path)
        with pytest.raises(UserError, match=r"^--model_id: no/where: is nowhere; look elsewhere$") as error:
            known.resolve(wanted[1], None)
        assert error.value.flag == "--model_id"
    assert asked == ["a/b", "no/where", "c/d"]


# One process


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Lists the tasks whose models have been loaded."""
    tasks = []
    load = session.load_components

    def spy(plan: Plan, runtime: Any) -> Any:
        tasks.append(plan.request.task.name)
        return load(plan, runtime)

    monkeypatch.setattr(session, "load_components", spy)
    return tasks


@pytest.fixture
def on_make(monkeypatch) -> Callable[[Callable[[Any], object]], None]:
    """Call a function with the request before each video is made."""

    def on_make(act: Callable[[Any], object]) -> None:
        generate = Generator.write

        def watched(self: Generator, plan: Plan) -> Path:
            act(plan.request)
            return generate(self, plan)

        monkeypatch.setattr(Generator, "write", watched)

    return on_make


@pytest.mark.slow
def test_good_and_bad_lines(main, write, loads, on_make, tmp_path, caplog):
    file = write(
        FOX | {"output": "one.mp4", "seed": -1}, MISSING, "", "no JSON", BOAT | {"output": "frames/"},
        FOX | {"output": "two.mp4", "save_latents": "two.safetensors"}, FOX | {"seed": -2},
    )  # fmt: skip
    seen: list[list[int]] = []
    on_make(lambda _: seen.append([result["job"] for result in results_of(file)]))
    code, stdout, stderr = main("--jobs", "jobs.jsonl", *TOY)
    assert (code, stdout) == (1, "one.mp4\ntwo.mp4\nframes\n")
    assert stderr.splitlines()[-1] == "error: 3 of 6 jobs failed; jobs.results.jsonl says why"
    assert loads == ["reference_to_video", "shot_switching_extension"]
    assert seen == [[4, 7], [4, 7, 1], [4, 7, 1, 6, 2]]  # in the order they end
    assert {"one.mp4", "two.mp4", "two.safetensors"} < files_in(tmp_path)
    assert len([*(tmp_path / "frames").iterdir()]) == 48
    results = {result["job"]: result for result in results_of(file)}
    assert {number: result["status"] for number, result in results.items()} == {
        1: "done", 2: "error", 4: "error", 5: "done", 6: "done", 7: "error",
    }  # fmt: skip
    assert results[6].keys() == {"job", "id", "status", "output", "seed", "seconds"}
    assert (results[6]["output"], results[6]["seed"]) == ("two.mp4", 42)
    assert 0 <= results[1]["seed"] != 42
    assert results[2].keys() == {"job", "id", "status", "error", "exit", "seconds"}
    assert results[2]["exit"] == 2 and results[2]["error"].startswith("--input_video: nowhere.mp4 does not exist")

    before = files_in(tmp_path)
    code, stdout, stderr = main("--jobs", "jobs.jsonl", *TOY, "--quiet", "--memory", "stream")
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1] == "error: 3 of 6 jobs failed; jobs.results.jsonl says why"
    assert len(loads) == 2 and len(results_of(file)) == 9 and files_in(tmp_path) == before

    write(*file.read_text().splitlines()[::4], FOX | {"seed": 2, "output": "three.mp4"})
    code, stdout, stderr = main("--jobs", "jobs.jsonl", *TOY)
    assert (code, stdout) == (0, "three.mp4\n")
    assert "2 of 3 jobs already done, according to jobs.results.jsonl" in caplog.messages
    assert len(loads) == 3
    assert main("--jobs", "jobs.jsonl", *TOY)[:2] == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [(), ("--offload",), ("--low_vram",), ("--memory", "stream", "--stream_blocks", 1)], ids=str
)
def test_a_job_makes_what_a_run_makes(main, write, tmp_path, mode):
    """The videos before do not matter. In bfloat16, where matmuls do not depend on the alignment of weights."""
    mode = (*mode, "--dtype", "bfloat16", "--no_cache")
    write(
        FOX | {"prompt": "before"},
        FOX | {"save_latents": "job.safetensors", "guidance_scale": 2, "num_inference_steps": 3},
    )
    assert main("--jobs", "jobs.jsonl", *TOY, *mode)[0] == 0
    flags = ("--task_type", FOX["task_type"], "--ref_imgs", FOX["ref_imgs"][0], "--num_frames", 5, "--prompt", "a fox")
    alone = ("--save_latents", "run.safetensors", "--guidance_scale", 2)
    assert main(*flags, *TOY[:-2], "--num_inference_steps", 3, *alone, *mode)[0] == 0
    run, job = (load_file(tmp_path / f"{name}.safetensors")["latents.0"] for name in ("run", "job"))
    np.testing.assert_array_equal(job, run)


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 9.00 GiB"), ValueError("odd\nvery odd")])
def test_one_job_fails(main, write, loads, monkeypatch, error):
    """The next job reloads its models: a failure may leave them in any state."""
    file = write(FOX | {"seed": 1}, FOX | {"seed": 2}, FOX | {"seed": 3}, BOAT)
    transformers: list[weakref.ref[Any]] = []
    denoise, start = Stages.denoise, runtime.start

    def only(*given: Any) -> Any:
        assert not any(transformer() for transformer in transformers), "what was loaded before is still there"
        return start(*given)

    def fail(self: Stages, *given: Any, **more: Any) -> Any:
        transformers.append(weakref.ref(self.components.transformer))
        if self.request.seed == 2:
            with self.runtime.resident(self.components.transformer, "denoising"):
                raise type(error)(*error.args)  # a new one: the caught one references what was in use
        return denoise(self, *given, **more)

    monkeypatch.setattr(Stages, "denoise", fail)
    monkeypatch.setattr(runtime, "start", only)
    code, stdout, stderr = main("--jobs", "jobs.jsonl", *TOY, "--memory", "stream")
    assert code == 1 and len(stdout.splitlines()) == 3
    assert stderr.splitlines()[-1] == "error: 1 of 4 jobs failed; jobs.results.jsonl says why"
    result = results_of(file)[1]
    assert (result["job"], result["status"], result["seed"], result["exit"]) == (2, "error", 2, 1)
    assert result["error"] == "ValueError: odd" or result["error"].startswith(
        "OutOfMemory: out of memory while denoising: 9.00 GiB was requested; reduce memory use with"
    )
    assert len(loads) == 3


def test_interrupted(main, write, on_make):
    file = write(FOX | {"seed": 1}, FOX | {"seed": 2}, FOX | {"seed": 3})

    keys = [KeyboardInterrupt]

    def press(request: Any) -> None:
        if request.seed == 2 and keys:
            raise keys.pop()

    on_make(press)
    code, stdout, stderr = main("--jobs", "jobs.jsonl", *TOY)
    assert code == 130 and len(stdout.splitlines()) == 1
    assert stderr.splitlines()[-1] == "interrupted"
    assert [(result["job"], result["status"]) for result in results_of(file)] == [(1, "done")]
    with results_file(str(file)).open("a") as results:
        results.write('{"job": 2, "id')  # as if the run had been killed
    code, stdout, _ = main("--jobs", "jobs.jsonl", *TOY)
    assert code == 0 and len(stdout.splitlines()) == 2
    lines = results_file(str(file)).read_text().splitlines()
    assert lines.pop(1) == '{"job": 2, "id'
    assert [json.loads(line)["job"] for line in lines] == [1, 2, 3]


@pytest.mark.slow
def test_a_job_goes_on_from_its_finished_passes(main, write, monkeypatch, caplog, tmp_path):
    """A job without an output, whose seed was random."""
    talk = {"task_type": "talking_avatar", "input_image": str(ASSETS / "portrait.png"), "prompt": "a", "seed": -1}
    small = {"input_audio": str(ASSETS / "speech.mp3"), "height": 32, "width": 32, "num_inference_steps": 1}
    file = write(talk | small)
    denoise, passes = Stages.denoise, [1, 2]

    def interrupted(self: Stages, *given: Any, **more: Any) -> Any:
        if passes.pop(0) == 2:
            raise KeyboardInterrupt
        return denoise(self, *given, **more)

    monkeypatch.setattr(Stages, "denoise", interrupted)
    code, _, stderr = main("--jobs", "jobs.jsonl", *TOY[:4])
    assert code == 130 and "resume" not in stderr
    (kept,) = tmp_path.glob("result/talking_avatar/*.state")
    assert (
        caplog.messages[-1] == f"{kept.relative_to(tmp_path)} holds the finished passes; to resume, repeat the command"
    )
    seed = kept.name.split("_")[0]
    monkeypatch.setattr(Stages, "denoise", denoise)
    code, stdout, _ = main("--jobs", "jobs.jsonl", *TOY[:4])
    assert (code, stdout) == (0, f"{kept.relative_to(tmp_path).with_suffix('.mp4')}\n")
    assert [text for text in caplog.messages if "already finished" in text] == ["pass 1 was already finished"]
    assert not kept.exists() and str(results_of(file)[-1]["seed"]) == seed


def test_a_dry_run(main, write, tmp_path):
    file = write(FOX, "x", MISSING, BOAT, FOX | {"seed": 1, "output": "b.mp4"})
    (tmp_path / "b.mp4").touch()
    flags = [str(flag) for flag in (*TOY, "--dry_run")]
    done = read_jobs(str(file), parse_flags(flags))[4]
    results_file(str(file)).write_text(json.dumps({"id": done.id, "status": "done", "output": "b.mp4"}))

    code, stdout, stderr = main("--jobs", "jobs.jsonl", *flags)
    assert code == 2, stderr
    assert stderr == "error: --jobs: jobs.jsonl: errors in 2 of 5 lines; fix them as described above\n"
    first, second, third, fourth, fifth = stdout.rstrip("\n").split("\n\n")
    assert first.startswith("line          1\ntask          reference_to_video: ")
    assert second.startswith("line          2\nerror         --jobs: x is not JSON")
    assert third == "line          3\nerror         --input_video: nowhere.mp4 does not exist; check the path"
    assert "48 x 32, 48 new frames" in fourth
    assert fifth == "line          5\ndone          b.mp4"
    assert files_in(tmp_path) == {"jobs.jsonl", "jobs.results.jsonl", "b.mp4"}
    write(FOX, FOX | {"seed": 1, "output": "b.mp4"})
    assert main("--jobs", "jobs.jsonl", *flags)[0] == 0


# What stays loaded


@pytest.fixture(scope="module")
def loaded(cache) -> Generator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKYREELS_CACHE", str(cache))
        return Generator(plan_for(make_tiny(request_for().task)))


def request_for(*flags: object) -> Any:
    argv = ("--task_type", "reference_to_video", "--ref_imgs", "a.png", "--prompt", "a", *TOY, *flags)
    return parse_request([str(flag) for flag in argv])


def plan_for(checkpoint: Path, *flags: object, free: float | None = None) -> Plan:
    return planned(request_for(*flags), checkpoint, free=None if free is None else int(free))


FIT = ("--seed 1 --prompt b --num_frames 9 --guidance_scale 3", "--height 720 --width 1280", "--memory resident")
NO_FIT = (
    "--dtype bfloat16", "--memory offload", "--memory stream --stream_blocks 1", "--quant fp8", "--vae_dtype bfloat16",
    "--attention sdpa", "--compile", "--lora a/b", "--no_cache",
)  # fmt: skip


@pytest.mark.parametrize(("words", "fits"), [*((words, True) for words in FIT), *((words, False) for words in NO_FIT)])
def test_what_fits(loaded, words, fits):
    flags = words.split()
    assert loaded.fits(plan_for(loaded.plan.checkpoint, *flags)) is fits
    assert not loaded.fits(replace(plan_for(loaded.plan.checkpoint, *flags), checkpoint=Path("another")))


def test_a_larger_video_may_need_another_memory_mode(loaded):
    large = ("--height", 720, "--width", 1280)
    assert loaded.fits(plan_for(loaded.plan.checkpoint, *large, free=15e9))
    assert not loaded.fits(plan_for(loaded.plan.checkpoint, *large, free=5e9))


# Several processes

# generate_video.py, plus a note of which rank worked on which job
NOTED = """
import os
import sys
from pathlib import Path

import skyreels_v3.main
from skyreels_v3 import batch as jobs

run_job = jobs.run_job


def noted(job, *others):
    with open("notes", "a") as notes:
        notes.write(f"{job.number} {os.environ['RANK']}\\n")
    return run_job(job, *others)


jobs.run_job = noted
sys.exit(skyreels_v3.main.main(sys.argv[1:]))
"""


@pytest.fixture
def launch(tmp_path, cache) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in two processes with torchrun."""
    (tmp_path / "noted.py").write_text(NOTED)

    def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {"SKYREELS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*launcher, "noted.py", *map(str, arguments)], cwd=tmp_path, env=os.environ | environment,
            capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip

    return launch


def notes(folder: Path) -> dict[int, set[int]]:
    """The ranks that worked on each job."""
    did: dict[int, set[int]] = {}
    for line in (folder / "notes").read_text().splitlines():
        number, rank = map(int, line.split())
        did.setdefault(number, set()).add(rank)
    return did


@pytest.mark.slow
def test_two_processes_share_them_out(launch, write, tmp_path):
    file = write(*(FOX | {"seed": seed} for seed in range(1, 7)), MISSING, "x")
    made = launch("--jobs", "jobs.jsonl", *TOY)
    assert made.returncode != 0
    results = results_of(file)
    assert sorted(result["job"] for result in results) == [*range(1, 9)]
    done = [result for result in results if result["status"] == "done"]
    assert sorted(result["job"] for result in done) == [1, 2, 3, 4, 5, 6]
    assert sorted(made.stdout.splitlines()) == sorted(result["output"] for result in done)
    assert all((tmp_path / result["output"]).is_file() for result in done)
    did = notes(tmp_path)
    assert all(len(ranks) == 1 for ranks in did.values()) and set.union(*did.values()) == {0, 1}
    assert made.stderr.count("error: 2 of 8 jobs failed; jobs.results.jsonl says why\n") == 1
    assert made.stderr.count("loading: 100%") == 1  # only the main process logs


@pytest.mark.slow
def test_two_processes_together(launch, write, tmp_path):
    """Two tasks, a line that is invalid from the start, and one that proves invalid later."""
    small = {"height": 32, "width": 32}
    fox, boat = FOX | small | {"seed": -1, "num_frames": 9}, BOAT | small
    file = write(fox, MISSING, fox | {"output": "second.mp4"}, FOX | {"height": 31}, boat)
    made = launch("--jobs", "jobs.jsonl", *TOY, "--use_usp")
    assert made.returncode != 0
    assert [(result["job"], result["status"]) for result in results_of(file)] == [
        (4, "error"), (1, "done"), (3, "done"), (2, "error"), (5, "done"),
    ], made.stderr  # fmt: skip
    assert notes(tmp_path) == {number: {0, 1} for number in range(1, 6)}
    assert made.stdout.splitlines() == [result["output"] for result in results_of(file) if result["status"] == "done"]
    assert made.stderr.count("error: 2 of 5 jobs failed") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray(write, tmp_path, cache):
    file = write(FOX | {"output": "a.mp4"}, MISSING, FOX | {"output": "b.mp4", "seed": 1})
    environment = {"SKYREELS_CACHE": str(cache), "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "cluster" / "ray_jobs.py"), "--jobs", "jobs.jsonl", *map(str, TOY)]
    made = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert made.returncode == 1, made.stderr
    assert sorted(made.stdout.splitlines()) == ["a.mp4", "b.mp4"]
    assert {result["job"]: result["status"] for result in results_of(file)} == {1: "done", 2: "error", 3: "done"}
    assert made.stderr.splitlines()[-1] == "error: 1 of 3 jobs failed; jobs.results.jsonl says why"
