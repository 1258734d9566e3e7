"""The Wan 2.1 video VAE: diffusers' AutoencoderKLWan with normalized latents, streaming, in exact tiles.

4k+1 frames <-> k+1 latent frames, height and width divided by 8, 16 channels. Latents outside this file are normalized
per channel with the constants of the VAE's config.

In time the VAE is causal: it processes one latent frame after another, and its convolutions cache what they need of
earlier frames. In space, only the attention in the middle, at an eighth of the frame's size, sees everything. Most
memory is used by the outer stages, above a quarter of the size: convolutions with a total reach of 24 pixels (decoder)
or 16 (encoder). These run tile by tile: each stage gets the halo that later stages need, which shrinks to nothing at
the end. Nothing is blended. The values are those of the whole frame, except for float32 rounding where another
shape selects another kernel. The caches hold the whole frame and limit the savings: more than 2 x 3 tiles save little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanRMS_norm,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from skyreels_v3.parallel.groups import Group, pad_end

ALONE = Group()
EPS = 1e-24  # the square of the smallest norm that diffusers divides by
Span = tuple[int, int]  # first, last + 1


class VideoVAE:
    """Encodes video (B, 3, F, H, W) in [-1, 1] to latents (B, 16, (F-1)/4+1, H/8, W/8) and back.

    Attributes:
        tiles: rows and columns of tiles; more tiles need less memory and a little more compute, for the same result.
        group: ranks that share the tiles.
    """

    def __init__(self, module: AutoencoderKLWan) -> None:
        assert not module.config["is_residual"], "Wan 2.2's VAE has another structure"
        streamline(module)
        self.module = module
        self.mean = torch.tensor(module.config["latents_mean"]).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(module.config["latents_std"]).view(1, -1, 1, 1, 1)
        self.tiles = (1, 1)
        self.group = Group()

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @torch.inference_mode()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalized latents, float32: the posterior's mode or, with a CPU `generator`, a sample."""
        stages, cut = encoder_stages(self.module.encoder, self.group.size > 1)
        fine = TiledStages(stages[:cut], video.shape[-2:], self.tiles, self.group)
        coarse = TiledStages(stages[cut:], fine.size)
        chunks = [video[:, :, :1], *(video[:, :, start : start + 4] for start in range(1, video.shape[2] - 3, 4))]
        moments = [coarse(fine(chunk.to(self.dtype))) for chunk in chunks]  # of one latent frame each
        posterior = DiagonalGaussianDistribution(self.module.quant_conv(torch.cat(moments, dim=2)).float())
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, 16, F, h, w) one latent frame at a time; the result is that of decoding all at once.

        Yields:
            (B, 3, f, 8h, 8w) in [-1, 1], float32: f = 1 for the first latent frame, then 4 each.

        Raises:
            FloatingPointError: the video has NaN or infinite values, which would show as black frames.
        """
        stages, cut = decoder_stages(self.module.decoder, self.group.size > 1)
        coarse = TiledStages(stages[:cut], latents.shape[-2:])
        fine = TiledStages(stages[cut:], coarse.size, self.tiles, self.group)
        raw = latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)
        for index, frame in enumerate(raw.to(self.dtype).split(1, dim=2)):
            # unnamed: this generator must not hold a chunk while it makes the next one
            yield displayable(fine(coarse(self.module.post_quant_conv(frame))), index)


def streamline(module: nn.Module) -> None:
    """Make norms, activations and convolutions move fewer bytes; values are the same except for rounding."""
    for part in module.modules():
        if isinstance(part, WanRMS_norm):
            part.__class__ = RMSNorm
        elif isinstance(part, WanCausalConv3d):
            part.__class__ = CausalConv3d
            part.padding = tuple(size // 2 for size in (0, *part.kernel_size[1:]))  # padded by the convolution itself
        elif isinstance(part, nn.SiLU):
            part.inplace = True  # on the output of a norm


class RMSNorm(WanRMS_norm):
    """The norm as one operation instead of six."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x (B, C, ...) over channels, times `gamma`."""
        assert self.channel_first and isinstance(self.bias, float)
        channels = self.gamma.numel()
        return F.rms_norm(x.movedim(1, -1), (channels,), self.gamma.flatten(), EPS / channels).movedim(-1, 1)


