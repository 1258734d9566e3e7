"""Saving FP8 checkpoints from the command line in every layout, and making the same video with them."""

from __future__ import annotations

import os
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from skyreels_v3.checkpoints.save import save_quantized
from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.families import family_of
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.checkpoint import load_transformer
from tests.conftest import ROOT, files_in

ASSETS = ROOT / "assets"
BASE = ("--device", "cpu", "--prompt", "a boat", "--height", 32, "--width", 48, "--num_inference_steps", 1, "--quiet")
INPUTS = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 5),
    "single_shot_extension": ("--input_video", ASSETS / "boat.mp4"),
    "shot_switching_extension": ("--input_video", ASSETS / "boat.mp4", "--duration", 2),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", "{sound}"),
}
Make = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def make(main, tmp_path_factory) -> Make:
    """Run a task; returns its latents."""
    folder = tmp_path_factory.mktemp("runs")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(8000) / 6)).astype("<i2").tobytes())
    runs = iter(range(100))

    def make(task: str, *flags: object) -> dict[str, np.ndarray]:
        name = folder / f"{next(runs)}.safetensors"
        inputs = [str(value).format(sound=folder / "sound.wav") for value in INPUTS[task]]
        files = ("--save_latents", name, "--output", name.with_suffix(".mp4"))
        code, _, stderr = main("--task_type", task, *BASE, *inputs, *files, *flags)
        assert code == 0, stderr
        return load_file(name)

    return make


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Compare to within 1e-5: mapped weights are aligned differently in the new file, which affects CPU matmuls."""
    assert one.keys() == other.keys()
    for name, latents in one.items():
        np.testing.assert_allclose(latents, other[name], atol=1e-5, rtol=0)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a transformer's folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_tensors(file).items()}


def in_cache(source: Path, folder: Path) -> Path:
    """Copy a checkpoint into the layout of the hub client's cache: blobs, and a snapshot of links to them."""
    for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob = folder / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = folder / "snapshots" / "revision" / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / "revision"


@pytest.mark.slow
@pytest.mark.parametrize("task", INPUTS)
def test_the_saved_checkpoint_makes_the_same_video(make, task, tmp_path, cache):
    saved, transformer = tmp_path / "deep" / "saved", task_spec(task).transformer_folder
    expected = make(task, "--model_id", "tiny", "--quant", "fp8", "--save_quantized", saved)
    assert not [name for name in files_in(tmp_path) if ".tmp" in name]
    (repository,) = family_of(task_spec(task)).repositories(task_spec(task))
    repository.check(saved, "--model_id")
    assert_same(make(task, "--model_id", saved, "--quant", "fp8"), expected)
    assert_same(make(task, "--model_id", saved), expected)
    assert_same(make(task, "--model_id", saved, "--low_vram"), make(task, "--model_id", "tiny", "--low_vram"))
    # saving it again changes nothing
    make(task, "--model_id", saved, "--quant", "fp8", "--save_quantized", tmp_path / "again")
    tensors, again = weights_of(saved / transformer), weights_of(tmp_path / "again" / transformer)
    assert tensors.keys() == again.keys()
    assert all(tensor.dtype == again[name].dtype for name, tensor in tensors.items())
    assert all(torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)) for name, tensor in tensors.items())
    source = make_tiny(task_spec(task))
    assert all(file.stat().st_nlink >= 2 for file in saved.rglob("*.pth"))
    for name in files_in(saved):
        if not name.startswith(("transformer/", "shot_transformer/", "config.json", "diffusion_pytorch_model")):
            assert (saved / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "recorded"),
    [
        ("reference_to_video", "reference_to_video"),
        ("shot_switching_extension", "video_extension"),
        ("talking_avatar", "talking_avatar"),
    ],
)
def test_a_recorded_checkpoint_behind_links(make, reference, task, recorded, tmp_path):
    """A checkpoint with shards, links into a cache, and files that the task does not need."""
    source = in_cache(reference / "pipelines" / "checkpoints" / recorded, tmp_path / "hub")
    (source / "README.md").write_text("words")
    saved = tmp_path / "saved"
    expected = make(task, "--model_id", source, "--quant", "fp8", "--save_quantized", saved)
    assert_same(make(task, "--model_id", saved), expected)
    shutil.rmtree(tmp_path / "hub")  # links would now be broken
    assert_same(make(task, "--model_id", saved), expected)
    assert not (saved / "README.md").exists()
    assert not any(path.is_symlink() for path in saved.rglob("*"))


@pytest.mark.slow
def test_another_file_system_gets_copies(make, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("skyreels_v3.checkpoints.save.os.link", refuse)
    task, saved = "shot_switching_extension", tmp_path / "saved"
    expected = make(task, "--model_id", "tiny", "--quant", "fp8", "--save_quantized", saved)
    assert all(path.stat().st_nlink == 1 for path in saved.rglob("*") if path.is_file())
    assert_same(make(task, "--model_id", saved), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["link_or_copy", "save_torch_state_dict", "publish"])
def test_interrupted_saving_leaves_nothing(main, tmp_path, monkeypatch, error, place):
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"skyreels_v3.checkpoints.save.{place}", stop)
    task, saved = "reference_to_video", tmp_path / "a" / "saved"
    flags = ("--model_id", "tiny", "--quant", "fp8", "--save_quantized", saved, "--output", "b/a.mp4")
    code, stdout, stderr = main("--task_type", task, *BASE, *INPUTS[task], *flags)
    assert (code, stdout) == (130 if error is KeyboardInterrupt else 1, "")
    assert "interrupted" in stderr or "No space left on device" in stderr
    assert not files_in(tmp_path)
    assert not saved.exists()


def test_a_folder_that_was_made_meanwhile_is_kept(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    task = task_spec("reference_to_video")
    source = make_tiny(task)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.txt").write_text("mine")
    transformer = load_transformer(source / "transformer", torch.float32)
    (repository,) = family_of(task).repositories(task)
    made = save_quantized(transformer, [(source, repository)], tmp_path / "saved")
    assert made == tmp_path / "saved-2"
    assert files_in(tmp_path / "saved") == {"mine.txt"}
    repository.check(made, "--model_id")
