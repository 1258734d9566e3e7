"""The wav2vec2 audio encoder: a voice to features for each video frame."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Wav2Vec2Model

SAMPLE_RATE = 16_000
VARIANCE_FLOOR = 1e-7


class AudioEncoder:
    """All layers' outputs, with the convolutions' frames stretched to the video's rate before the transformer."""

    def __init__(self, module: Wav2Vec2Model) -> None:
        self.module = module

    @torch.inference_mode()
    def __call__(self, samples: Tensor, fps: int) -> Tensor:
        """Mono samples (S,) at 16 kHz -> (ceil(seconds * fps), layers, D)."""
        frames = math.ceil(len(samples) / SAMPLE_RATE * fps)
        samples = (samples - samples.mean()) / torch.sqrt(samples.var(unbiased=False) + VARIANCE_FLOOR)
        features = self.module.feature_extractor(samples[None].to(self.module.dtype))  # (1, C, conv frames)
        features = F.interpolate(features, frames, mode="linear", align_corners=True).transpose(1, 2)
        hidden, _ = self.module.feature_projection(features)
        outputs: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            for layer in self.module.encoder.layers
        ]
        try:
            self.module.encoder(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(outputs, dim=2)[0]  # (frames, layers, D)
