"""shot_switching_extension: a new shot after the input clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyreels_v3.families import Pipeline
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import latent_frames

if TYPE_CHECKING:
    from skyreels_v3.stages import Event, Stages

CUT_POSITION = 1024  # start frame of the clip before the cut, far from the new frames


class ShotSwitchingExtension(Pipeline):
    """Appends the clip's last frames as clean frames, at a temporal position that marks them as another shot."""

    def passes(self, request: GenerationRequest) -> Iterator[tuple[int, int]]:
        # latent frames hold 4k+1 frames; the last frame is not written
        yield latent_frames(request.frames_out + 1), latent_frames(request.condition_frames)

    def run(self, stages: Stages) -> Iterator[Event]:
        from skyreels_v3.denoising.loop import unipc
        from skyreels_v3.stages import Pass
        from skyreels_v3.wan.conditioning import Conditioning
        from skyreels_v3.wan.rope import Segment

        request, guidance = stages.request, self.guidance(stages.request)
        clip = stages.read_condition()
        (texts,) = stages.encode_prompts(guidance, request.prompt)
        after = (Segment(stages.encode_frames(clip), CUT_POSITION, clean=True),)
        conditions = {name: Conditioning(parts["context"], after=after) for name, parts in texts.items()}
        generator = stages.runtime.generator(request.seed)
        ((frames, _),) = self.passes(request)
        noise = stages.noise(frames, generator)
        scheduler = unipc(request.num_inference_steps, request.shift)
        latents = yield from stages.denoise(noise, lambda: conditions, guidance, generator, scheduler)
        yield Pass(latents.cpu(), stages.decode(latents, rounding=False, frames=request.frames_out), clip)


PIPELINE = ShotSwitchingExtension()
