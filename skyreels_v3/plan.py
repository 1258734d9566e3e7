"""What a run will compute and how much room it needs, from the request alone. No torch, no weights.

Work is counted exactly (multiply-adds as two operations, matrix products and attention only). Activation memory is an
estimate: bytes for each token or pixel, counted tensor by tensor in the real models (a test counts them again), without
what the kernels need for themselves.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from skyreels_v3.checkpoints import hub
from skyreels_v3.checkpoints.shapes import wan_shapes
from skyreels_v3.denoising.guidance import Guidance, text_audio_guidance, text_guidance, text_image_guidance
from skyreels_v3.hunyuan.sizes import HunyuanSizes
from skyreels_v3.media.files import existing_folder, giga
from skyreels_v3.memory.units import BYTES, STREAM_SLOTS
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED, ParallelConfig, Ranks, choose_degrees
from skyreels_v3.tasks import (
    CONFIG_DIR,
    HUNYUAN,
    LATENT_CHANNELS,
    MEMORY_MODES,
    PATCH_SIZE,
    REFERENCE_SLOTS,
    VAE_STRIDE,
    GenerationRequest,
    latent_frames,
    load_yaml,
    plan_roll_outs,
)
from skyreels_v3.wan.windows import WINDOW_FRAMES, plan_windows

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
TILINGS = ((1, 1), (1, 2), (2, 2), (2, 3))  # rows and columns; with more of them the halos cost more than is saved
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
        counts = {name: math.prod(shape) for name, shape in wan_shapes(self).items()}
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
    """All that `--dry_run` prints."""

    request: GenerationRequest
    checkpoint: Path | None
    dtype: str
    passes: tuple[PassPlan, ...]
    forwards: int  # of one pass
    stages: Mapping[str, Stage]
    streamed_from_host: int  # bytes of the transformer's blocks that are not kept on the device
    ranks: Ranks = SINGLE
    degrees: ParallelConfig = UNDIVIDED

    @property
    def shards(self) -> bool:
        """Whether the transformer's weights are divided; one process has nobody to divide them with."""
        return shards(self.request, self.degrees)

    def peak(self, mode: str, tiles: tuple[int, int] = (1, 1)) -> int:
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


def plan(
    request: GenerationRequest, checkpoint: Path | None, default_dtype: str = "float32", ranks: Ranks = SINGLE
) -> Plan:
    """Work out a request whose inputs have been looked at.

    Args:
        default_dtype: that of a request that names none.
        ranks: the process that this is a plan for, and the others that share the video.

    Raises:
        UserError: the processes cannot be divided as the request wants.
    """
    assert request.height is not None and request.width is not None
    dtype = request.dtype or default_dtype
    sizes = transformer_sizes(request, checkpoint)
    terms = len(guidance_of(request).terms)
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
        for new, condition in latent_frames_of_passes(request)
    )
    quantized = request.quant is not None
    streamed = max(0, sizes.blocks - request.stream_blocks) * sizes.block_bytes(dtype, quantized)
    made = stages(request, checkpoint, sizes, passes, dtype, degrees)
    return Plan(request, checkpoint, dtype, passes, forwards, made, streamed, ranks, degrees)


def shards(request: GenerationRequest, degrees: ParallelConfig) -> bool:
    """See `Plan.shards`."""
    return request.shard_weights and degrees.world_size > 1


def guidance_of(request: GenerationRequest) -> Guidance:
    """The guidance that the task's pipeline will use."""
    if "ref_imgs" in request.task.inputs:
        return text_image_guidance(request.guidance_scale, request.image_guidance_scale)
    if "input_audio" in request.task.inputs:
        return text_audio_guidance(request.text_guidance_scale, request.audio_guidance_scale)
    return text_guidance(request.guidance_scale)


def tokens_per_frame(request: GenerationRequest) -> int:
    assert request.height is not None and request.width is not None
    pixels = request.height * request.width
    return pixels // (VAE_STRIDE[1] * VAE_STRIDE[2] * PATCH_SIZE[1] * PATCH_SIZE[2])


