"""Metrics confirm what is true of the drawn world in its own pictures, less in blurred ones, and nothing in noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training import measure, sound, world
from training.measure import Found, find_thing, lip_sync, mouth_openings, psnr, size_change, ssim
from training.run import HELD_OUT

SIZE = (96, 160)
FPS = 1 / measure.EVERY  # of the sampled frames
FRAMES = 14  # 2 s
SEEDS = range(HELD_OUT, HELD_OUT + 40)


def blurred(video: Tensor, sigma: float = 1.5) -> Tensor:
    """Blur (3, F, H, W) with a Gaussian."""
    at = torch.arange(-6, 7) / sigma
    window = torch.exp(-at.square() / 2)
    window = (window / window.sum()).expand(3, 1, 1, -1)
    frames = F.pad(video.transpose(0, 1), (6, 6, 6, 6), mode="replicate")
    return F.conv2d(F.conv2d(frames, window, groups=3), window.mT, groups=3).transpose(0, 1)


def noise(seed: int) -> Tensor:
    return torch.randn(3, FRAMES, *SIZE, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def rendered(scene: world.Scene, start: float = 0.0) -> Tensor:
    return world.render([scene], FRAMES, *SIZE, start=start, fps=FPS)[0]


def agreement(found: Sequence[Found], scenes: Sequence[world.Scene]) -> list[float]:
    """The fractions of scenes in which the first thing's color, kind and direction were found."""
    named = [(scene.things[0].color, scene.things[0].kind, scene.direction) for scene in scenes]
    seen = [(each.color, each.kind, each.direction) for each in found]
    return np.mean(np.array(named) == np.array(seen), axis=0).tolist()


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.make_scene(seed) for seed in SEEDS]


@pytest.mark.parametrize("seed", [HELD_OUT + 1, HELD_OUT + 4])
def test_a_thing_is_found(seed):
    """At 24 frames per second, some of which are sampled; and nothing is found in noise."""
    scene = world.make_scene(seed)
    video = world.render([scene], 49, *SIZE)[0]
    found = find_thing(video, scene)
    assert found.is_found and len(found.times) == 13 and found.times[1] == pytest.approx(4 / 24)
    assert agreement([found], [scene]) == [1, 1, 1]
    x, y, size = scene.on_screen(0, found.times).T
    assert np.abs(found.poses[:, :2] - np.stack((x, y), axis=1)).max() < 0.03
    np.testing.assert_allclose(found.poses[:, 2], size, rtol=0.25)
    lost = find_thing(noise(seed), scene, fps=FPS)
    assert not lost.is_found and (lost.kind, lost.color, lost.direction) == ("", "", "")


@pytest.mark.slow
def test_what_is_named_is_found(scenes):
    found = [find_thing(rendered(scene), scene, fps=FPS) for scene in scenes]
    assert min(agreement(found, scenes)) >= 0.95
    poses = np.stack([each.poses for each in found])
    true = [scene.on_screen(0, each.times) for each, scene in zip(found, scenes, strict=True)]
    x, y, size = np.stack(true).transpose(2, 0, 1)
    shifts = np.maximum(abs(poses[..., 0] - x), abs(poses[..., 1] - y)) / size
    assert np.mean(np.median(shifts, axis=1) < 0.1) >= 0.95
    sizes = np.median(poses[..., 2] / size, axis=1)
    assert 0.8 < np.quantile(sizes, 0.05) and 0.9 < np.median(sizes) < 1.05


@pytest.mark.extended
def test_what_is_named_is_found_in_blurred_frames(scenes):
    found = [find_thing(blurred(rendered(scene)), scene, fps=FPS) for scene in scenes]
    assert min(agreement(found, scenes)) >= 0.85


@pytest.mark.slow
def test_what_others_name_is_not_found(scenes):
    others = [*scenes[1:], scenes[0]]
    found = [find_thing(rendered(scene), other, fps=FPS) for scene, other in zip(scenes, others, strict=True)]
    assert max(agreement(found, others)) < 0.4


@pytest.mark.slow
def test_nothing_is_found_in_noise(scenes):
    found = [find_thing(noise(scene.seed), scene, fps=FPS) for scene in scenes[:10]]
    assert max(agreement(found, scenes[:10])) < 0.2


@pytest.mark.parametrize("seed", range(HELD_OUT, HELD_OUT + 30))
def test_directions_of_true_poses(seed):
    """The scene's own poses give its direction, also when mirrored and through a moving camera."""
    scene = world.make_scene(seed)
    times = np.arange(FRAMES) / FPS
    for shot in (scene, replace(scene, mirrored=True, zoom=0.85)):
        turn = shot.things[0].motion.at(times)[3]
        seen = np.concatenate((shot.on_screen(0, times), np.mod(turn, 2 * math.pi)[:, None]), axis=1)
        poses = measure.in_world(seen, shot, times)
        np.testing.assert_allclose(poses[:, :3], np.stack(shot.things[0].motion.at(times)[:3], axis=1), atol=1e-9)
        assert measure.direction_of(times, poses) == scene.direction


