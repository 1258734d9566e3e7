"""V3's conditioning.

The encoders wrap transformers' models for text (UMT5), images (CLIP) and audio (wav2vec2). `Conditioning` calls the
transformer with their hidden states and with the segments before and after the latents.
"""

from __future__ import annotations

import html
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2Model

from skyreels_v3.errors import format_value
from skyreels_v3.media.audio import SAMPLE_RATE
from skyreels_v3.wan.key_maps import TEXT_TOKENS
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VARIANCE_FLOOR = 1e-7  # of audio samples


def clean_prompt(prompt: str) -> str:
    """Fix the encoding, unescape HTML entities (twice: some are doubly escaped), collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """UMT5 with its tokenizer."""

    def __init__(self, module: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module = module
        self.tokenizer = tokenizer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, for streaming."""
        return cast(Sequence[nn.Module], self.module.encoder.block)

    def tokenize(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1, L) of the cleaned prompt, L <= 512."""
        text = clean_prompt(prompt)
        length = len(self.tokenizer(text, verbose=False).input_ids)
        if length > TEXT_TOKENS:
            start = format_value(prompt[:40])  # quoted, as it may be the negative prompt
            logger.warning('only the first %d of the %d tokens of "%s..." are used', TEXT_TOKENS, length, start)
        batch = self.tokenizer([text], truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    @torch.inference_mode()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """`context` (1, L, D): the states of the prompt's own tokens, without padding; small enough to store."""
        ids, mask = (tensor.to(self.module.shared.weight.device) for tensor in self.tokenize(prompt))
        return {"context": self.module(ids, attention_mask=mask).last_hidden_state}


class ImageEncoder:
    """CLIP's hidden states before the last layer, without the final norm: what image attention was trained on."""

    def __init__(self, module: CLIPVisionModel) -> None:
        self.module = module

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 257, D)."""
        size = cast(int, self.module.config.image_size)
        pixels = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False) / 2 + 0.5
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels - mean) / std).to(self.module.dtype)
        return self.module(pixels, output_hidden_states=True).hidden_states[-2]


class AudioEncoder:
    """The outputs of all wav2vec2 layers, with its convolutional features resampled to the video's frame rate."""

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
        outputs: list[Tensor] = []  # transformers can return them, but not from the encoder alone
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


@dataclass(frozen=True)
class Conditioning:
    """The transformer's inputs besides latents and timestep.

    Attributes:
        text: (B, L, text_dim) UMT5 states of the prompt's own tokens.
        start_frame: position of the latents on the time axis.
        before, after: segments that precede and follow the latents in the sequence.
        channels: (B, C', F, H, W) concatenated to the latents' channels, for models with more channels in than out.
        image, audio, speaker_masks: see `SkyReelsTransformer3DModel.forward`.
    """

    text: Tensor
    start_frame: int = 0
    before: tuple[Segment, ...] = ()
    after: tuple[Segment, ...] = ()
    channels: Tensor | None = None
    image: Tensor | None = None
    audio: Tensor | None = None
    speaker_masks: Tensor | None = None

    def predict(self, model: SkyReelsTransformer3DModel, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, F, H, W) of the latents at `timestep`, a scalar."""
        own = latents if self.channels is None else torch.cat((latents, self.channels), dim=1)
        segments = (*self.before, Segment(own, self.start_frame), *self.after)
        timestep = expand_timestep(timestep, segments)
        # as in training: padding is zeros, not the encoder's states of padding tokens
        text = F.pad(self.text, (0, 0, 0, TEXT_TOKENS - self.text.shape[1]))
        return model(segments, timestep, text, self.image, self.audio, self.speaker_masks)[len(self.before)]


def expand_timestep(timestep: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The sample's timestep (1,) or, with clean segments, one per latent frame (1, F), 0 for clean ones."""
    if not any(segment.clean for segment in segments):
        return timestep.reshape(1)
    frames = [(segment.latents.shape[2], 0 if segment.clean else timestep.item()) for segment in segments]
    return torch.cat([timestep.new_full((1, count), value) for count, value in frames], dim=1)
