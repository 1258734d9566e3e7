"""Plans the work and memory of a run from the request and the sizes of its model.

Weights are counted in the real transformer on the meta device; the preset has the counts for the published sizes. FLOPs
come from formulas (multiply-adds as two operations, matrix products and attention only). Activations are estimated in
bytes per token or pixel, without the kernels' workspaces; tests compare the estimates with the real models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from skyreels_v3.checkpoints.formats import read_format
from skyreels_v3.families import (
    Elements,
    TextEncoderSizes,
    component_files,
    family_named,
    family_of,
    pipeline_of,
    published_elements,
    published_transformer_bytes,
    width_of,
)
from skyreels_v3.inputs import Inputs
from skyreels_v3.memory.policy import (
    BYTES,
    RESIDENT,
    SCALE,
    STREAM_SLOTS,
    TILINGS,
    Policy,
    Tiles,
    choose_policy,
    resident_blocks,
)
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED, ParallelConfig, Ranks, choose_degrees
from skyreels_v3.prompts import AUTO
from skyreels_v3.request import ON, GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import LATENT_CHANNELS, PATCH_SIZE, TINY, VAE_STRIDE, TaskSpec, task_spec

OUTPUT_BYTES = {False: 0.5, True: 3}  # per pixel, rough upper bounds: mp4, PNG files
TINY_BYTES = 1 << 20  # per component of the built-in model, roughly
# of a run from which --compile auto compiles, such as 5 s of video at 720P: 200 s on an H100, of which it should save
# 7 %, the traffic between matrix products; loading compiled code from the cache should take less
COMPILE_FLOP = 1e17


@dataclass(frozen=True)
class Checked:
    """A request that has passed all checks, and its inputs.

    Attributes:
        checkpoint: its folder, None if it is not on this machine.
        done: an earlier run has already made `request.output`.
    """

    request: ResolvedRequest
    inputs: Inputs
    checkpoint: Path | None
    done: bool = False


@dataclass(frozen=True)
class Machine:
    """The device and dtype of a run, and the free bytes before anything is loaded.

    With several ranks, the free bytes are the minimum over all. `free_device` is None if the device shares host memory.
    """

    device: str
    dtype: str
    free_device: int | None
    free_host: int


@dataclass(frozen=True)
class PassPlan:
    """The work of one run of the denoising loop."""

    latents: tuple[int, int, int, int, int]  # (B, C, F, H, W), the generated ones
    tokens: int
    flop: int


@dataclass(frozen=True)
class Weights:
    """Bytes of a transformer's weights.

    Attributes:
        blocks: of each block, in order.
        outside: of everything else.
        dequantized: of a block's dequantized FP8 matrices, if the block keeps them while it processes chunks.
    """

    blocks: tuple[int, ...]
    outside: int
    dequantized: int

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)

    def streamed(self, resident: int) -> list[int]:
        """Bytes of each streamed block, while `resident` others stay on the device."""
        kept = resident_blocks(len(self.blocks), resident)
        return [size for index, size in enumerate(self.blocks) if index not in kept]

    def on_device(self, resident: int) -> int:
        """Bytes on the device while all but `resident` blocks are streamed through slots of the largest one's size."""
        streamed = self.streamed(resident)
        return self.total - sum(streamed) + min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)


