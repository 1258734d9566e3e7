"""The commands in Markdown pages, for the scripts here and for the tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n)+)")
SHELL = ("sh", "bash", "console")
PROGRAMS = "python3?|skyreels|torchrun|make|pip|docker|curl|sbatch|ray|git|cp|ln|install|openssl|systemctl|hf|zensical"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S* )*(?:{PROGRAMS}) .*")


def commands_of(page: Path) -> Iterator[str]:
    """The shell commands in a page's code blocks, each on one line."""
    text = page.read_text(encoding="utf-8")
    blocks = [block for language, block in FENCE.findall(text) if language in SHELL]
    blocks += INDENTED.findall(FENCE.sub("", text))
    for line in re.sub(r" *\\\n\s*", " ", "\n".join(blocks)).splitlines():
        if COMMAND.fullmatch(line.strip()):
            yield line.strip()
