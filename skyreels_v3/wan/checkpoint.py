"""The published layouts: which files hold which component, and what sizes it has.

`diffusers` (reference to video): a folder for each component, sizes in config.json. `native` (Wan-native: extension and
avatar): the transformer under its native names and two .pth files, whose sizes only their tensors tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from skyreels_v3.checkpoints import key_maps
from skyreels_v3.checkpoints.contents import (
    known_arguments,
    read_config,
    shape_of,
    sizes_of,
    wan_arguments,
    wan_key_map,
    without_prefix,
)
from skyreels_v3.checkpoints.hub import (
    NATIVE_IMAGE_ENCODER_FILE,
    NATIVE_TEXT_ENCODER_FILE,
    NATIVE_TOKENIZER,
    NATIVE_VAE_FILE,
    audio_weights,
)
from skyreels_v3.checkpoints.load import load_model, read_tensors
from skyreels_v3.errors import CheckpointError
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.memory.quantize import with_fp8_layers
from skyreels_v3.wan.audio_encoder import AudioEncoder
from skyreels_v3.wan.image_encoder import ImageEncoder
from skyreels_v3.wan.text_encoder import TextEncoder
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from skyreels_v3.wan.vae import VideoVAE

CLIP_HEADS = 16  # ViT-H/14


def load_transformer(folder: Path, dtype: torch.dtype, values: bool = True) -> SkyReelsTransformer3DModel:
    """The transformer in `folder` (config.json and safetensors), under diffusers' names or Wan-native ones.

    `values`: see `load.read_tensors`.
    """
    tensors = without_prefix(read_tensors(folder, values))
    arguments = wan_arguments(read_config(folder / "config.json"), tensors, folder)
    key_map = wan_key_map(tensors)
    float32_names = [*SkyReelsTransformer3DModel._keep_in_fp32_modules, SCALE]

    def build() -> SkyReelsTransformer3DModel:
        return cast(SkyReelsTransformer3DModel, with_fp8_layers(SkyReelsTransformer3DModel(**arguments), tensors))

    model = load_model(build, tensors, folder, dtype, key_map, float32_names)
    return cast(SkyReelsTransformer3DModel, model)


def load_vae(root: Path, layout: str, dtype: torch.dtype, values: bool = True) -> VideoVAE:
    """The VAE of the checkpoint at `root`; `values`: see `load.read_tensors`."""
    if layout == "diffusers":
        source, key_map = root / "vae", key_maps.IDENTITY
        tensors = read_tensors(source, values)
        names = AutoencoderKLWan._get_init_keys(AutoencoderKLWan)
        arguments = known_arguments(
            names, sizes_of(source, tensors), key_maps.WAN_VAE_CONSTANTS, source / "config.json"
        )
    else:
        source, key_map = root / NATIVE_VAE_FILE, key_maps.NATIVE_VAE
        tensors = read_tensors(source, values)
        arguments = native_vae_arguments(tensors, source)
    module = cast(AutoencoderKLWan, load_model(lambda: AutoencoderKLWan(**arguments), tensors, source, dtype, key_map))
    for name in ("latents_mean", "latents_std"):
        values = module.config[name]
        if len(values) != module.config.z_dim or not all(isinstance(value, int | float) for value in values):
            raise CheckpointError(f"{source}/config.json: {name} = {values} is not {module.config.z_dim} numbers")
    return VideoVAE(module)


def native_vae_arguments(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Sizes of a VAE from its tensors."""
    return {
        "base_dim": shape_of("encoder.conv1.weight", 5, tensors, source)[0],
        "decoder_base_dim": shape_of("decoder.head.0.gamma", 4, tensors, source)[0],
        "z_dim": shape_of("conv2.weight", 5, tensors, source)[0],
    }


