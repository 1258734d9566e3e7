"""Which implementation of USP a run takes."""

from __future__ import annotations

import torch

from skyreels_v3.attention.backends import AttentionByStep, sdpa
from skyreels_v3.parallel import usp
from skyreels_v3.parallel.groups import Parallel
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED


def zeros(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(query)


def test_a_kernel_for_some_steps_is_called_without_xdit(monkeypatch):
    """xDiT calls one kernel in all steps."""
    monkeypatch.setattr(usp, "has_xdit", lambda *_: True)
    monkeypatch.setattr(usp, "xdit_usp", lambda *_: zeros)
    parallel, attention = Parallel(SINGLE, UNDIVIDED, torch.device("cpu")), AttentionByStep(zeros, sdpa)
    assert usp.choose_usp("sage", zeros, parallel) is zeros
    chosen = usp.choose_usp("sage", attention, parallel)
    tensors = torch.randn(3, 1, 6, 2, 8)
    for attention.use_exact, expected in ((True, sdpa(*tensors)), (False, zeros(*tensors))):
        assert torch.equal(chosen(*tensors, 6), expected)
