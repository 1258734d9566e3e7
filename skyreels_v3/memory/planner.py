"""What a run will compute and how much room it needs, from the request alone. No torch, no weights.

Work is counted exactly (multiply-adds as two operations, matrix products and attention only). Activation memory is an
estimate: bytes for each token or pixel, counted tensor by tensor in the real models (a test counts them again), without
what the kernels need for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from skyreels_v3.checkpoints import hub
from skyreels_v3.runtime import expected_dtype
from skyreels_v3.sampling.guidance import Guidance, text_audio_guidance, text_guidance, text_image_guidance
from skyreels_v3.tasks import (
    CONFIG_DIR,
    LATENT_CHANNELS,
    PATCH_SIZE,
    REFERENCE_SLOTS,
    VAE_STRIDE,
    GenerationRequest,
    latent_frames,
    load_yaml,
    plan_roll_outs,
)
from skyreels_v3.windows import WINDOW_FRAMES, plan_windows

TEXT_TOKENS = 512
IMAGE_TOKENS = 257
BYTES = {"bfloat16": 2, "float32": 4}
# Parameters of the published components; the VAE is float32 always.
VAE_PARAMETERS = 126_892_531
TEXT_ENCODER_PARAMETERS = 5_680_910_336
IMAGE_ENCODER_PARAMETERS = 630_766_080
AUDIO_ENCODER_PARAMETERS = 94_371_712
# Live bytes at the peak of a forward: of a token for each channel of the model's width; of a pixel of the video's size.
ATTENTION_PEAK = {"bfloat16": 27, "float32": 37}
VAE_ENCODE_PEAK = 14_250
VAE_DECODE_PEAK = 18_200
TINY_BYTES = 1 << 20  # of each of the toy's components, roughly


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

    def parameters(self) -> tuple[int, int]:
        """Number of parameters, and how many of them are float32 in every case (the time embedding, mostly)."""
        dim, patch = self.dim, PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        block = 8 * dim**2 + 2 * dim * self.ffn_dim + self.ffn_dim + 21 * dim
        block_float32 = (4 + 2 + 6) * dim  # norms and modulation
        ends = dim * (patch * self.in_channels + 1) + (self.text_dim + 1) * dim + (dim + 1) * dim
        time = (self.freq_dim + 1) * dim + (dim + 1) * dim + 6 * (dim + 1) * dim
        head = (dim + 1) * patch * self.out_channels + 2 * dim
        float32 = self.num_layers * block_float32 + time + head
        everything = self.num_layers * block + ends + time + head
        for more, more_float32 in (self.image_parameters(), self.audio_parameters()):
            everything, float32 = everything + more, float32 + more_float32
        return everything, float32

    def image_parameters(self) -> tuple[int, int]:
        """As `parameters`, of the image embedding and attention."""
        if self.image_dim is None:
            return 0, 0
        norms = 2 * self.image_dim + 2 * self.dim + self.num_layers * self.dim
        layers = (self.image_dim + 1) * self.image_dim + (self.image_dim + 1) * self.dim
        return norms + layers + self.num_layers * 2 * (self.dim + 1) * self.dim, norms

    def audio_parameters(self) -> tuple[int, int]:
        """As `parameters`, of the audio projection and attention."""
        if self.audio_dim is None:
            return 0, 0
        entries = self.audio_window + self.audio_window // 2 * 2 + 4  # of the first frame's window and of later ones
        hidden, tokens = self.audio_hidden_dim, self.audio_tokens * self.audio_dim
        projection = hidden * (entries * self.audio_features + 2) + (hidden + 1) * hidden + (hidden + 1) * tokens
        norms = 2 * self.audio_dim + self.num_layers * 2 * self.dim
        block = 2 * (self.dim + 1) * self.dim + 2 * (self.audio_dim + 1) * self.dim
        return norms + projection + self.num_layers * block, norms

    def weight_bytes(self, dtype: str) -> int:
        everything, float32 = self.parameters()
        return (everything - float32) * BYTES[dtype] + float32 * BYTES["float32"]

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

    def activation_bytes(self, tokens: int, dtype: str) -> int:
        """Live bytes at the peak of a forward, weights not counted."""
        feed_forward = BYTES[dtype] * (self.dim + 2 * self.ffn_dim)
        return tokens * max(ATTENTION_PEAK[dtype] * self.dim, feed_forward)


@dataclass(frozen=True)
class PassPlan:
    """One run of the denoising loop."""

    latents: tuple[int, int, int, int, int]  # (B, C, F, H, W) generated
    tokens: int
    flop: int


@dataclass(frozen=True)
class Plan:
    """All that `--dry_run` prints."""

    request: GenerationRequest
    checkpoint: Path | None
    dtype: str
    passes: tuple[PassPlan, ...]
    forwards: int  # of one pass
    stages: Mapping[str, tuple[int, int]]  # name -> bytes of weights, bytes of activations


def plan(request: GenerationRequest, checkpoint: Path | None) -> Plan:
    """Work out a request whose inputs have been looked at."""
    assert request.height is not None and request.width is not None
    dtype = expected_dtype(request)
    sizes = transformer_sizes(request, checkpoint)
    forwards = request.num_inference_steps * len(guidance_of(request).terms)
    passes = tuple(
        PassPlan(
            (1, LATENT_CHANNELS, new, request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2]),
            tokens := (new + condition) * tokens_per_frame(request),
            forwards * sizes.forward_flop(tokens),
        )
        for new, condition in latent_frames_of_passes(request)
    )
    return Plan(request, checkpoint, dtype, passes, forwards, stages(request, checkpoint, sizes, passes, dtype))


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
    else:
        yield latent_frames(request.frames_out + 1), latent_frames(request.condition_frames)


def transformer_sizes(request: GenerationRequest, checkpoint: Path | None) -> Sizes:
    """Sizes from the checkpoint's own config where it is on this machine, else the published ones."""
    published = dict(request.task.transformer)
    if request.model_id == hub.TINY:
        toy = load_yaml(CONFIG_DIR / "tiny.yaml")
        more = toy["avatar_transformer"] if "input_audio" in request.task.inputs else {}
        return Sizes(**(toy["transformer"] | more))
    if checkpoint is not None:
        published |= hub.transformer_config(checkpoint / request.task.transformer_folder, published)
    return Sizes(**published)