@dataclass(frozen=True)
class ComponentBytes:
    """Bytes of a component in use: all weights, those on the device while its blocks are streamed, and activations.

    The VAE's `activations` are those without tiling.
    """

    weights: int
    streamed: int
    activations: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything known about a video before it is made; later stages only read it.

    Attributes:
        checkpoint: its folder, None if a dry run would have to download it.
        device: "cuda:0", "cpu", ...
        forwards: number of forwards in one pass.
        streamed_from_host: bytes of the transformer's blocks that are in host memory while it is streamed.
        shards: whether the ranks shard the transformer's weights.
    """

    request: ResolvedRequest
    inputs: Inputs
    checkpoint: Path | None
    device: str
    dtype: str
    passes: tuple[PassPlan, ...]
    forwards: int
    components: Mapping[str, ComponentBytes]
    streamed_from_host: int
    shards: bool
    ranks: Ranks = SINGLE
    degrees: ParallelConfig = UNDIVIDED
    policy: Policy = RESIDENT

    @property
    def compiles(self) -> bool:
        """Whether the transformer's blocks run compiled, where they can be.

        It changes the last bits of a video. So --compile auto does not depend on ranks or memory, nor on the GPU's
        speed.
        """
        if self.request.compile == AUTO:
            return self.device.startswith("cuda") and sum(made.flop for made in self.passes) >= COMPILE_FLOP
        return self.request.compile == ON

    def peak(self, mode: str, tiles: Tiles = TILINGS[0]) -> int:
        """Peak bytes on the device in a memory mode, with a tiling of the VAE."""
        vae = {f"VAE {part}": vae_bytes(self.request, part, tiles) for part in ("encode", "decode")}
        activations = {name: vae.get(name, part.activations) for name, part in self.components.items()}
        if mode == "resident":
            together = sum(part.weights for name, part in self.components.items() if name != "VAE encode")
            return together + max(activations.values())
        shard = self.components["transformer"].weights if self.shards else 0  # never leaves the device
        return max(
            (part.streamed if mode == "stream" else part.weights)
            + activations[name]
            + (shard if name != "transformer" else 0)
            for name, part in self.components.items()
        )


def plan(checked: Checked, machine: Machine, ranks: Ranks = SINGLE) -> Plan:
    """Plan a checked request for the machine that it will run on.

    Args:
        ranks: this process among those that make the video together.

    Raises:
        UserError: the ranks cannot be divided as requested.
    """
    request, dtype = checked.request, machine.dtype
    family = family_of(request.task)
    sizes = transformer_sizes(request, checked.checkpoint)
    weights = quantized_weights(request, checked.checkpoint, dtype)
    weights = weights or weights_of(request.task, sizes, dtype, request.quant)
    degrees, terms = degrees_of(request, checked.checkpoint, ranks), terms_of(request)
    forwards = request.num_inference_steps * terms
    latent_size = (request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2])
    tokens_per_frame = math.prod(latent_size) // math.prod(PATCH_SIZE)
    passes = tuple(
        PassPlan(
            (1, LATENT_CHANNELS, new, *latent_size),
            tokens := (new + condition) * tokens_per_frame,
            forwards * family.forward_flop(sizes, tokens),
        )
        for new, condition in pipeline_of(request.task).passes(request)
    )
    result = Plan(
        request=request,
        inputs=checked.inputs,
        checkpoint=checked.checkpoint,
        device=machine.device,
        dtype=dtype,
        passes=passes,
        forwards=forwards,
        components={},
        streamed_from_host=sum(weights.streamed(request.stream_blocks)),
        shards=request.shard_weights and degrees.world_size > 1,
        ranks=ranks,
        degrees=degrees,
    )
    result = replace(result, components=component_bytes(result, sizes, weights, math.ceil(terms / degrees.cfg)))
    policy = choose_policy(request, result.peak, result.streamed_from_host, machine.free_device, machine.free_host)
    return replace(result, policy=policy)


def degrees_of(request: GenerationRequest, checkpoint: Path | None, ranks: Ranks) -> ParallelConfig:
    """The parallel degrees for a request; raises UserError if the ranks cannot be divided as requested."""
    if not request.use_usp:
        return UNDIVIDED
    heads = transformer_sizes(request, checkpoint)["num_attention_heads"]
    return choose_degrees(request, ranks.world_size, heads, terms_of(request))


def terms_of(request: GenerationRequest) -> int:
    """The number of predictions that the guidance combines in each step."""
    return len(pipeline_of(request.task).guidance(request).terms)


def transformer_sizes(request: GenerationRequest, checkpoint: Path | None) -> dict[str, int]:
    """The transformer's sizes, from the checkpoint's own config if it is on this machine, else as published."""
    own = {} if checkpoint is None else family_of(request.task).transformer_sizes(checkpoint, request.task)
    return {**request.task.transformer, **own}


def build_on_meta(family: str, sizes: Mapping[str, Any]) -> Any:
    """Build the transformer of a family on meta."""
    import torch

    with torch.device("meta"):
        return family_named(family).build_transformer(dict(sizes))


def weights_of(task: TaskSpec, sizes: Mapping[str, int], dtype: str, quant: str | None) -> Weights:
    """Bytes of a transformer's weights; imports torch to count them unless the sizes are the published ones."""
    outside, blocks = published_elements(task)
    if sizes != task_spec(task.name).transformer:
        outside, blocks = count_elements(task.family, tuple(sizes.items()), quant == "fp8_dynamic")
    chunks = quant == "fp8" and family_of(task).CHUNKS_TOKENS
    return Weights(
        blocks=tuple(block.bytes(dtype, quant) for block in blocks),
        outside=outside.bytes(dtype, quant),
        dequantized=blocks[0].fp8 * BYTES[dtype] if chunks else 0,
    )


