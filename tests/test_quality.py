"""Quality metrics of frames whose true values are known, and what a run with --check reports."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import conv2d

from skyreels_v3 import load
from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.quality import CUT_AROUND, FLASH_FRAMES, Meter, Quality, find_cuts, noise_level, report, warnings
from tests.conftest import ASSETS
from training import world

FPS = 24


def quality_of(frames: np.ndarray, before: np.ndarray | None = None) -> Quality:
    meter = Meter(FPS)
    if before is not None:
        meter.add_before(before)
    for piece in np.array_split(frames, 3):
        meter.add(piece)
    return meter.quality()


def rendered(scene: world.Scene, frames: int = 24, start: float = 0.0) -> np.ndarray:
    """Render a scene as uint8 (F, 96, 160, 3)."""
    video = world.render([scene], frames, 96, 160, start=start)[0]
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def scene() -> world.Scene:
    return replace(world.make_scene(1_000_003), pan=0.0, zooming=0.0)


@pytest.fixture(scope="module")
def moving(scene) -> np.ndarray:
    return rendered(scene, 48)


def test_a_good_video_has_no_warning(moving):
    quality = quality_of(moving)
    assert not [*warnings(quality)]
    assert (quality.frames, quality.seconds, quality.black, quality.noisy, quality.cuts) == (48, 2.0, 0, 0, ())
    assert all(len(line) < 160 for line in report(quality)) and "cuts: 0" in [*report(quality)]
    again = Meter(FPS)
    again.add(moving)
    assert again.quality() == quality  # in one piece
    assert json.loads(json.dumps(quality.figures(), allow_nan=False))["frames"] == 48


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_few_frames(moving, frames):
    quality = quality_of(moving[:frames])
    assert quality.frames == frames and not [*warnings(quality)]
    assert all(math.isfinite(value) for value in vars(quality).values() if isinstance(value, float))


def test_black_flat_frozen_and_clipped(moving):
    black, grey = np.zeros_like(moving), np.full_like(moving, 128)
    assert quality_of(black).black == 48 and "all frames are black" in [*warnings(quality_of(black))]
    assert quality_of(grey).flat == 48 and "all frames are of one color" in [*warnings(quality_of(grey))]
    still = np.concatenate((moving[:24], np.repeat(moving[23:24], 60, axis=0)))
    quality = quality_of(still)
    assert quality.frozen == 60 and quality.freeze == pytest.approx(61 / FPS)
    assert any("frozen for 2.5 s" in line for line in warnings(quality))
    half = moving.copy()
    half[:, :48] = 255
    expected = 50 + 100 * ((moving[:, 48:] == 0) | (moving[:, 48:] == 255)).mean() / 2
    assert quality_of(half).clipped == pytest.approx(expected)


def test_noise():
    random = np.random.default_rng(0)
    mask = torch.tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=torch.float64)
    luma = (128 + random.normal(0, 20, (90, 120))).clip(0, 255).astype(np.uint8)
    answers = conv2d(torch.from_numpy(luma)[None, None].double(), mask[None, None])
    assert noise_level(luma) == pytest.approx(math.sqrt(math.pi / 2) / 6 * answers.abs().mean().item())
    assert noise_level(luma) == pytest.approx(20, rel=0.05)
    ramp = np.add.outer(np.arange(90), np.arange(120)).astype(np.uint8)
    assert noise_level(ramp) == 0
    quality = quality_of(random.integers(0, 256, (30, 60, 80, 3), np.uint8))
    assert quality.noisy == 30 and quality.noise > 0.9 and not quality.cuts
    assert "all frames are noisy" in [*warnings(quality)]


def test_flicker_and_drift(moving):
    assert quality_of(moving).flicker < 0.2
    signs = np.where(np.arange(48) % 2, 3, -3)[:, None, None, None]
    quality = quality_of((moving.astype(int) + signs).clip(0, 255).astype(np.uint8))
    assert quality.flicker == pytest.approx(12, rel=0.1)  # 3, -3, 3 has a second difference of 12
    assert any("flicker" in line for line in warnings(quality))
    # a gray that gets lighter: only L changes
    greys = np.linspace(100, 160, 72).round().astype(np.uint8)
    quality = quality_of(np.broadcast_to(greys[:, None, None, None], (72, 40, 40, 3)))
    lightness = 116 * ((((greys / 255) + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16
    assert quality.drift == pytest.approx(lightness[-24:].mean() - lightness[:24].mean(), rel=1e-3)
    assert quality.drift_per_minute == pytest.approx(quality.drift * 30)  # the means lie 2 s apart
    assert any("drift" in line for line in warnings(quality))


@pytest.mark.parametrize("kind", world.CUTS)
def test_seams(scene, moving, kind):
    """A continuing shot, a cut of each kind, and a shot that continues in other colors."""
    before, goes_on = moving[:24], moving[24:]
    new = rendered(world.cut_to(scene, 1.0, kind), start=1.0)
    whole, cut = quality_of(goes_on, before), quality_of(new, before)
    assert whole.cuts == () and whole.seam.luma < 2 and whole.seam.shift < 1
    assert cut.cuts == (0,) and cut.seam.luma > 3
    assert not [*warnings(whole)] and not [*warnings(cut, cut_at_seam=True)]
    assert "is visible" in "".join(warnings(cut)) and "there is no cut at frame 0" in "".join(warnings(whole, True))
    tinted = quality_of((goes_on * np.array([1, 0.95, 0.9])).astype(np.uint8), before)
    assert "is visible" in "".join(warnings(tinted))


def test_the_seam_is_the_jump_over_its_neighbours(scene, moving):
    ycc = [np.asarray(Image.fromarray(frame).convert("YCbCr")).astype(float) for frame in moving]
    jumps = np.array([np.abs(one - other).mean(axis=(0, 1)) for one, other in zip(ycc[1:], ycc, strict=False)])
    around = np.r_[24 - 13 : 23, 24:36]
    seam = quality_of(moving[24:], moving[:24]).seam
    assert seam.luma == pytest.approx(jumps[23, 0] / max(0.5, np.median(jumps[around, 0])))
    chroma = jumps[:, 1:].mean(axis=1)
    assert seam.chroma == pytest.approx(chroma[23] / max(0.5, np.median(chroma[around])))


def test_cuts_are_counted_in_the_file(scene, moving):
    other = rendered(world.make_scene(1_000_010))
    quality = quality_of(np.concatenate((moving, other)))
    assert quality.cuts == (48,) and "1 unexpected cut, the first at frame 48" in [*warnings(quality)]
    assert not [*warnings(quality, cuts_known=False)]
    meter = Meter(FPS)
    meter.first = 100  # the file starts with 100 input frames
    meter.add_before(moving[:24])
    meter.add(np.concatenate((moving[24:], other)))
    quality = meter.quality()
    assert quality.frames == 48 and quality.seam.frame == 100 and quality.cuts == (124,)


def test_no_cut(moving):
    """Flashes, repeated frames and the start of a pan."""
    for length in (1, 3, FLASH_FRAMES):
        flash = moving.copy()
        flash[20 : 20 + length] = 255 - flash[20 : 20 + length] // 4
        assert quality_of(flash).cuts == ()
    repeated = np.repeat(moving[::3], 3, axis=0)
    assert quality_of(repeated).cuts == ()
    wide = np.tile(moving[0], (1, 3, 1))
    pan = np.stack([wide[:, shift : shift + 160] for shift in (*[0] * 24, *range(0, 192, 8))])
    assert quality_of(pan).cuts == ()


def test_distances():
    lags = FLASH_FRAMES + 1
    still = np.full((40, lags), 0.5)
    still[20, :] = 30
    for lag in range(1, lags):
        still[20 + lag, lag:] = 30  # the frames before the cut stay far from those after it
    assert find_cuts(still) == [20]
    still[20 - CUT_AROUND : 20, 0] = 12  # changes as fast before it
    assert find_cuts(still) == []


def test_real_clip():
    boat = np.stack([*read_frames(ASSETS / "boat.mp4", FPS)])
    assert not [*warnings(quality_of(boat))] and quality_of(boat).cuts == ()


SMALL = {"model_id": "tiny", "device": "cpu", "num_inference_steps": 2, "height": 32, "width": 48, "prompt": "a"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["single_shot_extension", "shot_switching_extension"])
def test_the_seam_of_a_run(main, tmp_path, caplog, task):
    """The same with and without the input in the file; frame numbers count from the file's first frame."""
    run = {"task_type": task, "input_video": str(ASSETS / "boat.mp4"), "check": True, **SMALL}
    lines = [{"output": "new/"}, {"output": "both.mp4", "include_input": True}, {"output": "c/", "check": False}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps(run | line) for line in lines))
    code, stdout, stderr = main("--jobs", "jobs.jsonl")
    assert code == 0, stderr
    assert stdout.splitlines() == ["new", "both.mp4", "c"]  # nothing else
    results = [json.loads(line) for line in (tmp_path / "jobs.results.jsonl").read_text().splitlines()]
    new, both = (result["quality"] for result in results[:2])
    assert "quality" not in results[2] and len(results) == 3
    assert [caplog.text.count(f"check: seam at frame {number}:") for number in (0, 72)] == [1, 1]
    assert (new["seam"].pop("frame"), both["seam"].pop("frame")) == (0, 72)
    assert [cut + 72 for cut in new.pop("cuts")] == both.pop("cuts")
    assert new == both
    written = np.stack([*read_frames(tmp_path / "both.mp4", FPS)])
    assert new["frames"] == len(written) - 72 == 120


@pytest.mark.slow
def test_the_figures_of_a_call(monkeypatch, cache, caplog):
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    *events, done = load("reference_to_video", **SMALL)(ref_imgs=[ASSETS / "fox.png"], num_frames=9, check=True)
    frames = np.stack([event.image for event in events if type(event).__name__ == "Frame"])
    assert done.quality == quality_of(frames)
    assert "check: 7 of 9 frames are noisy" in caplog.text
    *_, done = load("reference_to_video", **SMALL)(ref_imgs=[ASSETS / "fox.png"], num_frames=5)
    assert done.quality is None
