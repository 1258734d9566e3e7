"""What a run will compute and how much memory it takes, from the request and its family's sizes. No weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyreels_v3.families import TextEncoderSizes, TransformerSizes, family_of, pipeline_of
from skyreels_v3.inputs import Inputs
from skyreels_v3.memory.policy import BYTES, RESIDENT, STREAM_SLOTS, TILINGS, Policy, Tiles, choose_policy
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED, ParallelConfig, Ranks, choose_degrees
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import LATENT_CHANNELS, PATCH_SIZE, TINY, VAE_STRIDE

OUTPUT_BYTES = {False: 0.5, True: 3}  # at most about, for each pixel: of an mp4, of PNG files
TINY_BYTES = 1 << 20  # of each of the toy's components, roughly


@dataclass(frozen=True)
class Checked:
    """A request that has passed all checks, and its inputs.

    Attributes:
        checkpoint: its folder, None where that is not on this machine.
        done: an earlier run has made `request.output` already.
    """

    request: ResolvedRequest
    inputs: Inputs
    checkpoint: Path | None
    done: bool = False


@dataclass(frozen=True)
class Machine:
    """What a run computes on: device and dtype by their names, and free bytes before anything was loaded.

    With several ranks the fewest bytes of any. `free_device` is None where the device has no memory of its own.
    """

    device: str
    dtype: str
    free_device: int | None
    free_host: int


@dataclass(frozen=True)
class PassPlan:
    """One run of the denoising loop."""

    latents: tuple[int, int, int, int, int]  # (B, C, F, H, W) generated
    tokens: int
    flop: int


@dataclass(frozen=True)
class Stage:
    """Bytes of one component at work: of its weights, of those while its blocks are streamed, of all that it computes.

    The VAE's `activations` are those without tiles.
    """

    weights: int
    streamed: int
    activations: int = 0


@dataclass(frozen=True)
class Plan:
    """All that is known of a video before it is made. Made once; everything later reads it.

    Attributes:
        checkpoint: its folder, None where it is yet to be downloaded (of a dry run).
        device: "cuda:0", "cpu", ...
        forwards: of one pass.
        streamed_from_host: bytes of the transformer's blocks that are not resident while it is streamed.
    """

    request: ResolvedRequest
    inputs: Inputs
    checkpoint: Path | None
    device: str
    dtype: str
    passes: tuple[PassPlan, ...]
    forwards: int
    stages: Mapping[str, Stage]
    streamed_from_host: int
    ranks: Ranks = SINGLE
    degrees: ParallelConfig = UNDIVIDED
    policy: Policy = RESIDENT

    @property
    def shards(self) -> bool:
        """Whether the transformer's weights are divided; one process has nobody to divide them with."""
        return shards(self.request, self.degrees)

    def peak(self, mode: str, tiles: Tiles = TILINGS[0]) -> int:
        """The most bytes on the device at one time in a mode of memory/policy.py, with a tiling of the VAE."""
        vae = {f"VAE {part}": vae_bytes(self.request, part, tiles) for part in ("encode", "decode")}
        activations = {name: vae.get(name, stage.activations) for name, stage in self.stages.items()}
        if mode == "resident":
            together = sum(stage.weights for name, stage in self.stages.items() if name != "VAE encode")
            return together + max(activations.values())
        stays = self.stages["transformer"].weights if self.shards and "transformer" in self.stages else 0
        return max(
            (stage.streamed if mode == "stream" else stage.weights)
            + activations[name]
            + (stays if name != "transformer" else 0)  # divided weights are never moved
            for name, stage in self.stages.items()
        )


def plan(checked: Checked, machine: Machine, ranks: Ranks = SINGLE) -> Plan:
    """Work out a request that was checked, for the machine that it will run on.

    Args:
        ranks: the process that this is a plan for, and the others that share the video.

    Raises:
        UserError: the processes cannot be divided as the request wants.
    """
    request, checkpoint, dtype = checked.request, checked.checkpoint, machine.dtype
    sizes = transformer_sizes(request, checkpoint)
    terms = len(pipeline_of(request.task).guidance(request).terms)
    forwards = request.num_inference_steps * terms
    degrees = (
        choose_degrees(request, ranks.world_size, sizes.num_attention_heads, terms) if request.use_usp else UNDIVIDED
    )
    passes = tuple(
        PassPlan(
            (1, LATENT_CHANNELS, new, request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2]),
            tokens := (new + condition) * tokens_per_frame(request),
            forwards * sizes.forward_flop(tokens),
        )
        for new, condition in pipeline_of(request.task).passes(request)
    )
    quantized = request.quant is not None
    streamed = max(0, sizes.blocks - request.stream_blocks) * sizes.block_bytes(dtype, quantized)
    made = stages(request, checkpoint, sizes, passes, dtype, degrees)
    result = Plan(
        request, checked.inputs, checkpoint, machine.device, dtype, passes, forwards, made, streamed, ranks, degrees
    )
    policy = choose_policy(
        request.memory,
        result.peak,
        streamed,
        request.stream_blocks,
        request.high_cpu_memory,
        machine.free_device,
        machine.free_host,
    )
    return replace(result, policy=policy)


