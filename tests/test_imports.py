"""Which part of the package may import which: only what is below it or beside it, and never in a circle."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "skyreels_v3"
# folders and modules of the package, from below; those of one row may import each other if that makes no circle
LAYERS = (
    ("version", "errors", "console", "vector_kernels", "progress", "config_text"),
    ("tasks", "hints", "attention"),
    ("request",),
    ("media", "cache", "memory", "parallel", "denoising", "checkpoints", "inputs"),
    ("families", "plan", "components", "stages", "runtime", "throughput", "resume", "outputs"),
    ("wan", "hunyuan"),
    ("resolve", "dry_run", "generate", "worker"),
    ("api", "batch", "checks", "cli", "main", "__main__"),
)
NOT_IN_THE_WHEEL = ("training", "benchmarks", "tests")
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def read_imports() -> dict[tuple[str, str], set[str]]:
    """Files by (importing room, imported room); imports inside functions and for typing count too."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: relative import"
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                package, _, rest = name.partition(".")
                assert package not in NOT_IN_THE_WHEEL, f"{file}: imports {package}"
                if package == PACKAGE.name and (PACKAGE / "__init__.py" != path):
                    found[file.parts[0].removesuffix(".py"), rest.split(".")[0]].add(str(file))
    return {(room, other): files for (room, other), files in found.items() if room != other and other in LAYER}


IMPORTS = read_imports()


def test_every_room_has_a_layer() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms - {"__init__"} == LAYER.keys()


def test_nothing_imports_upward() -> None:
    upward = {pair: files for pair, files in IMPORTS.items() if LAYER[pair[0]] < LAYER[pair[1]]}
    assert not upward


def test_no_circles() -> None:
    below = defaultdict(set)
    for room, other in IMPORTS:
        below[room].add(other)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
