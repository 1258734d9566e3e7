"""reference_to_video: the subjects of 1-4 images in a scene that the prompt describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from skyreels_v3.denoising.guidance import NO_TEXT_NO_IMAGE, Guidance, text_image_guidance
from skyreels_v3.families import Pipeline
from skyreels_v3.media.image import letterbox
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import REFERENCE_SLOTS, latent_frames

if TYPE_CHECKING:
    from skyreels_v3.stages import Event, Stages


class ReferenceToVideo(Pipeline):
    """Appends the images to the video's sequence as single latent frames; empty slots are zeros."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        return text_image_guidance(request.guidance_scale, request.image_guidance_scale)

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        yield latent_frames(request.frames_out), REFERENCE_SLOTS

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.denoising.loop import unipc
        from skyreels_v3.stages import Pass
        from skyreels_v3.wan.conditioning import Conditioning
        from skyreels_v3.wan.rope import Segment

        request, guidance = stages.request, self.guidance(stages.request)
        (texts,) = stages.encode_prompts(guidance, request.prompt)
        generator = stages.runtime.generator(request.seed)
        frames = latent_frames(request.frames_out)
        noise = stages.noise(frames, generator)  # drawn before the samples of the references
        shape = (1, noise.shape[1], REFERENCE_SLOTS, *noise.shape[3:])
        references = noise.new_zeros(shape, device=stages.runtime.device)
        for slot, image in enumerate(stages.inputs.images):
            picture = np.asarray(letterbox(image, request.height, request.width))
            references[:, :, slot : slot + 1] = stages.encode_frames(picture[None], generator)
        conditions = {
            name: Conditioning(
                parts["context"],
                after=(Segment(references.new_zeros(shape) if name == NO_TEXT_NO_IMAGE else references, frames),),
            )
            for name, parts in texts.items()
        }
        scheduler = unipc(request.num_inference_steps, request.shift)
        latents = yield from stages.denoise(noise, lambda: conditions, guidance, generator, scheduler)
        yield Pass(latents.cpu(), stages.decode(latents, rounding=True))


PIPELINE = ReferenceToVideo()
