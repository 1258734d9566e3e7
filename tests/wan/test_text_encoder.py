"""The text encoder and its cleaning of prompts, against the official ones."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.wan.checkpoint import load_text_encoder
from skyreels_v3.wan.conditioning import TextEncoder, clean_prompt, pad_context

ATOL = 1e-4


@pytest.fixture(scope="module")
def cases(reference):
    return json.loads((reference / "umt5" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recorded(reference):
    return load_file(reference / "umt5" / "cases.safetensors")


@pytest.fixture(scope="module")
def encoder(reference) -> TextEncoder:
    return load_text_encoder(reference / "umt5", torch.float32)


def contexts(encoder: TextEncoder, prompts: Sequence[str]) -> torch.Tensor:
    return torch.cat([pad_context(encoder.encode(prompt)["context"]) for prompt in prompts])


def test_cleaning(cases):
    assert [clean_prompt(prompt) for prompt in cases["prompts"]] == cases["cleaned"]


def test_tokens(encoder, cases, recorded, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = [encoder.tokenize(prompt) for prompt in cases["prompts"]]
    for (ids, mask), all_ids, all_mask in zip(tokens, recorded["ids"], recorded["mask"], strict=True):
        assert torch.equal(ids[0], all_ids[all_mask.bool()]) and mask.all()
    assert "only the first 512 are used" in caplog.text


def test_native_states(encoder, cases, recorded):
    torch.testing.assert_close(contexts(encoder, cases["prompts"]), recorded["context"], atol=ATOL, rtol=0)


def test_bfloat16_stays_close(reference, encoder, cases):
    rounded = load_text_encoder(reference / "umt5", torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.module.parameters()} == {torch.bfloat16}
    exact, out = (contexts(made, cases["prompts"][:1]) for made in (encoder, rounded))
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_diffusers_layout_states(reference, cases, recorded, tmp_path):
    shutil.copytree(reference / "umt5" / "hf_text_encoder", tmp_path / "text_encoder")
    shutil.copytree(reference / "umt5" / "google" / "umt5-xxl", tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path, torch.float32)
    torch.testing.assert_close(contexts(encoder, cases["prompts"]), recorded["hf_prompt_embeds"], atol=ATOL, rtol=0)
