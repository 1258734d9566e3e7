#!/usr/bin/env python3
"""Trains the small models: both VAEs, then the transformers, each in a process of its own, within so many minutes.

    python3 training/train.py --device cuda --minutes 4.5 --out DIR

DIR gets `wan.safetensors` and `hunyuan.safetensors`, float16, written anew every few seconds, `log.txt`, and
`sheet.png` with frames of scenes that were not trained on. `--resume DIR` goes on from such weights; `--only NAME`
trains one model; `--toy` does everything in small, to see that it runs. `training/pack.py` makes the built-in model of
the weights.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRANSFORMERS = {
    "reference_to_video": "wan",
    "video_extension": "wan",
    "talking_avatar": "wan",
    "t2v": "hunyuan",
    "i2v": "hunyuan",
}
VAES = {"vae_wan": "wan", "vae_hunyuan": "hunyuan"}
MODELS = VAES | TRANSFORMERS
PEAK, PEAK_OF_VAE = 6e-3, 2e-3  # the highest learning rates
ENDS = 0.34, 0.62  # parts of the time: when a VAE's encoder is done, and its decoder
ENDS_ALONE = 0.7, 1.0  # without transformers, which wait for the encoder
LEAST = 0.2  # of the time is for the encoders in every case
RESERVE = {"cuda": 14.0, "cpu": 20.0}  # seconds at the end, to draw the sheet and write
HELD_OUT = 1_000_000  # the first seed of scenes that are not trained on
CROPPED, WHOLE = {1: 64, 9: 8, 17: 5}, {1: 16, 9: 3, 17: 2}  # clips in a batch of a VAE, by frames

logger = logging.getLogger("training")


def main() -> None:
    options = parse()
    begun = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("skyreels_v3").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        run_all(options, Path(folder), begun)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and sheet")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=4.5, help="in which all is done and written")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model to train; may be given again")
    parser.add_argument("--resume", type=Path, help="folder with weights to go on from")
    parser.add_argument("--encoders", action="store_true", help="go on with the VAEs' encoders too: a new latent space")
    parser.add_argument("--toy", action="store_true", help="small pictures and banks, to see that all of it runs")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    return parser.parse_args()


# The parent: starts the others, and puts together what they write


def run_all(options: argparse.Namespace, folder: Path, begun: float) -> None:
    """Import and draw once, then fork a process for each model."""
    anew = options.resume is None or options.encoders
    names = options.only or list(MODELS if anew else TRANSFORMERS)
    if options.resume is not None:
        take_apart(options.resume, folder, ready=not anew)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # no CUDA in the parent
    import torch

    torch.set_num_threads(1)  # threads of the parent's would not be in its children
    from training import drawing, optimizer, sampling  # noqa: F401  for all of them

    drawing.draw_everything()
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=work, args=(name, options, folder, begun), name=name) for name in names]
    for run in runs:
        run.start()
    while any(run.is_alive() for run in runs) and time.time() < begun + 60 * options.minutes - 3:
        time.sleep(0.5)
        if int(time.time() - begun) % 15 == 0:
            put_together(folder, options.out)
            time.sleep(0.6)
    for run in runs:
        run.terminate()
        run.join(timeout=5)
    put_together(folder, options.out)


def put_together(work: Path, out: Path) -> None:
    """The parts that there are, as a file for each family, and their pictures as one."""
    from PIL import Image
    from safetensors.torch import load_file

    for family in VAES.values():
        tensors = {}
        for name, of in MODELS.items():
            part = work / f"{name}.safetensors"
            if of == family and part.is_file():
                place = "vae" if name in VAES else name
                tensors |= {f"{place}.{key}": value for key, value in load_file(part).items()}
        if tensors:
            write_tensors(out / f"{family}.safetensors", tensors)
    pictures = [Image.open(file) for name in MODELS if (file := work / f"{name}.png").is_file()]
    if pictures:
        width = max(picture.width for picture in pictures)
        sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)))
        top = 0
        for picture in pictures:
            sheet.paste(picture, (0, top))
            top += picture.height
        sheet.save(out / "sheet.tmp.png")
        (out / "sheet.tmp.png").replace(out / "sheet.png")


def take_apart(folder: Path, work: Path, ready: bool) -> None:
    """Weights of an earlier run as the parts of this one; whether its encoders are `ready` to be learned from."""
    from safetensors.torch import load_file

    for family in VAES.values():
        file = folder / f"{family}.safetensors"
        tensors = load_file(file) if file.is_file() else {}
        for name, of in MODELS.items():
            place = "vae." if name in VAES else f"{name}."
            part = {key.removeprefix(place): value for key, value in tensors.items() if key.startswith(place)}
            if of == family and part:
                write_tensors(work / f"{name}.safetensors", part)
                if name in VAES and ready:
                    (work / f"{name}.ready").touch()


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """A file that is there as a whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    temporary.replace(path)


