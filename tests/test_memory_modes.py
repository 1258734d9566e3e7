"""--memory, --quant, --vae_dtype, --compile and the prompt cache from the command line, with the built-in toy model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from skyreels_v3.wan.conditioning import TextEncoder
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from skyreels_v3.wan.vae import VideoVAE
from tests.conftest import ASSETS, files_in, write_tone

pytestmark = pytest.mark.slow

BASE = ("--model_id", "tiny", "--device", "cpu", "--prompt", "a boat", "--height", 32, "--width", 48, "--quiet")
INPUTS = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 5, "--guidance_scale", 2),
    "single_shot_extension": ("--input_video", ASSETS / "boat.mp4"),
    "shot_switching_extension": ("--input_video", ASSETS / "boat.mp4", "--duration", 2),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", "{sound}"),
}
STEPS = ("--num_inference_steps", 2)
MODES = (
    ("--memory", "resident"), ("--offload",), ("--memory", "stream"),
    ("--memory", "stream", "--stream_blocks", 1), ("--memory", "stream", "--stream_blocks", 999),
)  # fmt: skip
LEAST_PSNR = 30.0


@dataclass(frozen=True)
class Made:
    """What a run wrote."""

    latents: dict[str, np.ndarray]
    frames: np.ndarray
    stderr: str


@pytest.fixture
def make(main, tmp_path) -> Callable[..., Made]:
    """Run a task with the toy model, without the prompt cache unless `cached`."""
    sound = write_tone(tmp_path / "sound.wav", 0.5)
    runs = iter(range(100))

    def make(task: str, *flags: object, cached: bool = False) -> Made:
        folder = tmp_path / f"run-{next(runs)}"
        inputs = [str(value).format(sound=sound) for value in INPUTS[task]]
        files = ("--save_latents", folder / "latents.safetensors", "--output", f"{folder}/frames/")
        fresh = () if cached else ("--no_cache",)
        code, stdout, stderr = main("--task_type", task, *BASE, *STEPS, *inputs, *files, *fresh, *flags)
        assert (code, stdout) == (0, f"{folder}/frames\n"), stderr
        frames = [np.asarray(Image.open(path)) for path in sorted((folder / "frames").glob("*.png"))]
        return Made(load_file(folder / "latents.safetensors"), np.stack(frames), stderr)

    return make


def assert_same(one: Made, other: Made) -> None:
    assert one.latents.keys() == other.latents.keys()
    for name, latents in one.latents.items():
        np.testing.assert_array_equal(latents, other.latents[name])
    np.testing.assert_array_equal(one.frames, other.frames)


def psnr(made: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((made.astype(float) - expected) ** 2))


@pytest.mark.parametrize("task", INPUTS)
def test_modes_make_the_same_video(make, task):
    """In bfloat16, unlike the files, so that weights are copied. Mapped weights can have any alignment, and on CPUs the
    products with those differ in the last bit."""
    plain = make(task, "--dtype", "bfloat16")
    for mode in MODES:
        assert_same(make(task, "--dtype", "bfloat16", *mode), plain)


def test_modes_make_the_same_video_in_fp8(make):
    task = ("reference_to_video", "--dtype", "bfloat16")
    plain = make(*task, "--quant", "fp8")
    for flags in (*(("--quant", "fp8", *mode) for mode in MODES), ("--low_vram",)):
        assert_same(make(*task, *flags), plain)


def test_a_bfloat16_vae_changes_little(make):
    plain = make("shot_switching_extension")
    made = make("shot_switching_extension", "--vae_dtype", "bfloat16")
    assert not np.array_equal(made.frames, plain.frames)
    assert psnr(made.frames, plain.frames) > LEAST_PSNR


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that have been passed to the text encoder."""
    texts: list[str] = []
    call = TextEncoder.encode

    def spy(self: TextEncoder, prompt: str) -> dict[str, torch.Tensor]:
        texts.append(prompt)
        return call(self, prompt)

    monkeypatch.setattr(TextEncoder, "encode", spy)
    return texts


def test_a_prompt_is_encoded_once(make, encoded, monkeypatch, tmp_path, cache):
    """Once per checkpoint, dtype and quantization, unless --no_cache is given."""
    for name in cache.glob("tiny-*"):
        (tmp_path / "own" / name.name).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / name.name).symlink_to(name)
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "own"))
    task = "reference_to_video"
    first = make(task, cached=True)
    negative = encoded[1]
    assert encoded == ["a boat", negative]
    for flags in ((), ("--memory", "stream"), ("--seed", 42, "--num_inference_steps", 2)):
        assert_same(make(task, *flags, cached=True), first)
    assert len(encoded) == 2
    assert_same(make(task), first)
    assert encoded == ["a boat", negative] * 2
    make(task, "--prompt", "another boat", cached=True)
    assert encoded[4:] == ["another boat"]
    for number, flags in enumerate([("--dtype", "bfloat16"), ("--quant", "fp8"), ("--quant", "fp8_dynamic")], start=1):
        once = make(task, *flags, cached=True)
        assert_same(make(task, *flags, cached=True), once)
        assert encoded[5:] == ["a boat", negative] * number
    make("shot_switching_extension", cached=True)  # another checkpoint
    assert encoded[-1] == "a boat" and len(encoded) == 12


def test_no_cache_leaves_nothing(make, monkeypatch, tmp_path):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "own"))
    make("reference_to_video")
    assert not any(name.startswith("prompts") for name in files_in(tmp_path / "own"))
    make("reference_to_video", cached=True)
    assert sum(name.startswith("prompts") for name in files_in(tmp_path / "own")) == 2


def ask_for_too_much(*_: object, **__: object) -> None:
    torch.empty(1 << 62, dtype=torch.uint8)


FINISHED_PASS = {"out/a.state/request.json", "out/a.state/pass-000.safetensors"}  # for --resume
# stage: what is patched to run out of memory, and the files that are left
SHORTAGES: dict[str, tuple[type, str, set[str]]] = {
    "encoding the prompt": (TextEncoder, "encode", set()),
    "encoding with the VAE": (VideoVAE, "encode", set()),
    "denoising": (SkyReelsTransformer3DModel, "forward", set()),
    "decoding with the VAE": (VideoVAE, "decode_stream", FINISHED_PASS),
}


@pytest.mark.parametrize("stage", SHORTAGES)
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_out_of_memory(main, monkeypatch, tmp_path, stage, mode):
    owner, name, left = SHORTAGES[stage]
    monkeypatch.setattr(owner, name, ask_for_too_much)
    before = files_in(tmp_path)
    flags = ("--memory", mode, "--no_cache", "--output", "out/a.mp4", "--save_latents", "out/a.safetensors")
    task = "reference_to_video"
    code, stdout, stderr = main("--task_type", task, *BASE, *STEPS, *INPUTS[task], *flags)
    assert (code, stdout) == (1, "")
    lines = [line for line in stderr.splitlines() if not line.startswith("WARNING: tiny is a toy")]
    assert len(lines) == 1
    assert re.match(
        rf"error: OutOfMemory: out of memory while {stage}: [\d.]+ GB of host memory was requested", lines[0]
    )
    for way in ("--low_vram", "--vae_dtype bfloat16", "a smaller --height and --width"):
        assert way in lines[0]
    assert files_in(tmp_path) - before == left


def test_compiled_blocks_make_nearly_the_same_video(make):
    plain = make("reference_to_video")
    made = make("reference_to_video", "--compile")
    np.testing.assert_allclose(made.latents["latents.0"], plain.latents["latents.0"], atol=2e-3, rtol=0)
