"""Choice of device and dtype, noise, and when modules are on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from skyreels_v3 import runtime
from skyreels_v3.errors import UserError
from skyreels_v3.memory.policy import Policy
from skyreels_v3.request import MAX_SEED, GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, task_spec
from tests.planning import planned


def start(request: GenerationRequest, mode: str = "resident", device: str = "cpu") -> runtime.Runtime:
    plan = planned(request, dtype=runtime.find_machine(request).dtype)
    return runtime.start(replace(plan, policy=Policy(mode, "for a test"), device=device))


REQUEST = GenerationRequest(
    task=task_spec("reference_to_video"), model_id="tiny", prompt="p", device="cpu", height=32, width=48
)


def test_float32_on_the_cpu_unless_told_otherwise():
    assert start(REQUEST).dtype == torch.float32
    assert start(replace(REQUEST, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_auto_takes_the_cpu_when_there_is_no_other():
    assert runtime.find_machine(replace(REQUEST, device="auto")).device in ("cpu", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_a_driver_without_a_torch_that_can_use_it():
    with pytest.raises(UserError, match=r"--device: cuda: torch .* cannot use it"):
        runtime.find_machine(replace(REQUEST, device="cuda"))


def test_noise_is_that_of_a_cpu_generator():
    made = torch.randn(4, generator=start(REQUEST).generator(42))
    assert torch.equal(made, torch.randn(4, generator=torch.Generator("cpu").manual_seed(42)))


def test_every_bit_of_a_seed_counts():
    source = start(REQUEST)
    seeds = [0, *(1 << bit for bit in range(MAX_SEED.bit_length())), MAX_SEED]
    assert len({tuple(torch.randn(4, generator=source.generator(seed)).tolist()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_residence(mode):
    module = nn.Linear(2, 2)
    there = start(REQUEST, mode, "meta")
    with there.resident(module, "a test"):
        assert module.weight.device.type == "meta"
    assert module.weight.device.type == ("meta" if mode == "resident" else "cpu")


def test_a_stream_is_made_once_and_keeps_what_it_was_made_with():
    """It is created, with its options, before the transformer's first use."""
    run = start(REQUEST, "stream")
    module = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    made = run.stream(module, module, resident=2, pinned=True)
    assert len(made.streamed) == 3 and made.pin is not None
    assert run.stream(module, module) is made
    other = nn.ModuleList([nn.Linear(2, 2)])
    assert run.stream(other, other) is not made and run.stream(other, other).pin is None
    with run.resident(nn.Linear(2, 2), "a test"):  # without blocks, a whole module is moved
        assert len(run.streams) == 2


def test_a_cpu_has_no_memory_of_its_own():
    assert start(REQUEST).free_memory() is None
    assert runtime.find_machine(REQUEST).free_device is None


@pytest.mark.parametrize(("code", "pinned"), [(0, True), (2, False)])
def test_an_error_of_pinning_is_not_left_for_the_next_kernel(monkeypatch, code, pinned):
    """With a driver that behaves like CUDA: the next kernel launch raises an earlier error, once."""
    pending = []

    class Driver:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            pending.extend([code] * (code != 0))
            return code

        def cudaHostUnregister(self, address: int) -> int:
            return 0

    def launch(*shape: int, device: torch.device) -> torch.Tensor:
        if pending:
            raise torch.AcceleratorError(f"CUDA error {pending.pop()}")
        return torch.zeros(*shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch, "ones", launch)
    assert runtime.pin(torch.device("cuda", 0), torch.empty(3, dtype=torch.uint8)) is pinned
    assert not pending


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("bfloat16", "tf32"), ("float32", "ieee")])
def test_convolutions_are_exact_in_a_float32_run(dtype, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    start(replace(REQUEST, dtype=dtype))
    assert torch.backends.cudnn.conv.fp32_precision == precision
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_pinning_takes_nothing_where_nothing_is_transferred():
    assert runtime.pin(torch.device("cpu"), torch.empty(3, dtype=torch.uint8))
