"""Device and dtype choices, noise, and who is on the device when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from skyreels_v3 import runtime
from skyreels_v3.errors import UserError
from skyreels_v3.tasks import GenerationRequest, task_spec

REQUEST = GenerationRequest(task=task_spec("reference_to_video"), model_id="tiny", prompt="p", device="cpu")


def test_float32_on_the_cpu_unless_told_otherwise():
    assert runtime.start(REQUEST).dtype == torch.float32
    assert runtime.start(replace(REQUEST, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_auto_takes_the_cpu_when_there_is_no_other():
    assert runtime.start(replace(REQUEST, device="auto")).device.type in ("cpu", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_a_driver_without_a_torch_that_can_use_it():
    with pytest.raises(UserError, match=r"--device: cuda: torch .* cannot use it"):
        runtime.start(replace(REQUEST, device="cuda"))


def test_noise_is_that_of_a_cpu_generator():
    made = torch.randn(4, generator=runtime.start(REQUEST).generator(42))
    assert torch.equal(made, torch.randn(4, generator=torch.Generator("cpu").manual_seed(42)))


@pytest.mark.parametrize("offload", [True, False])
def test_residence(offload):
    module = nn.Linear(2, 2)
    there = runtime.Runtime(torch.device("meta"), torch.float32, offload, show_progress=False)
    with there.resident(module):
        assert module.weight.device.type == "meta"
    assert module.weight.device.type == ("cpu" if offload else "meta")
