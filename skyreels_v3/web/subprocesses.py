"""Processes that run a module of this package."""

from __future__ import annotations

import os
from pathlib import Path


def module_environment() -> dict[str, str]:
    """Environment variables for `python -m skyreels_v3...` in any current folder: the package may not be installed."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