def test_turns_of_a_star():
    """Rotations that leave a star unchanged count as the same pose."""
    times = np.arange(FRAMES) / FPS
    poses = np.zeros((FRAMES, 4))
    poses[:, 2], poses[:, 3] = 0.2, 2.4 * times - 0.4 * math.pi * np.arange(FRAMES) % (2 * math.pi)
    assert measure.direction_of(times, poses, measure.SYMMETRY["star"]) == "turning"
    poses[:, 3] = 0.4 * math.pi * (np.arange(FRAMES) % 3)
    assert measure.direction_of(times, poses, measure.SYMMETRY["star"]) == "still"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change"), [("ZOOM_IN_CUT", "closer"), ("ZOOM_OUT_CUT", "wider")])
def test_cuts_come_closer_or_go_wider(kind, change):
    seen = []
    for seed in range(HELD_OUT, HELD_OUT + 10):
        scene = world.make_scene(seed)
        shot = world.cut_to(scene, 1.0, kind)
        before = find_thing(rendered(scene)[:, :7], scene, fps=FPS)
        ratio, found = size_change(before, find_thing(rendered(shot, 1.0)[:, :7], shot, start=1.0, fps=FPS))
        true = shot.on_screen(0, np.ones(1))[0, 2] / scene.on_screen(0, np.ones(1))[0, 2]
        seen.append((found == change, abs(math.log(ratio / true)) < 0.25))
    assert np.mean(seen, axis=0).min() >= 0.9


# Mouths


@pytest.fixture(scope="module")
def mouth() -> np.ndarray:
    return sound.mouth_of(sound.make_voice(3, 5.0))


@pytest.mark.parametrize("seed", range(HELD_OUT, HELD_OUT + 6))
def test_mouths(mouth, seed):
    face = world.make_face(seed, mouth)
    video = world.render_faces([face], 96, 96)[0]
    for frames, error in ((video, 0.04), (blurred(video, 1.0), 0.06)):
        measured = mouth_openings(frames, face)
        assert np.abs(measured - mouth).mean() < error
        agreed = lip_sync(measured, mouth)
        assert agreed.correlation > 0.97 and agreed.lag == 0 and agreed.restless < 0.02


def test_late_silent_and_restless_mouths(mouth):
    face = world.make_face(1_000_001, mouth)
    video = world.render_faces([face], 96, 96)[0]
    for late in (-3, 0, 1, 2):
        agreed = lip_sync(mouth_openings(video.roll(late, dims=1), face), mouth)
        assert agreed.lag == late and (agreed.correlation > 0.97) == (late in (0, 1))
    other = sound.mouth_of(sound.make_voice(4, 5.0))
    assert lip_sync(mouth_openings(video, face), other).correlation < 0.6
    still = lip_sync(np.zeros_like(mouth), mouth)
    assert (still.correlation, still.lag, still.restless) == (0, None, 0)
    random = np.random.default_rng(0).uniform(0, 1, len(mouth))
    assert abs(lip_sync(random, mouth).correlation) < 0.4 and lip_sync(random, mouth).restless > 0.2
    static = torch.randn(3, len(mouth), 96, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert abs(lip_sync(mouth_openings(static, face), mouth).correlation) < 0.4


# Against ground truth


def pair() -> tuple[Tensor, Tensor]:
    truth = rendered(world.make_scene(1_000_002))[:, :2]
    generator = torch.Generator().manual_seed(0)
    return (blurred(truth) + 0.05 * torch.randn(truth.shape, generator=generator)).clamp(-1, 1), truth


def test_psnr():
    made, truth = pair()
    error = ((made.double() - truth.double()) ** 2).numpy()
    expected = [10 * math.log10(4 / error[:, frame].mean()) for frame in range(2)]
    np.testing.assert_allclose(psnr(made, truth).numpy(), expected)
    assert psnr(truth, truth).isinf().all()


def test_ssim_by_the_formula():
    """Window by window, in float64."""
    made, truth = (each[:, :1, :18, :20] for each in pair())
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        a, b = (each[channel, 0].double().numpy() for each in (made, truth))
        for y in range(18 - 10):
            for x in range(20 - 10):
                p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(made, truth).item() == pytest.approx(np.mean(values), rel=1e-9)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(1, dtype=torch.float64))


def test_ssim_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    made, truth = pair()
    expected = [
        metrics.structural_similarity(
            *(each[:, frame].double().numpy() for each in (made, truth)),
            data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for frame in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(made, truth).numpy(), expected, rtol=1e-6)
