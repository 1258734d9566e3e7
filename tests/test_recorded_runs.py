"""Whole runs through the command, against what the official code computed for the same checkpoint and inputs.

Tolerances are those in the recordings' README: 2e-3 for latents of the first pass, 2e-2 for later passes (which see
8-bit frames). Frames of a single pass differ by at most two levels, in under 2 % of the values. Over several passes,
rounding differences of one level, which depend on the CPU's instruction set, grow: those frames agree to 50 dB.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

MODES = (
    ("--memory", "resident"),
    ("--offload",),
    ("--memory", "stream"),
    ("--memory", "stream", "--stream_blocks", 1),
)
FP8 = (("--quant", "fp8"), ("--quant", "fp8_dynamic"))
FP8_LOSS = 10  # relative to bfloat16: 3 mantissa bits instead of 7 make rounding 16 times coarser
FP8_LOSS_OF_CHAINS = 4  # both lose more, and the ratio is smaller
LEAST_PSNR = 50.0
FIRST_PASS, LATER_PASS = 2e-3, 2e-2


@dataclass(frozen=True)
class Recording:
    """The flags of a run, and its recorded results.

    Attributes:
        latents: final latents of each pass.
        count: number of frames in the video.
        frames: the file that holds some of them.
    """

    flags: tuple[object, ...]
    latents: list[np.ndarray]
    count: int
    frames: Path | None


@pytest.fixture
def recording(reference, write_lossless, tmp_path) -> Callable[[str, Any], Recording]:
    """Find the recording of a task's case."""
    recordings = reference / "pipelines"

    def find(task: str, case: Any) -> Recording:
        folder = recordings / task
        meta = json.loads((folder / "meta.json").read_text())
        common = ("--task_type", task, "--prompt", meta["prompt"], "--seed", meta["seed"])
        if task == "reference_to_video":
            return of_references(folder, meta, case, common)
        if task == "talking_avatar":
            (found,) = (each for each in meta["cases"] if each["name"] == case)
            set_to = {"sampling_steps": 4, "text_guide_scale": 1.0, "audio_guide_scale": 1.0} | found["overrides"]
            flags = (
                *common, *size_of(found), "--model_id", recordings / "checkpoints" / task,
                "--input_image", folder / meta["portrait"], "--input_audio", folder / found["wav"],
                "--num_inference_steps", set_to["sampling_steps"], "--text_guidance_scale", set_to["text_guide_scale"],
                "--audio_guidance_scale", set_to["audio_guide_scale"],
            )  # fmt: skip
            stored = load_file(folder / f"{case}.safetensors")
            latents = [stored[f"pass{number}.final_latents"][None] for number in range(len(found["passes"]))]
            return Recording(flags, latents, found["audio_frames"], folder / f"{case}_frames.npz")
        (found,) = (each for each in meta["cases"] if each["duration"] == case)
        clip = recorded_clip(recordings, write_lossless, tmp_path / "clip.mp4", found["height"], found["width"])
        model = ("--model_id", recordings / "checkpoints" / "video_extension")
        flags = (*common, *size_of(found), *model, "--input_video", clip, "--duration", case)
        stored = load_file(folder / f"duration_{case}.safetensors")
        latents = [stored[f"roll{number}.final_latents"] for number in range(len(found["rolls"]))]
        frames = 10 if task == "single_shot_extension" and case == 5 else case  # the first frames of a longer run
        return Recording(flags, latents, case * 24, folder / f"duration_{frames}_frames.npz")

    return find


def of_references(folder: Path, meta: dict[str, Any], case: Any, common: tuple[object, ...]) -> Recording:
    """A run with `case` reference images; "guided" uses all images and both guidances."""
    images = ",".join(str(folder / name) for name in meta["refs"][: None if case == "guided" else case])
    model = folder.parent / "checkpoints" / "reference_to_video"
    flags = (*common, *size_of(meta), "--ref_imgs", images, "--model_id", model)
    if case != "guided":
        latents = load_file(folder / f"duration_1_refs_{case}.safetensors")["final_latents"]
        return Recording((*flags, "--duration", 1), [latents], 25, folder / f"duration_1_refs_{case}_frames.npz")
    guided = meta["dual_guidance"]
    more = (
        "--seed", guided["seed"], "--num_frames", guided["num_frames"], "--num_inference_steps", guided["steps"],
        "--guidance_scale", guided["guidance_scale"], "--image_guidance_scale", guided["guidance_scale_img"],
        "--negative_prompt", guided["negative_prompt"],
    )  # fmt: skip
    latents = load_file(folder / "dual_guidance.safetensors")["final_latents"]
    return Recording((*flags, *more), [latents], guided["num_frames"], None)


