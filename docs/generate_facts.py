"""Generates the tables in tasks/*.md (from presets and plans) and memory_and_speed.md (from benchmarks/results):
python docs/generate_facts.py"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.generate_options import fill  # noqa: E402
from docs.page_commands import commands_of  # noqa: E402
from skyreels_v3.cli import parse_request  # noqa: E402
from skyreels_v3.families import family_of, repositories_of  # noqa: E402
from skyreels_v3.media.files import giga  # noqa: E402
from skyreels_v3.memory.policy import TILINGS  # noqa: E402
from skyreels_v3.plan import Machine, Plan, plan  # noqa: E402
from skyreels_v3.resolve import preflight  # noqa: E402
from skyreels_v3.tasks import MEMORY_MODES, TASK_NAMES, TaskSpec, task_spec  # noqa: E402

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "h100" / "results.jsonl"
GPU = Machine("cuda:0", "bfloat16", 10**12, 10**12)  # with room for everything
# label, benchmark, and the paths of variant and baseline in its result
MEASURED = (
    ("`--memory stream`, not `resident`", "stream-480p", ("ways", "stream"), ("ways", "resident")),
    ("`--quant fp8`", "step-720p-fp8", ("modes", "fp8"), ("modes", "exact")),
    ("`--quant fp8_dynamic`", "step-720p-fp8", ("modes", "fp8_dynamic"), ("modes", "exact")),
    ("`--vae_dtype bfloat16`, encoding", "vae-720p", ("encode", "bfloat16"), ("encode", "whole")),
    ("`--vae_dtype bfloat16`, decoding", "vae-720p", ("decode", "bfloat16"), ("decode", "whole")),
    ("the VAE in 2 x 2 tiles, encoding", "vae-720p", ("encode", "tiled 2 x 2"), ("encode", "whole")),
    ("the VAE in 2 x 2 tiles, decoding", "vae-720p", ("decode", "tiled 2 x 2"), ("decode", "whole")),
)


def main() -> None:
    for name in TASK_NAMES:
        fill(page_of(name), __file__, task_table(name))
    fill(DOCS / "memory_and_speed.md", __file__, measured_table())


def page_of(task: str) -> Path:
    return DOCS / "tasks" / f"{task}.md"


def task_table(name: str) -> str:
    """A Markdown table: a task's inputs and defaults, and the cost of its page's first command at published sizes."""
    spec = task_spec(name)
    command = next(iter(commands_of(page_of(name))))
    made, quantized = plan_of(command), plan_of(f"{command} --low_vram")
    request = made.request
    peaks = {f"`{mode}`": (made, mode) for mode in MEMORY_MODES} | {"`--low_vram`": (quantized, "stream")}
    modes = (f"{name} {in_tiles(*peak)}" for name, peak in peaks.items())
    published = family_of(spec).published_bytes(spec)
    fetched = sum(published[name] for each in repositories_of(request) for name in each.components)
    work = sum(each.flop for each in made.passes)
    rows = {
        "checkpoint": ", also as ".join(map("`{}`".format, (spec.model_id, *spec.also_published_as))),
        "download": giga(fetched),
        "inputs": ", ".join(f"`--{flag}`" for flag in spec.inputs) or "the prompt alone",
        "length": length_of(spec),
        "steps": steps_of(spec),
        "its own flags": ", ".join(f"`--{flag}`" for flag in spec.takes),
        "the first command": f"{request.width} x {request.height}, {request.frames_out} frames, "
        f"{len(made.passes)} {'passes' if len(made.passes) > 1 else 'pass'}, {work / 1e15:.0f} PFLOP",
        "planned memory (with the VAE in tiles)": ", ".join(modes),
    }
    first, *others = (f"| {what} | {value} |" for what, value in rows.items())
    return "\n".join([first, "|---|---|", *others]) + "\n"


def plan_of(command: str) -> Plan:
    """The plan of a command, for a GPU with room for everything and a checkpoint that is not downloaded yet."""
    with tempfile.TemporaryDirectory() as folder:
        return plan(replace(preflight(parse_request(shlex.split(command)[2:]), Path(folder)), checkpoint=None), GPU)


def in_tiles(made: Plan, mode: str) -> str:
    whole, tiled = (giga(made.peak(mode, tiles)) for tiles in (TILINGS[0], TILINGS[-1]))
    return whole if whole == tiled else f"{whole} ({tiled})"


def length_of(spec: TaskSpec) -> str:
    if not spec.max_duration:
        return f"that of the sound, at {spec.fps} frames per second"
    limits = f"{spec.min_duration} to {spec.max_duration} s, {spec.default_duration} by default"
    return f"{limits}, at {spec.fps} frames per second"


def steps_of(spec: TaskSpec) -> str:
    shift = "the scheduler's shift" if spec.shift is None else f"shift {spec.shift:g}"
    guided = "no guidance" if spec.guidance_scale == 1 else f"guidance {spec.guidance_scale:g}"
    return f"{spec.num_inference_steps}, {shift}, {guided} by default"


def measured_table() -> str:
    """A Markdown table: time and memory of modes relative to their baselines, as measured on a GPU."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    results = {line["name"]: line["line"] for line in lines}
    rows = ["| | time | memory |", "|---|---:|---:|"]
    for what, name, variant, baseline in MEASURED:
        one, other = (value_of(results[name], path) for path in (variant, baseline))
        seconds = next(key for key in ("seconds", "seconds_per_frame") if key in one)
        memory = f"{one['peak_bytes'] / other['peak_bytes']:.2f}" if "VAE" in what or "vae" in what else ""
        rows.append(f"| {what} | {one[seconds] / other[seconds]:.2f} | {memory} |")
    return "\n".join(rows) + "\n"


def value_of(result: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        result = result[key]
    return result


if __name__ == "__main__":
    main()
