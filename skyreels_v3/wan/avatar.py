"""Runs the passes of a talking avatar.

`windows.plan_windows` plans the passes; `Avatar.make_window` runs one: the key-frame pass or a window. Only the
last few frames are kept between windows, so memory does not grow with the video's length.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skyreels_v3.cache import cache_folder
from skyreels_v3.denoising.guidance import NO_AUDIO, NO_TEXT_NO_AUDIO, Guidance
from skyreels_v3.denoising.loop import euler, unconstrained
from skyreels_v3.media.audio import normalize_loudness, read_audio
from skyreels_v3.media.color import match_color
from skyreels_v3.media.image import cover_crop, covered_box, full_size
from skyreels_v3.media.video_reader import read_frames, resize_frames
from skyreels_v3.media.voice import keep_spans, keep_speech, read_vocals
from skyreels_v3.stages import Encoded, Event, Frame, Pass, Stages, Step, frames_to_video
from skyreels_v3.tasks import PATCH_SIZE, SIZE_MULTIPLE, VAE_STRIDE, latent_frames
from skyreels_v3.wan.background import Background
from skyreels_v3.wan.conditioning import Conditioning
from skyreels_v3.wan.windows import MOTION_FRAMES, WINDOW_FRAMES, Window, WindowPlan, plan_windows

logger = logging.getLogger(__name__)

AUDIO_REACH = 2  # a video frame sees the audio of this many frames on either side
SILENT = (NO_AUDIO, NO_TEXT_NO_AUDIO)

Texts = Mapping[str, Encoded]  # the encoded prompt of each condition
Known = tuple[Tensor, Tensor | None]  # first and last frames of a pass, (1, 3, K, H, W) in [-1, 1]


class Avatar:
    """A video of a talking avatar.

    Attributes:
        portrait: (1, 3, 1, H, W) in [-1, 1] on the device; the video's colors are matched to it.
        speaker_masks: (3, H/8, W/8) first speaker, second speaker, background; None for one speaker.
        features: (P, F, layers, D) wav2vec2 features of P speakers, F frames including padding.
        generator: draws all noise, in the order of the passes.
    """

    features: Tensor

    def __init__(self, stages: Stages, guidance: Guidance) -> None:
        self.stages = stages
        self.runtime, self.components = stages.runtime, stages.components
        self.request, self.inputs = stages.request, stages.inputs
        self.guidance = guidance
        self.portrait = self.read_portrait()
        self.speaker_masks = self.make_speaker_masks()
        self.generator = self.runtime.generator(self.request.seed)

    def run(self) -> Iterator[Event]:
        """Run the key-frame pass and, for a longer video, a pass per window; for a dubbed clip windows only."""
        request, inputs = self.request, self.inputs
        if inputs.clip is not None or request.speakers > 1:
            logger.warning("experimental: the published weights are said to be trained on one speaker and a portrait")
        features = self.encode_audio()
        plan = plan_windows(features.shape[1])
        padding = features[:, 2 * plan.audio_frames - plan.padded_frames :].flip(1)
        self.features = torch.cat((features, padding), dim=1) if plan.windows else features
        window_prompt = request.window_prompt if plan.windows and inputs.clip is None else request.prompt
        texts, window_texts = self.stages.encode_prompts(self.guidance, request.prompt, window_prompt)
        if inputs.clip is not None:
            windows = plan.windows or (Window(0, 0, 0, plan.audio_frames),)
            events = self.make_windows(windows, self.clip_frames(windows), texts, done=0)
            yield from Background(self.stages, inputs.clip).keep(events) if request.keep_background else events
            return
        name = f"denoising 1/{len(plan.windows) + 1}"
        latents = yield from self.make_window(texts, (self.portrait, None), 0, name)
        decoded = self.decode_matched(latents, None if plan.windows else plan.audio_frames)
        if not plan.windows:
            yield Pass(latents.cpu(), self.stages.frames_of(decoded, rounding=False))
            return
        keys = self.key_frames(plan, decoded)
        yield Pass(latents.cpu(), iter(()))
        yield from self.make_windows(plan.windows, self.chained_frames(plan.windows, keys), window_texts, done=1)

    def make_windows(
        self, windows: Sequence[Window], known: Iterator[Known], texts: Texts, done: int
    ) -> Iterator[Event]:
        """Run a pass per window, after `done` passes; known frames are read when the window before is written."""
        total = done + len(windows)
        with self.runtime.bar("windows", total) as bar:
            bar.update(done)
            for number, (window, frames) in enumerate(zip(windows, known, strict=False), start=done + 1):
                name = f"denoising {number}/{total}"
                latents = yield from self.make_window(texts, frames, window.start, name)
                self.tail: deque[Tensor] = deque(maxlen=MOTION_FRAMES)
                yield Pass(latents.cpu(), self.new_frames(latents, window))
                bar.update()

    def chained_frames(self, windows: Sequence[Window], keys: Mapping[int, Tensor]) -> Iterator[Known]:
        """Yield each window's known frames: the last frames of the window before, and its key frame."""
        first = self.portrait
        for window in windows:
            yield first, keys[window.start].expand(-1, -1, MOTION_FRAMES, -1, -1)
            first = torch.cat(list(self.tail), dim=2)

    def clip_frames(self, windows: Sequence[Window]) -> Iterator[Known]:
        """Yield each window's known frames from the clip; the clip's last frame is repeated if it is too short."""
        request, clip = self.request, self.inputs.clip
        assert clip is not None
        frames = resize_frames(read_frames(clip.path, request.task.fps), request.height, request.width)
        held: deque[Frame] = deque(maxlen=WINDOW_FRAMES)
        read = 0
        for window in windows:
            while read < window.start + WINDOW_FRAMES:
                held.append(next(frames, held[-1]) if held else next(frames))
                read += 1
            first, last = ([*held][:MOTION_FRAMES], [*held][-MOTION_FRAMES:])
            yield frames_to_video(first).to(self.runtime.device), frames_to_video(last).to(self.runtime.device)

    def key_frames(self, plan: WindowPlan, decoded: Iterator[Tensor]) -> dict[int, Tensor]:
        """The key frame (1, 3, 1, H, W) of each window, by the window's start: the user's, or one of the pass."""
        wanted = {window.key_frame for window in plan.windows}
        # on the host: there may be as many as the pass has frames
        frames = (frame for piece in decoded for frame in piece.split(1, dim=2))
        made = {index: frame.cpu() for index, frame in enumerate(frames) if index in wanted}
        keys = {window.start: made[window.key_frame] for window in plan.windows}
        replaced: set[int] = set()
        for picture, seconds in self.inputs.keyframes:
            time = seconds * self.request.task.fps
            nearest = min(keys, key=lambda start: abs(start + WINDOW_FRAMES - time))
            if nearest in replaced:
                logger.warning("two --keyframes are nearest to the same window's end; using the one at %g s", seconds)
            replaced.add(nearest)
            keys[nearest] = frames_to_video([self.fitted(picture)])
        return keys

    def fitted(self, picture: Image.Image) -> Frame:
        """A picture scaled and cropped to the output size."""
        request = self.request
        return np.asarray(cover_crop(picture, request.height, request.width, Image.Resampling.BILINEAR))

    def read_portrait(self) -> Tensor:
        """The portrait, or the first frame of a dubbed clip."""
        clip = self.inputs.clip
        if clip is not None:
            picture = Image.fromarray(next(read_frames(clip.path, self.request.task.fps)))
        else:
            picture = self.inputs.images[0]
        return frames_to_video([self.fitted(picture)]).to(self.runtime.device)

    def make_speaker_masks(self) -> Tensor | None:
        """The masks of two speakers and the background: the portrait's halves unless boxes are given."""
        request, inputs = self.request, self.inputs
        if request.speakers < 2:
            return None
        width, height = size = full_size(inputs.images[0])
        middle = width // 2
        boxes = request.speaker_boxes or ((0, 0, middle, height), (middle, 0, width, height))
        masks = torch.zeros(3, request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2])
        for person, box in enumerate(boxes):
            x0, y0, x1, y1 = covered_box(box, size, request.height, request.width)
            masks[person, token_span(y0, y1, request.height), token_span(x0, x1, request.width)] = 1
        masks[2] = (masks[0] + masks[1] == 0).float()
        return masks.to(self.runtime.device)

    def voices(self) -> list[np.ndarray]:
        """The model's audio input for each speaker, float32 [samples]; the output's sound is not changed."""
        request, inputs = self.request, self.inputs
        read = partial(read_vocals, models=cache_folder() / "separation") if request.vocals else read_audio
        heard = [read(sound.path) for sound in inputs.audio]
        heard = [keep_spans(heard[0], spans) for spans in inputs.turns] or heard
        normalized = [normalize_loudness(samples) for samples in heard]
        return [keep_speech(samples) for samples in normalized] if request.speech_only else normalized

    def encode_audio(self) -> Tensor:
        """Features (P, F, layers, D) of each speaker's audio, silent while only the other one speaks."""
        encoder, request = self.components.audio_encoder, self.request

        def encode() -> dict[str, Tensor]:
            assert encoder is not None
            voices = self.voices()
            with self.runtime.resident(encoder.module, "encoding the audio"):
                heard = [
                    encoder(torch.from_numpy(samples).to(self.runtime.device), request.task.fps)
                    for samples in in_turn(voices, request.audio_type == "sequential")
                ]
            return {"features": torch.stack(heard)}

        return self.runtime.parallel.broadcast_from_main(encode)["features"].to(self.runtime.device)

    def make_window(self, texts: Texts, known: Known, start: int, name: str) -> Generator[Step, None, Tensor]:
        """Run the pass that begins at frame `start` of the audio; returns latents (1, 16, 21, h, w).

        If `start` > 0, each step replaces the first latent frames by the known ones at its noise level.
        """
        encoded: list[Tensor] = []

        def conditions() -> dict[str, Conditioning]:
            encoded.append(self.encode_known(*known))
            image = self.encode_image(known[0][:, :, 0])
            audio = audio_windows(self.features, start)[None]
            return {
                name: Conditioning(
                    parts["context"],
                    channels=encoded[0],
                    image=image,
                    audio=torch.zeros_like(audio) if name in SILENT else audio,
                    speaker_masks=self.speaker_masks,
                )
                for name, parts in texts.items()
            }

        def hold_motion(latents: Tensor, sigma: float) -> Tensor:
            motion = encoded[0][:, VAE_STRIDE[0] :, : latent_frames(MOTION_FRAMES)]
            fresh = torch.randn(motion.shape, generator=self.generator).to(latents.device)
            held = (1 - sigma) * motion + sigma * fresh
            return torch.cat((held, latents[:, :, motion.shape[2] :]), dim=2)

        noise = self.stages.noise(latent_frames(WINDOW_FRAMES), self.generator)
        constraint = hold_motion if start > 0 else unconstrained
        scheduler = euler(self.request.num_inference_steps, self.request.shift)
        return self.stages.denoise(noise, conditions, self.guidance, self.generator, scheduler, name, constraint)

    def encode_known(self, first: Tensor, last: Tensor | None) -> Tensor:
        """(1, 4 + 16, 21, h, w): mask of the known frames of a pass, and latents with all other frames gray."""
        video = first.new_zeros((*first.shape[:2], WINDOW_FRAMES, *first.shape[3:]))
        known = torch.zeros(WINDOW_FRAMES)
        video[:, :, : first.shape[2]] = first
        known[: first.shape[2]] = 1
        if last is not None:
            video[:, :, -last.shape[2] :] = last.to(video)
            known[-last.shape[2] :] = 1
        latents = self.stages.encode_video(video)
        # the first frame has a latent frame to itself, so it fills all four mask channels
        mask = torch.cat((known[:1].expand(VAE_STRIDE[0]), known[1:])).unflatten(0, (-1, VAE_STRIDE[0])).T  # (4, 21)
        mask = mask[None, :, :, None, None].to(latents).expand(-1, -1, -1, *latents.shape[3:])
        return torch.cat((mask, latents), dim=1)

    def encode_image(self, picture: Tensor) -> Tensor:
        """CLIP tokens (1, 257, D) of a picture (1, 3, H, W)."""
        encoder = self.components.image_encoder

        def encode() -> dict[str, Tensor]:
            assert encoder is not None
            with self.runtime.resident(encoder.module, "encoding the portrait"):
                return {"image": encoder(picture)}

        return self.runtime.parallel.broadcast_from_main(encode)["image"].to(self.runtime.device)

    def decode_matched(self, latents: Tensor, frames: int | None = None) -> Iterator[Tensor]:
        """Decode to video (1, 3, f, H, W) in the portrait's colors, piece by piece; see `Stages.decode_video`."""
        for piece in self.stages.decode_video(latents, frames):
            yield match_color(piece, self.portrait, self.request.color_correction_strength)

    def new_frames(self, latents: Tensor, window: Window) -> Iterator[Frame]:
        """The frames of a window that are written; leaves the last ones in `self.tail`."""

        def pieces() -> Iterator[Tensor]:
            for piece in self.decode_matched(latents, window.end):
                self.tail.extend(piece.split(1, dim=2))
                yield piece

        return islice(self.stages.frames_of(pieces(), rounding=False), window.first, None)


