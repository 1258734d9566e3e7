"""What only a GPU can show: the same video there, with and without offload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ASSETS = Path(__file__).resolve().parent.parent / "assets"
TASKS = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 9),
    "single_shot_extension": ("--input_video", ASSETS / "boat.mp4"),
    "shot_switching_extension": ("--input_video", ASSETS / "boat.mp4", "--duration", 2),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", ASSETS / "speech.mp3"),
}


def latents(generate, folder: Path, task: str, name: str, *arguments: object) -> np.ndarray:
    """Final latents of the first pass."""
    path = folder / f"{name}.safetensors"
    run = generate(
        "--task_type", task, "--model_id", "tiny", "--prompt", "A boat", "--height", 64, "--width", 96, *TASKS[task],
        "--output", folder / f"{name}.mp4", "--save_latents", path, *arguments,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return load_file(path)["latents.0"]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_video(generate, tmp_path, task):
    on_cpu = latents(generate, tmp_path, task, "cpu", "--device", "cpu", "--dtype", "float32")
    on_gpu = latents(generate, tmp_path, task, "gpu", "--device", "cuda", "--dtype", "float32")
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-2, rtol=0)
    offloaded = latents(generate, tmp_path, task, "offload", "--device", "cuda", "--dtype", "float32", "--offload")
    np.testing.assert_array_equal(offloaded, on_gpu)


def test_bfloat16_by_default(generate, tmp_path):
    task = "reference_to_video"
    exact = latents(generate, tmp_path, task, "exact", "--device", "cuda", "--dtype", "float32")
    made = latents(generate, tmp_path, task, "made", "--device", "cuda")
    assert np.abs(made - exact).mean() < 0.1 * exact.std()
    assert not np.array_equal(made, exact)
