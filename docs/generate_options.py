"""Generates the flag tables in options.md from skyreels_v3/request.py: python docs/generate_options.py"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skyreels_v3.cli import CONFIG_HELP, METAVARS
from skyreels_v3.request import FLAGS, Flag
from skyreels_v3.tasks import TASK_NAMES, task_spec

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "options.md"


def main() -> None:
    fill(PAGE, __file__, options_table())


def fill(page: Path, script: str, made: str) -> None:
    """Replace the part of a page that a script generates, between two markers."""
    begin, end = f"<!-- made by docs/{Path(script).name} -->\n", "<!-- end -->\n"
    text = page.read_text(encoding="utf-8")
    made, pattern = f"{begin}\n{made}\n{end}", f"{re.escape(begin)}.*?{re.escape(end)}"
    page.write_text(re.sub(pattern, lambda _: made, text, flags=re.DOTALL), encoding="utf-8")


def options_table() -> str:
    """Markdown tables of all flags, grouped as in --help."""
    lines: list[str] = []
    for flag in FLAGS:
        if flag.group:
            lines += ["", f"## {flag.group}", "", "| flag | values | for | meaning |", "|---|---|---|---|"]
        lines.append(
            f"| `--{flag.name}` | {values_of(flag)} | {tasks_of(flag)} | {flag.help.replace('|', chr(92) + '|')} |"
        )
    lines.append(f"| `--config` | FILE | | {CONFIG_HELP} |")
    return "\n".join(lines[1:]) + "\n"


def values_of(flag: Flag) -> str:
    """The values a flag accepts."""
    if flag.kind is bool:
        return ""
    if flag.choices and len(flag.choices) < 8 and flag.name != "task_type":
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    if not math.isinf(flag.low):
        return f"{flag.low:g} to {flag.high:.10g}"
    return (flag.metavar or METAVARS[flag.kind]).replace("|", r"\|")


def tasks_of(flag: Flag) -> str:
    """The tasks that take a flag; empty if all do."""
    names = [name for name in TASK_NAMES if flag.is_for(task_spec(name))]
    return "" if len(names) == len(TASK_NAMES) else ", ".join(names)


if __name__ == "__main__":
    main()
