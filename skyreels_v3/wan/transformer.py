"""`SkyReelsTransformer3DModel`: the one transformer behind all SkyReels V3 tasks.

It is a Wan 2.1 DiT under diffusers' parameter names. The tasks differ only in data: where the segments are on the time
axis, whether timesteps are per sample or per latent frame, and which conditions are given.

Dtypes: matrix products in the dtype of the weights (normally bfloat16); normalization, modulation, time embedding and
output head in float32; rotary angles in float64. Casts are explicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import attention as diffusers_attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn

import skyreels_v3.vector_kernels  # noqa: F401  first of all
from skyreels_v3.attention.backends import AttentionFn, attention_map, dispatched, sdpa
from skyreels_v3.checkpoints.key_maps import KeyMap
from skyreels_v3.wan.key_maps import NATIVE_TRANSFORMER, TOKENS_AT_ONCE
from skyreels_v3.wan.rope import THETA, Rotary, Segment, apply_rotary, rotary_tables, rotations

# Normalization and modulation: float32 inside, for any dtype of activations and weights


class FP32RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 with the result in x's dtype, the counterpart of diffusers' FP32LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift for tokens x (B, L, D); shift and scale (B, F, D) each apply to L/F tokens."""
    x = x.unflatten(1, (shift.shape[1], -1))  # (B, F, L/F, D)
    return torch.addcmul(shift.unsqueeze(2), x, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in float32, returned in x's dtype; x and update (B, L, D), gate (B, F, D)."""
    frames = (gate.shape[1], -1)
    total = torch.addcmul(x.float().unflatten(1, frames), gate.unsqueeze(2), update.float().unflatten(1, frames))
    return total.flatten(1, 2).type_as(x)


# Conditions, projected to the blocks' width, under diffusers' names

LATENT_STRIDE = 4  # video frames per latent frame, except for the first


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding (..., channels) of `timestep` in float32 on the CPU, cosines first.

    The angles are float64, which every CPU has. Keep timesteps on the CPU, so that nothing waits for the device.
    """
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = timestep.detach().to("cpu", torch.float64)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class ConditionEmbedding(WanTimeTextImageEmbedding):
    """diffusers' layers that turn timesteps into modulation and bring text and image tokens to the blocks' width.

    The time embedding, which scales every token of every block, is computed in float32 unless its weights were cast.
    """

    def forward(  # type: ignore[override]
        self, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Timesteps (B, F), text (B, 512, text_dim) and image (B, 257, image_dim) tokens.

        Returns:
            time embedding (B, F, D) and modulation (B, F, 6, D), float32; text (B, 512, D) and image (B, 257, D).
        """
        first = self.time_embedder.linear_1
        time = self.time_embedder(sinusoid(timestep, first.in_features).to(text.device, first.weight.dtype))
        modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        image = None if image is None else cast(nn.Module, self.image_embedder)(image)
        return time.float(), modulation.float(), self.text_embedder(text), image


class AudioProjection(nn.Module):
    """Projects windows of audio features to `tokens` audio tokens of width `audio_dim` per latent frame.

    The first latent frame is one video frame and sees that frame's whole window. A later one is four video frames and
    sees the past half and center of the first one's window, the centers of the middle two, and the center and future
    half of the last.
    """

    def __init__(self, window: int, features: int, hidden: int, tokens: int, audio_dim: int) -> None:
        super().__init__()
        self.center = window // 2
        self.tokens = tokens
        self.first_frame = nn.Linear(window * features, hidden)
        self.later_frames = nn.Linear((2 * (self.center + 1) + LATENT_STRIDE - 2) * features, hidden)
        self.shared = nn.Linear(hidden, hidden)
        self.to_tokens = nn.Linear(hidden, tokens * audio_dim)
        self.norm = FP32LayerNorm(audio_dim)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, P, F, window, layers, channels), P speakers, 4k+1 video frames -> (B, k+1, P*tokens, audio_dim)."""
        speakers = audio.shape[1]
        audio = audio.flatten(0, 1).flatten(3)  # (B*P, F, window, features)
        later = audio[:, 1:].unflatten(1, (-1, LATENT_STRIDE))  # (B*P, k, 4, window, features)
        past, future = later[:, :, 0, : self.center + 1], later[:, :, -1, self.center :]
        later = torch.cat((past, later[:, :, 1:-1, self.center], future), dim=2)  # (B*P, k, entries, features)
        first = F.relu(self.first_frame(audio[:, :1].flatten(2)))
        later = F.relu(self.later_frames(later.flatten(2)))
        hidden = F.relu(self.shared(torch.cat((first, later), dim=1)))
        tokens = self.norm(self.to_tokens(hidden).unflatten(-1, (self.tokens, -1)))
        return tokens.unflatten(0, (-1, speakers)).transpose(1, 2).flatten(2, 3)


# The three attentions of a block. Each calls an `AttentionFn` that is set from outside

# Positions on the speakers' rotary axis: ranges of the first and second speaker's tokens, the background between them,
# and the positions of both speakers' audio
SPEAKER_RANGES = ((0.0, 4.0), (20.0, 24.0))
BACKGROUND_POSITION = 12.0
SPEAKER_POSITIONS = (2.0, 22.0)
MAP_CHUNK = 4096  # tokens whose attention weights are alive at a time

KeyValue = tuple[Tensor, Tensor]  # (B, T, N, D) each
SpeakerFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # see `speaker_positions`


class Attention(nn.Module):
    """The layers that all three attentions share; `eps` is for the norms of queries and keys, None for no norms."""

    def __init__(self, dim: int, heads: int, condition_dim: int, eps: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.attention: AttentionFn = sdpa
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(condition_dim, dim)
        self.to_v = nn.Linear(condition_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if eps is not None:
            self.norm_q = FP32RMSNorm(dim, eps=eps)  # over the whole width, not per head
            self.norm_k = FP32RMSNorm(dim, eps=eps)


class SelfAttention(Attention):
    """Attention among all video tokens, with rotary positions."""

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, N, D) of tokens x (B, L, N*D)."""
        heads = (self.heads, -1)
        query = apply_rotary(self.norm_q(self.to_q(x).float()).unflatten(-1, heads), rotary).type_as(x)
        key = apply_rotary(self.norm_k(self.to_k(x).float()).unflatten(-1, heads), rotary).type_as(x)
        return query, key, self.to_v(x).unflatten(-1, heads)