# What each process does


def work(name: str, options: argparse.Namespace, folder: Path, begun: float) -> None:
    """Train a model; what is said has the time and its name."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(options.out / "log.txt")]
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    since = logging.Formatter(f"%(elapsed)6.1f {name:18} %(message)s")
    for handler in handlers:
        handler.setFormatter(since)
        handler.addFilter(lambda record: setattr(record, "elapsed", time.time() - begun) or True)
    import torch

    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not recorded on the default one
    torch.manual_seed(0)
    run = Run(options, folder, begun, alone=not set(options.only or MODELS) & set(TRANSFORMERS))
    try:
        (train_vae if name in VAES else train_transformer)(name, run)
    except Exception:
        logger.exception("failed")
        raise


class Run:
    """The time that there is, and where things go."""

    def __init__(self, options: argparse.Namespace, folder: Path, begun: float, alone: bool) -> None:
        import torch

        from training import tasks

        self.device = torch.device(options.device)
        self.work = folder
        self.begun = begun
        self.seconds = 60 * options.minutes
        self.end = self.begun + self.seconds - min(RESERVE[options.device], 0.2 * self.seconds)
        self.freeze, self.vae_end = ENDS_ALONE if alone else ENDS
        self.sizes = tasks.TOY if options.toy else tasks.ON_CUDA if options.device == "cuda" else tasks.ON_CPU
        self.encoders = options.encoders

    def at(self, part: float) -> float:
        """The time when a part of all is over."""
        return self.begun + part * self.seconds

    def part(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def write(self, name: str, module: Any) -> None:
        """A module's weights in float16, unless they are damaged."""
        import torch

        tensors = {key: value.detach().to("cpu", torch.float16) for key, value in module.named_parameters()}
        if all(value.isfinite().all() for value in tensors.values()):
            write_tensors(self.part(name), tensors)
        else:
            logger.info("weights are not finite; not written")

    def read(self, name: str, module: Any) -> None:
        from safetensors.torch import load_file

        module.load_state_dict({key: value.float() for key, value in load_file(self.part(name)).items()}, strict=False)


def rate(begun: float, end: float, now: float, peak: float, warm: float = 0.03, least: float = 0.02) -> float:
    """A learning rate that rises for a moment and falls as a cosine over the time."""
    place = min(1.0, max(0.0, (now - begun) / max(1e-6, end - begun)))
    if place < warm:
        return peak * (0.05 + 0.95 * place / warm)
    return peak * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (place - warm) / (1 - warm))))


# The VAEs


@cache
def spoken(seed: int) -> Any:
    """How a mouth moves in a second."""
    from training import sound

    return sound.mouth_of(sound.make_voice(seed, 2.0))[12:]


