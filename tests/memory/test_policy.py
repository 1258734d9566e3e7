"""Where weights live: a table by hand, and the published models on GPUs of all sizes. Also advice on out-of-memory
errors, in torch's own words and from a real one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from skyreels_v3.errors import OutOfMemory
from skyreels_v3.memory.policy import MARGIN, PINNED_SHARE, RESERVE, TILINGS, Policy, choose_policy, explain_oom
from skyreels_v3.plan import Plan
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, TASK_NAMES, task_spec
from tests.conftest import ROOT
from tests.planning import GB, planned

SIZES = {"480P": (480, 832), "720P": (720, 1280)}


def request(task: str = "reference_to_video", resolution: str = "720P", **changes: object) -> GenerationRequest:
    height, width = SIZES[resolution]
    return GenerationRequest(
        task=task_spec(task), model_id="a/b", prompt="p", dtype="bfloat16", resolution=resolution,
        height=height, width=width, audio_seconds=8.0 if task == "talking_avatar" else None, **changes,
    )  # fmt: skip


def test_no_torch():
    code = "import sys, skyreels_v3.memory.policy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The choice


def choose(free: int | None, wanted: str = "auto", host: int = 256 * GB, blocks: int = 0) -> Policy:
    """Choose for peaks of 45, 35 or 7 GB, with 28 GB of weights streamed from the host."""
    peaks = {"resident": 45, "offload": 35, "stream": 7}
    asked = request(memory=wanted, stream_blocks=blocks)
    return choose_policy(asked, lambda mode, tiles: peaks[mode] * GB, 28 * GB, free, host)


def free_for(need: float) -> int:
    """Free bytes on a device that has just enough room for `need` GB."""
    return int(need * GB * MARGIN) + RESERVE + 100


@pytest.mark.parametrize(
    ("free", "mode"),
    [
        (free_for(45), "resident"),
        (free_for(44.9), "offload"),
        (free_for(35), "offload"),
        (free_for(34.9), "stream"),
        (free_for(7), "stream"),
        (free_for(1), "stream"),  # no mode needs less
        (1, "stream"),
    ],
)
def test_the_fastest_that_fits(free, mode):
    decided = choose(free)
    assert decided.mode == mode
    assert ("too much" in decided.reason) == (free < free_for(6.9))


@pytest.mark.parametrize("wanted", MEMORY_MODES)
@pytest.mark.parametrize("free", [1, 200 * GB, None])
def test_an_explicit_mode_wins(wanted, free):
    decided = choose(free, wanted, blocks=3)
    assert decided.mode == wanted and "asked for" in decided.reason
    assert decided.resident_blocks == 3


def test_a_device_without_memory_of_its_own():
    decided = choose(None, host=1)
    assert (decided.mode, decided.pinned, decided.tiles) == ("resident", False, (1, 1))


@pytest.mark.parametrize(("host", "pinned"), [(28 / PINNED_SHARE + 0.1, True), (28 / PINNED_SHARE - 0.1, False)])
def test_pinned_if_the_host_has_room(host, pinned):
    assert choose(10 * GB, host=int(host * GB)).pinned is pinned
    assert not choose(40 * GB).pinned  # nothing is streamed


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "vae_dtype"), [(None, "float32"), ("fp8", "bfloat16")])
@pytest.mark.parametrize("resolution", SIZES)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_card(task, resolution, quant, vae_dtype):
    """The choice fits; no faster mode would, nor would fewer tiles."""
    asked = request(task, resolution, quant=quant, vae_dtype=vae_dtype)
    plan = planned(asked)
    order, before = [*MEMORY_MODES], 0
    smallest = TILINGS[-1]
    assert plan.peak("resident") > plan.peak("offload") > plan.peak("stream", smallest)
    for size in (80, 48, 24, 16, 12, 8, 4):
        usable = (size * GB - RESERVE) / MARGIN
        decided = planned(asked, free=size * GB).policy
        assert order.index(decided.mode) >= before  # never a faster mode on a smaller card
        before = order.index(decided.mode)
        assert all(plan.peak(faster, smallest) > usable for faster in order[:before])
        fewer = TILINGS[: TILINGS.index(decided.tiles)]
        assert all(plan.peak(decided.mode, tiles) > usable for tiles in fewer)
        if decided.mode != "stream" or decided.tiles != smallest:
            assert plan.peak(decided.mode, decided.tiles) <= usable
        streamed = planned(replace(asked, memory="stream"), free=size * GB).policy
        assert size < 80 or decided.tiles == streamed.tiles == (1, 1)  # room for everything in every mode


# Out-of-memory errors

FREE = 1_050_000_000
GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.05 GiB is "
    "free. Process 1 has 78.04 GiB memory in use. Of the allocated memory 76.50 GiB is allocated by PyTorch, and "
    "900.00 MiB is reserved by PyTorch but unallocated."
)


def advised(error: Exception, mode: str = "resident", free: int | None = FREE, **changes: object) -> str:
    plan: Plan = replace(planned(request(**changes)), policy=Policy(mode, "for a test"))
    with pytest.raises(OutOfMemory) as caught, explain_oom("decoding with the VAE", plan, lambda: free):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (GPU, "2.00 GiB"),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 512.00 KiB. GPU 0 has"), "512.00 KiB"),
        (RuntimeError("MPS backend out of memory (...). Tried to allocate 2.25 GB on private pool."), "2.25 GB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."), "some memory"),
        (torch.OutOfMemoryError("Allocation on device"), "some memory"),
        (MemoryError(), "some host memory"),
        *(  # from drivers and libraries, which do not use torch's class
            (RuntimeError(words), "some memory")
            for words in (
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "miopenStatusAllocFailed",
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
                "NCCL error in: NCCL.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
            )
        ),
    ],
)
def test_what_was_asked_for(error, size):
    line = advised(error)
    assert line.startswith(f"out of memory while decoding with the VAE: {size} was requested, with 1.1 GB free; ")


def test_a_real_one():
    with (
        pytest.raises(OutOfMemory, match=r"while loading: 1000000\.0 GB of host memory was requested; reduce"),
        explain_oom("loading", planned(request()), lambda: None),
    ):
        torch.empty(10**15, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling ..."),
        ValueError("no"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explain_oom("a stage", planned(request()), lambda: FREE):
        raise error
    assert caught.value is error


def test_it_is_explained_once():
    plan = planned(request())
    with (
        pytest.raises(OutOfMemory, match="out of memory while the inner stage"),
        explain_oom("the outer stage", plan, lambda: FREE),
        explain_oom("the inner stage", plan, lambda: FREE),
    ):
        raise GPU


@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize(
    ("mode", "smaller"), [("resident", ["offload", "stream"]), ("offload", ["stream"]), ("stream", [])]
)
def test_memory_modes_that_are_named_are_smaller(mode, smaller, quant):
    line, plan = advised(GPU, mode, quant=quant), planned(request(quant=quant))
    for name in MEMORY_MODES:
        advice = f"--memory {name} (about {plan.peak(name, (2, 3)) / 1e9:.1f} GB)"
        assert (advice in line) == (name in smaller)
        assert name not in smaller or plan.peak(name) < plan.peak(mode)
    assert ("--low_vram" in line) == (quant is None)


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_moving_weights_within_shared_memory_is_not_advised(mode):
    line = advised(MemoryError(), mode, free=None)
    assert "--memory" not in line and "free" not in line


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"vae_dtype": "bfloat16"}, "--vae_dtype"),
        ({"resolution": "480P"}, "--resolution"),
        ({"duration": 1}, "--duration"),
        ({"quant": "fp8"}, "--low_vram"),
        ({"num_frames": 97}, "--duration"),
        ({"task": "single_shot_extension", "duration": 30}, "--duration"),  # makes more passes, not larger ones
    ],
)
def test_ways_that_do_not_help_are_not_named(changes, way):
    assert way in advised(GPU)
    assert way not in advised(GPU, **changes)


def test_no_way_out():
    smallest = {"quant": "fp8", "vae_dtype": "bfloat16", "resolution": "480P", "duration": 1}
    assert advised(GPU, "stream", **smallest).endswith("; a machine with more memory is needed")
