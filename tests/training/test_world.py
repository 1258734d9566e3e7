"""The drawn world: reproducible for a seed, and consistent with its scenes' descriptions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training import captions, drawing, sound, world


def test_a_seed_is_a_scene():
    scenes = [world.make_scene(seed) for seed in (3, 4)]
    again = [world.make_scene(seed) for seed in (3, 4)]
    assert scenes == again and scenes[0] != scenes[1]
    torch.testing.assert_close(world.render(scenes, 2, 32, 48), world.render(again, 2, 32, 48), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(12))
def test_things_are_where_the_scene_says(seed):
    scene = replace(world.make_scene(seed), flakes=False, sun=None, waves=None)
    scene = replace(scene, things=scene.things[:1])
    bare = replace(scene, things=(replace(scene.things[0], motion=world.Motion((9.0, 9.0), size=0.1)),))
    height, width = 64, 112
    seen, empty = (world.render([made], 3, height, width, fps=2.0)[0] for made in (scene, bare))
    changed = (seen - empty).abs().sum(0) > 0.1  # (F, H, W)
    cells = world.where_things_are([scene], 3, height // 8, width // 8, fps=2.0)[0]
    touched = changed.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).any(4).any(2)
    assert (touched & ~cells).sum() <= 0.15 * touched.sum() and cells.sum() < 2.5 * touched.sum()
    x, y, size = scene.on_screen(0, np.arange(3) / 2.0).T
    for frame in range(3):
        rows, columns = np.nonzero(changed[frame].numpy())
        middle = (columns.min() + columns.max() + 1) / 2
        assert abs((middle - width / 2) / height - x[frame]) < max(0.05, 0.6 * size[frame])
        assert abs((rows.mean() + 0.5 - height / 2) / height - y[frame]) < size[frame]


@pytest.mark.parametrize("seed", range(30))
def test_captions_name_what_is_seen(seed):
    scene = world.make_scene(seed)
    words = {captions.meaning_of(word.strip(".,").lower()) for word in scene.caption.split()}
    for thing in scene.things:
        assert thing.kind.split()[0] in words
        assert thing.color in words or thing.color == drawing.NATURAL.get(thing.kind)
    colorless = {
        captions.meaning_of(word.strip(".,").lower()) for word in captions.without_colors(scene.caption).split()
    }
    assert colorless == words - drawing.COLORS.keys()
    if scene.direction_stated and scene.direction in ("left", "right"):
        assert scene.direction in words
    x, y, _, _ = scene.things[0].motion.at(np.linspace(0, world.STEADY_SECONDS, 30))
    if scene.direction in ("left", "right"):
        assert (np.diff(x) * (1 if scene.direction == "right" else -1) > 0).all()
    if scene.direction in ("up", "down"):
        assert (np.diff(y) * (1 if scene.direction == "down" else -1) > 0).all()


@pytest.mark.parametrize("kind", world.CUTS)
def test_cuts(kind):
    scene = world.make_scene(5)
    shot = world.cut_to(scene, 1.0, kind)
    assert shot.caption.startswith(f"[{kind}]")
    before, after = (made.on_screen(0, np.array([1.0]))[0, 2] for made in (replace(scene, zooming=0.0), shot))
    if kind == "ZOOM_IN_CUT":
        assert after > 1.5 * before
    if kind == "ZOOM_OUT_CUT":
        assert after < 0.75 * before
    assert shot.mirrored == (kind == "MULTI_ANGLE_CUT")
    assert (shot.things != scene.things) == (kind == "CUT_AWAY")


def test_a_mouth_opens_with_the_sound():
    voice = sound.make_voice(1, 4.0)
    mouth = sound.mouth_of(voice)
    assert len(mouth) == 100 and mouth.min() >= 0 and 0.8 < mouth.max() <= 1
    assert (mouth < 0.05).mean() > 0.1
    assert np.corrcoef(mouth, sound.loudness(voice))[0, 1] > 0.8
    shut, opened = (world.render_faces([world.make_face(0, np.full(1, o), blinks=False)], 64, 64) for o in (0.0, 1.0))
    changed = (shut - opened).abs().sum(1)[0, 0] > 0.1
    assert 10 < changed.sum() < 400


def test_a_dialog_takes_turns():
    for seed in range(3):
        first, second = sound.make_dialog(seed, 12.0)
        assert not (first * second).any()
        assert min(np.count_nonzero(first), np.count_nonzero(second)) > 0.15 * len(first)


def test_features_tell_loudness():
    encoder = sound.audio_encoder()
    seconds = 6.0
    voices = [sound.make_voice(seed, seconds) for seed in (1, 2)]
    features = [encoder(torch.from_numpy(voice), sound.FPS).flatten(1).numpy() for voice in voices]
    features = [np.c_[made, np.ones(len(made))] for made in features]
    mouths = [sound.mouth_of(voice) for voice in voices]
    least = features[0].T @ features[0] + 0.1 * np.eye(features[0].shape[1])
    weights = np.linalg.solve(least, features[0].T @ mouths[0])
    assert np.corrcoef(features[1] @ weights, mouths[1])[0, 1] > 0.8
