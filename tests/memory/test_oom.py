"""Shortages of memory, in torch's own words and from a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skyreels_v3.errors import OutOfMemory
from skyreels_v3.memory.policy import Policy, explained
from skyreels_v3.plan import Plan
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, task_spec
from tests.planning import planned

GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.05 GiB is "
    "free. Process 1 has 78.04 GiB memory in use. Of the allocated memory 76.50 GiB is allocated by PyTorch, and "
    "900.00 MiB is reserved by PyTorch but unallocated."
)
FREE = 1_050_000_000
OTHERS = [
    RuntimeError(f"CUDA error: {words}")
    for words in ("an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED when calling ...")
]


def made(**changes: object) -> Plan:
    request = GenerationRequest(
        task=task_spec("reference_to_video"), model_id="a/b", prompt="p", height=720, width=1280, dtype="bfloat16"
    )
    return planned(replace(request, **changes))


def in_mode(plan: Plan, mode: str) -> Plan:
    return replace(plan, policy=Policy(mode, "for a test"))


def said(error: Exception, mode: str = "resident", free: int | None = FREE, **changes: object) -> str:
    with (
        pytest.raises(OutOfMemory) as caught,
        explained("decoding with the VAE", in_mode(made(**changes), mode), lambda: free),
    ):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_gpus():
    line = said(torch.OutOfMemoryError(GPU))
    assert line.startswith("out of memory while decoding with the VAE: 2.00 GiB more were asked for, 1.1 GB are free; ")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "miopenStatusAllocFailed",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_of_drivers_and_libraries(words):
    """They are no errors of torch's own class."""
    assert ": some memory more were asked for" in said(RuntimeError(words))


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("HIP out of memory. Tried to allocate 512.00 KiB. GPU 0 has", "512.00 KiB"),
        ("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 2.25 GB on private pool.", "2.25 GB"),
        ("CUDA out of memory. Tried to allocate more than 1EB memory.", "some memory"),
        ("Allocation on device", "some memory"),
    ],
)
def test_in_other_words(words, size):
    assert f": {size} more were asked for" in said(torch.OutOfMemoryError(words))


def test_the_hosts():
    """A real one."""
    with (
        pytest.raises(OutOfMemory, match=r"while loading: 1000000\.0 GB of host memory more were asked for; ask"),
        explained("loading", made(), lambda: None),
    ):
        torch.empty(10**15, dtype=torch.uint8)
    assert "some host memory more" in said(MemoryError())


@pytest.mark.parametrize("error", [*OTHERS, ValueError("no"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explained("a stage", made(), lambda: FREE):
        raise error
    assert caught.value is error


def test_it_is_explained_once():
    plan = made()
    with (
        pytest.raises(OutOfMemory, match="out of memory while the inner stage"),
        explained("the outer stage", plan, lambda: FREE),
        explained("the inner stage", plan, lambda: FREE),
    ):
        raise torch.OutOfMemoryError(GPU)


@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize(
    ("mode", "smaller"), [("resident", ["offload", "stream"]), ("offload", ["stream"]), ("stream", [])]
)
def test_memory_modes_that_are_named_are_smaller(mode, smaller, quant):
    line, known = said(torch.OutOfMemoryError(GPU), mode, quant=quant), made(quant=quant)
    for name in MEMORY_MODES:
        advice = f"--memory {name} (about {known.peak(name, (2, 3)) / 1e9:.1f} GB)"
        assert (advice in line) == (name in smaller)
        assert name not in smaller or known.peak(name) < known.peak(mode)
    assert ("--low_vram" in line) == (quant is None)
    assert made(quant="fp8").stages["transformer"].streamed < made().stages["transformer"].streamed


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_a_device_without_memory_of_its_own(mode):
    """Wherever the weights live, it is the same memory."""
    line = said(MemoryError(), mode, free=None)
    assert "--memory" not in line and "free" not in line


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"vae_dtype": "bfloat16"}, "--vae_dtype"),
        ({"resolution": "480P"}, "--resolution"),
        ({"duration": 1}, "--duration"),
        ({"quant": "fp8"}, "--low_vram"),
        ({"num_frames": 97}, "--duration"),
        ({"task": task_spec("single_shot_extension"), "duration": 30}, "--duration"),  # more passes, none larger
    ],
)
def test_ways_that_are_none_are_not_named(changes, way):
    assert way in said(torch.OutOfMemoryError(GPU))
    assert way not in said(torch.OutOfMemoryError(GPU), **changes)


def test_no_way_out():
    smallest = {"quant": "fp8", "vae_dtype": "bfloat16", "resolution": "480P", "duration": 1}
    assert said(torch.OutOfMemoryError(GPU), "stream", **smallest).endswith("; it takes a machine with more memory")