def in_turn(voices: list[np.ndarray], sequential: bool) -> list[np.ndarray]:
    """Pad speakers' samples with silence to one length: one after another if `sequential`, else all from the start."""
    lengths = [*map(len, voices)]
    begins = np.cumsum([0, *lengths[:-1]]) if sequential else np.zeros(len(voices), dtype=int)
    total = sum(lengths) if sequential else max(lengths)
    return [
        np.pad(samples, (begin, total - begin - len(samples))) for begin, samples in zip(begins, voices, strict=True)
    ]


def token_span(start: float, end: float, side: int) -> slice:
    """Latent pixels of the tokens between two pixel positions along a side: at least one token."""
    first = min(int(start / SIZE_MULTIPLE), side // SIZE_MULTIPLE - 1)
    last = max(round(end / SIZE_MULTIPLE), first + 1)
    return slice(first * PATCH_SIZE[1], last * PATCH_SIZE[1])


def audio_windows(features: Tensor, start: int) -> Tensor:
    """Features around each frame of the window that begins at `start`: (P, F, layers, D) -> (P, 81, 5, layers, D)."""
    reach = torch.arange(-AUDIO_REACH, AUDIO_REACH + 1)
    frames = (start + torch.arange(WINDOW_FRAMES))[:, None] + reach
    return features[:, frames.clamp(0, features.shape[1] - 1).to(features.device)]