class CausalConv3d(WanCausalConv3d):
    """The convolution without a padded copy of its input."""

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """Convolve x (B, C, F, H, W) after its `past` frames; missing ones are zeros."""
        missing = int(self._padding[4])
        if past is not None and missing:
            x = torch.cat([past, x], dim=2)
            missing -= past.shape[2]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return nn.Conv3d.forward(self, x)


def displayable(chunk: Tensor, index: int) -> Tensor:
    """Float32 in [-1, 1]; raises FloatingPointError for NaN and infinite values."""
    if not torch.isfinite(chunk).all():
        raise FloatingPointError(f"the decoded video is not finite in latent frame {index}; the VAE is damaged")
    return chunk.float().clamp_(-1.0, 1.0)


def encoder_stages(encoder: WanEncoder3d, shared: bool = False) -> tuple[list[nn.Module], int]:
    """The encoder as a list of modules, and how many of them run in tiles: those above a quarter of the size.

    If ranks share the tiles (`shared`), all stages before the attention run in tiles: halos cost relatively more in
    small stages, but each rank runs only its own tiles.
    """
    stages = [encoder.conv_in, *encoder.down_blocks, encoder.mid_block]
    stages += [encoder.norm_out, encoder.nonlinearity, encoder.conv_out]
    return stages, stages.index(encoder.mid_block) if shared else resamplings(stages)[1] + 1


