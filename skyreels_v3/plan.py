"""What a run will compute and how much room it needs, from the request alone. No torch, no weights.

Work is counted exactly (multiply-adds as two operations, matrix products and attention only). Activation memory is an
estimate: bytes for each token or pixel, counted tensor by tensor in the real models (a test counts them again), without
what the kernels need for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from skyreels_v3.families import family_named, family_of
from skyreels_v3.hunyuan.sizes import HunyuanSizes
from skyreels_v3.inputs import Inputs
from skyreels_v3.memory.policy import BYTES, RESIDENT, STREAM_SLOTS, TILINGS, Policy, Tiles, choose_policy
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED, ParallelConfig, Ranks, choose_degrees
from skyreels_v3.pipeline import pipeline_of
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import HUNYUAN, LATENT_CHANNELS, PATCH_SIZE, TINY, VAE_STRIDE

FLOAT32 = ("time_embedder", "time_proj", "scale_shift_table", "norm", "proj_out")  # in names of weights, in every case
TEXT_TOKENS = 512
IMAGE_TOKENS = 257
# Parameters of the published components; the VAE is float32 always.
VAE_PARAMETERS = 126_892_531
HUNYUAN_VAE_PARAMETERS = 246_478_803
IMAGE_ENCODER_PARAMETERS = 630_766_080
IMAGE_ENCODER_FILE_BYTES = 4_770_000_000  # CLIP's text encoder is in it, too
AUDIO_ENCODER_PARAMETERS = 94_371_712
# Live bytes of a forward, of each channel of the model's width: of all tokens while self-attention works (the tokens,
# their queries, keys and values, and what comes out; a little for the rotary positions), of all tokens while a few are
# worked on, and of those few. As many are worked on at a time as models/transformer/block.py says.
ATTENTION_BYTES = {"bfloat16": 10.12, "float32": 20.2}
WAITING_BYTES = {"bfloat16": 8.0, "float32": 16.0}
WORKING_BYTES = {"bfloat16": 18.8, "float32": 29.3}
EXCHANGE_TENSORS = 4  # of all of a process's tokens, while several processes exchange queries, keys and values
TOKENS_AT_ONCE = 8192
# Live bytes at the VAE's peak for each pixel of a frame: whole; in tiles for each pixel, and for each of a tile's.
VAE_WHOLE = {"encode": {"float32": 14_250, "bfloat16": 7_620}, "decode": {"float32": 18_200, "bfloat16": 9_880}}
VAE_SHARED = {"encode": {"float32": 6_250, "bfloat16": 3_150}, "decode": {"float32": 10_200, "bfloat16": 5_150}}
VAE_TILE = {"encode": {"float32": 8_000, "bfloat16": 4_500}, "decode": {"float32": 8_000, "bfloat16": 4_750}}
VAE_HALO = {"encode": 16, "decode": 8}  # pixels that a tile sees beyond its own, on one side
# Live bytes at the peak of HunyuanVideo's VAE, always in tiles of one size: of a picture's encoding for each pixel of a
# tile, and for each pixel; of the decoding, of a tile, and for each pixel of a frame.
HUNYUAN_TILE_SIDE = 256
HUNYUAN_VAE_ENCODE_TILE = {"float32": 3_620, "bfloat16": 1_820}
HUNYUAN_VAE_ENCODE = 20
HUNYUAN_VAE_TILE = {"float32": 5_150_000_000, "bfloat16": 2_580_000_000}
HUNYUAN_VAE_DECODE = {"float32": 580, "bfloat16": 340}
OUTPUT_BYTES = {False: 0.5, True: 3}  # at most about, for each pixel: of an mp4, of PNG files
TINY_BYTES = 1 << 20  # of each of the toy's components, roughly


@dataclass(frozen=True)
class TextEncoderSizes:
    """Parameters of a published text encoder, in blocks, in one of those, and how many of a block's are quantised."""

    parameters: int
    blocks: int
    block: int
    matrices: int


UMT5 = TextEncoderSizes(
    5_680_910_336, 24, 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64, 4 * 4096**2 + 2 * 4096 * 10240
)
LLAMA_AND_CLIP = TextEncoderSizes(
    7_505_186_816 + 123_060_480,
    32,
    2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096,
    2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336,
)


