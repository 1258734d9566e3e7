"""Whole runs through the command line, against what the official code computed for the same checkpoint and inputs.

Tolerances are those of the recordings' README: latents of the first pass 2e-3, of later passes 2e-2 (they see frames
that went through 8 bits). Frames of one pass are at most two levels apart, and under 2 % of the values differ. Over
several passes one level of rounding, which a CPU's instruction set decides, grows: their frames agree to 50 dB.
"""

from __future__ import annotations

import json
from pathlib import Path

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
FP8_LOSS = 10  # times bfloat16's: with three bits of mantissa rounding is 16 times coarser than with seven
FP8_LOSS_OF_CHAINS = 4  # both lose more, and their losses are nearer to each other
LEAST_PSNR = 50.0
CPU = ("--device", "cpu", "--dtype", "float32", "--quiet")
FIRST_PASS, LATER_PASS = 2e-3, 2e-2


def run_recorded(generate, folder: Path, *arguments: object) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Latents and frames [F, H, W, 3] that the command line makes."""
    run = generate(*arguments, *CPU, "--save_latents", folder / "latents.safetensors", "--output", f"{folder}/frames/")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(folder / "frames")
    frames = [np.asarray(Image.open(path)) for path in sorted((folder / "frames").glob("*.png"))]
    return load_file(folder / "latents.safetensors"), np.stack(frames)


def check_frames(frames: np.ndarray, recorded: Path, passes: int = 1) -> None:
    stored = np.load(recorded)
    kept = [position for position, index in enumerate(frame_indices(stored)) if index < len(frames)]
    made, expected = frames[frame_indices(stored)[kept]], stored["frames"][kept].astype(int)
    if passes == 1:
        difference = np.abs(made - expected)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02
    else:
        assert 20 * np.log10(255 / max(distance(made, expected), 1e-9)) > LEAST_PSNR


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, in levels."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def frame_indices(stored: np.lib.npyio.NpzFile) -> np.ndarray:
    """Which frames of the run a file holds; all of them where it does not say."""
    return stored["index"] if "index" in stored else np.arange(len(stored["frames"]))


def recorded_clip(reference: Path, write_lossless, path: Path, height: int, width: int) -> Path:
    """The recorded input clip, in the size of the run: the recordings took the nearest pixel, index floor(i*in/out)."""
    stored = np.load(reference / "pipelines" / "video_input" / "input_frames.npz")
    frames = stored[stored.files[0]]
    rows = np.arange(height) * frames.shape[1] // height
    columns = np.arange(width) * frames.shape[2] // width
    return write_lossless(path, frames[:, rows][:, :, columns])


@pytest.mark.parametrize("references", [1, 3])
def test_reference_to_video(generate, reference, tmp_path, references):
    folder = reference / "pipelines" / "reference_to_video"
    meta = json.loads((folder / "meta.json").read_text())
    images = ",".join(str(folder / name) for name in meta["refs"][:references])
    latents, frames = run_recorded(
        generate, tmp_path, "--task_type", "reference_to_video", "--prompt", meta["prompt"], "--ref_imgs", images,
        "--model_id", reference / "pipelines" / "checkpoints" / "reference_to_video", "--duration", 1,
        "--height", meta["height"], "--width", meta["width"], "--seed", meta["seed"],
    )  # fmt: skip
    recorded = load_file(folder / f"duration_1_refs_{references}.safetensors")
    assert list(latents) == ["latents.0"]
    np.testing.assert_allclose(latents["latents.0"], recorded["final_latents"], atol=FIRST_PASS, rtol=0)
    assert len(frames) == 25
    check_frames(frames, folder / f"duration_1_refs_{references}_frames.npz")


def test_reference_to_video_with_dual_guidance(generate, reference, tmp_path):
    folder = reference / "pipelines" / "reference_to_video"
    meta = json.loads((folder / "meta.json").read_text())
    guided = meta["dual_guidance"]
    latents, frames = run_recorded(
        generate, tmp_path, "--task_type", "reference_to_video", "--prompt", meta["prompt"],
        "--ref_imgs", ",".join(str(folder / name) for name in meta["refs"]),
        "--model_id", reference / "pipelines" / "checkpoints" / "reference_to_video",
        "--height", meta["height"], "--width", meta["width"], "--seed", guided["seed"],
        "--num_frames", guided["num_frames"], "--num_inference_steps", guided["steps"],
        "--guidance_scale", guided["guidance_scale"], "--image_guidance_scale", guided["guidance_scale_img"],
        "--negative_prompt", guided["negative_prompt"],
    )  # fmt: skip
    recorded = load_file(folder / "dual_guidance.safetensors")
    np.testing.assert_allclose(latents["latents.0"], recorded["final_latents"], atol=FIRST_PASS, rtol=0)
    assert len(frames) == guided["num_frames"]


EXTENSIONS = [
    ("single_shot_extension", 5, "single_shot_extension/duration_10_frames.npz"),
    ("single_shot_extension", 7, "single_shot_extension/duration_7_frames.npz"),
    ("single_shot_extension", 10, "single_shot_extension/duration_10_frames.npz"),
    ("shot_switching_extension", 2, "shot_switching_extension/duration_2_frames.npz"),
    ("shot_switching_extension", 5, "shot_switching_extension/duration_5_frames.npz"),
]


@pytest.mark.parametrize(("task", "duration", "recorded_frames"), EXTENSIONS)
def test_extension(generate, reference, write_lossless, tmp_path, task, duration, recorded_frames):
    folder = reference / "pipelines" / task
    meta = json.loads((folder / "meta.json").read_text())
    case = next(case for case in meta["cases"] if case["duration"] == duration)
    clip = recorded_clip(reference, write_lossless, tmp_path / "clip.mp4", case["height"], case["width"])
    latents, frames = run_recorded(
        generate, tmp_path, "--task_type", task, "--prompt", meta["prompt"], "--input_video", clip,
        "--model_id", reference / "pipelines" / "checkpoints" / "video_extension", "--duration", duration,
        "--height", case["height"], "--width", case["width"], "--seed", meta["seed"],
    )  # fmt: skip
    recorded = load_file(folder / f"duration_{duration}.safetensors")
    assert list(latents) == [f"latents.{number}" for number in range(len(case["rolls"]))]
    for number in range(len(case["rolls"])):
        np.testing.assert_allclose(
            latents[f"latents.{number}"],
            recorded[f"roll{number}.final_latents"],
            atol=LATER_PASS if number else FIRST_PASS,
            rtol=0,
        )
    assert len(frames) == duration * 24
    check_frames(frames, reference / "pipelines" / recorded_frames, len(case["rolls"]))


@pytest.mark.parametrize("name", ["2s", "2s_guided", "5p8s", "8s"])
def test_talking_avatar(generate, reference, tmp_path, name):
    folder = reference / "pipelines" / "talking_avatar"
    meta = json.loads((folder / "meta.json").read_text())
    case = next(case for case in meta["cases"] if case["name"] == name)
    changed = {"sampling_steps": 4, "text_guide_scale": 1.0, "audio_guide_scale": 1.0} | case["overrides"]
    latents, frames = run_recorded(
        generate, tmp_path, "--task_type", "talking_avatar", "--prompt", meta["prompt"],
        "--input_image", folder / meta["portrait"], "--input_audio", folder / case["wav"],
        "--model_id", reference / "pipelines" / "checkpoints" / "talking_avatar",
        "--height", case["height"], "--width", case["width"], "--seed", meta["seed"],
        "--num_inference_steps", changed["sampling_steps"], "--text_guidance_scale", changed["text_guide_scale"],
        "--audio_guidance_scale", changed["audio_guide_scale"],
    )  # fmt: skip
    recorded = load_file(folder / f"{name}.safetensors")
    assert list(latents) == [f"latents.{number}" for number in range(len(case["passes"]))]
    for number in range(len(case["passes"])):
        expected = recorded[f"pass{number}.final_latents"][None]
        tolerance = LATER_PASS if number else FIRST_PASS
        np.testing.assert_allclose(latents[f"latents.{number}"], expected, atol=tolerance, rtol=0)
    assert len(frames) == case["audio_frames"]
    check_frames(frames, folder / f"{name}_frames.npz", len(case["passes"]))


def short_run(
    reference: Path, write_lossless, folder: Path, task: str, avatar: str = "2s"
) -> tuple[tuple[object, ...], Path, list[str]]:
    """The flags of a recorded run, the file of its latents, and the names there of each pass's.

    All are of one pass, but for the `avatar` case 5p8s, of which the first pass's name is given.
    """
    recordings = reference / "pipelines" / task
    meta = json.loads((recordings / "meta.json").read_text())
    common = ("--task_type", task, "--prompt", meta["prompt"], "--seed", meta["seed"], "--no_cache", "--quiet")
    checkpoints = reference / "pipelines" / "checkpoints"
    if task == "reference_to_video":
        size = ("--height", meta["height"], "--width", meta["width"])
        inputs = ("--ref_imgs", recordings / meta["refs"][0], "--duration", 1, "--model_id", checkpoints / task)
        return (*common, *size, *inputs), recordings / "duration_1_refs_1.safetensors", ["final_latents"]
    if task == "talking_avatar":
        case = next(case for case in meta["cases"] if case["name"] == avatar)
        size = ("--height", case["height"], "--width", case["width"], "--num_inference_steps", 4)
        inputs = ("--input_image", recordings / meta["portrait"], "--input_audio", recordings / case["wav"])
        flags = (*common, *size, *inputs, "--model_id", checkpoints / task)
        return flags, recordings / f"{avatar}.safetensors", ["pass0.final_latents"]
    case = min(meta["cases"], key=lambda case: case["duration"])
    clip = recorded_clip(reference, write_lossless, folder / "clip.mp4", case["height"], case["width"])
    size = ("--height", case["height"], "--width", case["width"], "--duration", case["duration"])
    flags = (*common, *size, "--input_video", clip, "--model_id", checkpoints / "video_extension")
    names = [f"roll{number}.final_latents" for number in range(len(case["rolls"]))]
    return flags, recordings / f"duration_{case['duration']}.safetensors", names


TASKS = ("reference_to_video", "single_shot_extension", "shot_switching_extension", "talking_avatar")


@pytest.fixture
def run_here(main, tmp_path):
    """Run the command in this process; gives latents and frames [F, H, W, 3]."""
    runs = iter(range(100))

    def run(*flags: object) -> tuple[dict[str, np.ndarray], np.ndarray]:
        folder = tmp_path / f"run-{next(runs)}"
        files = ("--save_latents", folder / "latents.safetensors", "--output", f"{folder}/frames/")
        code, _, stderr = main(*flags, "--device", "cpu", *files)
        assert code == 0, stderr
        frames = [np.asarray(Image.open(path)) for path in sorted((folder / "frames").glob("*.png"))]
        return load_file(folder / "latents.safetensors"), np.stack(frames)

    return run


@pytest.mark.parametrize("task", TASKS)
def test_exact_memory_modes(run_here, reference, write_lossless, tmp_path, task):
    flags, recorded, names = short_run(reference, write_lossless, tmp_path, task)
    expected = load_file(recorded)
    for mode in MODES:
        latents, _ = run_here(*flags, "--dtype", "float32", *mode)
        assert len(latents) == len(names)
        for number, name in enumerate(names):
            made = latents[f"latents.{number}"].reshape(expected[name].shape)
            np.testing.assert_allclose(made, expected[name], atol=LATER_PASS if number else FIRST_PASS, rtol=0)


@pytest.mark.parametrize(("task", "avatar"), [*((task, "2s") for task in TASKS), ("talking_avatar", "5p8s")])
def test_fp8(run_here, reference, write_lossless, tmp_path, task, avatar):
    """FP8's distance from float32, in units of bfloat16's own: so whatever this CPU rounds is in both."""
    flags, _, _ = short_run(reference, write_lossless, tmp_path, task, avatar)
    _, exact = run_here(*flags, "--dtype", "float32")
    _, plain = run_here(*flags, "--dtype", "bfloat16")
    limit = FP8_LOSS if avatar == "2s" else FP8_LOSS_OF_CHAINS
    for more in FP8:
        _, frames = run_here(*flags, "--dtype", "bfloat16", *more)
        assert 0 < distance(frames, plain)
        assert distance(frames, exact) < limit * distance(plain, exact)
