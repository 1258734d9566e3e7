"""The published layout of SkyReels V1: which folders hold which component, under diffusers' and transformers' names.

The transformer is in a folder of its own, the rest in that of HunyuanVideo: `text_encoder` and `tokenizer` (Llama),
`text_encoder_2` and `tokenizer_2` (CLIP), `vae`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skyreels_v3.checkpoints.contents import hunyuan_arguments, known_arguments, read_config, sizes_of, without_prefix
from skyreels_v3.checkpoints.key_maps import CLIP, HUNYUAN_VAE_CONSTANTS, LLAMA
from skyreels_v3.checkpoints.load import load_model, read_tensors
from skyreels_v3.hunyuan.text_encoder import HunyuanTextEncoder
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.hunyuan.vae import HunyuanVAE
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.memory.quantize import with_fp8_layers
from skyreels_v3.wan.checkpoint import load_tokenizer


def load_hunyuan_transformer(folder: Path, dtype: torch.dtype, values: bool = True) -> HunyuanTransformer3DModel:
    """The transformer in `folder` (config.json and safetensors); `values`: see `load.read_tensors`."""
    tensors = without_prefix(read_tensors(folder, values))
    arguments = hunyuan_arguments(read_config(folder / "config.json"), tensors, folder)

    def build() -> nn.Module:
        return with_fp8_layers(HunyuanTransformer3DModel(**arguments), tensors)

    return cast(HunyuanTransformer3DModel, load_model(build, tensors, folder, dtype, float32_names=[SCALE]))


def load_hunyuan_vae(base: Path, dtype: torch.dtype, values: bool = True) -> HunyuanVAE:
    """The VAE in the folder `base` of HunyuanVideo; `values`: see `load.read_tensors`."""
    source = base / "vae"
    tensors, names = read_tensors(source, values), AutoencoderKLHunyuanVideo._get_init_keys(AutoencoderKLHunyuanVideo)
    arguments = known_arguments(names, sizes_of(source, tensors), HUNYUAN_VAE_CONSTANTS, source / "config.json")
    module = load_model(lambda: AutoencoderKLHunyuanVideo(**arguments), tensors, source, dtype)
    return HunyuanVAE(cast(AutoencoderKLHunyuanVideo, module))


def load_hunyuan_text_encoder(base: Path, dtype: torch.dtype) -> HunyuanTextEncoder:
    """Llama and CLIP with their tokenizers, in the folder `base` of HunyuanVideo."""
    llama, clip = load_llama(base / "text_encoder", dtype), load_clip(base / "text_encoder_2", dtype)
    return HunyuanTextEncoder(
        llama, load_llama_tokenizer(base / "tokenizer"), clip, load_tokenizer(base / "tokenizer_2")
    )


def load_llama(folder: Path, dtype: torch.dtype) -> LlamaModel:
    """The Llama in `folder`, without what would predict the next token."""
    tensors = read_tensors(folder)
    sizes = sizes_of(folder, tensors, "llama") | {"use_cache": False}
    rotary: dict[str, Tensor] = {}

    def build() -> LlamaModel:
        config = LlamaConfig(**sizes)
        with torch.device("cpu"):
            rotary.update(LlamaRotaryEmbedding(config).named_buffers(prefix="rotary_emb"))
        return LlamaModel(config)

    module = load_model(build, tensors, folder, half_as_stored(tensors, dtype), LLAMA, buffers=rotary)
    return cast(LlamaModel, module)


def half_as_stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float16 in the place of bfloat16 for weights that are stored so.

    They are then views of the file. Converted, the published 15 GB would be read and copied even where the prompt has
    been encoded by an earlier run.
    """
    stored = {tensor.dtype for tensor in tensors.values()}
    return torch.float16 if dtype is torch.bfloat16 and stored == {torch.float16} else dtype


def load_clip(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """The CLIP text encoder in `folder`."""
    tensors = read_tensors(folder)
    sizes = sizes_of(folder, tensors, "clip_text_model")
    longest = max(axis for tensor in tensors.values() for axis in (0, *tensor.shape))
    positions: dict[str, Tensor] = {}

    def build() -> CLIPTextModel:
        config = CLIPTextConfig(**sizes)
        with torch.device("cpu"):
            count = min(config.max_position_embeddings, longest)  # more would not fit the weights
            positions["embeddings.position_ids"] = torch.arange(count)[None]
        return CLIPTextModel(config)

    return cast(CLIPTextModel, load_model(build, tensors, folder, dtype, CLIP, buffers=positions))


def load_llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The Llama's tokenizer in `folder`, as its file says it is.

    It is a Llama 3's, of bytes, while its config names the class of Llama 2's. transformers 5 believes the name and
    puts that one's rules in the place of the file's: most prompts would get other tokens.
    """
    return cast(PreTrainedTokenizerFast, load_tokenizer(folder, PreTrainedTokenizerFast))
