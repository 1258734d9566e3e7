"""The HunyuanVideo VAE: diffusers' AutoencoderKLHunyuanVideo with scaled latents, as a stream of finished frames.

4k+1 frames <-> k+1 latent frames, height and width divided by 8, 16 channels. Latents outside this file are multiplied
by the scaling factor of the VAE's config.

Unlike Wan's, this decoder keeps no state from one latent frame to the next: its attention and its norms see all frames
that it is given. So a long video is decoded in pieces that overlap, and where they overlap one is faded into the other:
in time 5 latent frames of which 3 are new, in space 256 pixels of which 192 are new. The library does both and holds
every piece until the last one is there; here those in time are made one after the other, and what is finished is
handed on. A picture is encoded in the same tiles. What a piece looks like depends on what is in it, so the pieces
belong to the model: other sizes would be another video, and those of the published code are used, whatever memory there
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from skyreels_v3.wan.vae import displayable

if TYPE_CHECKING:
    from skyreels_v3.parallel.groups import Group


class HunyuanVAE:
    """Encodes video (B, 3, F, H, W) in [-1, 1] to latents (B, 16, (F-1)/4+1, H/8, W/8) and back."""

    def __init__(self, module: AutoencoderKLHunyuanVideo) -> None:
        self.module = module
        self.module.enable_tiling()
        self.module.use_framewise_decoding = False  # pieces in time are cut here
        self.group: Group | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def set_tiles(self, rows: int, columns: int) -> None:
        """Changes nothing: tiles are blended and so they show. They are those of the published code in every case."""
        assert rows > 0 and columns > 0, (rows, columns)

    def share(self, group: Group | None) -> None:
        """Decode together with other processes from now on: each works on some of the pieces in time."""
        self.group = group

    @torch.inference_mode()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents, float32: the posterior's mode, or with a CPU `generator` a sample of it.

        The sample's noise is drawn in the VAE's dtype, as the published code draws it.
        """
        posterior = self.module.encode(video.to(self.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.float() * self.module.config["scaling_factor"]

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, 16, F, h, w) piece by piece.

        Laid end to end, the parts are the video that the library makes of everything at once. Besides the piece that
        they are of, the end of the one before is held, which is blended into its beginning.

        Yields:
            (B, 3, f, 8h, 8w) in [-1, 1], float32: f = 1 for the first latent frame, then 4 each.

        Raises:
            FloatingPointError: the video is infinite or not a number, which would be written as black frames.
        """
        raw = (latents.float() / self.module.config["scaling_factor"]).to(self.dtype)
        starts = self.starts(raw.shape[2])
        step = self.module.temporal_compression_ratio
        overlap = self.module.tile_sample_min_num_frames - self.module.tile_sample_stride_num_frames
        end, number = None, 0
        for start, piece in zip(starts, self.decoded([self.cut(raw, start) for start in starts]), strict=True):
            if end is not None:  # the first frame was made without those before it
                piece = self.module.blend_t(end, piece[:, :, 1:], overlap)
            finished = piece.shape[2] - (overlap if start != starts[-1] else 0)
            end = piece[:, :, finished:].clone()
            for part in piece[:, :, :finished].split([1] * (start == 0) + [step] * (finished // step), dim=2):
                yield displayable(part, number)
                number += 1

    def starts(self, frames: int) -> range:
        """The first latent frame of each piece. The last frame is never a piece's first, of which nothing is used."""
        stride = self.module.tile_sample_stride_num_frames // self.module.temporal_compression_ratio
        return range(0, max(frames - 1, 1), stride)

    def cut(self, latents: Tensor, start: int) -> Tensor:
        """A piece of the latents: one frame for the sake of what comes before, and those of a piece."""
        length = self.module.tile_sample_min_num_frames // self.module.temporal_compression_ratio
        return latents[:, :, start : start + length + 1]

    def decoded(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """The frames of each piece of latents, in order; N at a time when N processes divide them."""
        if self.group is None:
            yield from map(self.decode_piece, pieces)
            return
        for start in range(0, len(pieces), self.group.size):
            some = pieces[start : start + self.group.size]
            lengths = [(piece.shape[2] - 1) * self.module.temporal_compression_ratio + 1 for piece in some]
            # whoever has nothing to do makes the last one again; an exchange is of equal lengths
            own = self.decode_piece(some[min(self.group.rank, len(some) - 1)])
            padded = F.pad(own, (0, 0, 0, 0, 0, max(lengths) - own.shape[2]))
            for frames, length in zip(self.group.all_gather(padded), lengths, strict=False):
                yield frames[:, :, :length]

    def decode_piece(self, latents: Tensor) -> Tensor:
        """(B, 16, f, h, w) -> (B, 3, 4f-3, 8h, 8w), in tiles where it is larger than one."""
        return self.module.decode(latents).sample
