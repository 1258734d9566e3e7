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
from skyreels_v3.checkpoints.hub import (
    NATIVE_IMAGE_ENCODER_FILE,
    NATIVE_TEXT_ENCODER_FILE,
    NATIVE_TOKENIZER,
    NATIVE_VAE_FILE,
    audio_weights,
    transformer_config,
)
from skyreels_v3.checkpoints.load import load_model, read_config, read_tensors
from skyreels_v3.errors import CheckpointError
from skyreels_v3.memory.quantize import SCALE, with_fp8_layers
from skyreels_v3.models.audio_encoder import AudioEncoder
from skyreels_v3.models.image_encoder import ImageEncoder
from skyreels_v3.models.text_encoder import TextEncoder
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.models.vae import VideoVAE

CLIP_HEADS = 16  # ViT-H/14


def load_transformer(folder: Path, dtype: torch.dtype, values: bool = True) -> SkyReelsTransformer3DModel:
    """The transformer in `folder` (config.json and safetensors), under diffusers' names or Wan-native ones.

    `values`: see `load.read_tensors`.
    """
    config = read_config(folder / "config.json")
    tensors = read_tensors(folder, values)
    native = "num_heads" in config
    if native:
        arguments = native_arguments(config, tensors, folder)
    else:
        arguments = known_arguments(SkyReelsTransformer3DModel, config, key_maps.DIFFUSERS_CONSTANTS, folder)
    key_map = key_maps.NATIVE_TRANSFORMER if native else key_maps.IDENTITY
    float32_names = [*SkyReelsTransformer3DModel._keep_in_fp32_modules, SCALE]

    def build() -> SkyReelsTransformer3DModel:
        return cast(SkyReelsTransformer3DModel, with_fp8_layers(SkyReelsTransformer3DModel(**arguments), tensors))

    model = load_model(build, tensors, folder, dtype, key_map, float32_names)
    return cast(SkyReelsTransformer3DModel, model)


def known_arguments(
    model: Any, config: Mapping[str, Any], constants: Mapping[str, object], folder: Path
) -> dict[str, Any]:
    """Arguments of a diffusers model from its config; knobs that are not turned, and unknown ones, are refused by name.

    Args:
        constants: the only values that some knobs may have; they are no arguments.
    """
    check_constants(config, constants, folder)
    arguments = {key: value for key, value in config.items() if key not in constants}
    refuse_unknown(arguments.keys() - model._get_init_keys(model), folder)
    return arguments


def native_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Arguments of our transformer from a Wan-native config and the shapes of the tensors it leaves out."""
    check_constants(config, key_maps.NATIVE_CONSTANTS, folder)
    refuse_unknown(config.keys() - key_maps.NATIVE_CONFIG.keys() - key_maps.NATIVE_CONSTANTS.keys(), folder)
    arguments = {ours: config[theirs] for theirs, ours in key_maps.NATIVE_CONFIG.items() if ours and theirs in config}
    arguments |= transformer_config(folder, arguments.keys() - {"eps"})
    arguments["text_dim"] = shape_of("text_embedding.0.weight", 2, tensors, folder)[1]
    if "img_emb.proj.1.weight" in tensors:
        arguments["image_dim"] = shape_of("img_emb.proj.1.weight", 2, tensors, folder)[1]
    if "audio_window" in config:
        width = shape_of("audio_proj.proj1.weight", 2, tensors, folder)[1]
        arguments["audio_features"] = width // config["audio_window"]
    return arguments


def shape_of(key: str, axes: int, tensors: Mapping[str, Tensor], source: Path) -> torch.Size:
    """The shape of a tensor that a model's sizes are read from."""
    if key not in tensors:
        raise CheckpointError(f"{source} lacks {key}, which the model's sizes are read from; download it again")
    shape = tensors[key].shape
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{source}: wrong shape {key} ({list(shape)}); download it again")
    return shape


def check_constants(config: Mapping[str, Any], constants: Mapping[str, object], folder: Path) -> None:
    """Raise CheckpointError when a config turns a knob that the code does not have."""
    for key in config.keys() & constants.keys():
        if config[key] != constants[key]:
            raise CheckpointError(
                f"{folder}/config.json: {key} = {config[key]} is not supported, only {constants[key]}"
            )


def refuse_unknown(keys: set[str], folder: Path) -> None:
    """Raise CheckpointError when there are entries that nothing is known of."""
    if keys:
        raise CheckpointError(f"{folder}/config.json: unknown entries {', '.join(sorted(keys))}")


def load_vae(root: Path, layout: str, dtype: torch.dtype, values: bool = True) -> VideoVAE:
    """The VAE of the checkpoint at `root`; `values`: see `load.read_tensors`."""
    if layout == "diffusers":
        source, key_map = root / "vae", key_maps.IDENTITY
        tensors = read_tensors(source, values)
        arguments = known_arguments(AutoencoderKLWan, read_config(source / "config.json"), {}, source)
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
        tensors, sizes = read_tensors(source), read_config(source / "config.json")
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
    sizes = read_config(source.parent / "config.json")

    def build() -> Wav2Vec2Model:
        return Wav2Vec2Model(Wav2Vec2Config(**sizes))

    module = load_model(build, read_tensors(source), source, dtype, key_maps.TRANSFORMERS_AUDIO_ENCODER)
    return AudioEncoder(cast(Wav2Vec2Model, module))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error