def load_text_encoder(root: Path, layout: str, dtype: torch.dtype) -> TextEncoder:
    """The UMT5 text encoder of the checkpoint at `root`, with its tokenizer."""
    if layout == "diffusers":
        source, tokenizer, key_map = root / "text_encoder", root / "tokenizer", key_maps.TRANSFORMERS_TEXT_ENCODER
        tensors = read_tensors(source)
        sizes = sizes_of(source, tensors, "umt5")
    else:
        source, tokenizer = root / NATIVE_TEXT_ENCODER_FILE, root / NATIVE_TOKENIZER
        key_map, tensors = key_maps.NATIVE_TEXT_ENCODER, read_tensors(source)
        sizes = native_text_sizes(tensors, source)
    module = load_model(lambda: UMT5EncoderModel(UMT5Config(**sizes)), tensors, source, dtype, key_map)
    return TextEncoder(cast(UMT5EncoderModel, module), load_tokenizer(tokenizer))


def native_text_sizes(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Sizes of a UMT5 encoder from its tensors; the heads from its position table."""
    vocabulary, width = shape_of("token_embedding.weight", 2, tensors, source)
    buckets, heads = shape_of("blocks.0.pos_embedding.embedding.weight", 2, tensors, source)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of("blocks.0.attn.q.weight", 2, tensors, source)[0] // heads,
        "d_ff": shape_of("blocks.0.ffn.fc1.weight", 2, tensors, source)[0],
        "num_layers": sum(key.endswith("attn.q.weight") for key in tensors),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def load_image_encoder(root: Path, dtype: torch.dtype, heads: int = CLIP_HEADS) -> ImageEncoder:
    """The CLIP image encoder of the checkpoint at `root`; nothing in the file tells its heads."""
    source = root / NATIVE_IMAGE_ENCODER_FILE
    tensors = read_tensors(source)
    sizes = native_image_sizes(tensors, source) | {"num_attention_heads": heads}
    # class and position embedding have leading axes of size one there
    for key, axes in (("visual.cls_embedding", 1), ("visual.pos_embedding", 2)):
        tensors[key] = tensors[key].reshape(tensors[key].shape[-axes:])

    def build() -> CLIPVisionModel:
        return CLIPVisionModel(CLIPVisionConfig(**sizes))

    positions = {"embeddings.position_ids": torch.arange(len(tensors["visual.pos_embedding"]))[None]}
    module = load_model(build, tensors, source, dtype, key_maps.NATIVE_IMAGE_ENCODER, buffers=positions)
    return ImageEncoder(cast(CLIPVisionModel, module))


def native_image_sizes(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Sizes of a CLIP image encoder from its tensors."""
    patch = shape_of("visual.patch_embedding.weight", 4, tensors, source)
    positions = shape_of("visual.pos_embedding", 3, tensors, source)[1]
    width = shape_of("visual.cls_embedding", 3, tensors, source)[2]
    return {
        "hidden_size": width,
        "intermediate_size": shape_of("visual.transformer.0.mlp.0.weight", 2, tensors, source)[0],
        "num_hidden_layers": sum(key.endswith("attn.to_qkv.weight") for key in tensors),
        "patch_size": patch[-1],
        "image_size": math.isqrt(positions - 1) * patch[-1],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def load_audio_encoder(root: Path, dtype: torch.dtype) -> AudioEncoder:
    """The wav2vec2 audio encoder of the checkpoint at `root`."""
    source = audio_weights(root)
    tensors = read_tensors(source)
    sizes = sizes_of(source.parent, tensors, "wav2vec2")

    def build() -> Wav2Vec2Model:
        return Wav2Vec2Model(Wav2Vec2Config(**sizes))

    module = load_model(build, tensors, source, dtype, key_maps.TRANSFORMERS_AUDIO_ENCODER)
    return AudioEncoder(cast(Wav2Vec2Model, module))


def load_tokenizer(folder: Path, kind: Any = AutoTokenizer) -> Any:
    """The tokenizer in `folder`, of one of the library's classes."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error
