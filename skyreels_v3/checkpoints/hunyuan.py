"""The published layout of SkyReels V1: which folders hold which component, under diffusers' and transformers' names.

The transformer is in a folder of its own, the rest in that of HunyuanVideo: `text_encoder` and `tokenizer` (Llama),
`text_encoder_2` and `tokenizer_2` (CLIP), `vae`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap
from skyreels_v3.checkpoints.load import load_model, read_config, read_tensors
from skyreels_v3.checkpoints.published import known_arguments, load_tokenizer
from skyreels_v3.errors import CheckpointError
from skyreels_v3.memory.quantize import SCALE, with_fp8_layers
from skyreels_v3.models.hunyuan.text_encoder import HunyuanTextEncoder
from skyreels_v3.models.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.models.hunyuan.vae import HunyuanVAE

# A Llama or a CLIP may be stored alone, or as a part of the model that it was trained in, with that one's head.
LLAMA: KeyMap = (
    (r"lm_head\..+", None),
    (r"(?:.+\.)?rotary_emb\.inv_freq", None),
    (r"model\.(.+)", r"\1"),
    *IDENTITY,
)
CLIP: KeyMap = (
    (r"text_projection\..+", None),
    (r"(?:text_model\.)?embeddings\.position_ids", None),
    (r"text_model\.(.+)", r"\1"),
    *IDENTITY,
)

# Knobs that the code does not turn: any other value is refused by name.
TRANSFORMER_CONSTANTS: dict[str, object] = {"image_condition_type": None}
VAE_CONSTANTS: dict[str, object] = {
    "latent_channels": 16,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}


def load_hunyuan_transformer(folder: Path, dtype: torch.dtype, values: bool = True) -> HunyuanTransformer3DModel:
    """The transformer in `folder` (config.json and safetensors); `values`: see `load.read_tensors`."""
    tensors = read_tensors(folder, values)
    config = read_config(folder / "config.json")
    arguments = known_arguments(HunyuanVideoTransformer3DModel, config, TRANSFORMER_CONSTANTS, folder)

    def build() -> nn.Module:
        return with_fp8_layers(HunyuanTransformer3DModel(**arguments), tensors)

    return cast(HunyuanTransformer3DModel, load_model(build, tensors, folder, dtype, float32_names=[SCALE]))


def load_hunyuan_vae(base: Path, dtype: torch.dtype, values: bool = True) -> HunyuanVAE:
    """The VAE in the folder `base` of HunyuanVideo; `values`: see `load.read_tensors`."""
    source = base / "vae"
    tensors, config = read_tensors(source, values), read_config(source / "config.json")
    arguments = known_arguments(AutoencoderKLHunyuanVideo, config, VAE_CONSTANTS, source)
    module = load_model(lambda: AutoencoderKLHunyuanVideo(**arguments), tensors, source, dtype)
    factor = cast(AutoencoderKLHunyuanVideo, module).config.scaling_factor
    if not isinstance(factor, int | float) or not factor > 0:
        raise CheckpointError(f"{source}/config.json: scaling_factor = {factor} is no positive number")
    return HunyuanVAE(cast(AutoencoderKLHunyuanVideo, module))


def load_hunyuan_text_encoder(base: Path, dtype: torch.dtype) -> HunyuanTextEncoder:
    """Llama and CLIP with their tokenizers, in the folder `base` of HunyuanVideo."""
    llama, clip = load_llama(base / "text_encoder", dtype), load_clip(base / "text_encoder_2", dtype)
    return HunyuanTextEncoder(
        llama, load_llama_tokenizer(base / "tokenizer"), clip, load_tokenizer(base / "tokenizer_2")
    )


def load_llama(folder: Path, dtype: torch.dtype) -> LlamaModel:
    """The Llama in `folder`, without what would predict the next token."""
    sizes = read_config(folder / "config.json") | {"use_cache": False}
    rotary: dict[str, Tensor] = {}

    def build() -> LlamaModel:
        config = LlamaConfig(**sizes)
        with torch.device("cpu"):
            rotary.update(LlamaRotaryEmbedding(config).named_buffers(prefix="rotary_emb"))
        return LlamaModel(config)

    tensors = read_tensors(folder)
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
    sizes = read_config(folder / "config.json")
    positions: dict[str, Tensor] = {}

    def build() -> CLIPTextModel:
        config = CLIPTextConfig(**sizes)
        with torch.device("cpu"):
            positions["embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
        return CLIPTextModel(config)

    return cast(CLIPTextModel, load_model(build, read_tensors(folder), folder, dtype, CLIP, buffers=positions))


def load_llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The Llama's tokenizer in `folder`, as its file says it is.

    It is a Llama 3's, of bytes, while its config names the class of Llama 2's. transformers 5 believes the name and
    puts that one's rules in the place of the file's: most prompts would get other tokens.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error
