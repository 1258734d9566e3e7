"""t2v: a video from a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyreels_v3.families import Pipeline
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import latent_frames

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from skyreels_v3.stages import Event, Stages


class TextToVideo(Pipeline):
    """Uses classifier-free guidance in addition to the model's embedded guidance scale."""

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        yield latent_frames(request.frames_out), 0

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.denoising.loop import euler_of
        from skyreels_v3.hunyuan.conditioning import HunyuanConditioning
        from skyreels_v3.hunyuan.riflex import REPEATS_AFTER, riflex
        from skyreels_v3.stages import Pass

        request, guidance = stages.request, self.guidance(stages.request)
        (encoded,) = stages.encode_prompts(guidance, request.prompt)
        generator = stages.runtime.generator(request.seed)
        channels = self.channels(stages, generator)  # draws from the generator before the noise does
        frames = latent_frames(request.frames_out)
        noise = stages.noise(frames, generator)
        conditions = {
            name: HunyuanConditioning(parts["context"], parts["pooled"], request.embedded_guidance_scale, channels)
            for name, parts in encoded.items()
        }
        assert stages.components.scheduler is not None
        scheduler = euler_of(stages.components.scheduler, request.num_inference_steps, request.shift)
        long = frames > REPEATS_AFTER and not request.no_riflex
        with riflex(stages.components.transformer, frames if long else None):
            latents = yield from stages.denoise(noise, lambda: conditions, guidance, generator, scheduler)
        yield Pass(latents.cpu(), stages.decode(latents, rounding=True))

    def channels(self, stages: Stages, generator: torch.Generator) -> Tensor | None:
        """What to concatenate to the latents' channels, if anything."""
        return None


PIPELINE = TextToVideo()