def latent_frames_of_passes(request: GenerationRequest) -> Iterator[tuple[int, int]]:
    """Generated and condition latent frames of each pass."""
    if request.task.name == "reference_to_video":
        yield latent_frames(request.frames_out), REFERENCE_SLOTS
    elif request.task.name == "single_shot_extension":
        for new in plan_roll_outs(request.duration):
            yield new, latent_frames(request.condition_frames)
    elif request.task.name == "talking_avatar":
        windows = len(plan_windows(request.frames_out).windows)
        for _ in range(max(1, windows) if request.input_video else 1 + windows):  # a dubbed clip needs no key frames
            yield latent_frames(WINDOW_FRAMES), 0
    elif request.task.layout == HUNYUAN:
        yield latent_frames(request.frames_out), 0
    else:
        yield latent_frames(request.frames_out + 1), latent_frames(request.condition_frames)


def transformer_sizes(request: GenerationRequest, checkpoint: Path | None) -> Sizes | HunyuanSizes:
    """Sizes from the checkpoint's own config where it is on this machine, else the published ones."""
    published = dict(request.task.transformer)
    if request.model_id == hub.TINY:
        published = toy_sizes(request)
    elif checkpoint is not None:
        published |= hub.transformer_config(checkpoint / request.task.transformer_folder, published)
    return HunyuanSizes(**published) if request.task.layout == HUNYUAN else Sizes(**published)


def toy_sizes(request: GenerationRequest) -> dict[str, int]:
    """Sizes of the toy's transformer."""
    toy = load_yaml(CONFIG_DIR / "tiny.yaml")
    if request.task.layout == HUNYUAN:
        sizes = toy["hunyuan"]["transformer"] | {"in_channels": request.task.transformer["in_channels"]}
        return {name: sizes[name] for name in request.task.transformer}
    return toy["transformer"] | (toy["avatar_transformer"] if "input_audio" in request.task.inputs else {})


