"""The encoders against the official ones, and the arguments that the transformer is called with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from skyreels_v3.wan.checkpoint import load_audio_encoder, load_image_encoder, load_text_encoder
from skyreels_v3.wan.conditioning import Conditioning, TextEncoder, clean_prompt, expand_timestep
from skyreels_v3.wan.rope import Segment

ATOL = 1e-4

# Text


@pytest.fixture(scope="module")
def cases(reference):
    return json.loads((reference / "umt5" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recorded(reference):
    return load_file(reference / "umt5" / "cases.safetensors")


@pytest.fixture(scope="module")
def encoder(reference) -> TextEncoder:
    return load_text_encoder(reference / "umt5", torch.float32)


def check_states(encoder: TextEncoder, prompts: Sequence[str], padded: Tensor) -> None:
    for prompt, expected in zip(prompts, padded, strict=True):
        states = encoder.encode(prompt)["context"][0]
        torch.testing.assert_close(states, expected[: len(states)], atol=ATOL, rtol=0)
        assert not expected[len(states) :].any()


def test_cleaning(cases):
    assert [clean_prompt(prompt) for prompt in cases["prompts"]] == cases["cleaned"]


def test_tokens(encoder, cases, recorded, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = [encoder.tokenize(prompt) for prompt in cases["prompts"]]
    for (ids, mask), all_ids, all_mask in zip(tokens, recorded["ids"], recorded["mask"], strict=True):
        assert torch.equal(ids[0], all_ids[all_mask.bool()]) and mask.all()
    assert "only the first 512 of" in caplog.text


def test_native_states(encoder, cases, recorded):
    check_states(encoder, cases["prompts"], recorded["context"])


def test_diffusers_layout_states(reference, cases, recorded, tmp_path):
    shutil.copytree(reference / "umt5" / "hf_text_encoder", tmp_path / "text_encoder")
    shutil.copytree(reference / "umt5" / "google" / "umt5-xxl", tmp_path / "tokenizer")
    check_states(load_text_encoder(tmp_path, torch.float32), cases["prompts"], recorded["hf_prompt_embeds"])


def test_bfloat16_stays_close(reference, encoder, cases):
    rounded = load_text_encoder(reference / "umt5", torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.module.parameters()} == {torch.bfloat16}
    exact, out = (made.encode(cases["prompts"][0])["context"] for made in (encoder, rounded))
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.05 * exact.abs().mean()


# Images


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_image_states(reference, case):
    encoder = load_image_encoder(reference / "clip", torch.float32, heads=4)
    recorded = load_file(reference / "clip" / "cases.safetensors")
    out = encoder(recorded[f"{case}.image"][:, :, 0])
    torch.testing.assert_close(out, recorded[f"{case}.out"], atol=ATOL, rtol=0)


def test_the_image_encoder_of_a_run(reference):
    """The full width, with 16 heads."""
    encoder = load_image_encoder(reference / "pipelines" / "checkpoints" / "talking_avatar", torch.float32)
    assert encoder.module.config.num_attention_heads == 16
    assert encoder(torch.zeros(1, 3, 64, 48)).shape == (1, 257, 1280)


# Audio


@pytest.mark.parametrize("clip", ["speech_16k_2s", "speech_22k_1p3s"])
@pytest.mark.parametrize(
    ("folder", "name", "step"),
    # the second is in the format of older files: .bin, full width; only every 64th channel was recorded
    [("wav2vec2/small", "small.emb", 1), ("pipelines/checkpoints/talking_avatar", "base768.emb_every64th", 64)],
)
def test_audio_states(reference, clip, folder, name, step):
    recorded = load_file(reference / "wav2vec2" / "cases.safetensors")
    out = load_audio_encoder(reference / folder, torch.float32)(recorded[f"{clip}.normalised"], fps=25)
    torch.testing.assert_close(out[:, :, ::step], recorded[f"{clip}.{name}"], atol=1e-3, rtol=0)


# Calls of the transformer


def latents(frames: int) -> Tensor:
    return torch.zeros(1, 16, frames, 4, 4)


def test_clean_segments_stand_at_timestep_zero():
    segments = (Segment(latents(2), clean=True), Segment(latents(3), 2))
    assert expand_timestep(torch.tensor(875), segments).tolist() == [[0, 0, 875, 875, 875]]
    assert expand_timestep(torch.tensor(875), segments[1:]).tolist() == [875]


def test_the_latents_own_prediction_is_taken():
    seen = []

    def model(segments, timestep, *conditions):
        seen.append(([segment.start_frame for segment in segments], timestep.tolist()))
        return tuple(segment.latents + number for number, segment in enumerate(segments))

    condition = Conditioning(torch.zeros(1, 1, 1), 2, (Segment(latents(2), clean=True),), (Segment(latents(1), 9),))
    assert torch.equal(condition.predict(model, latents(3), torch.tensor(7)), latents(3) + 1)
    assert seen == [([0, 2, 9], [[0, 0, 7, 7, 7, 7]])]


def test_channels_are_concatenated_to_the_latents():
    condition = Conditioning(torch.zeros(1, 1, 1), channels=torch.ones(1, 20, 3, 4, 4))
    out = condition.predict(lambda segments, *others: (segments[0].latents,), latents(3), torch.tensor(7))
    assert torch.equal(out, torch.cat((latents(3), condition.channels), dim=1))
