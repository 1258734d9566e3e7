"""What every task is made of: encode the prompt, encode pictures, denoise, decode to frames.

A task's pipeline is a generator of passes. A `Pass` is what one run of the denoising loop made: its latents, and its
frames as a stream that is decoded while it is read. The frames of a pass must be read before the next pass is asked
for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from skyreels_v3 import throughput
from skyreels_v3.checkpoints.load import check_finite
from skyreels_v3.components import Components, quantize_blocks
from skyreels_v3.denoising.guidance import NEGATIVE_PROMPT, Guidance
from skyreels_v3.denoising.loop import Condition, Pin, Predictions, denoise, leave
from skyreels_v3.denoising.schedules import ATTRIBUTES, restore_scheduler, scheduler_state, unipc
from skyreels_v3.denoising.step_cache import StepCache
from skyreels_v3.hunyuan.text_encoder import HunyuanTextEncoder
from skyreels_v3.inputs import Inputs, condition_clip
from skyreels_v3.resume import RunState
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import LATENT_CHANNELS, VAE_STRIDE, GenerationRequest, latent_frames
from skyreels_v3.wan.text_encoder import TextEncoder, pad_context

logger = logging.getLogger(__name__)

Frame = np.ndarray  # uint8 [H, W, 3]
T = TypeVar("T")
Encoded = dict[str, Tensor]  # what a text encoder makes of a text


@dataclass(frozen=True)
class Pass:
    """Normalised latents (B, C, F, H, W) of the generated frames, float32 on the CPU, and the frames to write."""

    latents: Tensor
    frames: Iterator[Frame]


def frames_to_video(frames: Sequence[Frame] | np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] frames -> (1, 3, F, H, W) in [-1, 1]."""
    video = torch.from_numpy(np.stack(list(frames)))
    return (video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).contiguous()


def video_to_frames(video: Tensor, rounding: bool) -> np.ndarray:
    """(1, 3, F, H, W) in [-1, 1] -> uint8 [F, H, W, 3], rounded, or cut off as the extension models were made with."""
    levels = (video[0] / 2 + 0.5).clamp(0, 1) * 255
    levels = levels.round() if rounding else levels
    # in the order of the file while they are on the device, which is better at it
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def ahead(items: Generator[T, None, None], prepare: Callable[[], object] = lambda: None) -> Iterator[T]:
    """The same items; while one is used a thread makes the next one. `prepare` is called in the thread first."""
    end = object()
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        coming: Future[Any] = thread.submit(next, items, end)
        try:
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
                del item
        finally:
            thread.submit(items.close).result()


def log_step_times(ends: Sequence[float]) -> None:
    """Say how long the first step took and the others, from the times of the beginning and of each step's end."""
    first = ends[1] - ends[0]
    later = f", the others {(ends[-1] - ends[1]) / (len(ends) - 2):.1f} s each" if len(ends) > 2 else ""
    logger.info("the first step, with compilation, took %.1f s%s", first, later)


