"""What only a GPU can show: equal videos in all memory modes, attention kernels, FP8, compilation, peak memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch._dynamo.utils import counters

from skyreels_v3.attention.kernels import KERNELS, is_installed
from skyreels_v3.runtime import FP8_CAPABILITY
from tests import toys
from tests.conftest import ASSETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TASKS = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 9),
    "single_shot_extension": ("--input_video", ASSETS / "boat.mp4"),
    "shot_switching_extension": ("--input_video", ASSETS / "boat.mp4", "--duration", 2),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", ASSETS / "speech.mp3"),
    "t2v": ("--num_frames", 9, "--num_inference_steps", 8),
    "i2v": ("--image", ASSETS / "fox.png", "--num_frames", 9, "--num_inference_steps", 8),
}
MODELS = ("reference_to_video", "t2v")  # one task per transformer family


XDIT_ALONE = """
import os

os.environ["LOG_LEVEL"] = "error"
import torch
import torch.distributed as dist
from skyreels_v3.attention.backends import choose_attention, sdpa
from skyreels_v3.parallel.ranks import ParallelConfig
from skyreels_v3.parallel.usp import has_xdit, xdit_usp

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
device = torch.device("cuda", 0)
dist.init_process_group("cpu:gloo,cuda:nccl")
kernel, attention = choose_attention("auto", device, torch.bfloat16)
assert has_xdit(kernel, device)
tensors = torch.randn(3, 1, 1024, 4, 128, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
usp = xdit_usp(kernel, ParallelConfig())
for tokens in (1024, 1021):
    made, (query, key, value) = usp(*tensors, tokens), tensors
    for expected in (attention, sdpa):
        difference = (made - expected(query, key[:, :tokens], value[:, :tokens])).abs().max().item()
        assert difference < 0.02, (kernel, tokens, difference)
print("xDiT agrees,", kernel)
dist.destroy_process_group()
"""


@pytest.mark.skipif(find_spec("xfuser") is None, reason="xfuser is not installed")
def test_xdit_alone_agrees(tmp_path):
    """In a new process, because xDiT keeps its state in globals."""
    command = [sys.executable, "-c", XDIT_ALONE]
    made = subprocess.run(command, cwd=ASSETS.parent, capture_output=True, text=True, check=False, timeout=300)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("xDiT agrees, ")  # nothing printed by xDiT itself


CUDA = ("--device", "cuda", "--no_cache")
RESIDENT = (*CUDA, "--memory", "resident")
EXACT = ("--device", "cuda", "--dtype", "float32")


@dataclass(frozen=True)
class Made:
    """Final latents of the first pass, and the written frames."""

    latents: np.ndarray
    frames: np.ndarray


Run = Callable[..., Made]
KNOWN: dict[tuple[str, ...], Made] = {}  # results that several tests use


@pytest.fixture
def run(main, tmp_path) -> Run:
    """Run a task in this process; results of equal runs are reused."""

    def made(task: str, *flags: object) -> Made:
        key = (task, *map(str, flags))
        if key not in KNOWN:
            code, _, stderr = main(*argv(task), "--output", "frames/", "--save_latents", "a.safetensors", *flags)
            assert code == 0, stderr
            files = sorted((tmp_path / "frames").glob("*.png"))
            frames = np.stack([np.asarray(Image.open(file)) for file in files])
            KNOWN[key] = Made(load_file(tmp_path / "a.safetensors")["latents.0"], frames)
            shutil.rmtree(tmp_path / "frames")
            (tmp_path / "a.safetensors").unlink()
        return KNOWN[key]

    return made


def argv(task: str) -> tuple[object, ...]:
    """Flags for a small video with the toy model."""
    size = ("--height", 64, "--width", 96)
    return ("--task_type", task, "--model_id", "tiny", "--prompt", "A boat", *size, *TASKS[task])


def close(made: Made, expected: Made) -> bool:
    """Whether latents differ no more than between dtypes or kernels."""
    return np.abs(made.latents - expected.latents).mean() < 0.1 * expected.latents.std()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_video(run, task):
    on_cpu, on_gpu = run(task, "--device", "cpu", "--dtype", "float32"), run(task, *EXACT)
    np.testing.assert_allclose(on_gpu.latents, on_cpu.latents, atol=2e-2, rtol=0)
    np.testing.assert_array_equal(run(task, *EXACT, "--offload").latents, on_gpu.latents)


@pytest.mark.parametrize("task", MODELS)
def test_bfloat16_by_default(run, task):
    made, exact = run(task, *RESIDENT), run(task, *EXACT)
    assert close(made, exact)
    assert not np.array_equal(made.latents, exact.latents)


MODES = {"offload": ("--offload",), "stream": ("--memory", "stream")}
MORE_MODES = {  # one task per family is enough
    "stream, one stays": ("--memory", "stream", "--stream_blocks", 1),
    "stream, pinned whatever it takes": ("--offload", "--parameters_level", "--high_cpu_memory"),
}


@pytest.mark.parametrize("quant", [(), ("--quant", "fp8")], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("task", TASKS)
def test_memory_modes(run, task, quant):
    """Bit for bit: there is plenty of memory, so the VAE is never tiled."""
    resident = run(task, *RESIDENT, *quant)
    for flags in (MODES | MORE_MODES if task in MODELS else MODES).values():
        made = run(task, *CUDA, *quant, *flags)
        np.testing.assert_array_equal(made.latents, resident.latents)
        np.testing.assert_array_equal(made.frames, resident.frames)


FP8_LOSS = 16  # relative to bfloat16: 3 mantissa bits instead of 7


@pytest.mark.parametrize("flags", [("--low_vram",), ("--quant", "fp8_dynamic")], ids=["low_vram", "fp8_dynamic"])
@pytest.mark.parametrize("task", TASKS)
def test_fp8(run, task, flags):
    if "fp8_dynamic" in flags and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("needs FP8 units")
    exact, plain, made = (run(task, *which) for which in (EXACT, RESIDENT, (*CUDA, *flags)))
    losses = [np.square(each.latents - exact.latents).mean() ** 0.5 for each in (plain, made)]
    assert not np.array_equal(made.latents, plain.latents)
    assert losses[1] < FP8_LOSS * losses[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("task", MODELS)
def test_attention_kernels(main, run, task, kernel):
    """A kernel that does not support the toys' head sizes (24 and 16) in this GPU's dtype is skipped."""
    if not is_installed(kernel):
        pytest.skip("not installed")
    chosen = ("--attention", kernel)
    code, _, stderr = main(*argv(task), *RESIDENT, *chosen, "--output", "made.mp4")
    if code == 2 and stderr.splitlines()[-1].startswith(f"error: --attention: {kernel}"):
        pytest.skip(stderr.splitlines()[-1])
    assert code == 0, stderr
    assert close(run(task, *RESIDENT, *chosen), run(task, *RESIDENT, "--attention", "sdpa"))


@pytest.mark.parametrize("task", [*MODELS, "i2v"])
def test_compiled_blocks(run, task):
    torch.compiler.reset()
    dynamic = [("--quant", "fp8_dynamic")] if torch.cuda.get_device_capability() >= FP8_CAPABILITY else []
    for flags in ((), ("--memory", "stream"), ("--quant", "fp8"), *dynamic):
        assert close(run(task, *CUDA, "--compile", *flags), run(task, *RESIDENT))


def test_compiled_if_the_run_is_long(run, monkeypatch):
    graphs = counters["stats"]
    torch.compiler.reset()
    before = graphs["unique_graphs"]
    short = run("reference_to_video", *RESIDENT, "--compile", "auto")
    assert graphs["unique_graphs"] == before
    monkeypatch.setattr("skyreels_v3.plan.COMPILE_FLOP", 0)
    long = run("reference_to_video", *RESIDENT, "--compile", "auto", "--seed", 42)
    assert graphs["unique_graphs"] > before
    assert close(long, short)


def largest_model(folder: Path, task: str) -> Path:
    """A toy with blocks large enough to show in device memory: about 0.9 GB in bfloat16."""

    from skyreels_v3.checkpoints.tiny import make_tiny
    from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
    from skyreels_v3.tasks import task_spec
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

    spec = task_spec(task)
    root = shutil.copytree(make_tiny(spec), folder / "large")
    sizes = toys.sizes_of(spec) | {"num_attention_heads": 8, "attention_head_dim": 128}
    torch.manual_seed(0)
    if task == "t2v":
        model = HunyuanTransformer3DModel(**sizes | {"num_layers": 6, "num_single_layers": 12})
    else:
        model = SkyReelsTransformer3DModel(**sizes | {"num_layers": 24, "ffn_dim": 5120})
    model.bfloat16().save_pretrained(root / spec.transformer_folder)
    return root


@pytest.mark.parametrize("task", MODELS)
def test_streaming_is_pinned_and_takes_less_memory(main, monkeypatch, tmp_path, caplog, task):
    """In this process, to read the peak of its allocator."""
    from skyreels_v3 import runtime

    made: list[runtime.Runtime] = []
    start = runtime.start
    monkeypatch.setattr(runtime, "start", lambda *arguments: made.append(start(*arguments)) or made[-1])
    model = largest_model(tmp_path, task)
    inputs = ("--task_type", task, "--prompt", "A boat", "--height", 64, "--width", 96)
    peaks, results = {}, {}
    for mode in ("resident", "offload", "stream"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        files = ("--output", f"{mode}.mp4", "--save_latents", f"{mode}.safetensors")
        flags = (*TASKS[task], "--model_id", model, *files, "--memory", mode, *CUDA)
        code, _, stderr = main(*inputs, *flags)
        assert code == 0, stderr
        peaks[mode] = torch.cuda.max_memory_allocated() - before
        results[mode] = load_file(tmp_path / f"{mode}.safetensors")["latents.0"]
        assert made[-1].policy.mode == mode
        assert made[-1].policy.pinned == (mode == "stream")
        assert "unpinned" not in caplog.text
        made.clear()  # frees a resident run's weights
    assert peaks["stream"] < 0.5 * peaks["resident"]
    assert peaks["offload"] <= peaks["resident"]
    for mode in ("offload", "stream"):
        np.testing.assert_array_equal(results[mode], results["resident"])