def quantized_weights(request: GenerationRequest, checkpoint: Path | None, dtype: str) -> Weights | None:
    """Bytes of a transformer whose files on this machine have quantized weights; None for any other."""
    own = None if request.transformer is None else Path(request.transformer)
    if (checkpoint is None and own is None) or (own is not None and not own.is_file()):
        return None
    files = component_files(request, checkpoint or Path(), "transformer")
    if request.lora or not read_format(files).is_quantized:  # LoRAs are applied to dequantized weights
        return None
    if checkpoint is not None:
        return count_quantized(request.task.name, checkpoint, own, dtype, request.quant)
    outside, blocks = published_elements(request.task)  # no config: scale the published sizes by the file size
    share = sum(file.stat().st_size for file in files) / published_transformer_bytes(request.task)
    sizes = [int(share * each.bytes("bfloat16", None)) for each in (outside, *blocks)]
    return Weights(tuple(sizes[1:]), sizes[0], max(each.fp8 + each.others for each in blocks) * BYTES[dtype])


@cache
def count_quantized(task: str, checkpoint: Path, own: Path | None, dtype: str, quant: str | None) -> Weights:
    """Bytes of a transformer with quantized weights once it is loaded."""
    import torch

    from skyreels_v3.memory.quantize import UNPACKED_AT_ONCE, QuantizedLinear, quantize

    spec = task_spec(task)
    family, kind = family_of(spec), getattr(torch, dtype)
    files = {} if own is None else {"transformer": own}
    model = family.loaders(spec, checkpoint, checkpoint, kind, kind, False, files)["transformer"]()
    if quant is not None:
        quantize(model.blocks, torch.device("meta"), quant == "fp8_dynamic")
    blocks = tuple(sum(weight.nbytes for weight in block.parameters()) for block in model.blocks)
    layers = [[part for part in block.modules() if isinstance(part, QuantizedLinear)] for block in model.blocks]
    widths = [
        [BYTES[dtype] * part.in_features * part.out_features for part in parts if not part.dynamic] for parts in layers
    ]
    most = sum if family.CHUNKS_TOKENS else partial(max, default=0)
    unpacking = 8 * UNPACKED_AT_ONCE if any(part.kind for parts in layers for part in parts) else 0
    outside = sum(weight.nbytes for weight in model.parameters()) - sum(blocks)
    return Weights(blocks, outside, max(map(most, widths)) + unpacking)


@cache
def count_elements(family: str, sizes: tuple[tuple[str, int], ...], dynamic: bool) -> tuple[Elements, list[Elements]]:
    """Element counts of a transformer's weights: outside the blocks, and of each block."""
    import torch

    from skyreels_v3.memory.quantize import quantize

    model = build_on_meta(family, dict(sizes))
    quantize(model.blocks, torch.device("meta"), dynamic)
    float32_names = {*(model._keep_in_fp32_modules or ())}

    def elements_of(module: Any) -> Elements:
        counts = dict.fromkeys(Elements._fields, 0)
        for name, parameter in module.named_parameters():
            kind = "others" if float32_names.isdisjoint(name.split(".")) else "float32"
            kind = "fp8" if parameter.itemsize == 1 else "scales" if name.endswith(SCALE) else kind
            counts[kind] += parameter.numel()
        return Elements(**counts)

    each = [elements_of(block) for block in model.blocks]
    whole = elements_of(model)
    return Elements(*(total - sum(counts) for total, *counts in zip(whole, *each, strict=True))), each