def stages(
    request: GenerationRequest, checkpoint: Path | None, sizes: Sizes, passes: tuple[PassPlan, ...], dtype: str
) -> dict[str, tuple[int, int]]:
    """Weights and activations of each stage, in bytes."""
    assert request.height is not None and request.width is not None
    pixels = request.height * request.width
    parameters = {"text encoder": TEXT_ENCODER_PARAMETERS, "VAE": VAE_PARAMETERS}
    if "input_audio" in request.task.inputs:
        parameters |= {"image encoder": IMAGE_ENCODER_PARAMETERS, "audio encoder": AUDIO_ENCODER_PARAMETERS}
    weights = {name: count * BYTES[stage_dtype(name, dtype)] for name, count in parameters.items()}
    if checkpoint is not None:
        weights = hub.stored_bytes(checkpoint, request.task)
    elif request.model_id == hub.TINY:
        weights = dict.fromkeys(parameters, TINY_BYTES)
    tokens = max(made.tokens for made in passes)
    vae = weights.pop("VAE")
    return {
        **{name: (size, 0) for name, size in weights.items()},
        "VAE encode": (vae, pixels * VAE_ENCODE_PEAK),
        "transformer": (sizes.weight_bytes(dtype), sizes.activation_bytes(tokens, dtype)),
        "VAE decode": (vae, pixels * VAE_DECODE_PEAK),
    }


def stage_dtype(name: str, dtype: str) -> str:
    """The dtype of a stage's weights in a run of `dtype`."""
    return "float32" if name.startswith(("VAE", "audio")) else dtype


def describe(plan: Plan) -> str:
    """The plan as a table for people."""
    request = plan.request
    seconds = request.frames_out / request.task.fps
    size = f"{request.width} x {request.height}"
    video = f"{size}, {request.frames_out} new frames at {request.task.fps} fps ({seconds:.2f} s)"
    lines = [("task", f"{request.task.name}: {request.task.summary}"), ("video", video)]
    lines += [("checkpoint", request.model_id if plan.checkpoint is None else f"{plan.checkpoint} (on this machine)")]
    if plan.checkpoint is None and request.model_id != hub.TINY:
        lines += [("to fetch", f"from {request.model_source}: {', '.join(hub.download_patterns(request.task))}")]
    lines += [("steps", f"{request.num_inference_steps}, shift {request.shift:g}, {plan.forwards} forwards a pass")]
    for number, made in enumerate(plan.passes, start=1):
        work = f"{peta(made.flop / plan.forwards)} a forward, {peta(made.flop)} in all"
        lines += [(f"pass {number}", f"latents {list(made.latents)}, {made.tokens:,} tokens, {work}")]
    for name, (weights, activations) in plan.stages.items():
        lines += [
            (name, f"{giga(weights)} weights ({stage_dtype(name, plan.dtype)}), about {giga(activations)} activations")
        ]
    lines += [("peak", describe_peak(plan.stages)), ("output", str(request.output))]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def describe_peak(stages: Mapping[str, tuple[int, int]]) -> str:
    """The most memory that is in use at one time, with and without --offload."""
    components = {
        name.removesuffix(" decode").removesuffix(" encode"): weights for name, (weights, _) in stages.items()
    }  # the VAE has two stages
    everything = sum(components.values()) + max(activations for _, activations in stages.values())
    alone = max(weights + activations for weights, activations in stages.values())
    return f"about {giga(everything)} with all components on the device, {giga(alone)} with --offload"


def giga(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def peta(work: float) -> str:
    return f"{work / 1e15:.1f} PFLOP" if work >= 1e14 else f"{work / 1e12:.3g} TFLOP"
