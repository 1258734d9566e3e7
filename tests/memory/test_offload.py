"""Offloading: on the device for the length of the block, and back to the very same host memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skyreels_v3.memory.offload import on_device

ELSEWHERE = torch.device("meta")  # a device that every machine has


def test_weights_go_and_come_back_uncopied():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in module.named_parameters()}
    with on_device(module, ELSEWHERE):
        assert {parameter.device for parameter in module.parameters()} == {ELSEWHERE}
    for name, parameter in module.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)


def test_they_come_back_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), on_device(module, ELSEWHERE):
        raise RuntimeError("stop")
    assert module.weight.device.type == "cpu"


def test_tied_weights_go_once():
    module = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    module[1].weight = module[0].weight
    with on_device(module, ELSEWHERE):
        assert module[1].weight is module[0].weight
    assert module[1].weight.device.type == "cpu"


def test_a_stay_within_a_stay_ends_with_the_outer_one():
    module = nn.Linear(2, 2)
    before = module.weight
    with on_device(module, ELSEWHERE):
        with on_device(module, ELSEWHERE):
            assert module.weight.device == ELSEWHERE
        assert module.weight.device == ELSEWHERE
    assert module.weight is before
