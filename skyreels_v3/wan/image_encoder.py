"""The CLIP image encoder: a picture to 257 tokens."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder:
    """Hidden states before the last layer, without the final norm: what Wan's image attention was trained on."""

    def __init__(self, module: CLIPVisionModel) -> None:
        self.module = module

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 257, D)."""
        size = cast(int, self.module.config.image_size)
        pixels = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False) / 2 + 0.5
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        pixels = ((pixels - mean) / std).to(self.module.dtype)
        return self.module(pixels, output_hidden_states=True).hidden_states[-2]