class Steps:
    """The steps of a pipeline, on the components, the device and the state of a run.

    Of several processes the first one has the state, and the components that are needed there only.
    """

    make_schedule: ClassVar[Callable[[int, float], Any]] = staticmethod(unipc)

    def __init__(self, components: Components, runtime: Runtime, state: RunState | None) -> None:
        self.components = components
        self.runtime = runtime
        self.state = state

    def read_condition(self, request: GenerationRequest, inputs: Inputs) -> np.ndarray:
        """The input clip's last frames, uint8 [F, H, W, 3] of the output's size."""
        assert inputs.clip is not None
        with self.runtime.bar("reading the clip", inputs.clip.frames) as bar:
            return condition_clip(request, inputs, bar.update)

    def contexts(self, guidance: Guidance, *requests: GenerationRequest) -> list[dict[str, Tensor]]:
        """For each request the context (1, 512, D) of each condition on the device."""
        encoded = self.encode_prompts(guidance, *requests)
        return [{name: pad_context(parts["context"]) for name, parts in made.items()} for made in encoded]

    def encode_prompts(self, guidance: Guidance, *requests: GenerationRequest) -> list[dict[str, Encoded]]:
        """For each request what encodes each condition's text: its prompt, or the negative one."""
        wanted = [
            {name: made.negative_prompt if name in NEGATIVE_PROMPT else made.prompt for name in guidance.conditions}
            for made in requests
        ]
        encoded = self.encode_texts(prompt for prompts in wanted for prompt in prompts.values())
        return [{name: encoded[prompt] for name, prompt in prompts.items()} for prompts in wanted]

    def encode_texts(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """What encodes each text, on the device; each is encoded once, and kept for later runs."""
        texts, prompts = [*dict.fromkeys(texts)], self.components.prompts

        def encode() -> dict[str, Tensor]:
            known = {text: parts for text in texts if (parts := prompts.recall(text)) is not None}
            if missing := [text for text in texts if text not in known]:
                with self.text_encoder() as encoder:
                    known |= {text: encoder.encode(text) for text in missing}
                for text in missing:
                    prompts.store(text, known[text])
            return {f"{number} {name}": part for number, text in enumerate(texts) for name, part in known[text].items()}

        made: list[Encoded] = [{} for _ in texts]
        for key, part in self.runtime.parallel.broadcast_from_main(encode).items():
            number, name = key.split()
            made[int(number)][name] = part.to(self.runtime.device)
        return dict(zip(texts, made, strict=True))

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder | HunyuanTextEncoder]:
        """The text encoder at work; quantised, if it is to be, when it is first needed."""
        encoder, quant = self.components.text_encoder, self.components.quant
        assert encoder is not None
        if quant is not None:
            quantize_blocks(encoder.blocks, "quantizing the text encoder", quant, self.runtime)
        with self.runtime.resident(encoder.module, "encoding the prompt", encoder.blocks):
            yield encoder

    def encode_frames(self, frames: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [F, H, W, 3] -> latents on the device."""
        return self.encode_video(frames_to_video(frames).to(self.runtime.device), generator)

    def encode_video(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1] on the device -> latents."""
        vae = self.components.vae
        with self.runtime.resident(vae.module, "encoding with the VAE"):
            return vae.encode(video, generator)

    def noise(self, request: GenerationRequest, latent_frames: int, generator: torch.Generator) -> Tensor:
        """Gaussian noise (1, 16, F, H/8, W/8), float32 on the CPU."""
        assert request.height is not None and request.width is not None
        size = (request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2])
        return torch.randn((1, LATENT_CHANNELS, latent_frames, *size), generator=generator)

    def denoise(
        self,
        request: GenerationRequest,
        noise: Tensor,
        conditions: Callable[[], Mapping[str, Condition]],
        guidance: Guidance,
        generator: torch.Generator,
        name: str = "denoising",
        pin: Pin = leave,
    ) -> Tensor:
        """Latents (1, 16, F, h, w) from noise, on the device; those of an interrupted run as far as it had got.

        Args:
            conditions: makes the conditions; not called for a pass that was finished before.
            generator: where the noise comes from.
        """
        parallel = self.runtime.parallel
        saved = parallel.broadcast_from_main(self.recall)
        if saved and ATTRIBUTES not in saved:
            generator.set_state(saved["generator"])
            return saved["latents"].to(self.runtime.device)
        made = conditions()
        transformer = self.components.transformer
        scheduler = self.schedule(request)
        start, done = noise.to(self.runtime.device), 0
        if saved:
            generator.set_state(saved["generator"])
            restore_scheduler(scheduler, saved, self.runtime.device)
            start, done = saved["latents"].to(self.runtime.device), scheduler.step_index
            logger.info("going on after step %d of %d", done, len(scheduler.timesteps))
        keep = self.safety_copies(request, scheduler, generator)
        resident = self.runtime.resident(transformer, "denoising", transformer.blocks)
        divided = self.predictions(request)
        with resident, divided as predictions, self.runtime.bar(name, len(scheduler.timesteps)) as bar:
            bar.update(done)
            ends = [perf_counter()]

            def after_step(step: int, latents: Tensor) -> None:
                ends.append(perf_counter())
                bar.update()
                keep(step, latents)

            try:
                latents = denoise(transformer, scheduler, start, made, guidance, after_step, pin, predictions, done)
            except FloatingPointError:
                check_finite(transformer, "transformer")  # not before: it reads all weights
                raise
        if request.compile:
            log_step_times(ends)
        elif parallel.is_main and request.cache is None and not done:
            latents.flatten()[0].item()  # waits for the device
            throughput.store(self.runtime.plan, noise.shape[2], perf_counter() - ends[0])
        if self.state is not None:
            self.state.save(latents, generator)
        return latents

    def safety_copies(
        self, request: GenerationRequest, scheduler: Any, generator: torch.Generator
    ) -> Callable[[int, Tensor], None]:
        """What keeps the latents that a step ended in, if so many seconds have passed since it last did.

        Not with a step cache, which knows more than the scheduler does: that pass begins anew.
        """
        state, every, steps = self.state, request.checkpoint_every, len(scheduler.timesteps)
        last = perf_counter()

        def keep(step: int, latents: Tensor) -> None:
            nonlocal last
            if state is None or not every or request.cache is not None:
                return
            if step < steps and perf_counter() - last >= every:
                state.save_step(latents, generator, scheduler_state(scheduler))
                last = perf_counter()

        return keep

    def schedule(self, request: GenerationRequest) -> Any:
        """The scheduler of a pass, set to its first step."""
        assert request.shift is not None
        return self.make_schedule(request.num_inference_steps, request.shift)

    @contextmanager
    def predictions(self, request: GenerationRequest) -> Iterator[Predictions]:
        """What computes the predictions of a pass: divided among processes, and not at every step if so asked."""
        parallel = self.runtime.parallel
        if request.cache is None:
            yield parallel.predictions
            return
        cache = StepCache(request.cache, parallel.group("sequence"))
        with cache.attached(self.components.transformer):
            yield lambda names, predict: parallel.predictions(names, lambda name: cache.under(name, predict))
        logger.info("fbcache computed %d of %d blocks", cache.computed, cache.computed + cache.skipped)

    def recall(self) -> dict[str, Tensor]:
        """The next pass of an interrupted run, see `RunState.recall`."""
        assert self.state is not None
        return self.state.recall()

    def decode_video(self, latents: Tensor, frames: int | None = None) -> Iterator[Tensor]:
        """Video (1, 3, f, H, W) in [-1, 1] of latents (1, 16, F, h, w), piece by piece as it is asked for.

        Args:
            frames: how many are wanted, None for all.
        """
        vae = self.components.vae
        left = frames or VAE_STRIDE[0] * latents.shape[2]
        total = min(latents.shape[2], latent_frames(left + VAE_STRIDE[0] - 1))  # the last one's frames may be too many
        resident = self.runtime.resident(vae.module, "decoding with the VAE")
        with resident, self.runtime.bar("decoding", total) as bar:
            for chunk in islice(vae.decode_stream(latents), total):
                bar.update()
                yield chunk[:, :, :left]
                left -= chunk.shape[2]

    def decode(self, latents: Tensor, rounding: bool, frames: int | None = None) -> Iterator[Frame]:
        """Frames of latents (1, 16, F, h, w), decoded as they are asked for; see `decode_video`."""
        return self.frames_of(self.decode_video(latents, frames), rounding)

    def frames_of(self, video: Iterator[Tensor], rounding: bool) -> Iterator[Frame]:
        """Frames of a video that comes in pieces; while those of one are written the next one is decoded."""
        pieces = (video_to_frames(piece, rounding) for piece in video)
        del video  # closed with what it is read by, in the thread
        for frames in ahead(pieces, self.runtime.take_device):
            yield from frames
