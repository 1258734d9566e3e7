"""i2v: a video that begins with an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skyreels_v3.hunyuan.t2v import TextToVideo
from skyreels_v3.media.image import crop_resize
from skyreels_v3.tasks import latent_frames

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from skyreels_v3.stages import Stages


class ImageToVideo(TextToVideo):
    """Concatenates the image's latents to the channels of the first latent frame."""

    def channels(self, stages: Stages, generator: torch.Generator) -> Tensor:
        """A sample of the image's latents, and zeros for all later frames: (1, 16, F, H, W)."""
        request = stages.request
        picture = np.asarray(crop_resize(stages.inputs.images[0], request.height, request.width))
        first = stages.encode_frames(picture[None], generator)
        channels = first.new_zeros((*first.shape[:2], latent_frames(request.frames_out), *first.shape[3:]))
        channels[:, :, :1] = first
        return channels


PIPELINE = ImageToVideo()