def draw_clips(run: Run, kind: str, seeds: Iterable[int], frames: int = 17) -> Any:
    """uint8 clips (N, 3, F, H, W) that a VAE learns from."""
    import numpy as np
    import torch

    from training import tasks, world

    height, width = run.sizes.scene
    seeds = list(seeds)
    if kind == "face":
        mouths = [spoken(seed % 16)[:frames] for seed in seeds]
        faces = [world.make_face(seed, mouth) for seed, mouth in zip(seeds, mouths, strict=True)]
        video = world.render_faces(faces, *run.sizes.face, run.device)
        for index in range(0, len(seeds), 4):  # as the pipeline fills up what is not known
            video[index, :, 1 if index % 8 else 5 :] = 0
        return tasks.to_bytes(video)
    scenes = [world.make_scene(seed, width / height) for seed in seeds]
    if kind == "picture":
        shown = [world.references(scene)[0] for scene in scenes]
        made = tasks.to_bytes(world.render(shown, 1, height, height, run.device, fine=True))
        wide = torch.full((len(seeds), 3, 1, height, width), 255, dtype=torch.uint8, device=run.device)
        wide[..., (width - height) // 2 : (width - height) // 2 + height] = made
        return wide
    starts = [float(np.random.default_rng([9, seed]).uniform(0, 4)) for seed in seeds]
    scenes = [
        world.cut_to(scene, start, world.CUTS[seed % 4]) if seed % 5 == 0 else scene
        for scene, start, seed in zip(scenes, starts, seeds, strict=True)
    ]
    return tasks.to_bytes(world.render(scenes, frames, height, width, run.device, starts))


def train_vae(name: str, run: Run) -> None:
    """First encoder and decoder; then the decoder goes on alone while the transformers learn from the encoder."""
    import torch

    from training import networks, tasks
    from training.optimizer import Trainer

    vae: Any = networks.build_vae(VAES[name])
    resumed = run.part(name).is_file()
    if resumed:
        run.read(name, vae)
    vae.to(run.device)
    cuda = run.device.type == "cuda"
    networks.lay_out(vae)
    place = 50_000_000 + (int(run.begun * 10) if resumed else 0)

    def draw(part: str, size: int) -> Any:
        nonlocal place
        place += size
        return draw_clips(run, part, range(place - size, place))

    clips = {
        part: torch.cat([draw(part, run.sizes.chunk) for _ in range(max(1, share // run.sizes.chunk))])
        for part, share in (
            ("scene", run.sizes.first // 4),
            ("face", run.sizes.first // 8),
            ("picture", run.sizes.first // 8),
        )
    }
    replaced = dict.fromkeys(clips, 0)
    logger.info("%.2f M parameters; clips are drawn", networks.parameters_of(vae) / 1e6)

    def batch(progress: float) -> Any:
        chance = float(torch.rand(()))
        part = "scene" if chance < 0.62 else "face" if chance < 0.85 else "picture"
        if trainer.steps % 16 == 15:  # some new ones in the place of old ones
            at = replaced[part] % (len(clips[part]) - 3)
            clips[part][at : at + 4], replaced[part] = draw(part, 4), at + 4
        frames, whole = 1, progress > 0.7
        if part != "picture":
            chance = float(torch.rand(()))
            if progress > 0.5:
                frames = 17 if chance < 0.5 else 9 if chance < 0.8 else 1
            elif progress > 0.2:
                frames = 9 if chance < 0.65 else 1
        size = max(2, round((WHOLE if whole else CROPPED)[frames] * run.sizes.batch))
        video = clips[part][torch.randint(len(clips[part]), (size,), device=run.device)]
        first = int(torch.randint(video.shape[2] - frames + 1, ())) if chance < 0.5 else 0
        video = video[:, :, first : first + frames]
        if not whole:  # a part of the frame is enough for a while
            height, width = (side // 2 // 8 * 8 for side in run.sizes.scene)
            top = 8 * int(torch.randint((video.shape[3] - height) // 8 + 1, ()))
            left = 8 * int(torch.randint((video.shape[4] - width) // 8 + 1, ()))
            video = video[..., top : top + height, left : left + width]
        video = tasks.from_bytes(video)
        return video.contiguous(memory_format=torch.channels_last_3d)

    def measured() -> str:
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            figures = []
            for part in ("scene", "face"):
                video = tasks.from_bytes(draw_clips(run, part, range(HELD_OUT + 1, HELD_OUT + 1 + run.sizes.chunk)))
                again = networks.decoded(vae, networks.moments_of(vae, video)[0]).clamp(-1, 1)
                error = ((again - video) ** 2).mean((1, 2, 3, 4)) / 4
                figures.append(f"{part} {float((-10 * error.log10()).mean()):.2f} dB")
        return ", ".join(figures)

    def loss_of_both(video: Any, frozen: bool = False) -> Any:
        with torch.autocast(run.device.type, torch.bfloat16):
            with torch.set_grad_enabled(not frozen):
                mean, variance = networks.moments_of(vae, video)
            deviation = (0.5 * variance).exp()
            again = networks.decoded(vae, mean + deviation * torch.randn_like(mean))
        loss = (again - video).abs().mean() + (again - video).square().mean()
        if not frozen:
            loss = loss + 3e-5 * 0.5 * (mean.square() + deviation.square() - 1 - variance).mean()
        return loss

    def loss_of_decoder(video: Any) -> Any:
        return loss_of_both(video, frozen=True)

    def train(end: float, frozen: bool) -> None:
        begun = told = time.time()
        before, averaged = 0, copy.deepcopy(vae)
        while (now := time.time()) < end:
            progress = 1.0 if frozen else (now - begun) / (end - begun)
            loss_of = loss_of_decoder if frozen else loss_of_both
            trainer.step(loss_of, batch(progress), rate(begun, end, now, PEAK_OF_VAE, least=0.03))
            if now - told > (10 if cuda else 60):
                logger.info("step %d, error %.4f", trainer.steps, float(trainer.loss) / (trainer.steps - before))
                told, before = now, trainer.steps
                trainer.loss.zero_()
                trainer.average_into(parameter for parameter in averaged.parameters() if parameter.requires_grad)
                run.write(name, averaged)
        trainer.take_average()
        logger.info("%d steps; %s", trainer.steps, measured())

    if not resumed:
        with torch.no_grad():  # little noise at first
            vae.quant_conv.weight[networks.LATENTS :].mul_(0.1)
            vae.quant_conv.bias[networks.LATENTS :].fill_(-5)
    if not resumed or run.encoders:
        trainer = Trainer(vae.parameters())
        train(max(run.at(run.freeze), time.time() + LEAST * run.seconds), frozen=False)
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            found = [
                networks.moments_of(vae, tasks.from_bytes(clips[part][:size]))
                for part, size in (("scene", 32), ("face", 16))
            ]
        means, variances = (torch.cat([f[i].transpose(0, 1).flatten(1) for f in found], dim=1) for i in (0, 1))
        std = (means.var(dim=1) + variances.exp().mean(dim=1)).sqrt()
        networks.fold_normalisation(vae, means.mean(dim=1), std)
        used = (means.std(dim=1) / std > 0.5).sum()
        logger.info("encoder done: %d of 16 channels hold more than noise; %s", used, measured())
        run.write(name, vae)
        (run.work / f"{name}.ready").touch()
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        parameter.requires_grad_(False)
    trainer = Trainer(parameter for parameter in vae.parameters() if parameter.requires_grad)
    train(min(run.end, run.at(run.vae_end)), frozen=True)
    run.write(name, vae)
    picture_of_vae(name, run, vae)


def picture_of_vae(name: str, run: Run, vae: Any) -> None:
    """Scenes above, what the VAE makes of them below."""
    import torch

    from training import networks, tasks

    video = tasks.from_bytes(draw_clips(run, "scene", range(HELD_OUT + 1, HELD_OUT + 7)))
    with torch.no_grad():
        again = networks.decoded(vae, networks.moments_of(vae, video)[0])
    save_rows(run.work / f"{name}.png", [list(video[:, :, 8]), list(again[:, :, 8])])


def save_rows(path: Path, rows: list[list[Any]]) -> None:
    """Pictures (3, H, W) in [-1, 1] in rows."""
    import torch
    from PIL import Image

    lines = [torch.cat([picture.float().cpu() for picture in row], dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=-1) for line in lines]
    pixels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    temporary = path.with_suffix(".tmp.png")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)
    temporary.replace(path)


# The transformers


def train_transformer(name: str, run: Run) -> None:
    """Draw while the VAE is not there yet; then learn, with new samples every few steps."""
    import torch

    from training import networks, tasks
    from training.optimizer import Trainer

    task = tasks.TASKS[name](name, run.sizes, run.device, run.work / f"encoders_{name}")
    model: Any = networks.build_transformer(name)
    resumed = run.part(name).is_file()
    if resumed:
        run.read(name, model)
    model.to(run.device)
    averaged = copy.deepcopy(model)
    trainer = Trainer(model.parameters(), low=lower(model))
    place = int(run.begun * 7) % 1_000_000_000 + 2_000_000 if resumed else 2_000_000
    drawn: list[tuple[str, tasks.Sample]] = []
    logger.info("%.2f M parameters", networks.parameters_of(model) / 1e6)

    def draw(kind: str) -> None:
        """Some samples, whose pixels wait in the CPU's memory."""
        nonlocal place
        made = task.draw(kind, range(place, place + run.sizes.chunk))
        drawn.append((kind, {key: value.cpu() if value.dtype == torch.uint8 else value for key, value in made.items()}))
        place += run.sizes.chunk

    ready = run.work / f"vae_{task.vae}.ready"
    while not ready.is_file():
        if time.time() > run.end:
            raise SystemExit("there is no VAE")
        if len(drawn) * run.sizes.chunk < run.sizes.first:
            draw(task.kinds[len(drawn) % len(task.kinds)])
        else:
            time.sleep(0.1)
    while len(drawn) < 4 * len(task.kinds):
        draw(task.kinds[len(drawn) % len(task.kinds)])
    logger.info("%d samples are drawn", len(drawn) * run.sizes.chunk)
    vae: Any = networks.build_vae(task.vae)
    run.read(f"vae_{task.vae}", vae)
    latents = tasks.Latents(vae, run.device)

    def encode() -> None:
        kind, samples = drawn.pop(0)
        task.banks[kind].add(task.encode(samples, latents))

    def loss_of(inputs: Any) -> Any:
        target, noise, sigma, condition = inputs
        level = sigma.view(-1, 1, 1, 1, 1)
        made = tasks.velocity(model, condition, (1 - level) * target + level * noise, sigma, task.floor)
        return (made - (noise - target)).square().mean()

    for _ in range(min(len(drawn), 12 * len(task.kinds))):
        encode()
    begun = told = written = time.time()
    before = 0
    with networks.quick_tables():
        while (now := time.time()) < run.end:
            target, condition = task.batch((now - begun) / (run.end - begun))
            inputs = target, torch.randn_like(target), task.noise_levels(len(target)), condition
            trainer.step(loss_of, inputs, rate(begun, run.end, now, PEAK))
            if drawn:
                encode()
            elif trainer.steps % run.sizes.steps == 0:
                draw(task.kinds[(trainer.steps // run.sizes.steps) % len(task.kinds)])
            if now - told > (10 if run.device.type == "cuda" else 60):
                held = sum(bank.count for bank in task.banks.values())
                mean = float(trainer.loss) / (trainer.steps - before)
                logger.info("step %d, loss %.4f, %d samples", trainer.steps, mean, held)
                told, before = now, trainer.steps
                trainer.loss.zero_()
            if now - written > 20:
                trainer.average_into(averaged.parameters())
                run.write(name, averaged)
                written = now
    trainer.average_into(averaged.parameters())
    run.write(name, averaged)
    logger.info("%d steps, %.1f s", trainer.steps, time.time() - begun)
    run.read(f"vae_{task.vae}", vae)
    picture_of_samples(name, run, task, averaged.eval(), vae, latents)


def lower(model: Any) -> list[Any]:
    """The parameters that the product has in bfloat16."""
    wide = getattr(type(model), "_keep_in_fp32_modules", None) or []
    return [value for key, value in model.named_parameters() if not any(part in key for part in wide)]


def picture_of_samples(name: str, run: Run, task: Any, model: Any, vae: Any, latents: Any) -> None:
    """Held-out scenes as the product's own denoising loop makes them: truth above, sample below, several frames."""
    import torch

    from training import sampling, tasks

    rows: list[list[Any]] = []
    for kind in task.kinds:
        samples = task.encode(task.draw(kind, range(HELD_OUT + 10, HELD_OUT + 14)), latents)
        with torch.no_grad():
            made, truth = sampling.sample(name, task, model, kind, samples)
            some = [sampling.decode(vae, part).clamp(-1, 1) for part in (truth, made)]
        seen = tasks.CONDITION_FRAMES if kind == "single" else 0
        new = [part[:, :, seen:] for part in some]
        count = new[1].shape[2]
        frames = [max(0, seen - 1), *(seen + count * step // 4 for step in range(1, 4)), seen + count - 1]
        error = float((new[0] - new[1]).square().mean()) / 4
        first = float((-10 * ((new[0] - new[1])[:, :, 0].square().mean((1, 2, 3)) / 4).log10()).mean())
        logger.info("%s: %.2f dB to the truth, first frame %.2f dB", kind or name, -10 * math.log10(error), first)
        for part in some:
            rows += [[part[index, :, frame] for index in (0, 1) for frame in frames]]
        if kind == task.kinds[0]:
            for part in some:
                rows += [[part[index, :, frame] for index in (2, 3) for frame in frames]]
    save_rows(run.work / f"{name}.png", rows)


if __name__ == "__main__":
    main()
