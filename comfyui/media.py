"""Between ComfyUI's IMAGE, AUDIO and VIDEO and the files that flags name. Nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import Input, InputImpl, Types
from PIL import Image
from torch import Tensor

from skyreels_v3.media.audio import decode, mix, write_audio
from skyreels_v3.media.ffmpeg import AUDIO, find_track
from skyreels_v3.media.video_reader import probe_video
from skyreels_v3.media.video_writer import write_lossless

Audio = Mapping[str, Any]  # ComfyUI's: waveform (B, C, T) and sample_rate


def to_frames(images: Tensor) -> np.ndarray:
    """IMAGE, float (B, H, W, C) in [0, 1] -> uint8 [B, H, W, 3]."""
    return (images[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_images(frames: Sequence[np.ndarray]) -> Tensor:
    """Frames, uint8 [H, W, 3] each -> IMAGE, float32 (B, H, W, 3) in [0, 1]."""
    return torch.stack([torch.from_numpy(frame) for frame in frames]).float().div_(255)


def write_images(images: Tensor, folder: Path, name: str) -> list[str]:
    """The pictures of an IMAGE as PNG files; returns their paths."""
    paths = [folder / f"{name}-{number}.png" for number in range(len(images))]
    for path, frame in zip(paths, to_frames(images), strict=True):
        Image.fromarray(frame).save(path)
    return [*map(str, paths)]


def write_sound(audio: Audio, path: Path) -> Path:
    """An AUDIO as a file; of a batch the first one."""
    return write_audio(audio["waveform"][0].float().cpu().numpy(), audio["sample_rate"], path)


def write_clip(clip: Input.Video | Tensor, fps: float, folder: Path) -> tuple[Path, Audio | None]:
    """A VIDEO, or an IMAGE of `fps` frames per second, as a file, and the sound that is not in it.

    If the video is a whole file, it is that one.
    """
    path = folder / "clip.mp4"
    if isinstance(clip, Tensor):
        return write_lossless(to_frames(clip), path, Fraction(fps).limit_denominator(1001)), None
    if isinstance(clip, InputImpl.VideoFromFile):
        source = clip.get_stream_source()
        whole = InputImpl.VideoFromFile(source)
        if (clip.get_duration(), clip.get_dimensions()) == (whole.get_duration(), whole.get_dimensions()):
            if isinstance(source, str):
                return Path(source), None
            path.write_bytes(source.getvalue())
            return path, None
    parts = clip.get_components()
    return write_lossless(to_frames(parts.images), path, parts.frame_rate), parts.audio


def clip_sound(path: Path) -> Audio | None:
    """The sound of a clip, if it has any."""
    return read_sound(path) if probe_video(path, 1).has_sound else None


def read_sound(path: Path) -> Audio:
    """The sound of a file as AUDIO."""
    samples, rate = decode(find_track(path, AUDIO))
    return {"waveform": torch.from_numpy(samples)[None], "sample_rate": rate}


def join_sounds(sounds: Sequence[tuple[Audio, Path]], sequential: bool, folder: Path) -> Audio | None:
    """What is heard in a video: the only sound, or both together or one after the other."""
    if len(sounds) < 2:
        return sounds[0][0] if sounds else None
    return read_sound(mix([path for _, path in sounds], sequential, folder / "mixed.wav"))


def to_video(images: Tensor, fps: int, audio: Audio | None) -> Input.Video:
    """A VIDEO of an IMAGE."""
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(fps)))
