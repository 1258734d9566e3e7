"""`SkyReelsTransformer3DModel`: the one transformer behind all SkyReels V3 tasks.

It is a Wan 2.1 DiT under diffusers' parameter names, so that LoRAs, `save_pretrained` and the library's hooks work on
it. What differs between the tasks is data: where the segments stand, whether a timestep holds for the sample or for a
frame, which conditions are handed in.

Dtypes: matrix products in the dtype of the weights (bfloat16 as a rule); normalisation, modulation, the time embedding
and the output head in float32 (see `float32_parameters`); rotary angles in float64. Casts are explicit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from skyreels_v3.attention.backends import AttentionFn
from skyreels_v3.wan.transformer.attention import (
    AudioAttention,
    CrossAttention,
    SelfAttention,
    SpeakerFn,
    speaker_positions,
)
from skyreels_v3.wan.transformer.audio_projection import AudioProjection
from skyreels_v3.wan.transformer.block import Context, TransformerBlock, of_frames, token_spans
from skyreels_v3.wan.transformer.embeddings import ConditionEmbedding
from skyreels_v3.wan.transformer.norms import layer_norm, modulate
from skyreels_v3.wan.transformer.rope import Segment, rotary_tables


class SkyReelsTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity (noise minus data) of latent video.

    Args:
        patch_size: frames, rows and columns of a token.
        num_attention_heads, attention_head_dim: their product is the model's width D.
        in_channels, out_channels: latent channels in (16; avatar 36 with mask and condition) and out.
        text_dim, freq_dim, ffn_dim: widths of the text tokens, the timestep sinusoid and the feed-forward layer.
        num_layers: number of blocks.
        eps: of all norms but the embeddings'.
        image_dim: width of the CLIP tokens, None for models without image attention.
        audio_window, audio_features, audio_hidden_dim, audio_tokens, audio_dim: features a video frame sees, values of
            one feature (layers x channels), and sizes of the audio projection; audio_dim None for models without sound.
    """

    _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock"]
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["time_embedder", "time_proj", "scale_shift_table", "norm", "proj_out"]

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
        kernel = tuple(patch_size)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=kernel, stride=kernel)
        self.condition_embedder = ConditionEmbedding(dim, freq_dim, text_dim, image_dim)
        if audio_dim is not None:
            self.audio_projection = AudioProjection(
                audio_window, audio_features, audio_hidden_dim, audio_tokens, audio_dim
            )
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_attention_heads, ffn_dim, eps, image_dim is not None, audio_dim)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def set_attention(
        self,
        attention: AttentionFn,
        cross_attention: AttentionFn | None = None,
        speaker_positions: SpeakerFn = speaker_positions,
    ) -> None:
        """Hand in the functions that see more than one token.

        Args:
            attention: among video tokens.
            cross_attention: to the conditions; the same unless given.
            speaker_positions: whom the tokens belong to, see `attention.speaker_positions`.
        """
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.attention = attention
            elif isinstance(module, CrossAttention | AudioAttention):
                module.attention = cross_attention or attention
            elif isinstance(module, TransformerBlock):
                module.speaker_positions = speaker_positions

    def compilable(self) -> Iterator[tuple[object, str]]:
        """The parts that take each token by itself, as objects and names of methods; see `compile.compile_blocks`."""
        for block in self.blocks:
            yield block, "project"
            yield block, "finish"

    def forward(self, segments: Sequence[Segment], timestep: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Velocities (B, out_channels, F, H, W) of all segments, float32.

        Args:
            segments: latents (B, in_channels, F, H, W) each, all of one height and width.
            timestep: (B,) one per sample, or (B, F) one per latent frame of the segments laid end to end.
            context: what `embed_context` made of the conditions; the same for all steps of a generation.
        """
        dtype = self.patch_embedding.weight.dtype
        tokens = [self.patch_embedding(part.latents.to(dtype)).flatten(2).transpose(1, 2) for part in segments]
        lengths = [part.shape[1] for part in tokens]
        hidden = torch.cat(tokens, dim=1)  # (B, L, D)
        del tokens
        rotary = rotary_tables(segments, self.config.patch_size, self.config.attention_head_dim)
        embedding, modulation = self.condition_embedder.time(timestep.reshape(timestep.shape[0], -1))
        for block in self.blocks:
            hidden = block(hidden, context, modulation, rotary)
        out = self.head(hidden, embedding)
        return tuple(
            self.unpatchify(part, segment) for part, segment in zip(out.split(lengths, 1), segments, strict=True)
        )

    def head(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Tokens (B, L, D) and embedding (B, F, D) of the timesteps -> (B, L, out_channels * patch), float32."""
        modulation = self.scale_shift_table.unsqueeze(1) + embedding.unsqueeze(2)
        pieces = []
        for tokens, frames in token_spans(hidden.shape[1], modulation.shape[1]):
            shift, scale = of_frames(modulation, frames).unbind(2)
            pieces.append(self.proj_out(modulate(layer_norm(hidden[:, tokens], self.norm_out), shift, scale)))
        return torch.cat(pieces, dim=1)

    def embed_context(
        self,
        text: Tensor,
        image: Tensor | None = None,
        audio: Tensor | None = None,
        speaker_masks: Tensor | None = None,
    ) -> Context:
        """Bring all conditions to the blocks' width, once for all steps.

        Args:
            text: (B, 512, text_dim) UMT5 states; padding rows are zero and are attended to.
            image: (B, 257, image_dim) CLIP states.
            audio: (B, P, F, window, layers, channels) wav2vec2 states of P speakers around each of 4k+1 video frames.
            speaker_masks: (3, H, W) in latent pixels, needed for two speakers: first, second, background.
        """
        text = text.to(self.patch_embedding.weight.dtype)
        if audio is not None:
            people = audio.shape[1]
            tokens = self.audio_projection(audio.to(text.dtype).flatten(0, 1)).unflatten(0, (-1, people))
            audio = tokens.transpose(1, 2).flatten(2, 3)  # (B, F, P*T, audio_dim), person after person
            speaker_masks = self.token_masks(speaker_masks) if people > 1 else None
        return Context(
            text=self.condition_embedder.text_embedder(text),
            image=None if image is None else self.condition_embedder.image_embedder(image.to(text.dtype)),
            audio=audio,
            speaker_masks=speaker_masks,
        )

    def token_masks(self, masks: Tensor | None) -> Tensor:
        """Masks (3, H, W) of latent pixels -> (3, S) of tokens: a token takes its first pixel's value."""
        assert masks is not None, "two speakers need speaker_masks"
        _, rows, columns = self.config.patch_size
        return (masks[:, ::rows, ::columns] > 0).flatten(1).float()

    def unpatchify(self, tokens: Tensor, segment: Segment) -> Tensor:
        """Tokens (B, L, C * patch) of one segment -> (B, C, F, H, W)."""
        patch = self.config.patch_size
        frames, rows, columns = (size // step for size, step in zip(segment.latents.shape[2:], patch, strict=True))
        grid = tokens.reshape(tokens.shape[0], frames, rows, columns, *patch, -1)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