def component_bytes(plan: Plan, sizes: Mapping[str, int], weights: Weights, terms: int) -> dict[str, ComponentBytes]:
    """Weights and activations of each component on a rank that predicts `terms` guidance terms."""
    request, family, dtype = plan.request, family_of(plan.request.task), plan.dtype
    longest = max(plan.passes, key=lambda made: made.tokens)
    activations = family.activation_bytes(sizes, longest.tokens, dtype, plan.degrees)
    activations += weights.dequantized + family.context_bytes(sizes, longest.latents[2], request.speakers, dtype)
    if request.cache is not None:  # two residuals per term, and a copy of the first block's input
        tokens = longest.tokens // plan.degrees.sequence
        activations += (2 * terms + 1) * tokens * width_of(sizes) * BYTES[dtype]
    held = weights.total
    if plan.shards:  # its shard, two gathered blocks and the weights outside blocks
        held = held // plan.degrees.world_size + weights.on_device(0)
    others = component_weights(request, plan.checkpoint, dtype)
    vae = others.pop("VAE")
    made = {name: ComponentBytes(size, size) for name, size in others.items()}
    own, quant = Path(request.text_encoder or ""), request.quant
    if own.is_file() and read_format([own]).is_quantized:  # it is not quantized again
        quant = None
    made["text encoder"] = text_encoder_bytes(family.TEXT_ENCODER, others["text encoder"], dtype, quant)
    if request.task.inputs:
        made["VAE encode"] = ComponentBytes(vae, vae, vae_bytes(request, "encode", TILINGS[0]))
    made["transformer"] = ComponentBytes(held, weights.on_device(request.stream_blocks), activations)
    made["VAE decode"] = ComponentBytes(vae, vae, vae_bytes(request, "decode", TILINGS[0]))
    return made


def component_weights(request: GenerationRequest, checkpoint: Path | None, dtype: str) -> dict[str, int]:
    """Bytes of the weights of all other components, from their files if they are on this machine."""
    family = family_of(request.task)
    parameters = family.component_parameters(request.task)
    folder = checkpoint if request.base_model_id is None else Path(request.base_model_id)
    if folder is not None and folder.is_dir():
        return {name: file_bytes(request, folder, name) for name in parameters}
    if request.model_id == TINY:
        return dict.fromkeys(parameters, TINY_BYTES)
    return {name: count * BYTES[component_dtype(request, name, dtype)] for name, count in parameters.items()}


def transformer_file_bytes(request: GenerationRequest, checkpoint: Path | None) -> int:
    """Bytes of the transformer's files, or of the published ones if they are not on this machine. No torch."""
    own = request.transformer
    if own is None and request.model_id == TINY:
        return TINY_BYTES
    if checkpoint is None if own is None else not Path(own).is_file():
        return family_of(request.task).published_bytes(request.task)["transformer"]
    return file_bytes(request, checkpoint or Path(), "transformer")


def file_bytes(request: GenerationRequest, folder: Path, component: str) -> int:
    """Bytes of the files of a component."""
    return sum(file.stat().st_size for file in component_files(request, folder, component))


def text_encoder_bytes(encoder: TextEncoderSizes, size: int, dtype: str, quant: str | None) -> ComponentBytes:
    """Bytes of a text encoder with `size` bytes of weights before quantization."""
    share = size * encoder.blocks / encoder.parameters
    saved = 0 if quant is None else int(share * encoder.matrices * (1 - 1 / BYTES[dtype]))
    blocks = int(share * encoder.block) - saved
    return ComponentBytes(size - saved, size - saved - blocks * (encoder.blocks - STREAM_SLOTS) // encoder.blocks)


def vae_bytes(request: ResolvedRequest, part: str, tiles: Tiles) -> int:
    """Peak live bytes of the VAE's `part` ("encode" or "decode") without weights."""
    return family_of(request.task).vae_bytes((request.height, request.width), request.vae_dtype, part, tiles)


def component_dtype(request: GenerationRequest, name: str, dtype: str) -> str:
    """The dtype of a component's unquantized weights in a run with `dtype`."""
    if name.startswith("VAE"):
        return request.vae_dtype
    return "float32" if name.startswith("audio") else dtype


def output_bytes(request: ResolvedRequest) -> float:
    """A rough upper bound of the output's bytes."""
    return OUTPUT_BYTES[request.frame_folder] * request.frames_out * request.height * request.width
