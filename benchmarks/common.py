"""What the benchmarks share: the line about the machine, the middle of some numbers, a table for people."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import diffusers
import torch


def environment(name: str, device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code: the command, versions, device and threads."""
    module = torch.get_device_module(device)
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "device": module.get_device_name(device) if hasattr(module, "get_device_name") else device.type,
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of at least two values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    numbers = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {key: round(value, 4) for key, value in numbers.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    columns = []
    for index, cells in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if index else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))
