"""shot_switching_extension: the input clip goes on after a cut."""

from __future__ import annotations

from collections.abc import Iterator

from skyreels_v3.denoising.guidance import text_guidance
from skyreels_v3.denoising.loop import Conditioning
from skyreels_v3.inputs import Inputs
from skyreels_v3.stages import Pass, Steps
from skyreels_v3.tasks import GenerationRequest, latent_frames
from skyreels_v3.wan.transformer import Segment

CUT_POSITION = 1024  # where the frames before the cut stand on the time axis: far from the new ones


class ShotSwitchingExtension(Steps):
    """The clip's last frames stand clean behind the new ones, at a distance that says: another shot."""

    def __call__(self, request: GenerationRequest, inputs: Inputs) -> Iterator[Pass]:
        """One pass."""
        clip = self.read_condition(request, inputs)
        guidance = text_guidance(request.guidance_scale)
        (texts,) = self.contexts(guidance, request)
        after = (Segment(self.encode_frames(clip), CUT_POSITION, clean=True),)
        conditions = {name: Conditioning(text, after=after) for name, text in texts.items()}
        frames = latent_frames(request.frames_out + 1)  # latent frames hold 4k+1 frames; the last one is not written
        generator = self.runtime.generator(request.seed)
        noise = self.noise(request, frames, generator)
        latents = self.denoise(request, noise, lambda: conditions, guidance, generator)
        yield Pass(latents.cpu(), self.decode(latents, rounding=False, frames=request.frames_out))
