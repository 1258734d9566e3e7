"""Runs a set of benchmarks, each in its own process, and writes each result as soon as it is available.

    python benchmarks/run_all.py cpu                          # about 8 minutes on 2 cores
    python benchmarks/run_all.py gpu --minutes 6 --out DIR    # on the first GPU: as many as fit
    python benchmarks/run_all.py gpu --toy --out DIR          # the same set at toy size on the CPU, in a minute
    python benchmarks/run_all.py --table DIR/results.jsonl

--out (default: benchmarks/results/SET) gets a JSON line in results.jsonl for each benchmark that has ended: its name,
status ("done", "failed", "timed out" or "no time left"), seconds, and its own JSON line or the end of its output.
NAME.log has the full output. If one fails, hangs or goes OOM, the others still run.

All modules are imported once, before the processes are forked, which saves each of them about 10 s.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

from skyreels_v3.runtime import set_environment

RESULTS = Path(__file__).resolve().parent / "results"
PATIENCE = 3  # times the estimate, after which a benchmark is stopped
SLACK = 60  # seconds on top
PROBE = 120  # seconds, for the first use of a GPU
SAID = 2000  # characters kept from the end of a benchmark's output


@dataclass(frozen=True)
class Entry:
    """A benchmark with its flags; `seconds`: estimated total on an H100, or on 2 cores for the CPU set."""

    script: str
    flags: tuple[str, ...]
    seconds: int
    toy: tuple[str, ...] = ()


CUDA = ("--device", "cuda")
SMALL = ("--dim", "128", "--layers", "3", "--frames", "1", "--height", "4", "--width", "4", "--rounds", "2")
STEP = (*CUDA, "--official", "r2v-720p", "--layers", "2", "--rounds", "2", "--modes")
FULL = ("--model_id", "full", *CUDA, "--num_inference_steps", "3")
TOY_RUN = ("--model_id", "small", "--height", "32", "--width", "32", "--num_inference_steps", "2")
FP8_MODES = "exact,fp8,fp8_dynamic"
LOW_VRAM = ("--low_vram", "--layers", "10", "--resolution")
EXTENSION, AVATAR = ("--task_type", "single_shot_extension"), ("--task_type", "talking_avatar")
SETS: dict[str, dict[str, Entry]] = {
    "cpu": {
        "transformer_step": Entry("transformer_step", ("--rounds", "7"), 120),
        "step-bfloat16": Entry("transformer_step", ("--rounds", "7", "--dtype", "bfloat16"), 90),
        "traffic": Entry("traffic", (), 20),
        "offload": Entry("offload", ("--rounds", "7", "--frames", "2"), 60),
        "vae": Entry("vae", ("--rounds", "3"), 60),
        "end_to_end": Entry("end_to_end", ("--num_frames", "25"), 20),
        "load": Entry("load", ("--runs", "3"), 240),
        "memory_vs_length": Entry("memory_vs_length", (), 90),
        "hunyuan": Entry("hunyuan", (), 60),
        "step_cache": Entry("step_cache", (), 30),
    },
    "gpu": {
        "step-720p": Entry("transformer_step", (*STEP, "exact,stream"), 30, (*SMALL, "--modes", "exact,stream")),
        "stream-480p": Entry("offload", (*CUDA, "--official", "r2v-480p", "--layers", "4", "--rounds", "2"), 50, SMALL),
        "step-720p-fp8": Entry("transformer_step", (*STEP, FP8_MODES), 30, (*SMALL, "--modes", "exact,fp8")),
        "vae-720p": Entry(
            "vae",
            (*CUDA, "--frames", "9", "--height", "720", "--width", "1280", "--rounds", "2"),
            25,
            ("--base_dim", "4", "--frames", "5", "--height", "32", "--width", "32", "--rounds", "2"),
        ),
        "avatar-480p-low-vram": Entry(
            "end_to_end", (*FULL, *AVATAR, *LOW_VRAM, "480P"), 55, (*TOY_RUN, *AVATAR, "--low_vram")
        ),
        "extension-480p-low-vram": Entry(
            "end_to_end", (*FULL, *EXTENSION, *LOW_VRAM, "480P"), 35, (*TOY_RUN, *EXTENSION, "--low_vram")
        ),
        "extension-720p-low-vram": Entry(
            "end_to_end", (*FULL, *EXTENSION, *LOW_VRAM, "720P"), 55, (*TOY_RUN, *EXTENSION, "--low_vram")
        ),
        "v1-step": Entry("hunyuan", (*CUDA, "--official", "--layers", "3", "--rounds", "2"), 30, SMALL),
        "run-480p": Entry("end_to_end", (*FULL, "--resolution", "480P"), 35, (*TOY_RUN, "--num_frames", "5")),
        "step-720p-compiled": Entry("transformer_step", (*STEP, "exact,compile"), 75, (*SMALL, "--modes", "exact")),
        "step-cache": Entry(
            "step_cache",
            (*CUDA, "--dim", "1024"),
            30,
            ("--dim", "64", "--layers", "1", "--frames", "1", "--height", "4", "--width", "4", "--steps", "6")
            + ("--rounds", "2"),
        ),
        "run-720p-low-vram": Entry(
            "end_to_end",
            (*FULL, *LOW_VRAM[:1], *LOW_VRAM[3:], "720P"),
            180,
            (*TOY_RUN, "--low_vram", "--num_frames", "5"),
        ),
    },
}


def main() -> int:
    """Run a set, or print a file's tables; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=SETS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--minutes", type=float, help="time limit: skip what would take longer, and stop what does")
    parser.add_argument("--toy", action="store_true", help="for gpu: toy sizes, on the CPU")
    parser.add_argument("--only", metavar="NAME,...", help="these benchmarks of the set, in this order")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print this file's tables as Markdown instead")
    args = parser.parse_args()
    if (args.set is None) == (args.table is None):
        parser.error("give a set or --table FILE")
    if args.table:
        try:
            lines = [json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()]
            print("\n\n".join(markdown(line["line"]) for line in lines if line["status"] == "done"))
        except OSError as error:
            parser.error(f"--table: {args.table} cannot be read ({error})")
        except (ValueError, KeyError, TypeError, AttributeError):
            parser.error(f"--table: {args.table} was not written by this script")
        return 0
    entries = SETS[args.set]
    if args.toy and args.set != "gpu":
        parser.error("--toy: only the set gpu has toy sizes")
    if unknown := {*(args.only.split(",") if args.only else ())} - entries.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: not in the set; choose from {', '.join(entries)}")
    chosen = {name: entries[name] for name in (args.only.split(",") if args.only else entries)}
    return run_set(chosen, args.out or RESULTS / args.set, args.minutes, args.toy, args.set == "gpu" and not args.toy)


