"""Training runs the networks as inference does, learns, and writes what inference reads."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from skyreels_v3.checkpoints import tiny
from skyreels_v3.denoising.guidance import FULL, NO_TEXT, one_condition
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.conditioning import Conditioning
from skyreels_v3.wan.key_maps import TEXT_TOKENS
from skyreels_v3.wan.vae import VideoVAE
from tests.conftest import files_in
from training import captions, encoders, measure, networks, pack, tasks, world
from training.optimizer import Trainer
from training.run import Run, Schedule, write_tensors
from training.train import take_apart
from training.transformer import GUIDANCE, TransformerTraining
from training.vae import VAETraining

DEVICE = torch.device("cpu")
ASSETS = Path(__file__).resolve().parent.parent.parent / "assets"


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def shaken(kind):
    """A VAE whose blocks have an effect."""
    torch.manual_seed(0)
    vae = networks.build_vae(kind)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("tokens", [7, 100])  # all samples at once, and four at a time
def test_attention(tokens):
    query, key, value = torch.randn(3, 5, tokens, 6, 8, dtype=torch.float64)
    bias = torch.randn(tokens, dtype=torch.float64)
    heads = (part.transpose(1, 2) for part in (query, key, value))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=bias.expand(tokens, -1)).transpose(1, 2)
    torch.testing.assert_close(networks.attention(query, key, value, bias), expected)


def test_words(tmp_path):
    encoder = encoders.text_encoder(tmp_path / "tokenizer")
    prompts = ("a red fox and a blue lantern", "a red vixen and a blue lamp", "a blue fox and a red lamp")
    one, same, other = (encoder.encode(prompt)["context"][0] for prompt in prompts)
    torch.testing.assert_close(one, same)
    assert (one[6] - other[6]).norm() > 0.2 * one[6].norm()  # the lantern's own token knows its color
    pieces = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer("[ZOOM_IN_CUT] A zebra, a fox").input_ids)
    assert pieces[0].endswith("[ZOOM_IN_CUT]") and "z" in pieces


def test_words_of_v1(tmp_path):
    encoder = encoders.hunyuan_text_encoder(tmp_path)
    red, blue, azure = (
        encoder.encode(f"FPS-24, A {color} fox and a ball.")["context"][0] for color in ("red", "blue", "azure")
    )
    torch.testing.assert_close(blue, azure)
    changed = (red - blue).norm(dim=1) > 0.1
    assert changed.any() and changed.nonzero().min() > 3  # no change before the word
    assert changed[changed.nonzero().min() + 1]  # the token after it changes


def test_a_whole_clip_is_a_stream():
    vae = shaken("wan")
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, _ = networks.moments_of(vae, video)
        again = networks.decoded(vae, mean)
    latents = VideoVAE(vae).encode(video)
    torch.testing.assert_close(networks.normalized(vae, mean), latents, rtol=0, atol=1e-4)
    streamed = torch.cat([*VideoVAE(vae).decode_stream(latents)], dim=2)
    torch.testing.assert_close(again.clamp(-1, 1), streamed, rtol=0, atol=1e-4)


def test_a_new_vae_encodes_frames_as_pictures():
    vae = networks.build_vae("wan")
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, _ = networks.moments_of(vae, video)
        pictures = [networks.moments_of(vae, video[:, :, at : at + 1])[0] for at in (0, 4, 8)]
        again = networks.decoded(vae, mean)
    torch.testing.assert_close(mean, torch.cat(pictures, dim=2))
    assert mean.std() > 0.1
    torch.testing.assert_close(again[:, :, 1:5], again[:, :, 1:2].expand(-1, -1, 4, -1, -1))


def test_latents_of_clips_are_held_to_those_of_pictures(tmp_path):
    options = argparse.Namespace(device="cpu", minutes=1, only=["vae_wan"], toy=True, encoders=False, compile=False)
    training = VAETraining("vae_wan", Run(options, tmp_path, time.time()))
    video = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    for vae, least in ((networks.build_vae("wan"), 0.0), (shaken("wan"), 0.01)):
        training.vae = vae
        mean, _ = networks.moments_of(vae, video)
        expected = (
            (VideoVAE(vae).encode(video)[:, :, 1] - VideoVAE(vae).encode(video[:, :, 4:])[:, :, 0]).square().mean()
        )
        found = training.distance_to_pictures(video, mean)
        assert float(expected) >= least
        torch.testing.assert_close(found.detach(), expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_the_published_normalization(kind):
    vae = shaken(kind)
    video = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        before, variance = networks.moments_of(vae, video)
        picture = networks.decoded(vae, before)
        networks.fold_normalization(vae, before.mean((0, 2, 3, 4)), before.std((0, 2, 3, 4)))
        after, scaled = networks.moments_of(vae, video)
        again = networks.decoded(vae, after)
    latents = networks.normalized(vae, after)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(again, picture, atol=1e-3, rtol=0)
    ratio = (0.5 * (scaled - variance)).exp().mean((0, 2, 3, 4))
    torch.testing.assert_close(ratio, after.std((0, 2, 3, 4)) / before.std((0, 2, 3, 4)), atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Creates a task by name, with two samples of each kind."""

    def make(name):
        torch.manual_seed(0)
        task = tasks.TASKS[name](name, tasks.TOY, DEVICE, tmp_path_factory.mktemp(name))
        latents = tasks.Latents(shaken(task.vae), DEVICE)
        samples = {kind: task.encode(task.draw(kind, range(2)), latents) for kind in task.banks}
        for kind, some in samples.items():
            task.banks[kind].add(some)
        return task, samples

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "talking_avatar"])
def test_conditioned_as_in_the_pipelines(name, made):
    """For one sample at one noise level, training's shortcut gives what `Conditioning.predict` gives."""
    task, samples = made(name)
    torch.manual_seed(1)
    model = networks.build_transformer(name)
    torch.nn.init.normal_(model.proj_out.weight)
    for kind in task.kinds:
        chosen = {key: value[:1] for key, value in samples[kind if kind in samples else "cut 2"].items()}
        noisy = chosen["video"]
        if name == "talking_avatar":
            condition = task.condition(chosen, drop=False)
        else:
            condition = task.condition(kind, chosen, noisy.shape[2], drop=False)
        assert isinstance(condition, Conditioning)
        with torch.no_grad(), networks.quick_tables():
            short = tasks.velocity(model, condition, noisy, torch.tensor([0.75]))
        text = torch.nn.functional.pad(condition.text, (0, 0, 0, TEXT_TOKENS - condition.text.shape[1]))
        whole = Conditioning(**{**vars(condition), "text": text})
        with torch.no_grad():
            expected = whole.predict(model, noisy, torch.tensor(750.0))
        torch.testing.assert_close(short, expected, rtol=1e-3, atol=1e-3)


