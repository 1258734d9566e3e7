"""Peak memory of long videos against short ones.

Frames are written as they are made and only the last ones are kept, so a video five times as long must not take more
memory. Each length is made by `generate_video.py` with the built-in model in a new process, whose peak resident
size (ru_maxrss) is read at the end: it includes imports, weights, inputs and ffmpeg, as in normal use.

    python benchmarks/memory_vs_length.py
    python benchmarks/memory_vs_length.py --side 48 --steps 2
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
from imageio_ffmpeg import get_ffmpeg_exe

from benchmarks.common import at_least, environment, parser_of, report

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
LIMIT = 1.1  # peak of the long run / peak of the short one
LENGTHS = {"talking_avatar": (20, 100), "single_shot_extension": (5, 30)}  # seconds
ASSETS = ROOT / "assets"


@dataclass(frozen=True)
class Cost:
    """Cost of one run."""

    peak: int  # bytes
    seconds: float


def main() -> None:
    """Make all videos and print the result."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as folder:
        costs = {
            task: [measure(task, seconds, args, Path(folder)) for seconds in lengths]
            for task, lengths in LENGTHS.items()
        }
    tell(costs, args)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--side", type=at_least(16), default=32, help="side of the square frames, a multiple of 16")
    parser.add_argument("--steps", type=at_least(1), default=1, help="denoising steps")
    args = parser.parse_args()
    if args.side % 16:
        parser.error("--side must be a multiple of 16")
    return args


def measure(task: str, seconds: int, args: argparse.Namespace, folder: Path) -> Cost:
    """Make one video in a new process."""
    command = [sys.executable, str(ROOT / "generate_video.py"), "--task_type", task, "--prompt", "a", "--quiet"]
    command += ["--model_id", "tiny", "--device", "cpu", "--num_inference_steps", str(args.steps)]
    command += ["--height", str(args.side), "--width", str(args.side), "--output", str(folder / f"{seconds}.mp4")]
    command += make_inputs(task, seconds, folder)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=os.environ | {"SKYREELS_CACHE": str(folder / "cache")}
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{task}, {seconds} s: generate_video.py failed")
    peak = usage.ru_maxrss
    # a process inherits the peak of its parent
    assert peak > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(peak * 1024, time.perf_counter() - start)


def make_inputs(task: str, seconds: int, folder: Path) -> list[str]:
    """The flags for a video's inputs and length."""
    if task != "talking_avatar":
        return ["--input_video", str(ASSETS / "boat.mp4"), "--duration", str(seconds)]
    sound = folder / f"{seconds}.wav"
    speech = ["-stream_loop", "-1", "-i", str(ASSETS / "speech.mp3"), "-t", str(seconds)]
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *speech, str(sound)], stdin=subprocess.DEVNULL, check=True)
    return ["--input_image", str(ASSETS / "portrait.png"), "--input_audio", str(sound)]


def tell(costs: dict[str, list[Cost]], args: argparse.Namespace) -> None:
    """Print a table, then one JSON line."""
    figures = {task: summarize(task, short, long) for task, (short, long) in costs.items()}
    met = all(figure["ratio"] <= LIMIT for figure in figures.values())
    title = f"peak resident memory, tiny, {args.side} x {args.side}, {args.steps} step(s)"
    header = ("", "short", "MB", "s", "long", "MB", "s", "long / short")
    notes = [f"long within {LIMIT} x short: {'yes' if met else 'NO'}"]
    line = {**environment("memory_vs_length", torch.device("cpu")), "side": args.side, "steps": args.steps}
    line |= {"tasks": figures, "limit": LIMIT, "met": met}
    report(title, header, [row(task, figure) for task, figure in figures.items()], notes, line, args.json)


def summarize(task: str, short: Cost, long: Cost) -> dict[str, Any]:
    """Both runs of a task, and the ratio of their peaks."""
    runs = [
        {"video_seconds": seconds, "peak_mb": round(cost.peak / MB, 1), "seconds": round(cost.seconds, 1)}
        for seconds, cost in zip(LENGTHS[task], (short, long), strict=True)
    ]
    return {"short": runs[0], "long": runs[1], "ratio": round(long.peak / short.peak, 4)}


def row(task: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    cells = [
        text
        for run in (figure["short"], figure["long"])
        for text in (f"{run['video_seconds']} s", f"{run['peak_mb']:.0f}", f"{run['seconds']:.1f}")
    ]
    return (task, *cells, f"{figure['ratio']:.3f}")


if __name__ == "__main__":
    main()