class CrossAttention(Attention):
    """Attention to the text and, if the checkpoint has it, to the image; the sum of both."""

    def __init__(self, dim: int, heads: int, eps: float, with_image: bool) -> None:
        super().__init__(dim, heads, dim, eps)
        if with_image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = FP32RMSNorm(dim, eps=eps)

    def keys_values(self, text: Tensor, image: Tensor | None) -> list[KeyValue]:
        """Keys and values of text (B, 512, D) and, if given, image (B, 257, D) tokens."""
        pairs = [(self.norm_k(self.to_k(text)), self.to_v(text))]
        if image is not None:
            pairs.append((self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)))
        return [(key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))) for key, value in pairs]

    def forward(self, x: Tensor, keys_values: Sequence[KeyValue]) -> Tensor:
        """The update (B, L, D) of tokens x."""
        query = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))
        out, *more = (self.attention(query, key, value) for key, value in keys_values)
        return self.to_out[0](sum(more, out).flatten(2))


class AudioAttention(Attention):
    """Attention of each latent frame's tokens to the audio tokens of that frame."""

    def keys_values(self, audio: Tensor, two_people: bool) -> KeyValue:
        """Keys and values (B, F, T, N, D) of audio tokens (B, F, T, A).

        With two people, the first person's tokens precede the second's, and keys are rotated to the position of their
        person on the speakers' axis.
        """
        key, value = (layer(audio).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        if two_people:
            position = torch.tensor(SPEAKER_POSITIONS, device=audio.device).repeat_interleave(audio.shape[2] // 2)
            rotary = speaker_rotary(position[:, None], key.shape[-1])
            key = apply_rotary(key.flatten(0, 1), rotary).type_as(key).view_as(key)
        return key, value

    def forward(self, x: Tensor, keys_values: KeyValue, positions: Tensor | None) -> Tensor:
        """The update (B, L, D) of tokens x, L = F * tokens per frame.

        `positions` (B, L, N), with two people, are those of each token and head on the speakers' axis.
        """
        key, value = keys_values
        frames = key.shape[1]
        query = self.to_q(x).unflatten(-1, (self.heads, -1))
        if positions is not None:
            query = apply_rotary(query, speaker_rotary(positions, query.shape[-1])).type_as(x)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)  # (B*F, L/F, N, D)
        out = self.attention(query, key.flatten(0, 1), value.flatten(0, 1)).flatten(2)  # (B*F, L/F, N*D)
        return self.to_out[0](out.unflatten(0, (-1, frames)).flatten(1, 2))


def speaker_rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Rotations (..., head_dim/2, 2) for real-valued positions (...) on the speakers' axis."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    return rotations(positions[..., None] / THETA**exponents)


def head_positions(positions: Tensor, frames: int, heads: int) -> Tensor:
    """Positions (B, L) of tokens -> (B, L, N): the position that each head rotates its queries to.

    The published model pairs frames and heads by their order in memory: head n of frame f takes the positions of frame
    (f * N + n) modulo F, not those of its own frame. This is known only from recordings of its outputs.
    """
    frame = torch.arange(frames, device=positions.device)[:, None]
    source = (frame * heads + torch.arange(heads, device=positions.device)) % frames  # (F, N)
    return positions.unflatten(1, (frames, -1))[:, source].transpose(2, 3).flatten(1, 2)


def speaker_positions(query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
    """Position (B, L) of every token on the speakers' axis, from queries and keys (B, L, N, D) of all tokens.

    A token belongs to the region of the first frame that it attends to most; `masks` (3, S) are those of person one,
    person two and the background. A person's tokens are spread over that person's range by how much they attend to it.
    """
    weights = region_weights(query, key[:, : masks.shape[1]], masks)
    return positions_between(weights, weights.amin(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True))


def region_weights(query: Tensor, first_frame_key: Tensor, masks: Tensor) -> Tensor:
    """Mean attention weight (B, 3, L) of each token inside each region of the first frame."""
    regions = masks.float() / masks.sum(dim=1, keepdim=True).clamp(min=1)  # the background may be empty
    # in chunks: the weights of all tokens would be the largest tensor of a forward
    chunks = query.split(MAP_CHUNK, dim=1)
    return torch.cat([torch.einsum("bls,ps->bpl", attention_map(q, first_frame_key), regions) for q in chunks], dim=-1)


def positions_between(weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Positions (B, L) from region weights (B, 3, L) and their extremes (B, 3, 1) among all tokens."""
    spread = (weights - low) / (high - low)
    positions = torch.full_like(spread, BACKGROUND_POSITION)
    for person, (start, end) in enumerate(SPEAKER_RANGES):
        positions[:, person] = start + spread[:, person] * (end - start)
    return positions.gather(1, weights.argmax(dim=1, keepdim=True)).squeeze(1)


# A block: self-attention, text (and image) attention, audio attention, feed-forward.
#
# Only self-attention (and `speaker_positions`) needs all tokens at once. The rest treats each token (for audio each
# frame) independently and runs on a chunk of tokens at a time, so that its float32 and feed-forward temporaries stay
# small: the peak is the tokens, their queries, keys and values, and the output of attention.


class Context(NamedTuple):
    """What all blocks attend to, projected to their width.

    Attributes:
        text: (B, 512, D).
        image: (B, 257, D), or None.
        audio: (B, F, T, audio_dim), or None.
        speaker_masks: (3, S) over the S tokens of a frame: person one, person two, background; None for one speaker.
    """

    text: Tensor
    image: Tensor | None
    audio: Tensor | None
    speaker_masks: Tensor | None


class FeedForward(diffusers_attention.FeedForward):
    """diffusers' layer with an in-place activation: the hidden tokens, the largest tensor, exist once."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, inner_dim=hidden_dim, activation_fn="gelu-approximate")

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        expand, _, contract = cast(Iterable[Any], self.net)
        return contract(torch.ops.aten.gelu_(expand.proj(x), approximate=expand.approximate))


class TransformerBlock(nn.Module):
    """A Wan 2.1 block with optional image and audio attention."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, with_image: bool, audio_dim: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads, dim, eps)
        self.norm2 = FP32LayerNorm(dim, eps=eps)
        self.attn2 = CrossAttention(dim, heads, eps, with_image)
        self.norm_audio: Any = None if audio_dim is None else FP32LayerNorm(dim, eps=eps)
        self.attn_audio: Any = None if audio_dim is None else AudioAttention(dim, heads, audio_dim)
        self.norm3 = FP32LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.speaker_positions: SpeakerFn = speaker_positions

    def forward(self, x: Tensor, context: Context, modulation: Tensor, rotary: Rotary) -> Tensor:
        """Tokens x (B, L, D) and modulation (B, F, 6, D), F = 1 or the latent frames, -> (B, L, D).

        Without gradients x is overwritten.
        """
        modulation = self.scale_shift_table.unsqueeze(1) + modulation
        frames = modulation.shape[1] if context.audio is None else context.audio.shape[1]
        spans = [*token_spans(x.shape[1], frames)]
        query, key, value = self.projected(x, modulation, rotary, spans)
        positions = None
        if context.speaker_masks is not None:
            positions = self.speaker_positions(query.detach(), key.detach(), context.speaker_masks)
            positions = head_positions(positions, frames, query.shape[2])
        attended = self.attn1.attention(query, key, value)
        del query, key, value
        text = self.attn2.keys_values(context.text, context.image)
        audio = None if context.audio is None else self.attn_audio.keys_values(context.audio, positions is not None)
        out = torch.empty_like(x) if torch.is_grad_enabled() else x
        for tokens, part in spans:
            audio_part = None if audio is None else (audio[0][:, part], audio[1][:, part])
            position_part = None if positions is None else positions[:, tokens]
            out[:, tokens] = self.finish(
                x[:, tokens], attended[:, tokens], of_frames(modulation, part), text, audio_part, position_part
            )
        return out

    def projected(
        self, x: Tensor, modulation: Tensor, rotary: Rotary, spans: Sequence[tuple[slice, slice]]
    ) -> Sequence[Tensor]:
        """Queries, keys and values (B, L, N, D) of all tokens."""
        whole = [x.new_empty(*x.shape[:2], self.attn1.heads, x.shape[2] // self.attn1.heads) for _ in range(3)]
        for tokens, part in spans:
            out = [tensor[:, tokens] for tensor in whole]
            self.project(x[:, tokens], of_frames(modulation, part), rotary[tokens], out)
        return whole

    def project(self, x: Tensor, modulation: Tensor, rotary: Rotary, out: Sequence[Tensor]) -> None:
        """Everything before self-attention: queries, keys and values (B, l, N, D) of a chunk of tokens x (B, l, D).

        They are written to `out`, so that compiled code needs no copies.
        """
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        made = self.attn1.project(modulate(self.norm1(x.float()), shift, scale).type_as(x), rotary)
        for target, values in zip(out, made, strict=True):
            target.copy_(values)

    def finish(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text: Sequence[KeyValue],
        audio: KeyValue | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Everything after self-attention: new values of a chunk of tokens x (B, l, D), given attended (B, l, N, D)."""
        gate1, shift2, scale2, gate2 = modulation[:, :, 2:].unbind(2)
        x = gated_residual(x, gate1, self.attn1.to_out[0](attended.flatten(2)))
        x = x + self.attn2(self.norm2(x), text)
        if audio is not None:
            x = x + self.attn_audio(self.norm_audio(x), audio, positions)
        normed = modulate(self.norm3(x.float()), shift2, scale2).type_as(x)
        return gated_residual(x, gate2, self.ffn(normed))


def token_spans(tokens: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of tokens, and the frames that they belong to; with several frames, chunks are whole frames."""
    unit = tokens // frames if frames > 1 else 1
    step = max(1, TOKENS_AT_ONCE // unit)
    for start in range(0, tokens // unit, step):
        end = min(start + step, tokens // unit)
        yield slice(start * unit, end * unit), slice(start, end)


def of_frames(modulation: Tensor, frames: slice) -> Tensor:
    """The modulation (B, F, ..., D) of some frames; unchanged if one is shared by all frames."""
    return modulation if modulation.shape[1] == 1 else modulation[:, frames]


# The model


class SkyReelsTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity (noise minus data) of latent video.

    diffusers' tools for `WanTransformer3DModel` work here too: `from_pretrained` in any dtype, casts, layerwise
    casting, group offloading, accelerate's hooks, `compile_repeated_blocks`, attention backends, LoRA, gradient
    checkpointing. Refused with NotImplementedError or ValueError:

    - `enable_cache`: its hooks compare a block's input with its output, and blocks overwrite their input to save
      memory. `skyreels_v3.denoising.step_cache` caches steps.
    - context parallelism (there is no `_cp_plan`): such a plan splits one sequence evenly, which segments are not.
      `skyreels_v3.parallel` divides the tokens.
    - `from_single_file`: diffusers' key maps are private. `skyreels_v3.wan.checkpoint.load_transformer` reads Wan's
      native names.

    Args:
        patch_size: frames, rows and columns of a token.
        num_attention_heads, attention_head_dim: their product is the model's width D.
        in_channels, out_channels: latent channels in (16; avatar 36 with mask and condition) and out.
        text_dim, freq_dim, ffn_dim: widths of the text tokens, the timestep sinusoid and the feed-forward layer.
        num_layers: number of blocks.
        eps: of all norms except those of the embeddings.
        image_dim: width of the CLIP tokens, None for models without image attention.
        audio_window, audio_features, audio_hidden_dim, audio_tokens, audio_dim: feature vectors per video frame, values
            per vector (layers x channels), and sizes of the audio projection; audio_dim None for models without audio.
    """

    native_names: ClassVar[KeyMap] = NATIVE_TRANSFORMER
    # diffusers declares these with other types
    config_name: Any
    _repeated_blocks: Any = ["TransformerBlock"]
    _no_split_modules: Any = ["TransformerBlock"]
    _keep_in_fp32_modules: Any = [
        *("time_embedder", "time_proj", "scale_shift_table", "proj_out", "norm", "norm1", "norm2", "norm3"),
        *("norm_q", "norm_k", "norm_added_k", "norm_audio"),
    ]
    _skip_layerwise_casting_patterns: Any = ["patch_embedding", "condition_embedder", "norm"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        eps: float = 1e-6,
        image_dim: int | None = None,
        audio_window: int = 5,
        audio_features: int = 12 * 768,
        audio_hidden_dim: int = 512,
        audio_tokens: int = 32,
        audio_dim: int | None = None,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        kernel = cast(tuple[int, int, int], tuple(patch_size))
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel, kernel)
        self.condition_embedder = ConditionEmbedding(dim, freq_dim, 6 * dim, text_dim, image_dim)
        if audio_dim is not None:
            self.audio_projection = AudioProjection(
                audio_window, audio_features, audio_hidden_dim, audio_tokens, audio_dim
            )
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_attention_heads, ffn_dim, eps, image_dim is not None, audio_dim)
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        segments: Sequence[Segment],
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        audio: Tensor | None = None,
        speaker_masks: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Velocities (B, out_channels, F, H, W) of all segments, float32.

        Args:
            segments: latents (B, in_channels, F, H, W) each, all of the same height and width.
            timestep: (B,) one per sample, or (B, F) one per latent frame of all segments in order.
            text: (B, 512, text_dim) UMT5 states; padding is zeros, and is attended to.
            image: (B, 257, image_dim) CLIP states.
            audio: (B, P, F, window, layers, channels) wav2vec2 states of P speakers around each of 4k+1 video frames.
            speaker_masks: (3, H, W) in latent pixels, only with two speakers: first, second, background.
        """
        dtype = self.patch_embedding.weight.dtype
        tokens = [self.patch_embedding(part.latents.to(dtype)).flatten(2).transpose(1, 2) for part in segments]
        lengths = [part.shape[1] for part in tokens]
        hidden = torch.cat(tokens, dim=1)  # (B, L, D)
        del tokens
        time, modulation, text, image = self.condition_embedder(
            timestep.reshape(len(timestep), -1), text.to(dtype), None if image is None else image.to(dtype)
        )
        if audio is not None:
            assert (audio.shape[1] > 1) == (speaker_masks is not None), "speaker_masks are for two speakers"
            audio = self.audio_projection(audio.to(dtype))
        if speaker_masks is not None:  # a token takes the value of its first latent pixel
            _, rows, columns = self.config["patch_size"]
            speaker_masks = (speaker_masks[:, ::rows, ::columns] > 0).flatten(1).float()  # (3, S)
        context = Context(text, image, audio, speaker_masks)
        rotary = rotary_tables(segments, self.config["patch_size"], self.config["attention_head_dim"])
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                checkpoint: Any = self._gradient_checkpointing_func
                hidden = checkpoint(block, hidden, context, modulation, rotary)
            else:
                hidden = block(hidden, context, modulation, rotary)
        out = self.head(hidden, time).split(lengths, dim=1)
        return tuple(self.unpatchify(part, segment) for part, segment in zip(out, segments, strict=True))

    def head(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Tokens (B, L, D) and time embedding (B, F, D) -> (B, L, out_channels * patch), float32."""
        modulation = self.scale_shift_table.unsqueeze(1) + time.unsqueeze(2)
        pieces = []
        for tokens, frames in token_spans(hidden.shape[1], modulation.shape[1]):
            shift, scale = of_frames(modulation, frames).unbind(2)
            normed = modulate(self.norm_out(hidden[:, tokens].float()), shift, scale)
            pieces.append(self.proj_out(normed.to(self.proj_out.weight.dtype)).float())
        return torch.cat(pieces, dim=1)

    def unpatchify(self, tokens: Tensor, segment: Segment) -> Tensor:
        """Tokens (B, L, C * patch) of one segment -> (B, C, F, H, W)."""
        patch = self.config["patch_size"]
        frames, rows, columns = (size // step for size, step in zip(segment.latents.shape[2:], patch, strict=True))
        grid = tokens.reshape(tokens.shape[0], frames, rows, columns, *patch, -1)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def set_attention(self, attention: AttentionFn, cross_attention: AttentionFn | None = None) -> None:
        """Set the attention functions.

        Args:
            attention: among video tokens.
            cross_attention: to the conditions; `attention` if None.
        """
        for block in cast(Iterable[Any], self.blocks):
            block.attn1.attention = attention
            for module in (block.attn2, block.attn_audio):
                if module is not None:
                    module.attention = cross_attention or attention

    def set_attention_backend(self, backend: str) -> None:
        """Use one of diffusers' attention backends.

        Raises:
            ValueError: there is no such backend.
            RuntimeError: its package is missing or too old.
        """
        self.set_attention(dispatched(backend.lower()))

    def reset_attention_backend(self) -> None:
        """Use torch's scaled_dot_product_attention again."""
        self.set_attention(sdpa)

    def compilable(self) -> Iterator[tuple[object, str]]:
        """The code before and after self-attention, see `families.Transformer`."""
        for block in self.blocks:
            yield block, "project"
            yield block, "finish"

    def enable_cache(self, config: Any) -> NoReturn:
        """Not supported, see the class."""
        raise NotImplementedError("blocks overwrite their input; use skyreels_v3.denoising.step_cache.StepCache")

    @classmethod
    def from_single_file(cls, *_: Any, **__: Any) -> NoReturn:
        """Not supported, see the class."""
        raise NotImplementedError("use skyreels_v3.wan.checkpoint.load_transformer, which reads Wan's native names")