def test_batches_of_all_kinds_cost_the_same(made):
    task, _ = made("video")
    kinds = set()
    for step in range(80):
        target, condition, weight = task.batch(step / 80)
        given = [segment.latents.shape[2] for segment in (*condition.before, *condition.after)]
        kinds.add((target.shape[2], *given))
        frames = len(target) * (target.shape[2] + sum(given))
        assert len(target) == 2 or 0.8 < frames / (tasks.BATCH_FRAMES * tasks.TOY.batch) < 1.2
        assert weight.shape[2:] == target.shape[2:]
    assert {(1,), (1, 1), (1, 2), (1, 3), (13, 4), (9, 7), (13, 3)} <= kinds


def test_captions_state_no_direction_that_is_not_visible(made):
    task, _ = made("video")
    scenes = task.scenes(range(60), [0.0, 1.0] * 30)
    stated = [scene.direction_stated for scene in scenes]
    assert any(stated[::2]) and not any(stated[1::2])
    words = [{captions.meaning_of(word.strip(".,")) for word in scene.caption.split()} for scene in scenes[1::2]]
    still = [given for given, scene in zip(words, scenes[1::2], strict=True) if not scene.pan and not scene.zooming]
    assert not any(given & {"left", "right", "up", "down", "closer", "spins"} for given in still)


def test_colors_are_left_out_only_where_pictures_show_them(made):
    task, samples = made("video")
    chosen = {key: value[:1].expand(64, *value.shape[1:]) for key, value in samples[tasks.PICTURE].items()}
    chosen["count"] = torch.full((64,), 2)
    for slots, expected in ((1, False), (2, True)):
        text = task.condition("references", chosen, 1, slots=slots).text
        assert (text == chosen["colorless text"]).flatten(1).all(1).any() == expected


def test_each_of_two_faces_speaks_with_its_voice(tmp_path):
    task = tasks.Avatar("talking_avatar", replace(tasks.TOY, face=(128, 128)), DEVICE, tmp_path)
    drawn = task.draw(tasks.PAIR, range(3))
    assert drawn["video"].shape == (3, 3, 81, 128, 256)
    for seed, (video, voices, start) in enumerate(
        zip(tasks.from_bytes(drawn["video"]), drawn["voices"].tolist(), drawn["start"].tolist(), strict=True)
    ):
        for person, voice in enumerate(voices):
            face = world.make_face(seed + person, np.zeros(81))
            measured = measure.mouth_openings(video.split(128, dim=-1)[person], face)
            truth = task.mouths[voice][start : start + len(measured)]
            assert np.abs(measured - truth)[1:].mean() < 0.05  # the first frame is the portrait
            assert task.masks[person].argmax(dim=-1).eq(16 * person).all()


