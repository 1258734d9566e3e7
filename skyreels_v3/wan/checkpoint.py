"""Loads V3's components, in both published layouts. For `values`, see `read_tensors`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from skyreels_v3.checkpoints import load
from skyreels_v3.checkpoints.files import read_json
from skyreels_v3.checkpoints.key_maps import IDENTITY
from skyreels_v3.checkpoints.load import OWN_CONFIG, Weights, load_model, read_config, read_tensors, shape_of
from skyreels_v3.errors import CheckpointError
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.conditioning import AudioEncoder, ImageEncoder, TextEncoder
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from skyreels_v3.wan.vae import VideoVAE

CLIP_HEADS = 16  # ViT-H/14


def load_transformer(
    folder: Path, dtype: torch.dtype, values: bool = True, file: Path | None = None
) -> SkyReelsTransformer3DModel:
    """The transformer in `folder`, with the weights from `file` if given.

    Config and state dict may each have diffusers' names or Wan-native ones.
    """
    model, source = SkyReelsTransformer3DModel, file or folder
    tensors = read_tensors(source, values)
    native = "head.modulation" in tensors
    if "num_attention_heads" in read_json(folder / "config.json"):
        arguments = read_config(folder, tensors, key_maps.CONSTANTS, model._get_init_keys(model))
    else:
        arguments = native_arguments(folder, tensors, source)
    for key, tensor in tensors.items():
        if key.endswith("modulation") and tensor.ndim == 2 and isinstance(tensor, Tensor):
            tensors[key] = tensor[None]  # some GGUF writers drop axes of size 1
    key_map = key_maps.NATIVE_TRANSFORMER if native else IDENTITY
    float32_names = model._keep_in_fp32_modules
    return load_model(lambda: model(**arguments), tensors, source, dtype, key_map, float32_names)


def native_arguments(folder: Path, tensors: Weights, source: Path) -> dict[str, float]:
    """The transformer's arguments, from a Wan-native config and, for those it lacks, from tensor shapes."""
    names = {*key_maps.NATIVE_SIZES, "eps", "text_dim", "model_type"}
    config = read_config(folder, tensors, key_maps.NATIVE_CONSTANTS, names)
    arguments = key_maps.config_sizes(folder) | {"eps": config.get("eps", 1e-6)}
    arguments["text_dim"] = shape_of("text_embedding.0.weight", 2, tensors, source)[1]
    if "img_emb.proj.1.weight" in tensors:
        arguments["image_dim"] = shape_of("img_emb.proj.1.weight", 2, tensors, source)[1]
    if "audio_window" in arguments:
        width = shape_of("audio_proj.proj1.weight", 2, tensors, source)[1]
        arguments["audio_features"] = width // arguments["audio_window"]
    return arguments


def load_vae(root: Path, dtype: torch.dtype, values: bool = True, file: Path | None = None) -> VideoVAE:
    """The VAE of the checkpoint at `root`, with the weights from `file` if given."""
    native_file, folder = root / key_maps.NATIVE_VAE_FILE, root / "vae"
    source = file or (native_file if native_file.is_file() else folder)
    tensors = read_tensors(source, values)
    native = "decoder.head.0.gamma" in tensors or not folder.is_dir()
    key_map = key_maps.NATIVE_VAE if native else IDENTITY
    if native:
        arguments = {
            "base_dim": shape_of("encoder.conv1.weight", 5, tensors, source)[0],
            "decoder_base_dim": shape_of("decoder.head.0.gamma", 4, tensors, source)[0],
            "z_dim": shape_of("conv2.weight", 5, tensors, source)[0],
        }
    else:
        names = AutoencoderKLWan._get_init_keys(AutoencoderKLWan)
        arguments = read_config(folder, tensors, key_maps.VAE_CONSTANTS, names)
    module = load_model(lambda: AutoencoderKLWan(**arguments), tensors, source, dtype, key_map)
    for name in ("latents_mean", "latents_std"):
        numbers = module.config[name]
        if len(numbers) != module.config.z_dim or not all(isinstance(number, int | float) for number in numbers):
            reason = f"{source}/config.json: {name} = {numbers} is not {module.config.z_dim} numbers"
            raise CheckpointError(f"{reason}; {OWN_CONFIG}")
    return VideoVAE(module)