def stages(
    request: GenerationRequest,
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
    own_terms = math.ceil(len(guidance_of(request).terms) / degrees.cfg)
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
    """Bytes of a block's matrices in full width, see `quantize.keep_wide_weights`."""
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
    hunyuan, parameters = request.task.layout == HUNYUAN, component_parameters(request)
    others = checkpoint if request.base_model_id is None else Path(request.base_model_id)
    if others is not None and (not hunyuan or others.is_dir()):
        return hub.stored_bytes(others, request.task)
    if request.model_id == hub.TINY:
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


def vae_bytes(request: GenerationRequest, part: str, tiles: tuple[int, int]) -> int:
    """Live bytes at the peak of the VAE's `part`, "encode" or "decode", weights not counted."""
    assert request.height is not None and request.width is not None
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


def describe(plan: Plan, denoising: float | None = None) -> str:
    """The plan as a table for people; `denoising`: the seconds that it will take, if that is known."""
    request = plan.request
    size, length = f"{request.width} x {request.height}", request.frames_out / request.task.fps
    video = f"{size}, {request.frames_out} new frames at {request.task.fps} fps ({length:.2f} s)"
    lines = [("task", f"{request.task.name}: {request.task.summary}"), ("video", video)]
    lines += [("checkpoint", request.model_id if plan.checkpoint is None else f"{plan.checkpoint} (on this machine)")]
    if plan.checkpoint is None and request.model_id != hub.TINY:
        lines += [("to fetch", f"from {request.model_source}: {', '.join(hub.download_patterns(request.task))}")]
    if request.task.layout == HUNYUAN and request.model_id != hub.TINY:
        lines += [describe_base(request)]
    if to_fetch := missing_repositories(plan):
        lines += [("download", describe_download(plan, to_fetch))]
    shift = "the scheduler's shift" if request.shift is None else f"shift {request.shift:g}"
    lines += [("steps", f"{request.num_inference_steps}, {shift}, {plan.forwards} forwards a pass")]
    for number, made in enumerate(plan.passes, start=1):
        work = f"{peta(made.flop / plan.forwards)} a forward, {peta(made.flop)} in all"
        lines += [(f"pass {number}", f"latents {list(made.latents)}, {made.tokens:,} tokens, {work}")]
    if denoising is not None:
        lines += [("time", f"about {duration(denoising)} of denoising, as fast as it was here before")]
    for name, stage in plan.stages.items():
        quantized = f", {request.quant}" if request.quant and name in ("transformer", "text encoder") else ""
        weights = f"{giga(stage.weights)} weights ({stage_dtype(request, name, plan.dtype)}{quantized})"
        lines += [(name, weights + (f", about {giga(stage.activations)} activations" if stage.activations else ""))]
    if plan.degrees.world_size > 1:
        lines += [("processes", f"{plan.degrees.world_size}: {plan.degrees}; memory is that of one of them")]
    lines += [("memory", describe_memory(plan)), ("output", str(request.output)), ("disk", describe_disk(request))]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def describe_base(request: GenerationRequest) -> tuple[str, str]:
    """A line on where V1's encoders and VAE come from."""
    name = request.base_model_id or request.task.base_model_id
    if Path(name).is_dir():
        return "base model", f"{name} (on this machine)"
    return "base model", f"{name}, to fetch: {', '.join(hub.base_patterns())}"


def missing_repositories(plan: Plan) -> dict[str, list[str]]:
    """The hub's repositories of which something is to be downloaded, and the patterns of its files."""
    request, found = plan.request, {}
    if request.model_id == hub.TINY:
        return {}
    if plan.checkpoint is None:
        found[request.model_id] = hub.download_patterns(request.task)
    base = request.base_model_id or request.task.base_model_id
    if request.task.layout == HUNYUAN and not Path(base).is_dir():
        found[base] = hub.base_patterns()
    return found


def describe_download(plan: Plan, repositories: Mapping[str, list[str]]) -> str:
    """How much is to be downloaded, how much of that is here, and whether there is room for the rest."""
    request = plan.request
    size = transformer_sizes(request, None).weight_bytes("bfloat16") if request.model_id in repositories else 0
    if request.task.layout != HUNYUAN or any(name != request.model_id for name in repositories):
        size += sum(published_bytes(request).values())
    folder, here = hub.downloaded(request.model_source, repositories)
    free = shutil.disk_usage(folder if folder.exists() else existing_folder(folder)).free
    begun = f"{giga(here)} of it" if here else "nothing"
    text = f"about {giga(size)} in bfloat16, {begun} is here already; {giga(free)} free in {folder}"
    return (
        text if size - here <= free else f"{text}: too little; set {hub.CACHES[request.model_source]} to another folder"
    )


def published_bytes(request: GenerationRequest) -> dict[str, int]:
    """About the bytes of the published files of all components but the transformer."""
    sizes = {
        name: count * BYTES[stage_dtype(replace(request, vae_dtype="float32"), name, "bfloat16")]
        for name, count in component_parameters(request).items()
    }
    return sizes | ({"image encoder": IMAGE_ENCODER_FILE_BYTES} if "image encoder" in sizes else {})


def output_bytes(request: GenerationRequest) -> float:
    """About the bytes of the output at most."""
    assert request.height is not None and request.width is not None
    return OUTPUT_BYTES[request.frame_folder] * request.frames_out * request.height * request.width


def describe_disk(request: GenerationRequest) -> str:
    """How much room there is for the output."""
    assert request.output is not None
    free, need = shutil.disk_usage(existing_folder(request.output)).free, output_bytes(request)
    return f"{giga(free)} free for the output" + (f": it may need {giga(need)}" if need > free else "")


def describe_memory(plan: Plan) -> str:
    """The most memory that is in use at one time, for each --memory; in brackets with the VAE in tiles."""
    if plan.request.task.layout == HUNYUAN:  # its VAE always works in tiles
        return f"about {', '.join(f'{mode} {giga(plan.peak(mode))}' for mode in MEMORY_MODES)} on the device at most"
    told = (
        f"{mode} {giga(plan.peak(mode, TILINGS[0]))} ({giga(plan.peak(mode, TILINGS[-1]))})" for mode in MEMORY_MODES
    )
    return f"about {', '.join(told)} on the device at most; in brackets with the VAE in tiles, made when needed"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def peta(work: float) -> str:
    if work < 1e11:
        return f"{work / 1e9:.3g} GFLOP"
    return f"{work / 1e15:.1f} PFLOP" if work >= 1e14 else f"{work / 1e12:.3g} TFLOP"
