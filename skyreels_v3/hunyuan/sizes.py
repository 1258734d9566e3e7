"""What SkyReels V1's transformer, a HunyuanVideo model, computes and how much memory it takes.

The counterpart of `wan/sizes.py`, which says how things are counted. The blocks are of two kinds and not of one size:
the first ones, of two streams, have layers of their own for the text and weigh more than twice the others.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache

from skyreels_v3.families import TextEncoderSizes
from skyreels_v3.memory.policy import BYTES, STREAM_SLOTS, resident_blocks
from skyreels_v3.parallel.ranks import UNDIVIDED, ParallelConfig

TEXT_TOKENS = 256  # of a prompt, at most
# Live bytes of a forward, of each channel of the model's width, for each token of video and text: at the peak, which is
# where blocks of one stream multiply what attention and feed-forward layer made by their last matrix, and while
# attention works (tokens, hidden ones of the feed-forward layer, queries, keys and values, and what comes out).
PEAK_BYTES = {"bfloat16": 32.4, "float32": 64.4}
ATTENTION_BYTES = {"bfloat16": 22.4, "float32": 44.4}
# Of all of a process's tokens, while several processes exchange them: queries, keys and values with padding, the same
# from the others, and what comes out, on its way back.
EXCHANGE_TENSORS = 8


VAE_PARAMETERS = 246_478_803
# Live bytes at the VAE's peak, always in tiles of one size: of a picture's encoding for each pixel of a
# tile, and for each pixel; of the decoding, of a tile, and for each pixel of a frame.
TILE_SIDE = 256
VAE_ENCODE_TILE = {"float32": 3_620, "bfloat16": 1_820}
VAE_ENCODE = 20
VAE_TILE = {"float32": 5_150_000_000, "bfloat16": 2_580_000_000}
VAE_DECODE = {"float32": 580, "bfloat16": 340}
LLAMA_AND_CLIP = TextEncoderSizes(
    7_505_186_816 + 123_060_480,
    32,
    2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096,
    2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336,
)


@dataclass(frozen=True)
class HunyuanSizes:
    """A transformer's sizes, by the names of its config."""

    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    in_channels: int = 16
    out_channels: int = 16
    guidance_embeds: bool = True

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers."""
        return int(self.dim * self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.num_layers + self.num_single_layers

    @cache  # noqa: B019  of few sizes
    def parameters(self) -> int:
        """Number of parameters; all are of one dtype."""
        import torch

        from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

        with torch.device("meta"):
            model = HunyuanTransformer3DModel(**asdict(self))
        return sum(parameter.numel() for parameter in model.parameters())

    def matrices(self) -> tuple[int, int]:
        """Elements and rows of what is quantised: attention and feed-forward layers of the blocks."""
        dim, hidden = self.dim, self.hidden
        double = (2 * (4 * dim**2 + 2 * dim * hidden), 2 * (5 * dim + hidden))
        single = (4 * dim**2 + 2 * dim * hidden, 4 * dim + hidden)
        elements, rows = (
            self.num_layers * of_double + self.num_single_layers * of_single
            for of_double, of_single in zip(double, single, strict=True)
        )
        return elements, rows

    def weight_bytes(self, dtype: str, quantized: bool = False) -> int:
        """Bytes of all weights."""
        size = self.parameters() * BYTES[dtype]
        if quantized:
            elements, rows = self.matrices()
            size += elements * (1 - BYTES[dtype]) + rows * BYTES["float32"]
        return size

    def each_block(self, dtype: str, quantized: bool) -> list[int]:
        """Bytes of each block's weights, in order."""
        none = replace(self, num_layers=0, num_single_layers=0)
        outside = none.weight_bytes(dtype, quantized)
        double = replace(none, num_layers=1).weight_bytes(dtype, quantized) - outside
        single = replace(none, num_single_layers=1).weight_bytes(dtype, quantized) - outside
        return [double] * self.num_layers + [single] * self.num_single_layers

    def block_bytes(self, dtype: str, quantized: bool = False) -> int:
        """Bytes of a block's weights on average: blocks that are kept are spread evenly among both kinds."""
        return sum(self.each_block(dtype, quantized)) // self.blocks

    def streamed_bytes(self, dtype: str, quantized: bool, keep: int) -> int:
        """Bytes on the device while all blocks but `keep` are streamed, through room for the largest of them."""
        sizes = self.each_block(dtype, quantized)
        kept = resident_blocks(len(sizes), keep)
        streamed = [size for index, size in enumerate(sizes) if index not in kept]
        room = min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)
        return self.weight_bytes(dtype, quantized) - sum(streamed) + room

    def forward_flop(self, tokens: int, text_tokens: int = TEXT_TOKENS) -> int:
        """Floating-point operations of one forward on so many tokens of video and text."""
        both, dim = tokens + text_tokens, self.dim
        # the same in either kind: two streams have their own layers, not more to do
        block = 4 * both**2 * dim + 8 * both * dim**2 + 4 * both * dim * self.hidden
        return self.blocks * block

    def activation_bytes(self, tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED) -> int:
        """Live bytes at the peak of a forward on one of the processes that divide it, weights not counted."""
        own = math.ceil((tokens + TEXT_TOKENS) / degrees.sequence)
        peak = PEAK_BYTES[dtype] * self.dim * own
        if degrees.sequence > 1:
            exchanged = EXCHANGE_TENSORS * own + (2 * tokens // degrees.ulysses if degrees.ring > 1 else 0)
            attention = ATTENTION_BYTES[dtype] * self.dim * own + BYTES[dtype] * self.dim * exchanged
            embedded = BYTES[dtype] * self.dim * (tokens + own)  # all of them, before a process takes its own
            peak = max(peak, attention, embedded)
        return int(peak)

    def context_bytes(self, frames: int, speakers: int, dtype: str) -> int:
        """Bytes of a condition's keys and values in one block: none, the text's tokens are counted with the video's."""
        return 0

    def dequantized_bytes(self, dtype: str) -> int:
        """Nothing: blocks take all tokens at once, and dequantize a matrix when it is multiplied."""
        return 0


def vae_bytes(size: tuple[int, int], dtype: str, part: str) -> int:
    """Live bytes at the peak of the VAE's `part` for frames of `size` (height, width), weights not counted."""
    pixels = math.prod(size)
    if part == "encode":
        return math.prod(min(side, TILE_SIDE) for side in size) * VAE_ENCODE_TILE[dtype] + pixels * VAE_ENCODE
    return VAE_TILE[dtype] + pixels * VAE_DECODE[dtype]