def load_text_encoder(root: Path, dtype: torch.dtype, values: bool = True, file: Path | None = None) -> TextEncoder:
    """The UMT5 text encoder and tokenizer of the checkpoint at `root`, with the weights from `file` if given."""
    native_file, folder = root / key_maps.NATIVE_TEXT_ENCODER_FILE, root / "text_encoder"
    source = file or (native_file if native_file.is_file() else folder)
    tensors = read_tensors(source, values)
    native = "token_embedding.weight" in tensors or source == native_file
    key_map = key_maps.NATIVE_TEXT_ENCODER if native else key_maps.TRANSFORMERS_TEXT_ENCODER
    if native or not folder.is_dir():
        sizes = text_sizes(tensors, source, key_maps.NATIVE_TEXT_SIZES if native else key_maps.TRANSFORMERS_TEXT_SIZES)
    else:
        sizes = read_config(folder, tensors, {"model_type": "umt5"})
    model, config = transformers.UMT5EncoderModel, transformers.UMT5Config
    module = load_model(lambda: model(config(**sizes)), tensors, source, dtype, key_map, blocks=text_layers)
    tokenizer = root / key_maps.NATIVE_TOKENIZER
    tokenizer = tokenizer if tokenizer.is_dir() else root / "tokenizer"
    return TextEncoder(module, load.load_tokenizer(tokenizer, transformers.AutoTokenizer))


def text_layers(model: Any) -> Iterator[nn.Module]:
    """The linear layers of UMT5's blocks that may stay quantized: not `wo`, whose dtype transformers reads."""
    for block in model.encoder.block:
        yield from (part for name, part in block.named_modules() if isinstance(part, nn.Linear) and "wo" not in name)


def text_sizes(tensors: Weights, source: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """The config of a UMT5 encoder, from the shapes of the tensors that `names` lists."""
    vocabulary, width = shape_of(names["embedding"], 2, tensors, source)
    buckets, heads = shape_of(names["positions"], 2, tensors, source)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(names["query"], 2, tensors, source)[0] // heads,
        "d_ff": shape_of(names["hidden"], 2, tensors, source)[0],
        "num_layers": sum(key.endswith(".".join(names["query"].split(".")[-3:])) for key in tensors),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def load_image_encoder(root: Path, dtype: torch.dtype, values: bool = True, heads: int = CLIP_HEADS) -> ImageEncoder:
    """The CLIP image encoder of the checkpoint at `root`, whose file does not have the number of heads."""
    source = root / key_maps.NATIVE_IMAGE_ENCODER_FILE
    tensors = read_tensors(source, values)
    patch = shape_of("visual.patch_embedding.weight", 4, tensors, source)[-1]
    positions = shape_of("visual.pos_embedding", 3, tensors, source)[1]
    config = transformers.CLIPVisionConfig(
        hidden_size=shape_of("visual.cls_embedding", 3, tensors, source)[2],
        intermediate_size=shape_of("visual.transformer.0.mlp.0.weight", 2, tensors, source)[0],
        num_hidden_layers=sum(key.endswith("attn.to_qkv.weight") for key in tensors),
        num_attention_heads=heads,
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    # class and position embeddings have leading axes of size 1 in the file
    for key, axes in (("visual.cls_embedding", 1), ("visual.pos_embedding", 2)):
        tensors[key] = cast(Tensor, tensors[key]).reshape(tensors[key].shape[-axes:])
    buffers = {"embeddings.position_ids": torch.arange(positions)[None]}
    key_map = key_maps.NATIVE_IMAGE_ENCODER
    module = load_model(lambda: transformers.CLIPVisionModel(config), tensors, source, dtype, key_map, buffers=buffers)
    return ImageEncoder(module)


def load_audio_encoder(root: Path, dtype: torch.dtype, values: bool = True) -> AudioEncoder:
    """The wav2vec2 audio encoder of the checkpoint at `root`."""
    source = root / key_maps.AUDIO_ENCODER
    tensors = read_tensors(source, values)
    sizes = read_config(source, tensors, {"model_type": "wav2vec2"})
    model, config = transformers.Wav2Vec2Model, transformers.Wav2Vec2Config
    key_map = key_maps.TRANSFORMERS_AUDIO_ENCODER
    return AudioEncoder(load_model(lambda: model(config(**sizes)), tensors, source, dtype, key_map))
