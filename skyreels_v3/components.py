"""The networks a task works with, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from skyreels_v3.cache import TensorCache, cache_folder, identity_of
from skyreels_v3.checkpoints.adapters import apply_loras
from skyreels_v3.checkpoints.hub import BASE_SCHEDULER, errors_about, read_json, text_encoder_files, weight_files
from skyreels_v3.checkpoints.load import read_ahead
from skyreels_v3.compile import compile_blocks
from skyreels_v3.hunyuan.checkpoint import load_hunyuan_text_encoder, load_hunyuan_transformer, load_hunyuan_vae
from skyreels_v3.hunyuan.text_encoder import HunyuanTextEncoder
from skyreels_v3.hunyuan.vae import HunyuanVAE
from skyreels_v3.memory.quantize import cache_dequantized, quantize
from skyreels_v3.model_api import Transformer
from skyreels_v3.parallel.usp import choose_usp
from skyreels_v3.parallel.weights import broadcast_weights, shard_weights
from skyreels_v3.plan import Plan
from skyreels_v3.request import GenerationRequest
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import HUNYUAN
from skyreels_v3.wan.audio_encoder import AudioEncoder
from skyreels_v3.wan.checkpoint import (
    load_audio_encoder,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from skyreels_v3.wan.image_encoder import ImageEncoder
from skyreels_v3.wan.text_encoder import TextEncoder
from skyreels_v3.wan.vae import VideoVAE


@dataclass(frozen=True)
class Components:
    """A checkpoint's networks, and what is known of them.

    The audio encoder is float32 whatever the rest is, and so is the VAE unless it is asked for otherwise: errors of the
    one are seen, the other is small.
    """

    transformer: Any  # an nn.Module and a Transformer, for which Python has no type
    vae: VideoVAE | HunyuanVAE
    text_encoder: TextEncoder | HunyuanTextEncoder | None  # encoders only where something is encoded
    prompts: TensorCache
    scheduler: Mapping[str, Any] | None = None  # its config, where the task does not say it all
    quant: str | None = None  # of the text encoder, to be done when it is needed
    image_encoder: ImageEncoder | None = None
    audio_encoder: AudioEncoder | None = None


def load_components(plan: Plan, runtime: Runtime) -> Components:
    """Map a plan's checkpoint into memory; every file is checked before anything long begins."""
    folder, request, task = plan.checkpoint, plan.request, plan.request.task
    assert folder is not None
    reads = runtime.parallel.is_main or not request.broadcast_weights
    loaders = (hunyuan_loaders if task.layout == HUNYUAN else wan_loaders)(folder, request, runtime, reads)
    loaded: dict[str, Any] = {"text_encoder": None}
    others = others_of(folder, request)
    with runtime.bar("loading", len(loaders)) as bar:
        for name, load in loaders.items():
            elsewhere = others != folder and name != "transformer"
            with errors_about("--base_model_id" if elsewhere else "--model_id"):
                loaded[name] = load()
            bar.update()
    weights = weight_files(folder / task.transformer_folder)
    known_prompts = identity_of(text_encoder_files(others, task), runtime.dtype, request.quant)
    if reads:
        read_ahead(weights)  # while the prompt and the pictures are encoded
    components = Components(
        **loaded,
        prompts=TensorCache(None if request.no_cache else cache_folder() / "prompts", known_prompts),
        scheduler=read_json(others / BASE_SCHEDULER) if task.layout == HUNYUAN else None,
        quant=request.quant,
    )
    if request.broadcast_weights and not runtime.parallel.is_single:
        stay = runtime.policy.mode == "resident" and not runtime.plan.shards
        for module in (components.vae.module, components.transformer):
            broadcast_weights(module, runtime.device if stay else torch.device("cpu"))
    set_up_vae(components.vae, runtime)
    set_up_transformer(components.transformer, request, runtime)
    return components


def others_of(folder: Path, request: GenerationRequest) -> Path:
    """Where the components besides the transformer are, of the checkpoint in `folder`."""
    return Path(request.base_model_id) if request.base_model_id is not None else folder


Loaders = dict[str, Callable[[], Any]]


def wan_loaders(folder: Path, request: GenerationRequest, runtime: Runtime, reads: bool) -> Loaders:
    """What loads each component of V3; `reads`: see `load.read_tensors`."""
    task = request.task
    loaders: Loaders = {
        "vae": lambda: load_vae(folder, task.layout, getattr(torch, request.vae_dtype), reads),
        "transformer": lambda: load_transformer(folder / task.transformer_folder, runtime.dtype, reads),
    }
    if runtime.parallel.is_main:
        loaders["text_encoder"] = lambda: load_text_encoder(folder, task.layout, runtime.dtype)
    if runtime.parallel.is_main and "input_audio" in task.inputs:
        loaders["image_encoder"] = lambda: load_image_encoder(folder, runtime.dtype)
        loaders["audio_encoder"] = lambda: load_audio_encoder(folder, torch.float32)
    return loaders


def hunyuan_loaders(folder: Path, request: GenerationRequest, runtime: Runtime, reads: bool) -> Loaders:
    """The same for V1."""
    others = others_of(folder, request)
    loaders: Loaders = {
        "vae": lambda: load_hunyuan_vae(others, getattr(torch, request.vae_dtype), reads),
        "transformer": lambda: load_hunyuan_transformer(folder, runtime.dtype, reads),
    }
    if runtime.parallel.is_main:
        loaders["text_encoder"] = lambda: load_hunyuan_text_encoder(others, runtime.dtype)
    return loaders


def set_up_vae(vae: VideoVAE | HunyuanVAE, runtime: Runtime) -> None:
    """Prepare the VAE: memory format, tiles, and the ranks that divide these."""
    if runtime.device.type == "cuda":  # the format of cuDNN's kernels, which would otherwise convert each input
        cast(Any, vae.module).to(memory_format=torch.channels_last_3d)
    vae.set_tiles(*runtime.policy.tiles)
    vae.share(None if runtime.parallel.is_single else runtime.parallel.group("world"))


def set_up_transformer(transformer: Transformer, request: GenerationRequest, runtime: Runtime) -> None:
    """Prepare the transformer: LoRAs, quantization, attention, ranks, compilation, sharding or streaming."""
    module = cast(nn.Module, transformer)
    if request.lora:  # their sources were replaced by files when they were fetched
        apply_loras(module, request.lora, transformer.native_names, fuse=request.quant is not None)
    if request.quant is not None:
        quantize_blocks(transformer.blocks, "quantizing the transformer", request.quant, runtime)
    if transformer.chunks_tokens:
        cache_dequantized(transformer.blocks)
    transformer.set_attention(runtime.attention)
    if runtime.parallel.degrees.sequence > 1:
        usp = choose_usp(runtime.kernel, runtime.attention, runtime.parallel)
        transformer.divide_tokens(runtime.parallel.group("sequence"), usp)
    if request.compile:
        compile_blocks(transformer)
    if runtime.plan.shards:
        shard_weights(module, transformer.blocks, runtime.device)
    elif runtime.policy.mode == "stream":
        runtime.stream(module, transformer.blocks, runtime.policy.resident_blocks, runtime.policy.pinned).begin()


def quantize_blocks(blocks: Sequence[nn.Module], name: str, quant: str, runtime: Runtime) -> None:
    """Quantise a model's blocks, with a progress bar of that name; those that are so already stay."""
    with runtime.bar(name, len(blocks)) as bar:
        for block in blocks:
            quantize([block], runtime.device, dynamic=quant == "fp8_dynamic")
            bar.update()
