"""Device and dtype choices, noise, and who is on the device when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from skyreels_v3 import runtime
from skyreels_v3.errors import UserError
from skyreels_v3.memory.planner import plan
from skyreels_v3.memory.policy import Policy
from skyreels_v3.tasks import GenerationRequest, task_spec


def start(request: GenerationRequest) -> runtime.Runtime:
    return runtime.start(request, plan(request, None))


REQUEST = GenerationRequest(
    task=task_spec("reference_to_video"), model_id="tiny", prompt="p", device="cpu", height=32, width=48
)


def test_float32_on_the_cpu_unless_told_otherwise():
    assert start(REQUEST).dtype == torch.float32
    assert start(replace(REQUEST, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_auto_takes_the_cpu_when_there_is_no_other():
    assert start(replace(REQUEST, device="auto")).device.type in ("cpu", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_a_driver_without_a_torch_that_can_use_it():
    with pytest.raises(UserError, match=r"--device: cuda: torch .* cannot use it"):
        start(replace(REQUEST, device="cuda"))


def test_noise_is_that_of_a_cpu_generator():
    made = torch.randn(4, generator=start(REQUEST).generator(42))
    assert torch.equal(made, torch.randn(4, generator=torch.Generator("cpu").manual_seed(42)))


@pytest.mark.parametrize("mode", runtime.MEMORY_MODES)
def test_residence(mode):
    module = nn.Linear(2, 2)
    there = replace(start(REQUEST), device=torch.device("meta"), policy=Policy(mode, "for a test"))
    with there.resident(module, "a test"):
        assert module.weight.device.type == "meta"
    assert module.weight.device.type == ("meta" if mode == "resident" else "cpu")
