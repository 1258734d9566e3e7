"""Loads the components of a checkpoint and prepares them for a run."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from skyreels_v3.cache import TensorCache, cache_folder, identity_of
from skyreels_v3.checkpoints.files import errors_about
from skyreels_v3.checkpoints.hub import COMPONENTS, LORA, components_of, locate_file
from skyreels_v3.checkpoints.load import read_ahead
from skyreels_v3.checkpoints.lora import apply_loras, read_lora, shapes_of
from skyreels_v3.families import Transformer, component_files, family_of
from skyreels_v3.memory.quantize import cache_dequantized, dequantize_layers, quantize
from skyreels_v3.parallel.groups import broadcast_weights, shard_weights
from skyreels_v3.parallel.usp import choose_usp
from skyreels_v3.plan import Plan, build_on_meta, transformer_sizes
from skyreels_v3.prompts import AUTO
from skyreels_v3.request import GenerationRequest
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import task_spec

ENCODERS = ("text_encoder", "image_encoder", "audio_encoder")  # loaded only on the main process, which encodes


@dataclass(frozen=True)
class Components:
    """The components of a checkpoint.

    The audio encoder is always float32, since it is small; so is the VAE unless --vae_dtype says otherwise, since its
    errors are visible.
    """

    transformer: Any  # both nn.Module and Transformer; Python cannot express the intersection
    vae: Any
    prompt_cache: TensorCache
    text_encoder: Any = None
    image_encoder: Any = None
    audio_encoder: Any = None
    scheduler: Mapping[str, Any] | None = None  # its config, where the preset does not define the schedule
    quant: str | None = None  # of the text encoder, which is quantized on first use

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of all components that are loaded."""
        others = (self.vae, self.text_encoder, self.image_encoder, self.audio_encoder)
        return [self.transformer, *(each.module for each in others if each is not None)]