def size_of(case: dict[str, Any]) -> tuple[object, ...]:
    return "--height", case["height"], "--width", case["width"]


def recorded_clip(recordings: Path, write_lossless, path: Path, height: int, width: int) -> Path:
    """The recorded input clip, resized like the recording by nearest pixels: floor(i * in / out)."""
    stored = np.load(recordings / "video_input" / "input_frames.npz")
    frames = stored[stored.files[0]]
    rows = np.arange(height) * frames.shape[1] // height
    columns = np.arange(width) * frames.shape[2] // width
    return write_lossless(path, frames[:, rows][:, :, columns])


@pytest.fixture
def run(main, tmp_path) -> Callable[..., tuple[list[np.ndarray], np.ndarray]]:
    """Run the command; returns the latents of each pass, and frames [F, H, W, 3]."""
    runs = iter(range(100))

    def run(*flags: object) -> tuple[list[np.ndarray], np.ndarray]:
        folder = tmp_path / f"run-{next(runs)}"
        files = ("--save_latents", folder / "latents.safetensors", "--output", f"{folder}/frames/")
        code, stdout, stderr = main(*flags, "--device", "cpu", "--no_cache", "--quiet", *files)
        assert (code, stdout) == (0, f"{folder}/frames\n"), stderr
        frames = [np.asarray(Image.open(path)) for path in sorted((folder / "frames").glob("*.png"))]
        latents = load_file(folder / "latents.safetensors")
        return [latents[f"latents.{number}"] for number in range(len(latents))], np.stack(frames)

    return run


def check_latents(latents: list[np.ndarray], recorded: Recording) -> None:
    for number, (made, expected) in enumerate(zip(latents, recorded.latents, strict=True)):
        np.testing.assert_allclose(made, expected, atol=LATER_PASS if number else FIRST_PASS, rtol=0)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The RMS difference, in levels."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize(
    ("task", "case"),
    [
        *(("reference_to_video", case) for case in (1, 3, "guided")),
        *(("single_shot_extension", duration) for duration in (5, 7, 10)),
        *(("shot_switching_extension", duration) for duration in (2, 5)),
        *(("talking_avatar", name) for name in ("2s", "2s_guided", "5p8s", "8s")),
    ],
)
def test_recorded_run(run, recording, task, case):
    recorded = recording(task, case)
    latents, frames = run(*recorded.flags, "--dtype", "float32")
    check_latents(latents, recorded)
    assert len(frames) == recorded.count
    if recorded.frames is None:
        return
    stored = np.load(recorded.frames)
    index = stored["index"] if "index" in stored else np.arange(len(stored["frames"]))
    kept = index < len(frames)
    made, expected = frames[index[kept]], stored["frames"][kept].astype(int)
    if len(recorded.latents) == 1:
        difference = np.abs(made - expected)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02
    else:
        assert 20 * np.log10(255 / max(distance(made, expected), 1e-9)) > LEAST_PSNR


SHORT = [
    ("reference_to_video", 1), ("single_shot_extension", 5), ("shot_switching_extension", 2), ("talking_avatar", "2s"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "case"), SHORT)
def test_exact_memory_modes(run, recording, task, case):
    recorded = recording(task, case)
    for mode in MODES:
        check_latents(run(*recorded.flags, "--dtype", "float32", *mode)[0], recorded)


@pytest.mark.parametrize(("task", "case"), [*SHORT, pytest.param("talking_avatar", "5p8s", marks=pytest.mark.extended)])
def test_fp8(run, recording, task, case):
    """FP8's distance from float32, in multiples of bfloat16's on the same CPU."""
    flags = recording(task, case).flags
    _, exact = run(*flags, "--dtype", "float32")
    _, plain = run(*flags, "--dtype", "bfloat16")
    limit = FP8_LOSS_OF_CHAINS if case == "5p8s" else FP8_LOSS
    for more in FP8:
        _, frames = run(*flags, "--dtype", "bfloat16", *more)
        assert 0 < distance(frames, plain)
        assert distance(frames, exact) < limit * distance(plain, exact)
