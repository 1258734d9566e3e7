"""talking_avatar: the person in a portrait speaks what is in a sound file, window by window.

`windows.plan_windows` says which passes there are; `make_window` runs one, the key-frame pass as well as every window.
Between the windows only the last few frames are kept, so memory does not grow with the length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skyreels_v3.media.audio import normalise_loudness, read_audio
from skyreels_v3.media.color import match_color
from skyreels_v3.media.image import cover_crop
from skyreels_v3.media.inputs import Inputs
from skyreels_v3.pipelines.steps import Frame, Pass, Steps, frames_to_video, video_to_frames
from skyreels_v3.sampling.denoise import Conditioning
from skyreels_v3.sampling.guidance import NO_AUDIO, NO_TEXT_NO_AUDIO, Guidance, text_audio_guidance
from skyreels_v3.sampling.schedules import euler
from skyreels_v3.tasks import VAE_STRIDE, GenerationRequest, latent_frames
from skyreels_v3.windows import MOTION_FRAMES, WINDOW_FRAMES, Window, plan_windows

AUDIO_REACH = 2  # a video frame sees the sound of so many frames before and after it
SILENT = (NO_AUDIO, NO_TEXT_NO_AUDIO)


@dataclass(frozen=True)
class Voice:
    """What all windows of a run share.

    Attributes:
        portrait: (1, 3, 1, H, W) in [-1, 1].
        features: (P, F, layers, D) wav2vec2 features of P speakers, F frames with the padding.
        generator: where all noise comes from, in the order of the passes.
    """

    portrait: Tensor
    features: Tensor
    guidance: Guidance
    generator: torch.Generator


class TalkingAvatar(Steps):
    """A key-frame pass over the first frames; then windows from the last frames of one to the key frame of the next."""

    make_schedule = staticmethod(euler)

    def __call__(self, request: GenerationRequest, inputs: Inputs) -> Iterator[Pass]:
        """The key-frame pass, and a pass for each window of a longer video."""
        guidance = text_audio_guidance(request.text_guidance_scale, request.audio_guidance_scale)
        texts = self.encode_prompts(request, guidance)
        features = self.encode_audio(request, inputs)
        plan = plan_windows(features.shape[1])
        padding = features[:, plan.audio_frames * 2 - plan.padded_frames :].flip(1)
        voice = Voice(
            self.portrait(request, inputs),
            torch.cat((features, padding), dim=1) if plan.windows else features,
            guidance,
            self.runtime.generator(request.seed),
        )
        total = len(plan.windows) + 1
        latents = self.make_window(request, voice, texts, voice.portrait, None, 0, f"denoising 1/{total}")
        decoded = self.decode_matched(request, latents, voice)
        if not plan.windows:
            yield Pass(latents.cpu(), islice(to_frames(decoded), plan.audio_frames))
            return
        wanted = {window.key_frame for window in plan.windows}
        # on the host: there may be as many as the pass has frames
        keys = {index: frame.cpu() for index, frame in enumerate(decoded) if index in wanted}
        yield Pass(latents.cpu(), iter(()))
        texts = self.encode_prompts(replace(request, prompt=request.window_prompt), guidance)
        given = voice.portrait
        for number, window in enumerate(plan.windows, start=2):
            name = f"denoising {number}/{total}"
            latents = self.make_window(request, voice, texts, given, keys[window.key_frame], window.start, name)
            tail: deque[Tensor] = deque(maxlen=MOTION_FRAMES)
            yield Pass(latents.cpu(), self.new_frames(request, latents, voice, window, tail))
            given = torch.cat(list(tail), dim=2)

    def portrait(self, request: GenerationRequest, inputs: Inputs) -> Tensor:
        """The portrait in the output's size, (1, 3, 1, H, W) on the device."""
        assert request.height is not None and request.width is not None
        picture = cover_crop(inputs.images[0], request.height, request.width, Image.Resampling.BILINEAR)
        return frames_to_video([np.asarray(picture)]).to(self.runtime.device)

    def encode_audio(self, request: GenerationRequest, inputs: Inputs) -> Tensor:
        """Features (P, F, layers, D) of each speaker's sound."""
        encoder = self.components.audio_encoder
        assert encoder is not None and inputs.audio is not None
        samples = normalise_loudness(read_audio(inputs.audio.path, "--input_audio"))
        with self.runtime.resident(encoder.module):
            features = encoder(torch.from_numpy(samples).to(self.runtime.device), request.task.fps)
        return features[None]

    def make_window(
        self,
        request: GenerationRequest,
        voice: Voice,
        texts: dict[str, Tensor],
        given: Tensor,
        key: Tensor | None,
        start: int,
        name: str,
    ) -> Tensor:
        """Latents (1, 16, 21, h, w) of one pass.

        Args:
            texts: context of each condition.
            given: (1, 3, K, H, W) frames that the window begins with: the portrait, or the last ones before it.
            key: (1, 3, 1, H, W) the frame it ends in, if any.
            start: its first frame in the sound.
        """
        channels = self.known_frames(given, key)
        image = self.encode_image(given[:, :, 0])
        audio = audio_windows(voice.features, start)[None]
        conditions = {
            name: Conditioning(
                text, channels=channels, image=image, audio=torch.zeros_like(audio) if name in SILENT else audio
            )
            for name, text in texts.items()
        }
        noise = self.noise(request, channels.shape[2], voice.generator)
        motion = channels[:, 4:, : latent_frames(MOTION_FRAMES)]

        def pin(latents: Tensor, sigma: float) -> Tensor:
            fresh = torch.randn(motion.shape, generator=voice.generator).to(latents.device)
            known = (1 - sigma) * motion + sigma * fresh
            return torch.cat((known, latents[:, :, motion.shape[2] :]), dim=2)

        if given.shape[2] < MOTION_FRAMES:
            return self.denoise(request, noise, conditions, voice.guidance, name)
        return self.denoise(request, noise, conditions, voice.guidance, name, pin)

    def known_frames(self, given: Tensor, key: Tensor | None) -> Tensor:
        """(1, 4 + 16, 21, h, w): which frames of a window are known, and the latents of those on grey."""
        video = given.new_zeros((*given.shape[:2], WINDOW_FRAMES, *given.shape[3:]))
        known = torch.zeros(WINDOW_FRAMES)
        video[:, :, : given.shape[2]] = given
        known[: given.shape[2]] = 1
        if key is not None:
            video[:, :, -MOTION_FRAMES:] = key.to(video)
            known[-MOTION_FRAMES:] = 1
        vae = self.components.vae
        with self.runtime.resident(vae.module):
            latents = vae.encode(video)
        # the first frame fills a latent frame alone: it counts for all four
        mask = torch.cat((known[:1].expand(VAE_STRIDE[0]), known[1:])).unflatten(0, (-1, VAE_STRIDE[0])).T  # (4, 21)
        mask = mask[None, :, :, None, None].to(latents).expand(-1, -1, -1, *latents.shape[3:])
        return torch.cat((mask, latents), dim=1)

    def encode_image(self, picture: Tensor) -> Tensor:
        """CLIP tokens (1, 257, D) of a picture (1, 3, H, W)."""
        encoder = self.components.image_encoder
        assert encoder is not None
        with self.runtime.resident(encoder.module):
            return encoder(picture)

    def decode_matched(self, request: GenerationRequest, latents: Tensor, voice: Voice) -> Iterator[Tensor]:
        """Frames (1, 3, 1, H, W) of latents, in the portrait's colours."""
        for chunk in self.decode_video(latents):
            yield from match_color(chunk, voice.portrait, request.color_correction_strength).split(1, dim=2)

    def new_frames(
        self, request: GenerationRequest, latents: Tensor, voice: Voice, window: Window, tail: deque[Tensor]
    ) -> Iterator[Frame]:
        """The frames of a window that are written; `tail` ends up with the last of them."""
        for index, frame in enumerate(islice(self.decode_matched(request, latents, voice), window.end)):
            tail.append(frame)
            if index >= window.first:
                yield video_to_frames(frame, rounding=False)[0]


def to_frames(video: Iterator[Tensor]) -> Iterator[Frame]:
    """Frames (1, 3, 1, H, W) in [-1, 1] as uint8 [H, W, 3]."""
    for frame in video:
        yield video_to_frames(frame, rounding=False)[0]


def audio_windows(features: Tensor, start: int) -> Tensor:
    """Features around each frame of a window that begins at `start`: (P, F, layers, D) -> (P, 81, 5, layers, D)."""
    reach = torch.arange(-AUDIO_REACH, AUDIO_REACH + 1)
    frames = (start + torch.arange(WINDOW_FRAMES))[:, None] + reach
    return features[:, frames.clamp(0, features.shape[1] - 1).to(features.device)]