def decoder_stages(decoder: WanDecoder3d, shared: bool = False) -> tuple[list[nn.Module], int]:
    """The decoder as a list of modules, and how many precede the tiled ones, see `encoder_stages`."""
    stages = [decoder.conv_in, decoder.mid_block]
    for block in cast(Iterable[Any], decoder.up_blocks):
        stages += [*block.resnets, *(block.upsamplers or ())]
    stages += [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
    return stages, stages.index(decoder.mid_block) + 1 if shared else resamplings(stages)[1]


def resamplings(stages: Sequence[nn.Module]) -> list[int]:
    """Indices of the stages that change the size."""
    return [index for index, stage in enumerate(stages) if isinstance(stage, WanResample)]


class TiledStages:
    """A list of stages with their caches, run tile by tile on one chunk of a video after another.

    Args:
        stages: modules that map (B, C, F, H, W) to (B, C, F, H, W).
        size: H and W of the input.
        tiles: rows and columns of tiles, capped at those of the result.
        group: ranks that share the tiles, all with the same input; the grid grows until each has equally many.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        size: Sequence[int],
        tiles: tuple[int, int] = (1, 1),
        group: Group = ALONE,
    ) -> None:
        self.size = tuple(sizes_along(stages, length)[-1] for length in size)  # H and W of the result
        self.group = group
        grid = shared_grid(self.size, tiles, group.size)
        rows, columns = ([*split_evenly(*pair)] for pair in zip(self.size, grid, strict=True))
        self.spans = [(row, column) for row in rows for column in columns]
        last = len(self.spans) - 1  # several ranks may run it, so that each runs equally many tiles
        own = [self.spans[min(start + group.rank, last)] for start in range(0, last + 1, group.size)]
        self.tiles = [
            Tile(stages, crops_along(stages, size[0], row), crops_along(stages, size[1], column)) for row, column in own
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Run the next frames (B, C, F, H, W) through all stages."""
        out = None
        for piece, (rows, columns) in zip(self.pieces(x), self.spans, strict=True):
            if out is None:
                out = piece.new_empty(*piece.shape[:3], *self.size)
            out[..., slice(*rows), slice(*columns)] = piece
            del piece  # before the next one is made
        assert out is not None
        return out

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """The tiles' parts of the result, in order."""
        if self.group.size == 1:
            yield from (tile(x) for tile in self.tiles)
            return
        # an all-gather needs equal shapes; tiles differ by at most one row or column
        height, width = (max(end - first for first, end in spans) for spans in zip(*self.spans, strict=True))

        def make(number: int) -> Tensor:
            return pad_end(pad_end(self.tiles[number // self.group.size](x), -1, width), -2, height)

        made = self.group.map(make, range(len(self.spans)))
        for piece, ((top, bottom), (left, right)) in zip(made, self.spans, strict=True):
            yield piece[..., : bottom - top, : right - left]


def shared_grid(size: Sequence[int], tiles: tuple[int, int], ranks: int) -> tuple[int, int]:
    """The smallest grid of at least `tiles` that divides evenly among ranks, with the shortest borders."""
    height, width = size
    grids = [
        (rows, columns)
        for rows in range(tiles[0], tiles[0] * ranks + 1)
        for columns in range(tiles[1], tiles[1] * ranks + 1)
        if rows * columns % ranks == 0
    ]
    return min(grids, key=lambda grid: (grid[0] * grid[1], grid[0] * width + grid[1] * height))


class Tile:
    """One tile of a list of stages: the crops before each stage and at the end, and the caches."""

    def __init__(self, stages: Sequence[nn.Module], rows: Sequence[slice], columns: Sequence[slice]) -> None:
        self.stages = stages
        self.crops = [(..., *pair) for pair in zip(rows, columns, strict=True)]
        convolutions = [part for stage in stages for part in stage.modules() if isinstance(part, WanCausalConv3d)]
        self.caches: list[Any] = [None] * len(convolutions)

    def __call__(self, x: Tensor) -> Tensor:
        """The tile's part of the result for the next whole frames `x`."""
        index = [0]
        for stage, crop in zip(self.stages, self.crops, strict=False):
            x = advance(stage, x[crop], self.caches, index)
        return x[self.crops[-1]]


def advance(stage: nn.Module, x: Tensor, caches: list[Any], index: list[int]) -> Tensor:
    """Run one stage on the next frames; diffusers' modules use the caches from `index[0]` on, and advance it."""
    if isinstance(stage, WanRMS_norm | nn.SiLU):
        return stage(x)
    if not isinstance(stage, WanCausalConv3d):
        return stage(x, feat_cache=caches, feat_idx=index)
    past, kept = caches[index[0]], stage.kernel_size[0] - 1
    seen = x[:, :, -kept:] if past is None else torch.cat([past, x[:, :, -kept:]], dim=2)[:, :, -kept:]
    caches[index[0]] = seen.clone()
    index[0] += 1
    return stage(x, past)


def split_evenly(size: int, parts: int) -> Iterator[Span]:
    """Split 0 .. size - 1 into `parts` spans whose lengths differ by at most 1; fewer if some would be empty."""
    parts = min(parts, size)
    return pairwise(size * part // parts for part in range(parts + 1))


def mode_of(stage: nn.Module) -> str:
    """How a stage changes the size: "up", "down" or ""."""
    mode = stage.mode if isinstance(stage, WanResample) else ""
    return next((way for way in ("up", "down") if mode.startswith(way)), "")


def resized(stage: nn.Module, size: int) -> int:
    """Rows that a stage outputs for `size` rows. Here and below, the same holds for columns."""
    return {"up": 2 * size, "down": size // 2, "": size}[mode_of(stage)]


def sizes_along(stages: Sequence[nn.Module], size: int) -> list[int]:
    """Rows before each stage and after the last one."""
    return [*accumulate(stages, lambda rows, stage: resized(stage, rows), initial=size)]


def needed_by(stage: nn.Module, span: Span) -> Span:
    """Rows of its input that a stage needs for the rows `span` of its output.

    A 3 x 3 convolution reaches one row, a residual block with two of them two. An upsampler doubles the rows before its
    convolution. A downsampler's convolution makes row i from rows 2i, 2i + 1, 2i + 2: it is padded below only.
    """
    reach = sum(part.kernel_size[-1] // 2 for part in stage.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    first, end = span
    return {
        "up": ((first - reach) // 2, (end + reach + 1) // 2),
        "down": (2 * first, 2 * end + reach),
        "": (first - reach, end + reach),
    }[mode_of(stage)]


def crops_along(stages: Sequence[nn.Module], size: int, span: Span) -> list[slice]:
    """The crops before each stage, and at the end, for the rows `span` of the result.

    Needed rows are found from the last stage to the first. Rows beyond the frame are padding that a stage adds itself,
    with or without tiles; rows that padding at other borders affects are never needed.

    Returns:
        one more slice than stages, each relative to the first row of the previous stage's output.
    """
    needed = [span]
    for stage, rows in zip(reversed(stages), reversed(sizes_along(stages, size)[:-1]), strict=True):
        first, end = needed_by(stage, needed[-1])
        needed.append((max(first, 0), min(end, rows)))
    needed.reverse()
    origins = [0, *(resized(stage, first) for stage, (first, _) in zip(stages, needed, strict=False))]
    return [slice(first - origin, end - origin) for (first, end), origin in zip(needed, origins, strict=True)]