@pytest.mark.parametrize("name", [slow("talking_avatar"), "t2v", slow("video")])
def test_it_learns(name, made):
    task, _ = made(name)
    model = networks.build_transformer(name)
    trainer = Trainer(model.parameters())
    target, condition, _ = task.batch(0.0)
    noise, sigma = torch.randn_like(target), torch.tensor([0.8, 0.4]).repeat(len(target))[: len(target)]
    level = sigma.view(-1, 1, 1, 1, 1)

    def loss_of(noisy):
        prediction = tasks.velocity(model, condition, noisy, sigma)
        return (prediction - (noise - target)).square().mean()

    losses = []
    with networks.quick_tables():
        for _ in range(8):
            trainer.loss.zero_()
            trainer.step(loss_of, (1 - level) * target + level * noise, 6e-3)
            losses.append(float(trainer.loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["talking_avatar", "video"])
def test_distilled_guidance(name, tmp_path):
    """A model with the teacher's weights lacks just what guidance adds to the teacher's prediction."""
    take_apart(tiny.WEIGHTS, tmp_path, ready=True)
    options = argparse.Namespace(device="cpu", minutes=1, only=[name], toy=True, encoders=False, compile=False)
    training = TransformerTraining(name, Run(options, tmp_path, time.time()))
    task, latents = training.task, training.wait_for_latents()
    while training.drawn:
        training.encode(latents)
    target, condition, weight = task.batch(0.0)
    while (without := task.unguided(condition)) is None:
        target, condition, weight = task.batch(0.0)
    noise, sigma = torch.randn_like(target), torch.full((len(target),), 0.8)
    noisy = 0.2 * target + 0.8 * noise
    training.make_teacher()
    training.model.float(), training.teacher.float()  # exact on every CPU
    given = tasks.velocity(training.model, condition, noisy, sigma, task.floor)
    unguided = tasks.velocity(training.model, without, noisy, sigma, task.floor)
    guided = one_condition(GUIDANCE, NO_TEXT)(lambda name: given if name == FULL else unguided)
    assert (guided - given).abs().max() > 1e-3
    for each, extra in ((None, 0.0), (without, guided - given)):
        expected = ((given - (noise - target) - extra).square() * weight).mean()
        loss = training.loss_of((target, noise, sigma, condition, each, weight))
        torch.testing.assert_close(loss, expected)


def test_learning_rate():
    schedule = Schedule(1.0, end=0.0)
    rates = [schedule.rate(progress) for progress in np.linspace(0, 1, 51)]
    assert max(rates) > 0.99 and rates[0] < 0.1 and rates[-1] <= 0.03
    assert np.argmax(rates) < 5


INPUTS = {
    "reference_to_video": ["--ref_imgs", ASSETS / "fox.png", "--duration", 1],
    "talking_avatar": ["--input_image", ASSETS / "portrait.png", "--input_audio", ASSETS / "speech.mp3"],
    "t2v": ["--num_frames", 5],
}


@pytest.mark.parametrize(
    "task, name", [("reference_to_video", "video"), ("talking_avatar", "talking_avatar"), ("t2v", "t2v")]
)
def test_packed_weights_are_the_built_in_model(task, name, tmp_path, main, monkeypatch):
    spec = task_spec(task)
    tensors = {
        f"{place}.{key}": value.half()
        for place, model in (("vae", networks.build_vae(spec.family)), (name, networks.build_transformer(name)))
        for key, value in model.state_dict().items()
    }
    trained = tmp_path / f"{spec.family}.safetensors"
    write_tensors(trained, tensors)
    pack.pack(trained, tmp_path / "packs" / trained.name)
    pack.write(tensors, spec, name, tmp_path / "written")
    monkeypatch.setattr(tiny, "WEIGHTS", tmp_path / "packs")
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "cache"))
    code, out, err = main(
        *("--model_id", "tiny", "--task_type", task, "--prompt", "A fox in the snow", "--num_inference_steps", 2),
        *("--height", 32, "--width", 48, "--output", tmp_path / "made.mp4", *INPUTS[task]),
    )
    assert code == 0, err
    assert out.strip().endswith("made.mp4")
    written, unpacked = tmp_path / "written", tiny.folder_of(spec)
    assert files_in(unpacked) == files_in(written)
    for name in files_in(written):
        if name.endswith((".safetensors", ".pth")):
            expected, found = (dict(pack.tensors_of(folder / name)) for folder in (written, unpacked))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        else:
            assert (unpacked / name).read_text() == (written / name).read_text()