@dataclass(frozen=True)
class Sizes:
    """A transformer's sizes; `text_dim` is not in every config and weighs little."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    in_channels: int
    out_channels: int
    image_dim: int | None = None
    audio_window: int = 5
    audio_features: int = 12 * 768
    audio_hidden_dim: int = 512
    audio_tokens: int = 32
    audio_dim: int | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers

    @cache  # noqa: B019  of few sizes
    def parameters(self) -> tuple[int, int]:
        """Number of parameters, and how many of them are float32 in every case (the time embedding, mostly)."""
        import torch

        with torch.device("meta"):
            model = family_named("wan").build_transformer(asdict(self))
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        float32 = sum(count for name, count in counts.items() if any(part in name for part in FLOAT32))
        return sum(counts.values()), float32

    def matrices(self) -> tuple[int, int]:
        """Elements and rows of what is quantised: self-attention and the feed-forward layer."""
        elements, rows = 4 * self.dim**2 + 2 * self.dim * self.ffn_dim, 5 * self.dim + self.ffn_dim
        return self.num_layers * elements, self.num_layers * rows

    def weight_bytes(self, dtype: str, quantized: bool = False) -> int:
        """Bytes of all weights."""
        everything, float32 = self.parameters()
        size = (everything - float32) * BYTES[dtype] + float32 * BYTES["float32"]
        if quantized:
            elements, rows = self.matrices()
            size += elements * (1 - BYTES[dtype]) + rows * BYTES["float32"]
        return size

    def block_bytes(self, dtype: str, quantized: bool = False) -> int:
        """Bytes of one block's weights."""
        one, none = (replace(self, num_layers=layers).weight_bytes(dtype, quantized) for layers in (1, 0))
        return one - none

    def streamed_bytes(self, dtype: str, quantized: bool, keep: int) -> int:
        """Bytes on the device while all blocks but `keep` are streamed."""
        there = min(self.num_layers, keep + STREAM_SLOTS)
        return self.weight_bytes(dtype, quantized) - (self.num_layers - there) * self.block_bytes(dtype, quantized)

    def forward_flop(self, tokens: int) -> int:
        """Floating-point operations of one forward on a sequence of `tokens`."""
        dim = self.dim
        attention = 4 * tokens**2 * dim + 8 * tokens * dim**2
        context = TEXT_TOKENS + (IMAGE_TOKENS if self.image_dim is not None else 0)
        cross = 4 * tokens * dim**2 + 4 * context * dim**2 + 4 * tokens * context * dim
        if self.audio_dim is not None:
            cross += 4 * tokens * dim**2 + 4 * tokens * self.audio_tokens * dim
        feed_forward = 4 * tokens * dim * self.ffn_dim
        return self.num_layers * (attention + cross + feed_forward)

    def activation_bytes(self, tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED) -> int:
        """Live bytes at the peak of a forward on one of the processes that divide it, weights not counted."""
        if degrees.sequence > 1:
            own = math.ceil(tokens / degrees.sequence)
            exchanged = EXCHANGE_TENSORS * own + (2 * tokens // degrees.ulysses if degrees.ring > 1 else 0)
            return self.activation_bytes(own, dtype) + BYTES[dtype] * self.dim * exchanged
        working = min(tokens, TOKENS_AT_ONCE) * max(
            WORKING_BYTES[dtype] * self.dim, BYTES[dtype] * (self.dim + 2 * self.ffn_dim)
        )
        return int(max(ATTENTION_BYTES[dtype] * self.dim * tokens, WAITING_BYTES[dtype] * self.dim * tokens + working))

    def context_bytes(self, frames: int, speakers: int, dtype: str) -> int:
        """Bytes of the keys and values of one condition in one block."""
        tokens = TEXT_TOKENS + (IMAGE_TOKENS if self.image_dim is not None else 0)
        tokens += self.audio_tokens * speakers * frames if self.audio_dim is not None else 0
        return 2 * tokens * self.dim * BYTES[dtype]


@dataclass(frozen=True)
class Checked:
    """A request that has passed all checks, its inputs, and the checkpoint's folder, None where that is not here."""

    request: ResolvedRequest
    inputs: Inputs
    checkpoint: Path | None


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


def transformer_sizes(request: GenerationRequest, checkpoint: Path | None) -> Sizes | HunyuanSizes:
    """Sizes from the checkpoint's own config where it is on this machine, else the published ones."""
    family = family_of(request.task)
    published: dict[str, Any] = dict(request.task.transformer)
    if request.model_id == TINY:
        published = family.tiny_sizes(request.task)
    elif checkpoint is not None:
        published |= family.transformer_sizes(checkpoint, request.task)
    return HunyuanSizes(**published) if request.task.layout == HUNYUAN else Sizes(**published)


def stages(
    request: ResolvedRequest,
    checkpoint: Path | None,
    sizes: Sizes | HunyuanSizes,
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
        + wide_bytes(request, sizes, dtype)
        + context
        + kept_bytes(request, own_terms, longest.tokens // degrees.sequence * sizes.dim * BYTES[dtype]),
    )
    vae = weights.pop("VAE")
    made = {name: Stage(size, size) for name, size in weights.items()}
    encoder = LLAMA_AND_CLIP if request.task.layout == HUNYUAN else UMT5
    made["text encoder"] = text_encoder_stage(encoder, weights["text encoder"], dtype, quantized)
    for part in ("encode", "decode") if request.task.inputs else ("decode",):
        if part == "decode":
            made["transformer"] = transformer  # between the two
        made[f"VAE {part}"] = Stage(vae, vae, vae_bytes(request, part, (1, 1)))
    return made


def wide_bytes(request: GenerationRequest, sizes: Sizes | HunyuanSizes, dtype: str) -> int:
    """Bytes of a block's matrices in full width, see `quantize.cache_dequantized`."""
    if request.quant != "fp8" or isinstance(sizes, HunyuanSizes):
        return 0
    return sizes.matrices()[0] // sizes.num_layers * BYTES[dtype]


def kept_bytes(request: GenerationRequest, terms: int, tokens: int) -> int:
    """Bytes that step caching keeps from step to step for tokens of so many bytes: two residuals of each condition.

    While the first block works there is a copy of what it began with.
    """
    return 0 if request.cache is None else (2 * terms + 1) * tokens


def component_bytes(request: GenerationRequest, checkpoint: Path | None, dtype: str) -> dict[str, int]:
    """Bytes of the weights of all components but the transformer."""
    parameters = component_parameters(request)
    others = checkpoint if request.base_model_id is None else Path(request.base_model_id)
    if others is not None and others.is_dir():
        *_, repository = family_of(request.task).repositories(request.task)
        weights = {name: repository.weights(others, name) for name in parameters}
        return {name: sum(file.stat().st_size for file in files) for name, files in weights.items()}
    if request.model_id == TINY:
        return dict.fromkeys(parameters, TINY_BYTES)
    return {name: count * BYTES[stage_dtype(request, name, dtype)] for name, count in parameters.items()}


def component_parameters(request: GenerationRequest) -> dict[str, int]:
    """Parameters of all published components but the transformer."""
    if request.task.layout == HUNYUAN:
        return {"text encoder": LLAMA_AND_CLIP.parameters, "VAE": HUNYUAN_VAE_PARAMETERS}
    parameters = {"text encoder": UMT5.parameters, "VAE": VAE_PARAMETERS}
    if "input_audio" in request.task.inputs:
        parameters |= {"image encoder": IMAGE_ENCODER_PARAMETERS, "audio encoder": AUDIO_ENCODER_PARAMETERS}
    return parameters


def text_encoder_stage(encoder: TextEncoderSizes, size: int, dtype: str, quantized: bool) -> Stage:
    """A text encoder of which `size` bytes are loaded."""
    saved = size * encoder.blocks * encoder.matrices // encoder.parameters * (BYTES[dtype] - 1) // BYTES[dtype]
    blocks = size * encoder.blocks * encoder.block // encoder.parameters - saved * quantized
    weights = size - saved * quantized
    return Stage(weights, weights - blocks * (encoder.blocks - STREAM_SLOTS) // encoder.blocks)


def vae_bytes(request: ResolvedRequest, part: str, tiles: Tiles) -> int:
    """Live bytes at the peak of the VAE's `part`, "encode" or "decode", weights not counted."""
    dtype, pixels = request.vae_dtype, request.height * request.width
    if request.task.layout == HUNYUAN:
        if part == "encode":
            tile = min(request.height, HUNYUAN_TILE_SIDE) * min(request.width, HUNYUAN_TILE_SIDE)
            return tile * HUNYUAN_VAE_ENCODE_TILE[dtype] + pixels * HUNYUAN_VAE_ENCODE
        return HUNYUAN_VAE_TILE[dtype] + pixels * HUNYUAN_VAE_DECODE[dtype]
    if tiles == (1, 1):
        return pixels * VAE_WHOLE[part][dtype]
    sides = (
        min(side, math.ceil(side / count) + VAE_HALO[part] * min(count - 1, 2))
        for side, count in zip((request.height, request.width), tiles, strict=True)
    )
    return pixels * VAE_SHARED[part][dtype] + math.prod(sides) * VAE_TILE[part][dtype]


def stage_dtype(request: GenerationRequest, name: str, dtype: str) -> str:
    """The dtype of a stage's weights in a run of `dtype`, those aside that are quantised."""
    if name.startswith("VAE"):
        return request.vae_dtype
    return "float32" if name.startswith("audio") else dtype


def output_bytes(request: ResolvedRequest) -> float:
    """About the bytes of the output at most."""
    return OUTPUT_BYTES[request.frame_folder] * request.frames_out * request.height * request.width
