"""`SkyReelsTransformer3DModel`: the one transformer behind all SkyReels V3 tasks.

It is a Wan 2.1 DiT under diffusers' parameter names. What differs between the tasks is data: where the segments are on
the time axis, whether a timestep is given per sample or per latent frame, which conditions are given.

Dtypes: matrix products in the dtype of the weights (bfloat16 as a rule); normalization, modulation, the time embedding
and the output head in float32; rotary angles in float64. Casts are explicit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from skyreels_v3.attention.backends import AttentionFn, dispatched, sdpa
from skyreels_v3.checkpoints.key_maps import KeyMap
from skyreels_v3.wan.key_maps import NATIVE_TRANSFORMER
from skyreels_v3.wan.transformer.block import Context, TransformerBlock, of_frames, token_spans
from skyreels_v3.wan.transformer.embeddings import AudioProjection, ConditionEmbedding
from skyreels_v3.wan.transformer.norms import modulate
from skyreels_v3.wan.transformer.rope import Segment, rotary_tables

if TYPE_CHECKING:
    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn


class SkyReelsTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity (noise minus data) of latent video.

    diffusers' tools for a `WanTransformer3DModel` work here too: `from_pretrained` in any dtype, casts, layerwise
    casting, group offloading, accelerate's hooks, `compile_repeated_blocks`, attention backends, LoRA, gradient
    checkpointing. Refused with NotImplementedError or ValueError:

    - `enable_cache`: its hooks compare a block's input with its output, and blocks overwrite their input to save
      memory. `skyreels_v3.denoising.step_cache` caches steps.
    - context parallelism (there is no `_cp_plan`): a plan splits one sequence evenly, and segments are not one.
      `skyreels_v3.parallel` divides the tokens.
    - `from_single_file`: diffusers keeps its key maps to itself. `skyreels_v3.wan.checkpoint.load_transformer` reads
      Wan's native names.

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

    chunks_tokens: ClassVar[bool] = True
    native_names: ClassVar[KeyMap] = NATIVE_TRANSFORMER
    # diffusers' defaults have other types
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
        self.condition_embedder = ConditionEmbedding(dim, freq_dim, text_dim, image_dim)
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
            segments: latents (B, in_channels, F, H, W) each, all of one height and width.
            timestep: (B,) one per sample, or (B, F) one per latent frame of the segments laid end to end.
            text: (B, 512, text_dim) UMT5 states; padding rows are zero and are attended to.
            image: (B, 257, image_dim) CLIP states.
            audio: (B, P, F, window, layers, channels) wav2vec2 states of P speakers around each of 4k+1 video frames.
            speaker_masks: (3, H, W) in latent pixels, for two speakers only: first, second, background.
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

    def set_attention(
        self,
        attention: AttentionFn,
        cross_attention: AttentionFn | None = None,
    ) -> None:
        """Set the functions that see more than one token.

        Args:
            attention: among video tokens.
            cross_attention: to the conditions; the same unless given.
        """
        for block in cast(Iterable[Any], self.blocks):
            block.attn1.attention = attention
            for module in (block.attn2, block.attn_audio):
                if module is not None:
                    module.attention = cross_attention or attention

    def set_attention_backend(self, backend: str) -> None:
        """Use an attention backend of diffusers, by its name there.

        Raises:
            ValueError: there is no such backend.
            RuntimeError: the package it needs is missing or too old.
        """
        self.set_attention(dispatched(backend.lower()))

    def reset_attention_backend(self) -> None:
        """Use torch's scaled_dot_product_attention again."""
        self.set_attention(sdpa)

    def compilable(self) -> Iterator[tuple[object, str]]:
        """What runs before and after self-attention, see `model_api.Transformer`."""
        for block in self.blocks:
            yield block, "project"
            yield block, "finish"

    def divide_tokens(self, group: Group, usp: UspFn) -> None:
        """See `model_api.Transformer`."""
        from skyreels_v3.wan.sequence_parallel import SequenceParallel  # which needs this package

        SequenceParallel(group, usp).attach(self)

    def enable_cache(self, config: Any) -> NoReturn:
        """Not supported, see the class."""
        raise NotImplementedError("blocks overwrite their input; use skyreels_v3.denoising.step_cache.StepCache")

    @classmethod
    def from_single_file(cls, *_: Any, **__: Any) -> NoReturn:
        """Not supported, see the class."""
        raise NotImplementedError("use skyreels_v3.wan.checkpoint.load_transformer, which reads Wan's native names")
