"""Runs a set of benchmarks, each in a process of its own, and collects their last lines in one file.

    python benchmarks/run_all.py cpu            # about 10 minutes on 2 cores, writes benchmarks/results/cpu.json
    python benchmarks/run_all.py gpu            # of the first GPU, into a file of its name
    python benchmarks/run_all.py --table benchmarks/results/cpu.json

The file is a JSON object: name of the benchmark -> its line. It is written after each benchmark; one that fails leaves
no line, and the others go on. --table prints a file's tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, nothing installed

from skyreels_v3.runtime import set_environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CUDA = ("--device", "cuda")
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "transformer_step": ("--rounds", "7"),
        "offload": ("--rounds", "7", "--frames", "2"),
        "vae": ("--rounds", "3"),
        "end_to_end": ("--num_frames", "25"),
        "load": ("--runs", "3"),
        "memory_vs_length": (),
        "hunyuan": (),
        "step_cache": (),
    },
    "gpu": {
        "transformer_step": (*CUDA, "--official", "r2v-720p", "--layers", "3", "--rounds", "2"),
        "offload": (*CUDA, "--official", "r2v-480p", "--layers", "8", "--rounds", "3"),
        "vae": (*CUDA, "--frames", "17", "--height", "720", "--width", "1280", "--rounds", "2"),
        "end_to_end": ("--model_id", "full", "--device", "cuda"),
        "hunyuan": (*CUDA, "--official", "--rounds", "2"),
        "step_cache": (*CUDA, "--dim", "1024"),
    },
}


def main() -> int:
    """Run a set, or print a file's tables; 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=SETS)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print this file's tables instead")
    args = parser.parse_args()
    if (args.set is None) == (args.table is None):
        parser.error("give a set or --table FILE")
    if args.set:
        return run_set(args.set)
    try:
        lines = json.loads(args.table.read_text(encoding="utf-8"))
        print("\n\n".join(map(markdown, lines.values())))
    except OSError as error:
        parser.error(f"--table: {args.table} cannot be read ({error})")
    except (ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"--table: {args.table} was not written by this script")
    return 0


def run_set(name: str) -> int:
    """Run its benchmarks and write what they gave."""
    set_environment()  # as the product does
    lines: dict[str, Any] = {}
    for benchmark, arguments in SETS[name].items():
        line = run(benchmark, arguments)
        if line is not None:
            lines[benchmark] = line
            file = RESULTS / f"{machine(lines)}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    failed = SETS[name].keys() - lines.keys()
    print(f"failed: {', '.join(sorted(failed))}" if failed else f"written: {file}", flush=True)
    return 1 if failed else 0


def run(benchmark: str, arguments: tuple[str, ...]) -> dict[str, Any] | None:
    """A benchmark's line; what people read of it is passed on. None if it failed."""
    print(f"== {benchmark} {' '.join(arguments)}", flush=True)
    made = subprocess.run(
        [sys.executable, str(HERE / f"{benchmark}.py"), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    *shown, line = made.stdout.strip().split("\n")
    print("\n".join(shown), flush=True)
    return json.loads(line) if made.returncode == 0 and line else None


def machine(lines: dict[str, Any]) -> str:
    """A file's name for the device that most figures are of."""
    device = next(iter(lines.values()))["device"]
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def markdown(line: dict[str, Any]) -> str:
    """A line's table."""
    header, *rows = line["table"]
    marks = ["---", *["---:"] * (len(header) - 1)]
    cells = "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))
    about = f"{line['device']}, torch {line['torch']}, diffusers {line['diffusers']}, {line['threads']} threads"
    notes = "".join(f"\n\n{note}" for note in line["notes"])
    return f"### {line['benchmark']}\n\n    {line['command']}\n\n{line['title']}; {about}\n\n{cells}{notes}"


if __name__ == "__main__":
    sys.exit(main())
