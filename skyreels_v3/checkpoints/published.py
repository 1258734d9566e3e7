"""The published layouts: which files hold which component, and what sizes it has.

`diffusers` (reference to video): a folder for each component, sizes in config.json. `native` (Wan-native: extension and
avatar): the transformer under its native names and two .pth files, whose sizes only their tensors tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from skyreels_v3.checkpoints import key_maps
from skyreels_v3.checkpoints.hub import NATIVE_TEXT_ENCODER_FILE, NATIVE_TOKENIZER, NATIVE_VAE_FILE
from skyreels_v3.checkpoints.load import load_model, read_config, read_tensors, rename
from skyreels_v3.errors import CheckpointError
from skyreels_v3.models.text_encoder import TextEncoder
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.models.vae import VideoVAE


def load_transformer(folder: Path, layout: str, dtype: torch.dtype) -> SkyReelsTransformer3DModel:
    """The transformer in `folder` (config.json and safetensors)."""
    config = read_config(folder / "config.json")
    tensors = read_tensors(folder)
    if layout == "diffusers":
        arguments = diffusers_arguments(config, folder)
    else:
        arguments = native_arguments(config, tensors, folder)
        tensors = rename(tensors, key_maps.NATIVE_TRANSFORMER, folder)
    float32_names = SkyReelsTransformer3DModel._keep_in_fp32_modules
    model = load_model(lambda: SkyReelsTransformer3DModel(**arguments), tensors, folder, dtype, float32_names)
    return cast(SkyReelsTransformer3DModel, model)


def diffusers_arguments(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of our transformer from a diffusers config; knobs we do not have are refused by name."""
    check_constants(config, key_maps.DIFFUSERS_CONSTANTS, folder)
    arguments = {key: value for key, value in config.items() if key not in key_maps.DIFFUSERS_CONSTANTS}
    known = SkyReelsTransformer3DModel._get_init_keys(SkyReelsTransformer3DModel)
    refuse_unknown(arguments.keys() - known, folder)
    return arguments


def native_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Arguments of our transformer from a Wan-native config and the shapes of the tensors it leaves out."""
    check_constants(config, key_maps.NATIVE_CONSTANTS, folder)
    refuse_unknown(config.keys() - key_maps.NATIVE_CONFIG.keys() - key_maps.NATIVE_CONSTANTS.keys(), folder)
    try:
        arguments = {
            ours: config[theirs] for theirs, ours in key_maps.NATIVE_CONFIG.items() if ours and theirs in config
        }
        arguments["attention_head_dim"] = config["dim"] // config["num_heads"]
        arguments["text_dim"] = tensors["text_embedding.0.weight"].shape[1]
        if "img_emb.proj.1.weight" in tensors:
            arguments["image_dim"] = tensors["img_emb.proj.1.weight"].shape[1]
        if "audio_window" in config:
            arguments["audio_features"] = tensors["audio_proj.proj1.weight"].shape[1] // config["audio_window"]
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks {error}, which the model's sizes are read from") from error
    return arguments


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


def load_vae(root: Path, layout: str, dtype: torch.dtype) -> VideoVAE:
    """The VAE of the checkpoint at `root`."""
    if layout == "diffusers":
        source = root / "vae"
        tensors, arguments = read_tensors(source), read_config(source / "config.json")
    else:
        source = root / NATIVE_VAE_FILE
        tensors = rename(read_tensors(source), key_maps.NATIVE_VAE, source)
        arguments = native_vae_arguments(tensors, source)
    return VideoVAE(cast(AutoencoderKLWan, load_model(lambda: AutoencoderKLWan(**arguments), tensors, source, dtype)))


def native_vae_arguments(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Sizes of a VAE from its tensors (under diffusers' names)."""
    try:
        return {
            "base_dim": tensors["encoder.conv_in.weight"].shape[0],
            "decoder_base_dim": tensors["decoder.norm_out.gamma"].shape[0],
            "z_dim": tensors["post_quant_conv.weight"].shape[0],
        }
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}, which the model's sizes are read from") from error


def load_text_encoder(root: Path, layout: str, dtype: torch.dtype) -> TextEncoder:
    """The UMT5 text encoder of the checkpoint at `root`, with its tokenizer."""
    if layout == "diffusers":
        source, tokenizer = root / "text_encoder", root / "tokenizer"
        tensors = rename(read_tensors(source), key_maps.TRANSFORMERS_TEXT_ENCODER, source)
        config = UMT5Config(**read_config(source / "config.json"))
    else:
        source, tokenizer = root / NATIVE_TEXT_ENCODER_FILE, root / NATIVE_TOKENIZER
        tensors = rename(read_tensors(source), key_maps.NATIVE_TEXT_ENCODER, source)
        config = native_text_config(tensors, source)
    module = load_model(lambda: UMT5EncoderModel(config), tensors, source, dtype)
    return TextEncoder(cast(UMT5EncoderModel, module), load_tokenizer(tokenizer))


def native_text_config(tensors: Mapping[str, Tensor], source: Path) -> UMT5Config:
    """Sizes of a UMT5 encoder from its tensors; the heads from its position table."""
    first = "encoder.block.0.layer."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[first + "0.SelfAttention.relative_attention_bias.weight"].shape
        return UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=tensors[first + "0.SelfAttention.q.weight"].shape[0] // heads,
            d_ff=tensors[first + "1.DenseReluDense.wi_0.weight"].shape[0],
            num_layers=sum(key.endswith("SelfAttention.q.weight") for key in tensors),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}, which the model's sizes are read from") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error
