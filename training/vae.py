"""Training of a VAE on pictures, then clips, of the drawn world."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training import measure, networks, sound, tasks, world
from training.optimizer import Trainer
from training.run import HELD_OUT, VAES, Run, Schedule

KINDS = {"scene": 0.62, "face": 0.23, "picture": 0.15}  # kinds of clips, and how often each is used
CLIP_FRAMES = 49  # late frames must look like early ones
CROPPED, WHOLE = {1: 64, 9: 8, 17: 5, 49: 2}, {1: 16, 9: 3, 17: 2}  # clips per batch, by number of frames
STAGES = (  # from a fraction of the time on: frames per clip, and how often
    (0.0, {1: 1.0}),
    (0.15, {1: 0.4, 9: 0.6}),
    (0.4, {1: 0.15, 9: 0.25, 17: 0.25, 49: 0.35}),
)
LONGEST = {"wan": 49, "hunyuan": 17}  # V1's VAE runs in pieces
RESUMED = 0.4  # the fraction of the schedule that a resumed training skips
RENEWED, RENEW_EVERY = 4, 16  # clips replaced at a time, and after how many steps
PEAK_RATE = 2e-3
FIRST_LOG_VARIANCE = -5  # little noise at first
LOG_VARIANCE_MAX = 2.0  # of the added noise: else one outlier dominates the loss
KL_WEIGHT = 3e-5
ALIKE = 0.02  # weight of the differences between latents of pictures and of clips
LEAST = 0.2  # fraction of the time that the encoder gets in any case

logger = logging.getLogger("training")


class VAETraining:
    """Trains encoder and decoder, then the decoder alone while the transformers train with the encoder."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run = name, run
        self.random = np.random.default_rng(2)
        self.vae: Any = networks.build_vae(VAES[name])
        self.resumed = run.has(name)
        if self.resumed:
            run.read(name, self.vae)
        self.vae.to(run.device)
        networks.to_channels_last(self.vae)
        self.seed = 50_000_000 + (int(run.start * 10) if self.resumed else 0)  # of the next clip
        shares = {"scene": run.sizes.first // 4, "face": run.sizes.first // 8, "picture": run.sizes.first // 8}
        chunk = run.sizes.chunk
        self.clips = {
            kind: torch.cat([self.draw(kind, chunk) for _ in range(max(1, share // chunk))])
            for kind, share in shares.items()
        }
        self.replaced = dict.fromkeys(self.clips, 0)
        logger.info("%.2f M parameters; clips are drawn", networks.parameters_of(self.vae) / 1e6)

    def train(self) -> None:
        run, vae = self.run, self.vae
        if not self.resumed:
            with torch.no_grad():
                vae.quant_conv.weight[networks.LATENTS :].mul_(0.1)
                vae.quant_conv.bias[networks.LATENTS :].fill_(FIRST_LOG_VARIANCE)
        if not self.resumed or run.encoders:
            self.learn(max(run.encoder_end, time.time() + LEAST * (run.end - run.start)), frozen=False)
            used = self.normalize()
            logger.info("encoder done: %d of 16 channels hold more than noise; %s", used, self.measured())
            run.write(self.name, vae)
            run.ready(self.name).touch()
        for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
            parameter.requires_grad_(False)
        self.learn(run.decoder_end, frozen=True)
        run.write(self.name, vae)
        video = tasks.from_bytes(self.draw("scene", 6, HELD_OUT + 1))
        with torch.no_grad():
            again = networks.decoded(vae, networks.moments_of(vae, video)[0])
        run.write_pictures(self.name, [[*video[:, :, 8]], [*again[:, :, 8]]])

    def learn(self, end: float, frozen: bool) -> None:
        """Train the parameters that require gradients until `end`; `frozen`: not the encoder."""
        trainer = Trainer(parameter for parameter in self.vae.parameters() if parameter.requires_grad)
        averaged = copy.deepcopy(self.vae)
        schedule = Schedule(PEAK_RATE, end, lowest=0.03)
        logged, before = time.time(), 0
        while (now := time.time()) < end:
            progress = schedule.progress(now)
            if trainer.steps % RENEW_EVERY == RENEW_EVERY - 1:
                self.renew()
            late = 1.0 if frozen else RESUMED + (1 - RESUMED) * progress if self.resumed else progress
            video = self.batch(late)
            trainer.step(self.loss_of_decoder if frozen else self.loss_of_both, video, schedule.rate(progress))
            if now - logged > self.run.log_every:
                logger.info("step %d, error %.4f", trainer.steps, float(trainer.loss) / (trainer.steps - before))
                logged, before = now, trainer.steps
                trainer.loss.zero_()
                trainer.average_into(parameter for parameter in averaged.parameters() if parameter.requires_grad)
                self.run.write(self.name, averaged)
        trainer.take_average()
        logger.info("%d steps; %s", trainer.steps, self.measured())

    def loss_of_both(self, video: Tensor) -> Tensor:
        return self.loss_of(video, frozen=False)

    def loss_of_decoder(self, video: Tensor) -> Tensor:
        return self.loss_of(video, frozen=True)

    def loss_of(self, video: Tensor, frozen: bool) -> Tensor:
        with torch.autocast(self.run.device.type, torch.bfloat16):
            with torch.set_grad_enabled(not frozen):
                mean, log_variance = networks.moments_of(self.vae, video)
            deviation = (0.5 * log_variance.clamp(max=LOG_VARIANCE_MAX)).exp()
            again = networks.decoded(self.vae, mean + deviation * torch.randn_like(mean))
        loss = (again - video).abs().mean() + (again - video).square().mean()
        if not frozen:
            loss = loss + KL_WEIGHT * 0.5 * (mean.square() + deviation.square() - 1 - log_variance).mean()
            if mean.shape[2] > 1:
                loss = loss + ALIKE * self.distance_to_pictures(video, mean)
        return loss

    def distance_to_pictures(self, video: Tensor, mean: Tensor) -> Tensor:
        """How much the last latents of clips differ from those that their last frames have as pictures: mean square.

        V3's VAE treats the first frame in its own way. If nothing held them together, the latents of first and later
        frames would become uncorrelated, and what a transformer learns from one would not help with the other.
        """
        with torch.autocast(self.run.device.type, torch.bfloat16):
            picture, _ = networks.moments_of(self.vae, video[:, :, -1:])
        clip = networks.normalized(self.vae, mean[:, :, -1:])
        return (clip - networks.normalized(self.vae, picture)).square().mean()

    def batch(self, progress: float) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1]: crops of single frames at first, later more frames, then whole ones."""
        kind = self.random.choice([*KINDS], p=[*KINDS.values()])
        chances = next(chances for start, chances in reversed(STAGES) if progress >= start)
        frames = int(self.random.choice([*chances], p=[*chances.values()])) if kind != "picture" else 1
        frames = min(frames, LONGEST[VAES[self.name]])
        whole = progress > 0.7 and frames in WHOLE
        clips = self.clips[kind]
        size = max(1, round((WHOLE if whole else CROPPED)[frames] * self.run.sizes.batch))
        video = clips[torch.randint(len(clips), (size,), device=clips.device)]
        first = int(self.random.integers(video.shape[2] - frames + 1)) if self.random.random() < 0.5 else 0
        video = video[:, :, first : first + frames]
        if not whole:
            height, width = (side // 2 // 8 * 8 for side in self.run.sizes.scene)
            top = 8 * int(self.random.integers((video.shape[3] - height) // 8 + 1))
            left = 8 * int(self.random.integers((video.shape[4] - width) // 8 + 1))
            video = video[..., top : top + height, left : left + width]
        return tasks.from_bytes(video).contiguous(memory_format=torch.channels_last_3d)

    def renew(self) -> None:
        """Replace a few clips by new ones."""
        kind = self.random.choice([*KINDS])
        at = self.replaced[kind] % (len(self.clips[kind]) - RENEWED + 1)
        self.clips[kind][at : at + RENEWED] = self.draw(kind, RENEWED)
        self.replaced[kind] = at + RENEWED

    def draw(self, kind: str, size: int, seed: int | None = None) -> Tensor:
        """Draw new clips, or those from `seed` on."""
        if seed is not None:
            return draw_clips(self.run, kind, range(seed, seed + size))
        seeds = range(self.seed, self.seed + size)
        self.seed += size
        clips = draw_clips(self.run, kind, seeds)
        if kind == "face":
            for clip, number in zip(clips, seeds, strict=True):
                if number % 4 == 0:  # gray, like the pipeline's unknown frames
                    clip[:, 1 if number % 8 else 5 :] = 128
        return clips

    @torch.no_grad()
    def normalize(self) -> int:
        """Normalize latents to the published statistics; returns how many channels hold more than noise."""
        with torch.autocast(self.run.device.type, torch.bfloat16):
            found = [
                networks.moments_of(self.vae, tasks.from_bytes(self.clips[kind][:size]))
                for kind, size in (("scene", 8), ("face", 4))
            ]
        means, variances = (torch.cat([part[i].transpose(0, 1).flatten(1) for part in found], dim=1) for i in (0, 1))
        std = (means.var(dim=1) + variances.exp().mean(dim=1)).sqrt()
        networks.fold_normalization(self.vae, means.mean(dim=1), std)
        return int((means.std(dim=1) / std > 0.5).sum())

    @torch.no_grad()
    def measured(self) -> str:
        """PSNR of held-out clips' frames, as text."""
        figures = []
        for kind in ("scene", "face"):
            video = tasks.from_bytes(self.draw(kind, self.run.sizes.chunk, HELD_OUT + 1))
            with torch.autocast(self.run.device.type, torch.bfloat16):
                again = networks.decoded(self.vae, networks.moments_of(self.vae, video)[0]).clamp(-1, 1)
            found = torch.stack([measure.psnr(*pair) for pair in zip(again, video, strict=True)])
            figures.append(f"{kind} {float(found.mean()):.2f} dB")
        return ", ".join(figures)


def draw_clips(run: Run, kind: str, seeds: Sequence[int]) -> Tensor:
    """uint8 clips (N, 3, F, H, W); pictures have one frame."""
    height, width = run.sizes.scene
    if kind == "face":
        mouths = [spoken(seed % 16)[:CLIP_FRAMES] for seed in seeds]
        faces = [world.make_face(seed, mouth) for seed, mouth in zip(seeds, mouths, strict=True)]
        return tasks.to_bytes(world.render_faces(faces, *run.sizes.face, run.device))
    scenes = [world.make_scene(seed, width / height) for seed in seeds]
    if kind == "picture":
        shown = [world.references(scene)[0] for scene in scenes]
        made = tasks.to_bytes(world.render(shown, 1, height, height, run.device, fine=True))
        margin = (width - height) // 2
        return nn.functional.pad(made, (margin, width - height - margin), value=255)
    starts = [float(np.random.default_rng([9, seed]).uniform(0, 4)) for seed in seeds]
    scenes = [
        world.cut_to(scene, start, world.CUTS[seed % 4]) if seed % 5 == 0 else scene
        for scene, start, seed in zip(scenes, starts, seeds, strict=True)
    ]
    return tasks.to_bytes(world.render(scenes, CLIP_FRAMES, height, width, run.device, starts))


@cache
def spoken(seed: int) -> np.ndarray:
    """Mouth openings over a few seconds of speech."""
    return sound.mouth_of(sound.make_voice(seed, 4.0))[12:]
