"""Shared by the benchmarks: flags, measuring time and memory, the table and the final JSON line."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

Work = Callable[[], Tensor]
Rounds = list[dict[str, float]]  # seconds per work, one dict per round


# Flags


def parser_of(text: str | None, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the common flags."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if device:
        parser.add_argument("--device", type=torch_device, default="cpu", help="a torch device (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to this file")
    return parser


def torch_device(text: str) -> torch.device:
    """An available torch device."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    device = torch.device(text)
    return torch.device("cuda", torch.cuda.current_device()) if text == "cuda" else device


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: integers of at least `low`."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {low}")
        return int(text)

    return number


# Measuring


def seconds(work: Work) -> float:
    """Wall time, including work still running on the device."""
    start = time.perf_counter()
    wait_for(work().device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Synchronize with a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_rounds(works: Mapping[str, Work], rounds: int) -> Rounds:
    """Seconds of each work, round by round; each round starts with a different one."""
    names = list(works)
    orders = [names[number % len(names) :] + names[: number % len(names)] for number in range(rounds)]
    return [{name: seconds(works[name]) for name in order} for order in orders]


def median_of(rounds: Rounds, name: str) -> float:
    """Median seconds of a work."""
    return statistics.median(taken[name] for taken in rounds)


def ratio_of(rounds: Rounds, name: str, baseline: str) -> dict[str, float]:
    """Time of a work over that of `baseline`, within each round."""
    return spread([taken[name] / taken[baseline] for taken in rounds])


def measure_peak(work: Work, device: torch.device) -> tuple[Tensor, int | None]:
    """The result on the CPU, and the peak GPU memory it took; None without a GPU."""
    if device.type != "cuda":
        return work().cpu(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = work().cpu()
    return out, torch.cuda.max_memory_allocated(device) - before


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and maximum of at least two values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    numbers = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {key: round(value, 4) for key, value in numbers.items()}


# Reporting


def environment(name: str, device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code: command, versions, device and threads."""
    module = torch.get_device_module(device)
    of_gpu = {} if device.type != "cuda" else gpu_facts() | {"reserved_bytes": torch.cuda.max_memory_reserved(device)}
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "device": module.get_device_name(device) if hasattr(module, "get_device_name") else device.type,
        "threads": torch.get_num_threads(),
        **of_gpu,
    }


def gpu_facts() -> dict[str, Any]:
    """Driver, memory, CUDA and cuDNN of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    driver, _, memory = (said.splitlines() or [""])[0].partition(", ")
    return {"driver": driver, "memory": memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def quartiles(ratio: Mapping[str, float], digits: int = 2) -> str:
    """The quartiles of a ratio as text."""
    return f"{ratio['q1']:.{digits}f} to {ratio['q3']:.{digits}f}"


def gigabytes(size: float | None) -> str:
    """A size as text; a dash for None."""
    return "-" if size is None else f"{size / 1e9:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first left-aligned, the others right-aligned."""
    columns = []
    for index, cells in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if index else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def report(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    line: Mapping[str, Any],
    file: Path | None,
) -> None:
    """Print the table, then everything as one JSON line, which is also written to `file`."""
    print("\n".join((title, table(header, rows), *notes)))
    text = json.dumps({**line, "title": title, "table": [header, *rows], "notes": notes})
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)
