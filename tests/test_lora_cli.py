"""--lora from the command line, with the built-in toy model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tests.conftest import ROOT

BASE = (
    *("--task_type", "reference_to_video", "--model_id", "tiny", "--device", "cpu", "--prompt", "a boat", "--quiet"),
    *("--ref_imgs", ROOT / "assets" / "fox.png", "--num_frames", 5, "--num_inference_steps", 2),
    *("--height", 32, "--width", 48),
)
LAYERS = {"attn1.to_q": (96, 96), "attn2.to_out.0": (96, 96), "ffn.net.0.proj": (192, 96)}
DIFFERENCES = {
    **{"blocks.0.self_attn.q.diff_b": (96,), "blocks.1.norm3.diff": (96,), "blocks.0.diff_m": (1, 6, 96)},
    **{"patch_embedding.lora_A.weight": (4, 16, 1, 2, 2), "patch_embedding.lora_B.weight": (96, 4, 1, 1, 1)},
    **{"head.diff_m": (1, 2, 96), "head.head.diff": (64, 96)},
}
Make = Callable[..., np.ndarray]


def write_lora(path: Path, seed: int = 0, rank: int = 4, **layers: tuple[int, int]) -> Path:
    """Write a LoRA for the given layers of the toy's first block; by default for some layers, plus differences."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in (layers or LAYERS).items():
        layer = f"transformer.blocks.0.{name}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    for name, shape in {} if layers else DIFFERENCES.items():
        tensors[f"diffusion_model.{name}"] = torch.randn(shape, generator=generator) / 10
    save_file(tensors, path)
    return path


@pytest.fixture
def make(main, tmp_path) -> Make:
    """Run the command with additional flags; returns its latents."""
    runs = iter(range(100))

    def make(*flags: object) -> np.ndarray:
        name = tmp_path / f"{next(runs)}.safetensors"
        code, _, stderr = main(*BASE, "--save_latents", name, "--output", name.with_suffix(".mp4"), *flags)
        assert code == 0, stderr
        return load_file(name)["latents.0"]

    return make


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_lora(tmp_path / "one.safetensors")


def relative(made: np.ndarray, expected: np.ndarray) -> float:
    return float((made - expected).std() / expected.std())


@pytest.mark.slow
def test_scales_and_several(make, lora, tmp_path):
    other = write_lora(tmp_path / "other.safetensors", seed=1, rank=2)
    plain, one, both = make(), make("--lora", lora), make("--lora", f"{lora},{other}")
    assert relative(one, plain) > 1e-2 and relative(both, one) > 1e-2
    np.testing.assert_allclose(make("--lora", f"{lora}:0"), plain, atol=1e-5, rtol=0)
    np.testing.assert_allclose(make("--lora", f"{other},{lora}"), both, atol=1e-4, rtol=0)
    np.testing.assert_allclose(make("--lora", f"{lora}:0.5,{lora}:0.5"), one, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_lora_with_the_memory_flags(make, lora):
    one = make("--lora", lora)
    for flags in (("--memory", "stream"), ("--memory", "stream", "--stream_blocks", 1), ("--offload",)):
        np.testing.assert_allclose(make("--lora", lora, *flags), one, atol=1e-5, rtol=0)
    plain = make("--quant", "fp8")
    fused = make("--lora", lora, "--quant", "fp8")
    assert relative(fused, one) < 0.3 * relative(plain, one)
    np.testing.assert_array_equal(make("--lora", lora, "--low_vram"), fused)


@pytest.mark.slow
def test_a_saved_checkpoint_holds_the_lora(make, main, lora, tmp_path):
    fused = make("--lora", lora, "--quant", "fp8", "--save_quantized", tmp_path / "saved")
    np.testing.assert_allclose(make("--model_id", tmp_path / "saved"), fused, atol=1e-5, rtol=0)
    code, stdout, stderr = main(*BASE, "--model_id", tmp_path / "saved", "--lora", lora)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: --lora: {str(lora)[:40]}") and "--save_quantized" in stderr


WRONG = {
    "layer": (
        {"attn9.to_q": (96, 96), "attn1.to_q": (96, 96)},
        "does not fit its model, which has no weights for transformer.blocks.0.attn9.to_q.lora_A.weight, "
        "transformer.blocks.0.attn9.to_q.lora_B.weight; wrong.safetensors:1:partial applies the rest",
    ),
    "rows": (
        {"attn1.to_q": (95, 96)},
        "does not fit its model: wrong shapes transformer.blocks.0.attn1.to_q.lora_B.weight "
        "([95, 4] instead of [96, 4]); give a LoRA of this model",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_a_lora_that_does_not_fit(main, tmp_path, name, flags):
    layers, says = WRONG[name]
    file = write_lora(tmp_path / "wrong.safetensors", **layers)
    assert main(*BASE, "--lora", file, "--output", "out/a.mp4", *flags) == (2, "", f"error: --lora: {file} {says}\n")
    assert not (tmp_path / "out").exists()


def test_a_hubs_lora_is_looked_at_before_the_checkpoint_is_fetched(main, tmp_path, monkeypatch):
    """By the known shapes of the published model."""
    file = write_lora(tmp_path / "small.safetensors")
    monkeypatch.setattr("skyreels_v3.resolve.download_file", lambda name, request, kind: file)
    monkeypatch.setattr("skyreels_v3.resolve.download", lambda *_: pytest.fail("the checkpoint is fetched"))
    code, stdout, stderr = main(*BASE, "--model_id", "some/model", "--lora", "a/b", "--output", "out/a.mp4")
    assert (code, stdout) == (2, "")
    assert f"--lora: {file} does not fit its model: wrong shapes" in stderr and "instead of [1, 2, 5120]" in stderr


def test_a_part_of_a_lora(make, tmp_path, caplog):
    """What is left out is reported, and the rest works as it does alone; also for file names with commas."""
    layers, _ = WRONG["layer"]
    file = write_lora(tmp_path / "one, or more.safetensors", **layers)
    rest = write_lora(tmp_path / "rest.safetensors", **dict(list(layers.items())[1:]))
    save_file({key: torch.from_numpy(load_file(file)[key]) for key in load_file(rest)}, rest)
    made = make("--lora", f"{file}:0.5:partial", "--lora", f"{rest}:0")
    assert (
        "2 entries are left out, as the model has no weights for transformer.blocks.0.attn9.to_q.lora_A" in caplog.text
    )
    np.testing.assert_allclose(made, make("--lora", f"{rest}:0.5"), atol=1e-5, rtol=0)


def test_loras_of_another_model(main, lora, tmp_path):
    """V3's for V1, and vice versa."""
    layer = "transformer.single_transformer_blocks.1.attn.to_v.lora_"
    v1_lora = tmp_path / "v1.safetensors"
    save_file({f"{layer}A.weight": torch.zeros(4, 64), f"{layer}B.weight": torch.zeros(64, 4)}, v1_lora)
    t2v = ("--task_type", "t2v", "--model_id", "tiny", "--device", "cpu", "--prompt", "FPS-24, a boat", "--quiet")
    for base, file, key in ((t2v, lora, "diffusion_model.blocks.0.diff_m"), (BASE, v1_lora, f"{layer}A.weight")):
        code, stdout, stderr = main(*base, "--lora", file, "--output", "out/a.mp4")
        assert (code, stdout) == (2, "")
        says = f"error: --lora: {file} does not fit its model, which has no weights for {key}, "
        assert stderr.splitlines()[-1].startswith(says)
        assert not (tmp_path / "out").exists()