def shards(request: GenerationRequest, degrees: ParallelConfig) -> bool:
    """See `Plan.shards`."""
    return request.shard_weights and degrees.world_size > 1


def tokens_per_frame(request: ResolvedRequest) -> int:
    pixels = request.height * request.width
    return pixels // (VAE_STRIDE[1] * VAE_STRIDE[2] * PATCH_SIZE[1] * PATCH_SIZE[2])


def transformer_sizes(request: GenerationRequest, checkpoint: Path | None) -> TransformerSizes:
    """Sizes from the checkpoint's own config where it is on this machine, else the published ones."""
    family = family_of(request.task)
    published: dict[str, Any] = dict(request.task.transformer)
    if request.model_id == TINY:
        published = family.tiny_sizes(request.task)
    elif checkpoint is not None:
        published |= family.transformer_sizes(checkpoint, request.task)
    return family.sizes(published)


def stages(
    request: ResolvedRequest,
    checkpoint: Path | None,
    sizes: TransformerSizes,
    passes: tuple[PassPlan, ...],
    dtype: str,
    degrees: ParallelConfig,
) -> dict[str, Stage]:
    """Weights and activations of each stage on one process, in bytes."""
    weights = component_bytes(request, checkpoint, dtype)
    quantized = request.quant is not None
    longest = max(passes, key=lambda made: made.tokens)
    context = sizes.context_bytes(longest.latents[2], len(request.input_audio), dtype)
    own_terms = math.ceil(len(pipeline_of(request.task).guidance(request).terms) / degrees.cfg)
    weights_here = sizes.weight_bytes(dtype, quantized)
    if shards(request, degrees):  # a part of all, and gathered two blocks and what is outside of blocks
        weights_here = weights_here // degrees.world_size + sizes.streamed_bytes(dtype, quantized, 0)
    transformer = Stage(
        weights_here,
        sizes.streamed_bytes(dtype, quantized, request.stream_blocks),
        sizes.activation_bytes(longest.tokens, dtype, degrees)
        + (sizes.dequantized_bytes(dtype) if request.quant == "fp8" else 0)
        + context
        + kept_bytes(request, own_terms, longest.tokens // degrees.sequence * sizes.dim * BYTES[dtype]),
    )
    vae = weights.pop("VAE")
    made = {name: Stage(size, size) for name, size in weights.items()}
    encoder = family_of(request.task).text_encoder()
    made["text encoder"] = text_encoder_stage(encoder, weights["text encoder"], dtype, quantized)
    for part in ("encode", "decode") if request.task.inputs else ("decode",):
        if part == "decode":
            made["transformer"] = transformer  # between the two
        made[f"VAE {part}"] = Stage(vae, vae, vae_bytes(request, part, (1, 1)))
    return made


def kept_bytes(request: GenerationRequest, terms: int, tokens: int) -> int:
    """Bytes that step caching keeps from step to step for tokens of so many bytes: two residuals of each condition.

    While the first block works there is a copy of what it began with.
    """
    return 0 if request.cache is None else (2 * terms + 1) * tokens


def component_bytes(request: GenerationRequest, checkpoint: Path | None, dtype: str) -> dict[str, int]:
    """Bytes of the weights of all components but the transformer."""
    parameters = family_of(request.task).component_parameters(request.task)
    others = checkpoint if request.base_model_id is None else Path(request.base_model_id)
    if others is not None and others.is_dir():
        *_, repository = family_of(request.task).repositories(request.task)
        weights = {name: repository.weights(others, name) for name in parameters}
        return {name: sum(file.stat().st_size for file in files) for name, files in weights.items()}
    if request.model_id == TINY:
        return dict.fromkeys(parameters, TINY_BYTES)
    return {name: count * BYTES[stage_dtype(request, name, dtype)] for name, count in parameters.items()}


def text_encoder_stage(encoder: TextEncoderSizes, size: int, dtype: str, quantized: bool) -> Stage:
    """A text encoder of which `size` bytes are loaded."""
    saved = size * encoder.blocks * encoder.matrices // encoder.parameters * (BYTES[dtype] - 1) // BYTES[dtype]
    blocks = size * encoder.blocks * encoder.block // encoder.parameters - saved * quantized
    weights = size - saved * quantized
    return Stage(weights, weights - blocks * (encoder.blocks - STREAM_SLOTS) // encoder.blocks)


def vae_bytes(request: ResolvedRequest, part: str, tiles: Tiles) -> int:
    """Live bytes at the peak of the VAE's `part`, "encode" or "decode", weights not counted."""
    size = (request.height, request.width)
    return family_of(request.task).vae_bytes(size, request.vae_dtype, part, tiles)


def stage_dtype(request: GenerationRequest, name: str, dtype: str) -> str:
    """The dtype of a stage's weights in a run of `dtype`, those aside that are quantised."""
    if name.startswith("VAE"):
        return request.vae_dtype
    return "float32" if name.startswith("audio") else dtype


def output_bytes(request: ResolvedRequest) -> float:
    """About the bytes of the output at most."""
    return OUTPUT_BYTES[request.frame_folder] * request.frames_out * request.height * request.width
