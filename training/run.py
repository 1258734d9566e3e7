"""The environment of one model's training: device, time limit and files."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import tasks

TRANSFORMERS = {  # transformer -> family
    "video": "wan",  # reference_to_video and both extensions
    "talking_avatar": "wan",
    "t2v": "hunyuan",
    "i2v": "hunyuan",
}
VAES = {"vae_wan": "wan", "vae_hunyuan": "hunyuan"}
MODELS = VAES | TRANSFORMERS
ENCODER_ENDS, DECODER_ENDS = 0.34, 0.62  # fractions of the time
ENDS_ALONE = 0.7, 1.0  # without transformers, which wait for the encoder
RESERVE = {"cuda": 14.0, "cpu": 20.0}  # seconds at the end, for the last pictures and files
LOG_EVERY = {"cuda": 10.0, "cpu": 60.0}  # seconds
HELD_OUT = 1_000_000  # the first seed of scenes that are not trained on


class Run:
    """The options of a training run, for one of its processes.

    Attributes:
        folder: for the files that processes exchange: `NAME.safetensors`, `NAME.png`, and `NAME.ready` of a VAE.
        start, end: times, in seconds since the epoch.
        encoder_end, decoder_end: when the training of a VAE's encoder ends, and of its decoder.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, start: float) -> None:
        self.device = torch.device(options.device)
        self.folder = folder
        self.start = start
        seconds = 60 * options.minutes
        self.end = start + seconds - min(RESERVE[options.device], 0.2 * seconds)
        alone = not set(options.only or MODELS) & set(TRANSFORMERS)
        encoder, decoder = ENDS_ALONE if alone else (ENCODER_ENDS, DECODER_ENDS)
        self.encoder_end, self.decoder_end = start + encoder * seconds, min(self.end, start + decoder * seconds)
        self.sizes = tasks.TOY if options.toy else tasks.ON_CUDA if options.device == "cuda" else tasks.ON_CPU
        self.encoders = options.encoders
        self.compile = options.compile
        self.log_every = LOG_EVERY[options.device]

    def has(self, name: str) -> bool:
        """Whether there are weights to continue from."""
        return self.file(name).is_file()

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def ready(self, vae: str) -> Path:
        """The file that marks a VAE's encoder as done."""
        return self.folder / f"{vae}.ready"

    def write(self, name: str, module: nn.Module) -> None:
        """Write a module's weights in float16.

        Raises:
            FloatingPointError: some are not finite; the file of the last finite ones stays.
        """
        tensors = {key: value.detach().to("cpu", torch.float16) for key, value in module.named_parameters()}
        if not all(value.isfinite().all() for value in tensors.values()):
            raise FloatingPointError(f"{name}: weights are not finite")
        write_tensors(self.file(name), tensors)

    def read(self, name: str, module: nn.Module) -> None:
        tensors = {key: value.float() for key, value in load_file(self.file(name)).items()}
        module.load_state_dict(tensors, strict=False)

    def write_pictures(self, name: str, rows: Sequence[Sequence[Tensor]]) -> None:
        """Write rows of pictures (3, H, W) in [-1, 1] as one PNG."""
        lines = [torch.cat([picture.float().cpu() for picture in row], dim=2) for row in rows]
        width = max(line.shape[2] for line in lines)
        lines = [nn.functional.pad(line, (0, width - line.shape[2]), value=-1) for line in lines]
        pixels = tasks.to_bytes(torch.cat(lines, dim=1).clamp(-1, 1))
        temporary = self.folder / f"{name}.tmp.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)
        temporary.replace(self.folder / f"{name}.png")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    temporary.replace(path)


class Schedule:
    """A learning rate with a short warm-up, then cosine decay, over the time until `end`."""

    def __init__(self, peak: float, end: float, lowest: float = 0.02, warm_up: float = 0.03) -> None:
        self.peak, self.lowest, self.warm_up = peak, lowest, warm_up
        self.start, self.end = time.time(), end

    def progress(self, now: float) -> float:
        """Fraction of the time that has passed, 0 to 1."""
        return min(1.0, max(0.0, (now - self.start) / max(1e-6, self.end - self.start)))

    def rate(self, progress: float) -> float:
        if progress < self.warm_up:
            return self.peak * (0.05 + 0.95 * progress / self.warm_up)
        falling = 0.5 * (1 + math.cos(math.pi * (progress - self.warm_up) / (1 - self.warm_up)))
        return self.peak * (self.lowest + (1 - self.lowest) * falling)
