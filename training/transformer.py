"""Training of a transformer, on latents of the drawn world.

Guidance is distilled by adding (s - 1) (v(c) - v(0)) of a teacher to the target, for a scale s, the condition c and its
absence 0: Z. Tang et al., Diffusion Models without Classifier-free Guidance, arXiv:2502.12154, with the teacher frozen.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from training import measure, networks, sampling, tasks
from training.optimizer import Trainer
from training.run import HELD_OUT, Run, Schedule

PEAK_RATE = 6e-3
WRITE_EVERY = 20  # seconds
RESUMED = 0.5  # fraction of the schedule of batches that a resumed training skips
FIRST_CHUNKS = 12  # of each kind, encoded before the first step
# V3's transformers are sampled without guidance, like the published ones, so it is distilled into them in the end
GUIDANCE = 3.0
GUIDED = 0.6  # from this fraction of the time on

logger = logging.getLogger("training")


class TransformerTraining:
    """Draws samples until the VAE is ready; then trains, with new samples every few steps."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run = name, run
        self.task = tasks.TASKS[name](name, run.sizes, run.device, run.folder / f"encoders_{name}")
        self.vae_name = f"vae_{self.task.vae}"
        self.model: Any = networks.build_transformer(name)
        self.seed = 2_000_000  # of the next sample
        self.resumed = run.has(name)
        if self.resumed:
            run.read(name, self.model)
            self.seed += int(run.start * 7) % 1_000_000_000
        self.model.to(run.device)
        self.averaged = copy.deepcopy(self.model)
        self.trainer = Trainer(self.model.parameters(), low=low(self.model))
        self.compile(self.model)
        self.teacher: Any = None
        self.drawn: list[tuple[str, tasks.Sample]] = []
        logger.info("%.2f M parameters", networks.parameters_of(self.model) / 1e6)

    def train(self) -> None:
        run, task, trainer = self.run, self.task, self.trainer
        latents = self.wait_for_latents()
        for _ in range(min(len(self.drawn), FIRST_CHUNKS * len(task.banks))):
            self.encode(latents)
        schedule = Schedule(PEAK_RATE, run.end)
        logged, written, before = schedule.start, schedule.start, 0
        skipped = RESUMED if self.resumed and not run.encoders else 0.0  # nothing, if the latents are new
        with networks.quick_tables():
            while (now := time.time()) < run.end:
                progress = schedule.progress(now)
                target, condition, weight = task.batch(skipped + (1 - skipped) * progress)
                without = task.unguided(condition) if progress > GUIDED else None
                if without is not None and self.teacher is None:
                    self.make_teacher()
                inputs = target, torch.randn_like(target), task.noise_levels(len(target)), condition, without, weight
                trainer.step(self.loss_of, inputs, schedule.rate(progress))
                if self.drawn:
                    self.encode(latents)
                elif trainer.steps % run.sizes.steps == 0:
                    self.draw(trainer.steps // run.sizes.steps)
                if now - logged > run.log_every:
                    held = sum(bank.count for bank in task.banks.values())
                    mean = float(trainer.loss) / (trainer.steps - before)
                    logger.info("step %d, loss %.4f, %d samples", trainer.steps, mean, held)
                    logged, before = now, trainer.steps
                    trainer.loss.zero_()
                if now - written > WRITE_EVERY:
                    self.write()
                    written = now
        self.write()
        logger.info("%d steps, %.1f s", trainer.steps, time.time() - schedule.start)
        self.picture(latents)

    def loss_of(self, inputs: Any) -> Tensor:
        """The flow-matching loss: weighted mean square of the predicted velocity's error."""
        target, noise, sigma, condition, without, weight = inputs
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * target + level * noise
        wanted = noise - target
        if without is not None:
            with torch.no_grad():
                guided, unguided = (
                    tasks.velocity(self.teacher, each, noisy, sigma, self.task.floor) for each in (condition, without)
                )
            wanted = wanted + (GUIDANCE - 1) * (guided - unguided)
        made = tasks.velocity(self.model, condition, noisy, sigma, self.task.floor)
        return ((made - wanted).square() * weight).mean()

    def make_teacher(self) -> None:
        """Freeze a copy of the averaged model."""
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.trainer.average_into(self.teacher.parameters())
        self.compile(self.teacher)
        logger.info("step %d: guidance is distilled from here on", self.trainer.steps)

    def compile(self, model: Any) -> None:
        """Compile its blocks, if the run should, for each shape of a batch."""
        if self.run.compile:
            torch._dynamo.config.recompile_limit = 64
            model.compile_repeated_blocks(dynamic=False)

    def wait_for_latents(self) -> tasks.Latents:
        """Draw samples until the VAE's encoder is done; returns it."""
        ready = self.run.ready(self.vae_name)
        while not ready.is_file():
            if time.time() > self.run.end:
                raise RuntimeError("there is no VAE")
            if len(self.drawn) * self.run.sizes.chunk < self.run.sizes.first:
                self.draw(len(self.drawn))
            else:
                time.sleep(0.1)
        while len(self.drawn) < max(4, len(self.task.drawn)):
            self.draw(len(self.drawn))
        logger.info("%d chunks of samples are drawn", len(self.drawn))
        return tasks.Latents(self.read_vae(), self.run.device)

    def read_vae(self) -> Any:
        vae = networks.build_vae(self.task.vae)
        self.run.read(self.vae_name, vae)
        return vae

    def draw(self, number: int) -> None:
        """Draw a chunk of samples; kinds take turns."""
        kind = self.task.drawn[number % len(self.task.drawn)]
        count = self.run.sizes.chunk_of(kind)
        self.drawn.append((kind, self.task.draw(kind, range(self.seed, self.seed + count))))
        self.seed += count

    def encode(self, latents: tasks.Latents) -> None:
        kind, samples = self.drawn.pop(0)
        self.task.banks[kind].add(self.task.encode(samples, latents))

    def write(self) -> None:
        self.trainer.average_into(self.averaged.parameters())
        self.run.write(self.name, self.averaged)

    @torch.no_grad()
    def picture(self, latents: tasks.Latents) -> None:
        """Write several frames of held-out scenes: the truth, and below it samples by the pipelines' denoising loop."""
        task, vae = self.task, self.read_vae().to(self.run.device)
        rows: list[list[Tensor]] = []
        for kind in task.kinds:
            drawn = kind if kind in task.drawn else task.drawn[0]
            samples = task.encode(task.draw(drawn, range(HELD_OUT + 10, HELD_OUT + 14)), latents)
            made, truth = sampling.sample(task, self.averaged.eval(), kind, samples)
            some = [sampling.decode(vae, part).clamp(-1, 1) for part in (truth, made)]
            seen = tasks.CONDITION_FRAMES if kind in ("short", "long") else 0
            psnr = torch.stack([measure.psnr(*pair) for pair in zip(*some, strict=True)])[:, seen:]  # (B, F)
            video, first = float(psnr.mean()), float(psnr[:, 0].mean())
            logger.info("%s: %.2f dB to the truth, first frame %.2f", kind or self.name, video, first)
            count = psnr.shape[1]
            frames = [max(0, seen - 1), *(seen + count * step // 4 for step in range(1, 4)), seen + count - 1]
            for pair in ((0, 1), (2, 3)) if kind == task.kinds[0] else ((0, 1),):
                rows += [[part[index, :, frame] for index in pair for frame in frames] for part in some]
        self.run.write_pictures(self.name, rows)


def low(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the pipelines hold in bfloat16."""
    wide = getattr(type(model), "_keep_in_fp32_modules", None) or []
    return [value for key, value in model.named_parameters() if not any(part in key for part in wide)]
