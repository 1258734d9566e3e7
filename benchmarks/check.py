"""Compares results of run_all.py with earlier ones of the same device, and fails if something got worse or failed.

    python benchmarks/check.py DIR/results.jsonl                    # with benchmarks/results/*/results.jsonl
    python benchmarks/check.py DIR/results.jsonl --baseline FILE

It compares seconds, ratios to a baseline in the same run, peak memory and counts that both files have. A whole run may
take 15 % longer, its denoising 10 %, anything shorter 25 %; memory and counts may grow by 2 %, waits for the device not
at all. Seconds on a CPU are not compared, since results do not name the CPU; ratios are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

from benchmarks.common import table

RESULTS = Path(__file__).resolve().parent / "results"
SHORT = 0.25
LIMITS = {  # by the last part of a figure's name
    "total": 0.15,
    "denoising/seconds": 0.10,
    "seconds": SHORT,
    "seconds_per_frame": SHORT,
    "ratio/median": SHORT,
    "peak_bytes": 0.02,
    "bytes": 0.02,
    "operations": 0.02,
    "waits": 0.0,
}
TIMES = ("total", "seconds", "seconds_per_frame")
MIN_SECONDS = 0.1  # shorter times are too noisy


class Change(NamedTuple):
    """A figure that both files have.

    Attributes:
        name: of the benchmark and the figure.
        limit: how much it may grow, as a share of `before`.
    """

    name: str
    before: float
    now: float
    limit: float

    @property
    def growth(self) -> float:
        """As a share of `before`."""
        return self.now / self.before - 1 if self.before else float(self.now > 0)

    @property
    def is_worse(self) -> bool:
        return not self.growth <= self.limit  # true for NaN too


def records_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def lines_of(file: Path) -> dict[str, dict[str, Any]]:
    """The result lines of the benchmarks that succeeded, by name."""
    return {record["name"]: record["line"] for record in records_of(file) if record["status"] == "done"}


def broken_in(file: Path) -> list[str]:
    """The benchmarks that failed or timed out."""
    return [record["name"] for record in records_of(file) if record["status"] in ("failed", "timed out")]


def device_of(lines: dict[str, dict[str, Any]]) -> str:
    return next((str(line["device"]) for line in lines.values()), "")


def figures_of(line: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of all figures that have a limit."""
    if isinstance(line, dict):
        for key, value in line.items():
            yield from figures_of(value, f"{name}/{key}")
    elif isinstance(line, int | float) and limit_of(name) is not None:
        yield name, line


def limit_of(name: str) -> float | None:
    """How much a figure may grow, by the longest matching end of its name; None if it is not compared."""
    found = [part for part in LIMITS if name.endswith(f"/{part}")]
    return LIMITS[max(found, key=len)] if found else None


def compare(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[Change]:
    """Changes of the figures that both have, worst first; `before` and `now` are of the same device."""
    changes = []
    for name in before.keys() & now.keys():
        old = dict(figures_of(before[name], name))
        for figure, value in figures_of(now[name], name):
            limit = limit_of(figure)
            if figure not in old or limit is None:
                continue
            is_time = figure.endswith(TIMES)
            if not is_time or (device_of(now) != "cpu" and old[figure] >= MIN_SECONDS):
                changes.append(Change(figure, old[figure], value, limit))
    return sorted(changes, key=lambda change: (change.limit - change.growth, change.name))


def main() -> int:
    """Print what got worse; 1 if anything did or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE", help="results.jsonl of run_all.py")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="earlier results (default: of the same device)")
    args = parser.parse_args()
    try:
        now, broken = lines_of(args.results), broken_in(args.results)
        files = [args.baseline] if args.baseline else sorted(RESULTS.glob("*/results.jsonl"))
        known = [lines for file in files if device_of(lines := lines_of(file)) == device_of(now)]
    except OSError as error:
        parser.error(f"{error.filename} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"not written by run_all.py ({error!r})")
    changes = compare(known[-1], now) if known else []
    if not changes and not broken:
        parser.error(f"{args.results}: nothing to compare with: no results of {device_of(now) or 'any device'}")
    worse = [change for change in changes if change.is_worse]
    rows = [[c.name, f"{c.before:.4g}", f"{c.now:.4g}", f"{c.growth:+.1%}", f"{c.limit:.0%}"] for c in changes]
    print(table(["worst first", "before", "now", "change", "limit"], rows[: max(10, len(worse))]))
    print(f"{len(worse)} of {len(changes)} figures are worse")
    if broken:
        print(f"failed or stopped: {', '.join(broken)}")
    return 1 if worse or broken else 0


if __name__ == "__main__":
    sys.exit(main())
