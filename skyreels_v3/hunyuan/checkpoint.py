"""Loads V1's components into diffusers' and transformers' models. For `values`, see `read_tensors`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skyreels_v3.checkpoints.key_maps import IDENTITY
from skyreels_v3.checkpoints.load import config_errors, load_model, load_tokenizer, read_config, read_tensors
from skyreels_v3.hunyuan import key_maps
from skyreels_v3.hunyuan.conditioning import HunyuanTextEncoder
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.hunyuan.vae import HunyuanVAE
from skyreels_v3.memory.quantize import Packed


def load_transformer(
    folder: Path, dtype: torch.dtype, values: bool = True, file: Path | None = None
) -> HunyuanTransformer3DModel:
    """The transformer in `folder`, with the weights from `file` if given.

    The state dict may have diffusers' names, HunyuanVideo's own or ComfyUI's.
    """
    model, source = HunyuanTransformer3DModel, file or folder
    tensors = read_tensors(source, values)
    arguments = read_config(folder, tensors, key_maps.TRANSFORMER_CONSTANTS, model._get_init_keys(model))
    key_map = IDENTITY
    if any(key.startswith("double_blocks.") for key in tensors):
        key_map = key_maps.NATIVE_CHECKPOINT
        # ComfyUI calls the weight of a norm `scale`
        tensors = {re.sub(r"(?<=_norm\.)scale$", "weight", key): weight for key, weight in tensors.items()}
        for key in key_maps.SWAPPED & tensors.keys():
            weight = tensors[key]
            whole = weight.dequantized(dtype) if isinstance(weight, Packed) else weight
            tensors[key] = whole.roll(len(whole) // 2, 0)
    return load_model(lambda: model(**arguments), tensors, source, dtype, key_map)


def load_vae(base: Path, dtype: torch.dtype, values: bool = True) -> HunyuanVAE:
    """The VAE in the folder `base` of HunyuanVideo."""
    tensors, model = read_tensors(base / "vae", values), AutoencoderKLHunyuanVideo
    arguments = read_config(base / "vae", tensors, key_maps.VAE_CONSTANTS, model._get_init_keys(model))
    return HunyuanVAE(load_model(lambda: model(**arguments), tensors, base / "vae", dtype))


def load_text_encoder(base: Path, dtype: torch.dtype, values: bool = True) -> HunyuanTextEncoder:
    """Llama and CLIP with their tokenizers, in the folder `base` of HunyuanVideo."""
    llama = load_llama(base / "text_encoder", dtype, values)
    clip = load_clip(base / "text_encoder_2", dtype, values)
    clip_tokenizer = load_tokenizer(base / "tokenizer_2", transformers.AutoTokenizer)
    return HunyuanTextEncoder(llama, load_llama_tokenizer(base / "tokenizer"), clip, clip_tokenizer)


def load_llama(folder: Path, dtype: torch.dtype, values: bool = True) -> transformers.LlamaModel:
    """The Llama model in `folder`, without its head.

    Float16 weights stay float16 if bfloat16 is requested, as views of the file: casting would read and copy the
    published 15 GB even if an earlier run has encoded the prompt.
    """
    tensors = read_tensors(folder, values)
    sizes = read_config(folder, tensors, {"model_type": "llama"}) | {"use_cache": False}
    if dtype is torch.bfloat16 and {tensor.dtype for tensor in tensors.values()} == {torch.float16}:
        dtype = torch.float16
    with config_errors(folder):
        config = transformers.LlamaConfig(**sizes)
        buffers = dict(LlamaRotaryEmbedding(config).named_buffers(prefix="rotary_emb"))
    return load_model(lambda: transformers.LlamaModel(config), tensors, folder, dtype, key_maps.LLAMA, buffers=buffers)


def load_clip(folder: Path, dtype: torch.dtype, values: bool = True) -> transformers.CLIPTextModel:
    """The CLIP text encoder in `folder`."""
    tensors = read_tensors(folder, values)
    sizes = read_config(folder, tensors, {"model_type": "clip_text_model"})
    with config_errors(folder):
        config = transformers.CLIPTextConfig(**sizes)
    longest = max(axis for tensor in tensors.values() for axis in (0, *tensor.shape))
    count = min(config.max_position_embeddings, longest)  # more would not fit the weights
    buffers: dict[str, Tensor] = {"embeddings.position_ids": torch.arange(count)[None]}
    model = transformers.CLIPTextModel
    return load_model(lambda: model(config), tensors, folder, dtype, key_maps.CLIP, buffers=buffers)


def load_llama_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """The Llama tokenizer in `folder`, exactly as its file defines it.

    It is Llama 3's byte-level tokenizer, but its config names Llama 2's tokenizer class. transformers 5 would use that
    class and override the file's rules: most prompts would be tokenized differently.
    """
    return load_tokenizer(folder, transformers.PreTrainedTokenizerFast)
