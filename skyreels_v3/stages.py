"""The stages that pipelines consist of: encode prompts, encode images, denoise, decode to frames.

A pipeline is a generator of events: a `Step` after each denoising step, and a `Pass` after each denoising loop. A pass
has its latents and a lazily decoded stream of frames, which must be read before asking for the next event.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from skyreels_v3 import throughput
from skyreels_v3.attention.backends import AttentionByStep
from skyreels_v3.checkpoints.load import check_finite
from skyreels_v3.components import Components, quantize_blocks
from skyreels_v3.denoising.guidance import NEGATIVE_PROMPT, Guidance
from skyreels_v3.denoising.loop import (
    ATTRIBUTES,
    Condition,
    LatentConstraint,
    Predictions,
    denoise,
    restore_scheduler,
    scheduler_state,
    unconstrained,
)
from skyreels_v3.denoising.step_cache import StepCache
from skyreels_v3.families import TextEncoder
from skyreels_v3.inputs import condition_clip
from skyreels_v3.plan import Plan
from skyreels_v3.resume import RunState
from skyreels_v3.runtime import Runtime
from skyreels_v3.tasks import LATENT_CHANNELS, VAE_STRIDE, latent_frames

logger = logging.getLogger(__name__)

Frame = np.ndarray  # uint8 [H, W, 3]
COMPILATION = "compilation"
T = TypeVar("T")
Encoded = dict[str, Tensor]  # the output of a text encoder


@dataclass(frozen=True)
class Step:
    """Denoising step `number` of `total` in the pass `name` is done.

    Attributes:
        latents: (B, C, F, H, W).
        sigma: the remaining noise level.
    """

    name: str
    number: int
    total: int
    latents: Tensor
    sigma: float


@dataclass(frozen=True)
class Pass:
    """A pass: normalized latents (B, C, F, H, W) of the new frames, float32 on the CPU, and the frames to write.

    Attributes:
        before: the frames that these continue, if any, uint8 [F, H, W, 3].
    """

    latents: Tensor
    frames: Iterator[Frame]
    before: np.ndarray | None = None


Event = Step | Pass


def frames_to_video(frames: Sequence[Frame] | np.ndarray) -> Tensor:
    """Frames, uint8 [F, H, W, 3] -> video (1, 3, F, H, W) in [-1, 1]."""
    video = torch.from_numpy(np.stack(list(frames)))
    return (video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).contiguous()


def video_to_frames(video: Tensor, rounding: bool) -> np.ndarray:
    """Video (1, 3, F, H, W) in [-1, 1] -> uint8 [F, H, W, 3], rounded, or truncated as in the extensions' training."""
    levels = (video[0] / 2 + 0.5).clamp(0, 1) * 255
    levels = levels.round() if rounding else levels
    # transposing on the device is faster
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def prefetch(items: Generator[T, None, None], prepare: Callable[[], object] = lambda: None) -> Iterator[T]:
    """Yield the items, each produced in a thread while the previous one is used; the thread first calls `prepare`."""
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
    """Log how long the first step and the others took; `ends` has the time of the start and of each step's end."""
    first = ends[1] - ends[0]
    later = f", the others {(ends[-1] - ends[1]) / (len(ends) - 2):.1f} s each" if len(ends) > 2 else ""
    logger.info("the first step, with %s, took %.1f s%s", COMPILATION, first, later)


