"""reference_to_video: the subjects of 1-4 pictures, in a scene that the prompt describes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from skyreels_v3.denoising.guidance import NO_TEXT_NO_IMAGE, text_image_guidance
from skyreels_v3.denoising.loop import Conditioning
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.image import letterbox
from skyreels_v3.stages import Pass, Steps
from skyreels_v3.tasks import REFERENCE_SLOTS, GenerationRequest, latent_frames
from skyreels_v3.wan.transformer import Segment


class ReferenceToVideo(Steps):
    """The pictures stand behind the video in the sequence, as single latent frames; empty slots are zeros."""

    def __call__(self, request: GenerationRequest, inputs: Inputs) -> Iterator[Pass]:
        """One pass."""
        assert request.height is not None and request.width is not None
        guidance = text_image_guidance(request.guidance_scale, request.image_guidance_scale)
        (texts,) = self.contexts(guidance, request)
        generator = self.runtime.generator(request.seed)
        frames = latent_frames(request.frames_out)
        noise = self.noise(request, frames, generator)  # drawn before the samples of the references
        references = torch.zeros((1, noise.shape[1], REFERENCE_SLOTS, *noise.shape[3:]), device=self.runtime.device)
        for slot, image in enumerate(inputs.images):
            picture = np.asarray(letterbox(image, request.height, request.width))
            references[:, :, slot : slot + 1] = self.encode_frames(picture[None], generator)
        conditions = {
            name: Conditioning(
                text=text,
                after=(Segment(torch.zeros_like(references) if name == NO_TEXT_NO_IMAGE else references, frames),),
            )
            for name, text in texts.items()
        }
        latents = self.denoise(request, noise, lambda: conditions, guidance, generator)
        yield Pass(latents.cpu(), self.decode(latents, rounding=True))