def load_components(plan: Plan, runtime: Runtime) -> Components:
    """Load a plan's checkpoint, memory-mapped; all files are checked before anything slow begins."""
    folder, request, task, main = plan.checkpoint, plan.request, plan.request.task, runtime.parallel.is_main
    assert folder is not None
    family = family_of(task)
    others = others_of(folder, request)
    reads = main or not request.broadcast_weights
    vae_dtype, own = getattr(torch, request.vae_dtype), own_files(request)
    loaders = family.loaders(task, folder, others, runtime.dtype, vae_dtype, reads, own)
    loaded: dict[str, Any] = {}
    with runtime.bar("loading", len(loaders)) as bar:
        for name, load in loaders.items():
            if main or name not in ENCODERS:
                with errors_about(flag_of(name, folder, others, own)):
                    loaded[name] = load()
            bar.update()
    known_prompts = identity_of(component_files(request, others, "text encoder"), runtime.dtype, request.quant)
    if reads:
        read_ahead(component_files(request, folder, "transformer"))  # while inputs are encoded
    components = Components(
        **loaded,
        prompt_cache=TensorCache(None if request.no_cache else cache_folder() / "prompts", known_prompts),
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
    """The folder of the components besides the transformer, for the checkpoint in `folder`."""
    return Path(request.base_model_id) if request.base_model_id is not None else folder


def own_files(request: GenerationRequest) -> dict[str, Path]:
    """The files on this machine of components that a request takes from their own files."""
    found = {field: locate_file(name, COMPONENTS[field]) for field, name in components_of(request).items()}
    return {field: file for field, file in found.items() if file is not None}


def flag_of(component: str, folder: Path, others: Path, own: Container[str]) -> str:
    """The flag that names the weights of a component."""
    if component in own:
        return COMPONENTS[component].flag
    return "--model_id" if component == "transformer" or others == folder else "--base_model_id"


def check_components(request: GenerationRequest, folder: Path | None) -> None:
    """Raise UserError for component files or LoRAs that do not fit the model.

    Everything is loaded on meta, without the weights' values, in a second or two.

    Args:
        folder: the checkpoint's; None if it is not on this machine, then LoRAs are checked against published sizes.
    """
    files = [(file, lora.partial) for lora in request.lora if (file := locate_file(lora.source, LORA)) is not None]
    own = own_files(request)
    if folder is not None and own.keys() == components_of(request).keys():
        model = load_on_meta(request.task.name, folder, others_of(folder, request), tuple(own.items()))
    elif files:
        model = build_on_meta(request.task.family, transformer_sizes(request, None))
    for file, some in files:
        read_lora(file, shapes_of(model), model.native_names, some)


@cache
def load_on_meta(task: str, folder: Path, others: Path, own: tuple[tuple[str, Path], ...]) -> Any:
    """Check all components of a checkpoint by loading them on meta; returns the transformer."""
    spec, loaded = task_spec(task), {}
    loaders = family_of(spec).loaders(spec, folder, others, torch.float32, torch.float32, False, dict(own))
    for name, load in loaders.items():
        with errors_about(flag_of(name, folder, others, dict(own))):
            loaded[name] = load()
    return loaded["transformer"]


def use_channels_last(module: nn.Module) -> None:
    """Make the weights of 3D convolutions channels-last, and only these: other weights may not be 5D."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs


def use_onednn(module: nn.Module) -> None:
    """Use oneDNN for 3D convolutions on the CPU, whatever their size.

    torch uses it only if the product of the first four of a float32 input's five sizes exceeds 20480; for smaller
    frames it runs a loop that takes eight times as long.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part._conv_forward = partial(onednn_convolution, part)  # type: ignore[method-assign]


def onednn_convolution(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `layer` to x (B, C, F, H, W) with oneDNN."""
    assert layer.padding_mode == "zeros"
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups)


def set_up_vae(vae: Any, runtime: Runtime) -> None:
    """Set up the VAE: memory format or kernels, tiles, and the ranks that share the tiles."""
    if runtime.device.type == "cuda":  # native to cuDNN's kernels, which would otherwise convert each input
        use_channels_last(vae.module)
    elif runtime.device.type == "cpu" and torch.backends.mkldnn.is_available():
        use_onednn(vae.module)
    vae.tiles = runtime.policy.tiles
    vae.group = runtime.parallel.group("world")


def set_up_transformer(transformer: Transformer, request: GenerationRequest, runtime: Runtime) -> None:
    """Set up the transformer: LoRAs, quantization, attention, ranks, compilation, sharding or streaming."""
    module = cast(nn.Module, transformer)
    if request.lora:  # their sources are local files by now
        dequantize_layers(module, runtime.dtype)
        apply_loras(module, request.lora, fuse=request.quant is not None)
    if request.quant is not None:
        quantize_blocks(transformer.blocks, "quantizing the transformer", request.quant, runtime)
    if family_of(request.task).CHUNKS_TOKENS:
        cache_dequantized(transformer.blocks)
    transformer.set_attention(runtime.attention)
    if runtime.parallel.degrees.sequence > 1:
        usp = choose_usp(runtime.kernel, runtime.attention, runtime.parallel)
        family_of(request.task).divide_tokens(transformer, runtime.parallel.group("sequence"), usp)
    if runtime.can_compile:
        compile_blocks(transformer, or_eager=request.compile == AUTO)
    if runtime.plan.shards:
        shard_weights(module, transformer.blocks, runtime.device)
    elif runtime.policy.mode == "stream":
        runtime.stream(module, transformer.blocks, runtime.policy.resident_blocks, runtime.policy.pinned).begin()


def quantize_blocks(blocks: Sequence[nn.Module], name: str, quant: str, runtime: Runtime) -> None:
    """Quantize a model's blocks, with a progress bar; FP8 layers stay as they are."""
    with runtime.bar(name, len(blocks)) as bar:
        for block in blocks:
            quantize([block], runtime.device, dynamic=quant == "fp8_dynamic")
            bar.update()


MAX_GRAPHS = 16  # per compiled part, since shapes, dtypes and adapters differ


def compile_blocks(model: Transformer, or_eager: bool = False) -> None:
    """Compile a model's parts on their first call; the code is cached where `runtime.set_environment` says.

    Args:
        or_eager: if the compiler fails, log why and run the part as it is.
    """
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.suppress_errors = or_eager
    for owner, method in model.compilable():
        setattr(owner, method, torch.compile(getattr(owner, method)))
