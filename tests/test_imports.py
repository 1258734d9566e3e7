"""Which parts of the package may import which: only those below or beside them, and never in a cycle."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "skyreels_v3"
# folders and modules of the package, lowest first; those in one row may import each other without cycles
LAYERS = (
    ("version", "errors", "packages", "console", "vector_kernels", "float8", "progress", "config_text", "subprocesses"),
    ("tasks", "prompts", "hints", "attention"),
    ("request",),
    ("media", "cache", "memory", "parallel", "denoising", "checkpoints", "inputs", "quality"),
    ("families", "plan", "components", "stages", "runtime", "throughput", "resume", "outputs", "enhancer", "preview"),
    ("wan", "hunyuan"),
    ("resolve", "dry_run", "generate", "worker"),
    ("api", "batch", "checks", "cli", "concat", "convert", "forms", "story"),
    ("web",),
    ("main", "__main__"),
)
NOT_IN_THE_WHEEL = ("comfyui", "training", "benchmarks", "tests")
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def module_of(name: str) -> str | None:
    """The longest prefix of a dotted name in the package that is a module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = PACKAGE.parent.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:length])
    return None


def read_imports() -> dict[str, set[str]]:
    """The modules that each module imports, including imports in functions and for type checking."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: relative import"
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                package = name.partition(".")[0]
                assert package not in NOT_IN_THE_WHEEL, f"{file}: imports {package}"
                module = module_of(name) if package == PACKAGE.name else None
                if module is not None and PACKAGE / "__init__.py" != path:
                    found[".".join((PACKAGE.name, *file.with_suffix("").parts))].add(module)
    return found


IMPORTS = read_imports()


def test_every_room_has_a_layer() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms - {"__init__"} == LAYER.keys()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_nothing_imports_upward() -> None:
    pairs = {(module, other) for module, others in IMPORTS.items() for other in others if room_of(other) in LAYER}
    upward = {pair for pair in pairs if LAYER[room_of(pair[0])] < LAYER[room_of(pair[1])]}
    assert not upward


@pytest.mark.parametrize("what", ["modules", "rooms"])
def test_no_circles(what: str) -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for module, others in IMPORTS.items():
        for other in others:
            pair = (module, other) if what == "modules" else (room_of(module), room_of(other))
            if pair[0] != pair[1]:
                below[pair[0]].add(pair[1])
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
