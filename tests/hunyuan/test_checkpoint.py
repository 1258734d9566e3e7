"""SkyReels V1's checkpoint layout: the stock libraries can read the toy, and our loaders are strict."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, LlamaModel

from skyreels_v3.errors import CheckpointError
from skyreels_v3.hunyuan.checkpoint import (
    load_clip,
    load_llama,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.tasks import task_spec
from tests import toys

TRANSFORMER = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toys.write(folder, task_spec("i2v"))
    return folder


@pytest.fixture
def root(toy, tmp_path):
    """A copy that tests may damage."""
    return shutil.copytree(toy, tmp_path / "copy")


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(model, stock):
    ours, theirs = dict(model.named_parameters()), dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in stock.named_buffers()}
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, atol=0, rtol=0)


def test_it_is_what_the_stock_libraries_load(toy):
    transformer = load_transformer(toy, torch.float32)
    assert isinstance(transformer, HunyuanTransformer3DModel)
    assert transformer.config.in_channels == 32
    assert_same(transformer, HunyuanVideoTransformer3DModel.from_pretrained(toy))
    assert_same(load_vae(toy, torch.float32).module, AutoencoderKLHunyuanVideo.from_pretrained(toy / "vae"))
    assert_same(load_llama(toy / "text_encoder", torch.float32), LlamaModel.from_pretrained(toy / "text_encoder"))
    assert_same(load_clip(toy / "text_encoder_2", torch.float32), CLIPTextModel.from_pretrained(toy / "text_encoder_2"))
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(toy / "scheduler").config.shift == 7.0


def test_dtypes(toy):
    """The Llama's rotary frequencies are always float32."""
    llama = load_llama(toy / "text_encoder", torch.bfloat16)
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in llama.buffers()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clips_names(root, toy, prefix):
    """With and without the `text_model.` prefix, with a projection and the position ids that older files contain."""
    positions = {f"{prefix}embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.ones(4, 4)}
    file = root / "text_encoder_2" / "model.safetensors"
    named = {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(named | positions, file)
    assert_same(
        load_clip(root / "text_encoder_2", torch.float32), CLIPTextModel.from_pretrained(toy / "text_encoder_2")
    )


def test_llamas_names(root, toy):
    """As part of a causal language model, in shards."""
    file = root / "text_encoder" / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    tensors |= {"lm_head.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    file.unlink()
    names = [*tensors]
    shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, file.parent / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_llama(root / "text_encoder", torch.float32), LlamaModel.from_pretrained(toy / "text_encoder"))


LOADERS = {
    ".": load_transformer,
    "vae": lambda folder, dtype: load_vae(folder.parent, dtype),
    "text_encoder": load_llama,
    "text_encoder_2": load_clip,
}


@pytest.mark.parametrize(
    ("folder", "entry", "message"),
    [
        (".", {"more": 1}, "unknown entries more"),
        (".", {"image_condition_type": "token_replace"}, "image_condition_type = token_replace is not supported"),
        (".", {"attention_head_dim": 10**12}, "attention_head_dim = 1000000000000 is more than"),
        (".", {"patch_size": 4}, "patch_size = 4 is not supported, only 2"),
        ("vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio = 8 is not supported, only 4"),
        ("vae", {"scaling_factor": None}, "scaling_factor = None is not a positive number"),
        ("vae", {"block_out_channels": [8, 8, 8, 10**6]}, "block_out_channels = 1000000 is more than"),
        ("vae", {"norm_num_groups": 3}, "no model can be made with the sizes in its config"),
        ("text_encoder", {"num_attention_heads": "many"}, "num_attention_heads = many is not a size"),
        ("text_encoder", {"model_type": "mistral"}, "model_type = mistral is not supported, only llama"),
        ("text_encoder", {"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported"),
        ("text_encoder_2", {"hidden_size": -1}, "hidden_size = -1 is not a size"),
        ("text_encoder_2", {"max_position_embeddings": 10**15}, "wrong shapes embeddings.position_embedding.weight"),
    ],
)
def test_configs_that_are_refused(root, folder, entry, message):
    change_config(root / folder / "config.json", **entry)
    with pytest.raises(CheckpointError, match=message) as caught:
        LOADERS[folder](root / folder, torch.float32)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_tokenizers_that_cannot_be_read(root, folder):
    for file in (root / folder).iterdir():
        file.write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer in .*{folder} cannot be read"):
        load_text_encoder(root, torch.float32)


@pytest.mark.parametrize(
    ("stored", "wanted", "loaded"),
    [
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_llama_stays_in_its_own_half_precision(tmp_path, stored, wanted, loaded):
    toys.write(tmp_path, task_spec("t2v"))
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    module = load_llama(tmp_path / "text_encoder", wanted)
    assert {parameter.dtype for parameter in module.parameters()} == {loaded}
