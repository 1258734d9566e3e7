"""The text encoder and its cleaning of prompts, against the official ones."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.wan.checkpoint import load_text_encoder
from skyreels_v3.wan.text_encoder import clean_prompt

ATOL = 1e-4


@pytest.fixture(scope="module")
def cases(reference):
    return json.loads((reference / "umt5" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recorded(reference):
    return load_file(reference / "umt5" / "cases.safetensors")


def test_cleaning(cases):
    assert [clean_prompt(prompt) for prompt in cases["prompts"]] == cases["cleaned"]


def test_tokens(reference, cases, recorded, caplog):
    encoder = load_text_encoder(reference / "umt5", torch.float32)
    with caplog.at_level(logging.WARNING):
        ids, mask = encoder.tokenize(cases["prompts"])
    assert torch.equal(ids, recorded["ids"])
    assert torch.equal(mask, recorded["mask"])
    assert "only the first 512 are used" in caplog.text


def test_native_states(reference, cases, recorded):
    encoder = load_text_encoder(reference / "umt5", torch.float32)
    torch.testing.assert_close(encoder(cases["prompts"]), recorded["context"], atol=ATOL, rtol=0)


def test_states_do_not_depend_on_the_batch(reference, cases, recorded):
    encoder = load_text_encoder(reference / "umt5", torch.float32)
    for prompt, expected in zip(cases["prompts"], recorded["context"], strict=True):
        torch.testing.assert_close(encoder([prompt])[0], expected, atol=ATOL, rtol=0)


def test_bfloat16_stays_close(reference, cases):
    exact = load_text_encoder(reference / "umt5", torch.float32)(cases["prompts"][:1])
    encoder = load_text_encoder(reference / "umt5", torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.bfloat16}
    out = encoder(cases["prompts"][:1])
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_diffusers_layout_states(reference, cases, recorded, tmp_path):
    shutil.copytree(reference / "umt5" / "hf_text_encoder", tmp_path / "text_encoder")
    shutil.copytree(reference / "umt5" / "google" / "umt5-xxl", tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path, torch.float32)
    torch.testing.assert_close(encoder(cases["prompts"]), recorded["hf_prompt_embeds"], atol=ATOL, rtol=0)
