"""What V3's models compute and how much memory they take. No weights; torch is imported to count them.

Work is counted exactly (multiply-adds as two operations, matrix products and attention only). Activation memory is an
estimate: bytes for each token or pixel, counted tensor by tensor in the real models (a test counts them again), without
what the kernels need for themselves.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache

from skyreels_v3.families import TextEncoderSizes, family_named
from skyreels_v3.memory.policy import BYTES, STREAM_SLOTS, Tiles
from skyreels_v3.parallel.ranks import UNDIVIDED, ParallelConfig

TEXT_TOKENS = 512
IMAGE_TOKENS = 257
# Parameters of the published components; the VAE is float32 always.
VAE_PARAMETERS = 126_892_531
IMAGE_ENCODER_PARAMETERS = 630_766_080
IMAGE_ENCODER_FILE_BYTES = 4_770_000_000  # CLIP's text encoder is in it, too
AUDIO_ENCODER_PARAMETERS = 94_371_712
# Live bytes of a forward, of each channel of the model's width: of all tokens while self-attention works (the tokens,
# their queries, keys and values, and what comes out; a little for the rotary positions), of all tokens while a few are
# worked on, and of those few. As many are worked on at a time as transformer.py says.
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

UMT5 = TextEncoderSizes(
    5_680_910_336, 24, 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64, 4 * 4096**2 + 2 * 4096 * 10240
)


@dataclass(frozen=True)
class WanSizes:
    """A transformer's sizes, by the names of its config; `text_dim` is not in every config and weighs little."""

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
        kept = {*model._keep_in_fp32_modules}
        float32 = sum(count for name, count in counts.items() if kept.intersection(name.split(".")))
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

    def dequantized_bytes(self, dtype: str) -> int:
        """Bytes of a block's quantized matrices in full width, see `quantize.cache_dequantized`."""
        return self.matrices()[0] // self.num_layers * BYTES[dtype]


def vae_bytes(size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
    """Live bytes at the peak of the VAE's `part` for frames of `size` (height, width), weights not counted."""
    pixels = math.prod(size)
    if tiles == (1, 1):
        return pixels * VAE_WHOLE[part][dtype]
    sides = (
        min(side, math.ceil(side / count) + VAE_HALO[part] * min(count - 1, 2))
        for side, count in zip(size, tiles, strict=True)
    )
    return pixels * VAE_SHARED[part][dtype] + math.prod(sides) * VAE_TILE[part][dtype]
