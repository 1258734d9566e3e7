"""The HunyuanVideo VAE: diffusers' AutoencoderKLHunyuanVideo with scaled latents, streaming finished frames.

4k+1 frames <-> k+1 latent frames, height and width divided by 8, 16 channels. Latents outside this file are multiplied
by the scaling factor of the VAE's config.

Unlike Wan's, this decoder has no state between latent frames: its attention and norms see all frames of a call. So a
long video is decoded in overlapping pieces that are blended: 5 latent frames in time, 3 of them new; in space tiles of
256 pixels, 192 of them new. diffusers holds all pieces until the last one is done; here they are decoded one after
another in time, and finished frames are yielded. An image is encoded in the same tiles. The content of a piece depends
on its size, so the sizes belong to the model and are always those of the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from skyreels_v3.parallel.groups import Group, pad_end
from skyreels_v3.wan.vae import displayable


class HunyuanVAE:
    """Encodes video (B, 3, F, H, W) in [-1, 1] to latents (B, 16, (F-1)/4+1, H/8, W/8) and back.

    Attributes:
        tiles: ignored; blended tiles are visible, so their sizes are always those of the published code.
        group: ranks that share the pieces in time of a decode.
    """

    def __init__(self, module: AutoencoderKLHunyuanVideo) -> None:
        self.module = module
        self.module.enable_tiling()
        self.module.use_framewise_decoding = False  # pieces in time are cut here
        self.tiles = (1, 1)
        self.group = Group()

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @torch.inference_mode()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents, float32: the posterior's mode or, with a CPU `generator`, a sample.

        The noise of a sample is drawn in the VAE's dtype, as in the published code.
        """
        posterior = self.module.encode(video.to(self.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.float() * self.module.config["scaling_factor"]

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, 16, F, h, w) piece by piece; the result is that of diffusers' tiled decode.

        Only the end of the previous piece is held, to be blended into the next.

        Yields:
            (B, 3, f, 8h, 8w) in [-1, 1], float32: f = 1 for the first latent frame, then 4 each.

        Raises:
            FloatingPointError: the video has NaN or infinite values, which would show as black frames.
        """
        raw = (latents.float() / self.module.config["scaling_factor"]).to(self.dtype)
        step = self.module.temporal_compression_ratio
        length, stride = (
            size // step for size in (self.module.tile_sample_min_num_frames, self.module.tile_sample_stride_num_frames)
        )
        overlap = (length - stride) * step
        starts = range(0, max(raw.shape[2] - 1, 1), stride)  # a piece's first frame is context only
        end, number = None, 0
        for start, piece in zip(starts, self.decoded([raw[:, :, s : s + length + 1] for s in starts]), strict=True):
            if end is not None:
                piece = self.module.blend_t(end, piece[:, :, 1:], overlap)
            finished = piece.shape[2] - (overlap if start != starts[-1] else 0)
            end = piece[:, :, finished:].clone()
            for part in piece[:, :, :finished].split([1] * (start == 0) + [step] * (finished // step), dim=2):
                yield displayable(part, number)
                number += 1

    def decoded(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """The frames of each piece (B, 16, f, h, w) of latents, in order; N ranks decode N pieces at a time."""
        lengths = [(piece.shape[2] - 1) * self.module.temporal_compression_ratio + 1 for piece in pieces]

        def decode(piece: Tensor) -> Tensor:
            """(B, 3, F, 8h, 8w), tiled if larger than a tile; padded to the first piece's length, the longest."""
            return pad_end(self.module.decode(piece).sample, 2, lengths[0])

        for frames, length in zip(self.group.map(decode, pieces), lengths, strict=True):
            yield frames[:, :, :length]
