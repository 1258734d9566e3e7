"""The Wan 2.1 video VAE: diffusers' AutoencoderKLWan with normalised latents and a decode that streams.

4k+1 frames <-> k+1 latent frames, height and width divided by 8, 16 channels. Latents outside this file are normalised,
channel by channel, with the constants of the VAE's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor


class VideoVAE:
    """Encodes video (B, 3, F, H, W) in [-1, 1] to latents (B, 16, (F-1)/4+1, H/8, W/8) and back."""

    def __init__(self, module: AutoencoderKLWan) -> None:
        self.module = module
        self.mean = torch.tensor(module.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(module.config.latents_std).view(1, -1, 1, 1, 1)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.module.dtype)

    @torch.inference_mode()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents, float32: the posterior's mode, or with a CPU `generator` a sample of it."""
        posterior = self.module.encode(video.to(self.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents.float() - self.mean.to(latents.device)) / self.std.to(latents.device)

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, 16, F, h, w) one latent frame at a time.

        The VAE is causal in time: what one latent frame needs of the earlier ones is kept in the convolutions' caches,
        so the pieces laid end to end are the video that a decode of everything at once would give.

        Yields:
            (B, 3, f, 8h, 8w) in [-1, 1]: f = 1 for the first latent frame, then 4 each.

        Raises:
            FloatingPointError: the video is infinite or not a number, which would be written as black frames.
        """
        raw = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        decoder = self.module.decoder
        caches: list[Tensor | None] = [None] * sum(isinstance(part, WanCausalConv3d) for part in decoder.modules())
        for index, frame in enumerate(raw.to(self.dtype).split(1, dim=2)):
            z = self.module.post_quant_conv(frame)
            chunk = decoder(z, feat_cache=caches, feat_idx=[0], first_chunk=index == 0)
            if not torch.isfinite(chunk).all():
                raise FloatingPointError(f"the decoded video is not finite in latent frame {index}; the VAE is damaged")
            yield chunk.float().clamp(-1.0, 1.0)
