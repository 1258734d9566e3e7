"""t2v and i2v: SkyReels V1, HunyuanVideo by way of diffusers' model.

The stages are those of all tasks; what is V1's own is what its transformer is conditioned on. For i2v the picture's
latents stand beside the noise, as more channels of the first latent frame, and zeros beside the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyreels_v3.denoising.guidance import text_guidance
from skyreels_v3.denoising.schedules import euler_of
from skyreels_v3.hunyuan.riflex import REPEATS_AFTER, riflex
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.image import crop_resize
from skyreels_v3.stages import Pass, Steps
from skyreels_v3.tasks import GenerationRequest, latent_frames

GUIDANCE_UNIT = 1000.0  # the guidance is embedded like a timestep


@dataclass(frozen=True)
class HunyuanConditioning:
    """What the transformer sees besides the latents.

    Attributes:
        text: (1, L, D) Llama states of the prompt's own tokens.
        pooled: (1, P) from CLIP.
        guidance: the scale that the model is told of.
        channels: (1, C, F, H, W) joined to the latents' channels, or None.
    """

    text: Tensor
    pooled: Tensor
    guidance: float
    channels: Tensor | None = None

    def arguments(self, model: HunyuanTransformer3DModel) -> dict[str, Tensor]:
        """The model's arguments besides latents and timestep."""
        text, pooled = (part.to(model.dtype) for part in (self.text, self.pooled))
        guidance = torch.tensor([self.guidance], dtype=model.dtype, device=text.device) * GUIDANCE_UNIT
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": text.new_ones(text.shape[:2]),
            "pooled_projections": pooled,
            "guidance": guidance,
        }

    def predict(self, model: HunyuanTransformer3DModel, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (1, C, F, H, W) of the latents, float32."""
        seen = latents if self.channels is None else torch.cat((latents, self.channels), dim=1)
        times = timestep.reshape(1).to(latents)
        (velocity,) = model(
            hidden_states=seen.to(model.dtype), timestep=times, return_dict=False, **self.arguments(model)
        )
        return velocity.float()


class TextToVideo(Steps):
    """A prompt becomes a video; the guidance is by the negative prompt, besides the scale that the model is told of."""

    def __call__(self, request: GenerationRequest, inputs: Inputs) -> Iterator[Pass]:
        """One pass."""
        guidance = text_guidance(request.guidance_scale)
        (encoded,) = self.encode_prompts(guidance, request)
        generator = self.runtime.generator(request.seed)
        channels = self.channels(request, inputs, generator)  # drawn from before the noise is
        frames = latent_frames(request.frames_out)
        noise = self.noise(request, frames, generator)
        conditions = {
            name: HunyuanConditioning(parts["context"], parts["pooled"], request.embedded_guidance_scale, channels)
            for name, parts in encoded.items()
        }
        long = frames > REPEATS_AFTER and not request.no_riflex
        with riflex(self.components.transformer, frames if long else None):
            latents = self.denoise(request, noise, lambda: conditions, guidance, generator)
        yield Pass(latents.cpu(), self.decode(latents, rounding=True))

    def channels(self, request: GenerationRequest, inputs: Inputs, generator: torch.Generator) -> Tensor | None:
        """What is joined to the latents' channels."""
        return None

    def schedule(self, request: GenerationRequest) -> Any:
        """As the checkpoint's own scheduler says."""
        assert self.components.scheduler is not None
        return euler_of(self.components.scheduler, request.num_inference_steps, request.shift)


class ImageToVideo(TextToVideo):
    """The video begins with a picture."""

    def channels(self, request: GenerationRequest, inputs: Inputs, generator: torch.Generator) -> Tensor | None:
        """The picture's latents (1, 16, F, H, W): a sample of them, and zeros for all later frames."""
        assert request.height is not None and request.width is not None
        picture = np.asarray(crop_resize(inputs.images[0], request.height, request.width))
        first = self.encode_frames(picture[None], generator)
        later = first.new_zeros((*first.shape[:2], latent_frames(request.frames_out) - 1, *first.shape[3:]))
        return torch.cat((first, later), dim=2)
