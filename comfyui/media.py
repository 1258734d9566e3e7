"""Converts between ComfyUI's IMAGE, AUDIO and VIDEO and the files that flags name, without lossy compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import Input, InputImpl, Types
from PIL import Image
from torch import Tensor

from skyreels_v3.media.audio import write_audio
from skyreels_v3.media.video_writer import copy_frames

if TYPE_CHECKING:
    from skyreels_v3 import Done

Audio = Mapping[str, Any]  # ComfyUI's: waveform (B, C, T) and sample_rate


def to_frames(images: Tensor) -> np.ndarray:
    """IMAGE, float (B, H, W, C) in [0, 1] -> uint8 [B, H, W, 3]."""
    return (images[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_images(frames: Sequence[np.ndarray]) -> Tensor:
    """Frames, uint8 [H, W, 3] each -> IMAGE, float32 (B, H, W, 3) in [0, 1]."""
    return torch.stack([torch.from_numpy(frame) for frame in frames]).float().div_(255)


def write_images(images: Tensor, folder: Path, name: str) -> list[str]:
    """Write the pictures of an IMAGE as PNG files; returns their paths."""
    paths = [folder / f"{name}-{number}.png" for number in range(len(images))]
    for path, frame in zip(paths, to_frames(images), strict=True):
        Image.fromarray(frame).save(path)
    return [*map(str, paths)]


def write_sound(audio: Audio, path: Path) -> Path:
    """Write an AUDIO, of a batch the first one, to a file."""
    return write_audio(audio["waveform"][0].float().cpu().numpy(), audio["sample_rate"], path)


def write_frames(images: Tensor, path: Path, fps: Fraction) -> Path:
    """Write an IMAGE as a lossless clip."""
    deque(copy_frames((frame for frame in to_frames(images)), path, fps), maxlen=0)
    return path


def write_clip(clip: Input.Video | Tensor, fps: float, folder: Path) -> tuple[Path, Audio | None]:
    """The file of a VIDEO, or of an IMAGE at `fps` frames per second, and the sound that is not in it.

    A VIDEO that is a whole file is used as it is.
    """
    path = folder / "clip.mp4"
    if isinstance(clip, Tensor):
        return write_frames(clip, path, Fraction(fps).limit_denominator(1001)), None
    if isinstance(clip, InputImpl.VideoFromFile):
        source = clip.get_stream_source()
        whole = InputImpl.VideoFromFile(source)
        if (clip.get_duration(), clip.get_dimensions()) == (whole.get_duration(), whole.get_dimensions()):
            if isinstance(source, str):
                return Path(source), None
            path.write_bytes(source.getvalue())
            return path, None
    parts = clip.get_components()
    return write_frames(parts.images, path, parts.frame_rate), parts.audio


def to_video(images: Tensor, done: Done, sound: Audio | None) -> Input.Video:
    """A VIDEO of the frames that were made, with the sound that was made, or else with `sound`."""
    if done.sound is not None:
        samples, rate = done.sound
        sound = {"waveform": torch.from_numpy(samples)[None], "sample_rate": rate}
    return InputImpl.VideoFromComponents(
        Types.VideoComponents(images=images, audio=sound, frame_rate=Fraction(done.fps))
    )