class Stages:
    """The stages, with the components, device and saved state of one video.

    With several ranks, only the main one has the state and the encoders.
    """

    def __init__(self, components: Components, runtime: Runtime, plan: Plan, state: RunState | None) -> None:
        self.components = components
        self.runtime = runtime
        self.request, self.inputs = plan.request, plan.inputs
        self.plan = plan
        self.state = state

    def read_condition(self) -> np.ndarray:
        """Read the last frames of the input clip, uint8 [F, H, W, 3] in the size of the output."""
        assert self.inputs.clip is not None
        with self.runtime.bar("reading the clip", self.inputs.clip.frames) as bar:
            return condition_clip(self.request, self.inputs, bar.update)

    def encode_prompts(self, guidance: Guidance, *prompts: str) -> list[dict[str, Encoded]]:
        """Encode prompts; returns for each the encoded prompt or negative prompt by condition name."""
        negative = self.request.negative_prompt
        wanted = [
            {name: negative if name in NEGATIVE_PROMPT else prompt for name in guidance.conditions}
            for prompt in prompts
        ]
        encoded = self.encode_texts(text for texts in wanted for text in texts.values())
        return [{name: encoded[text] for name, text in texts.items()} for texts in wanted]

    def encode_texts(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """Encode each text once, or take it from the cache; results are on the device."""
        texts, prompts = [*dict.fromkeys(texts)], self.components.prompt_cache

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
    def text_encoder(self) -> Iterator[TextEncoder]:
        """The text encoder, on the device; with --quant it is quantized on first use."""
        encoder, quant = self.components.text_encoder, self.components.quant
        assert encoder is not None
        if quant is not None:
            quantize_blocks(encoder.blocks, "quantizing the text encoder", quant, self.runtime)
        with self.runtime.resident(encoder.module, "encoding the prompt", encoder.blocks):
            yield encoder

    def encode_frames(self, frames: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
        """Encode frames, uint8 [F, H, W, 3], to latents on the device."""
        return self.encode_video(frames_to_video(frames).to(self.runtime.device), generator)

    def encode_video(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode a video (1, 3, F, H, W) in [-1, 1] on the device to latents."""
        vae = self.components.vae
        with self.runtime.resident(vae.module, "encoding with the VAE"):
            return vae.encode(video, generator)

    def noise(self, latent_frames: int, generator: torch.Generator) -> Tensor:
        """Gaussian noise (1, 16, F, H/8, W/8), float32 on the CPU."""
        size = (self.request.height // VAE_STRIDE[1], self.request.width // VAE_STRIDE[2])
        return torch.randn((1, LATENT_CHANNELS, latent_frames, *size), generator=generator)

    def denoise(
        self,
        noise: Tensor,
        conditions: Callable[[], Mapping[str, Condition]],
        guidance: Guidance,
        generator: torch.Generator,
        scheduler: Any,
        name: str = "denoising",
        constraint: LatentConstraint = unconstrained,
    ) -> Generator[Step, None, Tensor]:
        """Denoise to latents (1, 16, F, h, w) on the device; yields a `Step` for each step.

        A pass that an interrupted run finished is loaded; one that it began is continued.

        Args:
            conditions: makes the conditions; not called for a finished pass.
            generator: the source of the noise; its state is saved.
            scheduler: a diffusers scheduler, set to its first step.
        """
        request, parallel = self.request, self.runtime.parallel
        total = len(scheduler.timesteps)
        latents, done = self.start_pass(noise, generator, scheduler)
        if done == total:
            return latents
        made = conditions()
        transformer = self.components.transformer
        resident = self.runtime.resident(transformer, "denoising", transformer.blocks)
        compiled = self.runtime.compiles
        stance = torch.compiler.set_stance("default" if compiled else "force_eager")
        with resident, stance, self.predictions() as predictions, self.runtime.bar(name, total) as bar:
            bar.update(done)
            ends = [perf_counter()]
            last_copy = ends[0]
            try:
                steps = denoise(transformer, scheduler, latents, made, guidance, constraint, predictions, done)
                self.choose_precision(done, total)
                for step, latents in steps:
                    ends.append(perf_counter())
                    bar.update()
                    if self.copies_steps and step < total and ends[-1] - last_copy >= request.checkpoint_every:
                        assert self.state is not None
                        self.state.save_step(latents, generator, scheduler_state(scheduler))
                        last_copy = perf_counter()
                    yield Step(name, step, total, latents, float(scheduler.sigmas[step]))
                    self.choose_precision(step, total)
            except FloatingPointError:
                check_finite(transformer, "transformer")  # only on failure, since it reads all weights
                raise
        if compiled and COMPILATION not in self.runtime.logged_stages:
            self.runtime.logged_stages.add(COMPILATION)
            log_step_times(ends)
        skipped = int(compiled)  # the first step includes the compilation
        if parallel.is_main and request.cache is None and not done and total > skipped:
            latents.flatten()[0].item()  # waits for the device
            seconds = (perf_counter() - ends[skipped]) * total / (total - skipped)
            throughput.store(self.plan, noise.shape[2], seconds)
        if self.state is not None:
            self.state.save(latents, generator)
        return latents

    def choose_precision(self, done: int, total: int) -> None:
        """Choose the attention of the next step: exact in the first and last --exact_steps."""
        if isinstance(self.runtime.attention, AttentionByStep):
            self.runtime.attention.use_exact = min(done, total - 1 - done) < self.request.exact_steps

    def start_pass(self, noise: Tensor, generator: torch.Generator, scheduler: Any) -> tuple[Tensor, int]:
        """The latents that a pass starts from, on the device, and how many of its steps an interrupted run has done.

        The states of `generator` and `scheduler` at that point are restored.
        """
        saved, total = self.runtime.parallel.broadcast_from_main(self.recall), len(scheduler.timesteps)
        if not saved:
            return noise.to(self.runtime.device), 0
        done = total
        if ATTRIBUTES in saved:
            try:
                restore_scheduler(scheduler, saved, self.runtime.device)
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("the saved state of an unfinished pass is damaged (%s); the pass starts over", error)
                return noise.to(self.runtime.device), 0
            done = scheduler.step_index
            logger.info("resuming after step %d of %d", done, total)
        generator.set_state(saved["generator"])
        return saved["latents"].to(self.runtime.device), done

    @property
    def copies_steps(self) -> bool:
        """Whether unfinished passes are saved; not with a step cache, whose state is not saved."""
        return self.state is not None and self.request.checkpoint_every > 0 and self.request.cache is None

    @contextmanager
    def predictions(self) -> Iterator[Predictions]:
        """The function that computes a pass's predictions: divided among ranks, with --cache through the step cache."""
        request, parallel = self.request, self.runtime.parallel
        if request.cache is None:
            yield parallel.predictions
            return
        cache = StepCache(request.cache, parallel.group("sequence"))
        with cache.attached(self.components.transformer):
            yield lambda names, predict: parallel.predictions(names, lambda name: cache.under(name, predict))
        logger.info("fbcache computed %d of %d blocks", cache.computed, cache.computed + cache.skipped)

    def recall(self) -> dict[str, Tensor]:
        """Load the next pass of an interrupted run, see `RunState.recall`."""
        return {} if self.state is None else self.state.recall()

    def decode_video(self, latents: Tensor, frames: int | None = None) -> Iterator[Tensor]:
        """Lazily decode latents (1, 16, F, h, w) to chunks of video (1, 3, f, H, W) in [-1, 1].

        Args:
            frames: how many to decode, None for all.
        """
        vae = self.components.vae
        left = VAE_STRIDE[0] * latents.shape[2] if frames is None else frames
        total = min(latents.shape[2], latent_frames(left + VAE_STRIDE[0] - 1))  # rounded up
        resident = self.runtime.resident(vae.module, "decoding with the VAE")
        with resident, self.runtime.bar("decoding", total) as bar:
            for chunk in islice(vae.decode_stream(latents), total):
                bar.update()
                yield chunk[:, :, :left]
                left -= chunk.shape[2]

    def decode(self, latents: Tensor, rounding: bool, frames: int | None = None) -> Iterator[Frame]:
        """Lazily decode latents (1, 16, F, h, w) to frames, see `decode_video`."""
        return self.frames_of(self.decode_video(latents, frames), rounding)

    def frames_of(self, video: Iterator[Tensor], rounding: bool) -> Iterator[Frame]:
        """Yield the frames of a video in chunks; the next chunk is decoded while one is written."""
        pieces = (video_to_frames(piece, rounding) for piece in video)
        del video  # so that the generator above, closed in the thread, has the only reference
        for frames in prefetch(pieces, self.runtime.make_device_current):
            yield from frames
