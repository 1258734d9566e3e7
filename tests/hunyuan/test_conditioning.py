"""The text encoder on the toy model, against diffusers' pipelines with the libraries' own models of the same files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator

import pytest
import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

from skyreels_v3.hunyuan.checkpoint import load_llama_tokenizer, load_text_encoder
from skyreels_v3.hunyuan.conditioning import HunyuanTextEncoder
from skyreels_v3.tasks import task_spec
from tests import toys

LONG = "A small wooden boat with a torn red sail drifts across the calm lake at dawn, followed by two white swans."
PROMPTS = ["", "FPS-24, A fox runs.", "Two lines,\n\nand {braces} in\u00e9dites: <video>!", LONG]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan")
    toys.write(folder, task_spec("t2v"))
    return folder


@pytest.fixture(scope="module")
def encoder(root) -> HunyuanTextEncoder:
    return load_text_encoder(root, torch.float32)


@pytest.fixture(scope="module", params=[HunyuanVideoPipeline, HunyuanSkyreelsImageToVideoPipeline])
def stock(request, root):
    return request.param(
        text_encoder=LlamaModel.from_pretrained(root / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
        text_encoder_2=CLIPTextModel.from_pretrained(root / "text_encoder_2"),
        tokenizer_2=AutoTokenizer.from_pretrained(root / "tokenizer_2"),
        transformer=None, vae=None, scheduler=None,
    )  # fmt: skip


@pytest.fixture
def said(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that is logged, including by the libraries, which do not propagate to the root logger."""
    libraries = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for library in libraries:
        library.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="skyreels_v3"):
        yield caplog
    for library in libraries:
        library.removeHandler(caplog.handler)


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_it_is_the_librarys_encoding(encoder, stock, prompt, capsys):
    states, pooled, mask = stock.encode_prompt(prompt)
    made = encoder.encode(prompt)
    assert made.keys() == {"context", "pooled"}
    assert mask.sum() < 256 and not mask[:, int(mask.sum()) :].any()
    torch.testing.assert_close(made["context"], states[:, : int(mask.sum())], atol=1e-6, rtol=0)
    torch.testing.assert_close(made["pooled"], pooled, atol=1e-6, rtol=0)
    assert capsys.readouterr().out == ""


def test_long_prompts(encoder, said, capsys):
    assert encoder.encode("x" * 256)["context"].shape == (1, 256, 32)
    assert "are used" not in said.text
    assert encoder.encode("x" * 257)["context"].shape == (1, 256, 32)
    assert "only the first 256 of the 257 tokens of" in said.text
    assert capsys.readouterr().out == ""


def test_prompts_that_are_long_for_clip(root, said, capsys):
    """One warning per prompt; the libraries' own, longer ones are suppressed."""
    encoder = load_text_encoder(root, torch.float32)
    encoder.encode("x" * 75)
    assert not said.messages
    for length in (76, 119):
        said.clear()
        encoder.encode("x" * length)
        (record,) = said.records
        assert record.levelno == logging.INFO and record.name.startswith("skyreels_v3")
        text = f'CLIP reads the first 75 of {length} tokens of "{"x" * 40}..."; Llama reads up to 256'
        assert record.getMessage() == text
    assert capsys.readouterr() == ("", "")


def test_the_llamas_layers_are_its_blocks(encoder):
    assert len(encoder.blocks) == 3
    owned = {id(parameter) for parameter in encoder.module.parameters()}
    assert {id(parameter) for block in encoder.blocks for parameter in block.parameters()} < owned


def test_bfloat16_stays_close(root, encoder):
    half = load_text_encoder(root, torch.bfloat16).encode(LONG)
    for name, exact in encoder.encode(LONG).items():
        assert half[name].dtype == torch.bfloat16
        assert not half[name].requires_grad
        assert (half[name] - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_the_tokenizers_file_counts_and_not_its_class(root, encoder, tmp_path, name):
    """The published tokenizer is Llama 3's but declares Llama 2's class."""
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((root / "tokenizer" / "tokenizer_config.json").read_text())
    text = json.dumps(config | {"tokenizer_class": name, "legacy": True, "add_prefix_space": None})
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(text)
    tokenizer = load_llama_tokenizer(tmp_path / "tokenizer")
    for prompt in PROMPTS:
        expected = encoder.tokenizer(prompt, padding="max_length", max_length=300)
        assert tokenizer(prompt, padding="max_length", max_length=300).input_ids == expected.input_ids
