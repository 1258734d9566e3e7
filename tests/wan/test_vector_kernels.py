"""A CPU's vector functions are first called on few elements, before any call that is split among threads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Prints the size of each function's first call in a process that computes a transformer's tables
PROGRAM = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode

first = {}


class Record(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in {"cos", "sin", "exp", "sqrt", "tanh"}:
            first.setdefault(f"{name} {arguments[0].dtype}", arguments[0].numel())
        return function(*arguments, **(options or {}))


with Record():
    from skyreels_v3.wan.rope import Segment
    from skyreels_v3.wan.rope import rotary_tables
    from skyreels_v3.wan.transformer import sinusoid

    rotary_tables([Segment(torch.zeros(1, 16, 9, 256, 256))], (1, 2, 2), 128)
    sinusoid(torch.arange(40)[None], 256)
print(json.dumps(first))
"""


@pytest.mark.slow
def test_first_calls_are_small():
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    first = json.loads(run.stdout)
    assert set(first) >= {f"{name} torch.{dtype}" for name in ("cos", "sin") for dtype in ("float32", "float64")}
    assert max(first.values()) < 2048