def run_set(entries: dict[str, Entry], folder: Path, minutes: float | None, toy: bool, gpu: bool) -> int:
    """Run the benchmarks one after another and write each result."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    set_environment()  # as a run does
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # otherwise checking for a GPU here breaks CUDA in forks
    for entry in entries.values():
        importlib.import_module(f"benchmarks.{entry.script}")
    context: Any = multiprocessing.get_context("fork")
    if gpu and run(context, "machine", ["benchmarks.run_all", "probe"], folder, PROBE)[0] != "done":
        context = multiprocessing.get_context("spawn")  # an import has initialized CUDA nevertheless
    statuses = []
    for name, entry in entries.items():
        left = float("inf") if minutes is None else 60 * minutes - (time.monotonic() - start)
        flags = entry.toy if toy else entry.flags
        record: dict[str, Any] = {"name": name, "script": entry.script, "flags": flags, "status": "no time left"}
        if entry.seconds <= left or toy:
            began = time.monotonic()
            module = f"benchmarks.{entry.script}"
            limit = min(left, PATIENCE * entry.seconds + SLACK)
            record["status"], said = run(context, name, [module, "main", *flags], folder, limit)
            record["wall_s"] = round(time.monotonic() - began, 1)
            try:
                record["line"] = json.loads(said.splitlines()[-1]) if record["status"] == "done" else None
            except (ValueError, IndexError):
                record["status"] = "failed"
            if record["status"] != "done":
                record["said"] = said[-SAID:]
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        statuses.append(record["status"])
        tell(record)
    print(f"{statuses.count('done')} of {len(statuses)} done; written: {results}", flush=True)
    return 0 if {*statuses} <= {"done", "no time left"} else 1


def run(context: Any, name: str, call: Sequence[str], folder: Path, limit: float) -> tuple[str, str]:
    """Call a module's function with flags in its own process; returns status and output."""
    log = folder / f"{name}.log"
    sys.stdout.flush()
    process = context.Process(target=carry_out, args=(call, log))
    process.start()
    status = "done"
    try:
        process.join(limit)
    finally:  # also if this process is being stopped
        if process.is_alive():
            status = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    status = "failed" if status == "done" and process.exitcode else status
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return status, f"{said}\nexit code {process.exitcode}" if status == "failed" else said


def carry_out(call: Sequence[str], log: Path) -> None:
    """In the new process: call the function, with all output going to `log`."""
    os.setsid()  # own session, so it can be killed with its children
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    module, function, *flags = call
    sys.argv = [f"{module.rpartition('.')[2]}.py", *flags]
    sys.exit(getattr(importlib.import_module(module), function)())


def probe() -> None:
    """Initialize the GPU and print its environment."""
    import torch

    from benchmarks.common import environment

    torch.zeros(1, device="cuda")
    print(json.dumps(environment("run_all", torch.device("cuda", 0))))


def tell(record: dict[str, Any]) -> None:
    """Print the outcome of a benchmark."""
    print(f"== {record['name']}: {record['status']}, {record.get('wall_s', 0)} s", flush=True)
    if record["status"] == "done":
        from benchmarks.common import table

        line = record["line"]
        print("\n".join((line["title"], table(*line["table"][:1], line["table"][1:]), *line["notes"])), flush=True)
    elif "said" in record:
        print(record["said"][-300:], flush=True)


def markdown(line: dict[str, Any]) -> str:
    """A JSON line's table as Markdown."""
    header, *rows = line["table"]
    marks = ["---", *["---:"] * (len(header) - 1)]
    cells = "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))
    about = f"{line['device']}, torch {line['torch']}, diffusers {line['diffusers']}, {line['threads']} threads"
    notes = "".join(f"\n\n{note}" for note in line["notes"])
    return f"### {line['benchmark']}\n\n    {line['command']}\n\n{line['title']}; {about}\n\n{cells}{notes}"


if __name__ == "__main__":
    sys.exit(main())
