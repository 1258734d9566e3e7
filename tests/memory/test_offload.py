"""Offloading: weights are on the device while a module runs, then back in the same host memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skyreels_v3.memory.offload import on_device

META = torch.device("meta")  # a device that every machine has


def test_weights_go_and_come_back_uncopied():
    """Tied weights move together; those of a nested block return only with the outer one."""
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    before = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    with on_device(module, META):
        with on_device(module, META):
            assert {parameter.device for parameter in module.parameters()} == {META}
        assert module[0].weight.device == META and module[2].weight is module[0].weight
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_they_come_back_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), on_device(module, META):
        raise RuntimeError("stop")
    assert module.weight.device.type == "cpu"
