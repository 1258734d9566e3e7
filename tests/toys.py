"""Random checkpoints of minimal size in the published layouts; they generate noise, but fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel, UMT5Config, UMT5EncoderModel

from skyreels_v3.checkpoints import tiny
from skyreels_v3.tasks import TASK_NAMES, TaskSpec, task_spec
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from training import layouts
from training.layouts import random_model

TRANSFORMER = {
    **{"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 192, "text_dim": 32},
    **{"freq_dim": 64, "in_channels": 16, "out_channels": 16},
}
AVATAR = {
    **{"in_channels": 36, "image_dim": 32, "audio_features": 384, "audio_hidden_dim": 8, "audio_tokens": 4},
    "audio_dim": 16,
}
TEXT_ENCODER = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
VAE = {"base_dim": 4}
HUNYUAN: dict[str, Any] = {  # RoPE with 4 frequencies on the time axis
    **{"num_attention_heads": 4, "attention_head_dim": 16, "rope_axes_dim": [8, 4, 4], "num_layers": 2},
    **{"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16},
    **{"guidance_embeds": True, "out_channels": 16},
}
HUNYUAN_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
LLAMA = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2},
}
GAIN = 1.5  # for V1's random matrices: without it the prompt hardly changes the video


def put_into(cache: Path) -> None:
    """Write the toys of all tasks to where `--model_id tiny` looks for the built-in model."""
    for task in map(task_spec, TASK_NAMES):
        folder = cache / tiny.folder_of(task).relative_to(tiny.cache_folder())
        if not folder.exists():
            write(folder, task)


def write(root: Path, task: TaskSpec) -> None:
    """Write the toy of a task to a new or empty folder."""
    root.mkdir(parents=True, exist_ok=True)
    (write_hunyuan if task.family == "hunyuan" else write_wan)(root, task)


def sizes_of(task: TaskSpec) -> dict[str, Any]:
    """The config of a toy's transformer."""
    if task.family == "hunyuan":
        return HUNYUAN | {"in_channels": task.transformer["in_channels"]}
    return TRANSFORMER | (AVATAR if "input_audio" in task.inputs else {})


def write_wan(root: Path, task: TaskSpec) -> None:
    transformer = random_model(lambda: SkyReelsTransformer3DModel(**sizes_of(task)))
    vae = random_model(lambda: AutoencoderKLWan(**VAE))
    umt5 = UMT5Config(feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **TEXT_ENCODER)
    text_encoder = random_model(lambda: UMT5EncoderModel(umt5))
    pieces = dict.fromkeys(layouts.umt5_characters(), 0.0)
    if task.layout == "diffusers":
        transformer.save_pretrained(root / "transformer")
        vae.save_pretrained(root / "vae")
        layouts.save(text_encoder, root / "text_encoder")
        layouts.write_umt5_tokenizer(root / "tokenizer", pieces)
        return
    avatar = "input_audio" in task.inputs
    for folder in ["."] if avatar else ["transformer", "shot_transformer"]:
        layouts.write_native_transformer(root / folder, transformer)
    torch.save(layouts.native(layouts.weights(vae), key_maps.NATIVE_VAE), root / key_maps.NATIVE_VAE_FILE)
    tensors = layouts.native(layouts.weights(text_encoder), key_maps.NATIVE_TEXT_ENCODER)
    torch.save(tensors, root / key_maps.NATIVE_TEXT_ENCODER_FILE)
    layouts.write_umt5_tokenizer(root / key_maps.NATIVE_TOKENIZER, pieces)
    if avatar:
        image_encoder = layouts.random_image_encoder()
        layouts.write_native_image_encoder(root / key_maps.NATIVE_IMAGE_ENCODER_FILE, image_encoder)
        wav2vec2 = transformers.Wav2Vec2Config(**layouts.AUDIO_ENCODER)
        layouts.save(random_model(lambda: transformers.Wav2Vec2Model(wav2vec2)), root / key_maps.AUDIO_ENCODER)


def write_hunyuan(root: Path, task: TaskSpec) -> None:
    transformer = random_model(lambda: HunyuanVideoTransformer3DModel(**sizes_of(task)))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN)
    transformer.save_pretrained(root)
    random_model(lambda: AutoencoderKLHunyuanVideo(**HUNYUAN_VAE)).save_pretrained(root / "vae")
    layouts.save(random_model(lambda: LlamaModel(LlamaConfig(**LLAMA))), root / "text_encoder")
    layouts.save(layouts.random_clip(), root / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**layouts.SCHEDULER).save_pretrained(root / "scheduler")
    layouts.write_llama_tokenizer(root / "tokenizer", layouts.llama_vocabulary(layouts.llama_template()))
    layouts.write_clip_tokenizer(root / "tokenizer_2")
