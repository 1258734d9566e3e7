"""The Python API: videos from calls instead of commands.

    from skyreels_v3 import load

    generator = load("reference_to_video", memory="offload")
    for event in generator(prompt="A fox runs through snow", ref_imgs=["fox.png"], seed=1):
        ...  # Step: a denoising step has ended; Frame: one frame of the video; Done: the video is complete

Arguments are the command-line flags, see docs/options.md; invalid ones raise `UserError`. To cancel, stop iterating
(or close the iterator): nothing continues in the background.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyreels_v3.checks import request_of
from skyreels_v3.cli import convert_flags, without_overruled
from skyreels_v3.errors import UserError
from skyreels_v3.generate import clip_frames, judge, measured, sound_of
from skyreels_v3.media.audio import decode
from skyreels_v3.media.ffmpeg import AUDIO, find_track
from skyreels_v3.media.files import run_folder
from skyreels_v3.media.video_reader import ClipInfo
from skyreels_v3.memory.stream import tensors_of
from skyreels_v3.quality import Meter, Quality
from skyreels_v3.request import BY_NAME, COMMAND_ONLY, GenerationRequest
from skyreels_v3.stages import Pass, Step
from skyreels_v3.worker import Worker


@dataclass(frozen=True)
class Frame:
    """Frame `number` of the video, from 0, uint8 [H, W, 3]; the input clip's come first with `include_input=True`."""

    number: int
    image: np.ndarray


@dataclass(frozen=True)
class Done:
    """The end of a video: the final latents of each pass (1, 16, F, H/8, W/8), its seed and frames per second.

    Attributes:
        quality: the measurements, with `check=True`.
        sound: float32 [channels, samples] in [-1, 1], and its sample rate.
    """

    latents: tuple[Tensor, ...]
    seed: int
    fps: int
    quality: Quality | None = None
    sound: tuple[np.ndarray, int] | None = None


Event = Step | Frame | Done


class VideoGenerator:
    """Makes videos of one task. Models are loaded for the first video and kept for later ones that need the same."""

    def __init__(self, task_type: str, **flags: Any) -> None:
        self.flags = {"task_type": task_type, **flags}
        check_names(self.flags)
        self.worker = Worker()

    def __call__(self, **flags: Any) -> Generator[Event, None, None]:
        """Make a video; yields a `Step` per denoising step, a `Frame` per frame, then `Done`.

        Args:
            flags: for this video; they override those given to `load`.

        Raises:
            UserError: wrong flags, at once; unusable inputs or an unsuitable machine, with the first event.
        """
        check_names(flags)
        given = {name: value for name, value in flags.items() if value is not None}
        return self._events(request_of(convert_flags({**without_overruled(self.flags, given), "quiet": True, **given})))

    def _events(self, request: GenerationRequest) -> Generator[Event, None, None]:
        with run_folder() as folder:
            request = replace(request, output=folder / "video.mp4")  # never written
            generator, planned = self.worker.load(self.worker.resolve(request, folder))
            latents, numbers = [], count()
            meter = Meter(planned.request.task.fps) if planned.request.check else None
            for image in clip_frames(planned, meter):
                yield Frame(next(numbers), image)
            for event in generator.events(planned):
                if isinstance(event, Step):
                    yield event
                    continue
                assert isinstance(event, Pass)
                latents.append(event.latents)
                for image in measured(event, meter):
                    yield Frame(next(numbers), image)
            quality = None if meter is None else judge(meter, planned)
            heard = sound_of(planned, folder)
            path = heard.path if isinstance(heard, ClipInfo) else heard
            sound = None if path is None else decode(find_track(path, AUDIO))
            yield Done(tuple(latents), planned.request.seed, planned.request.task.fps, quality, sound)

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of the loaded weights on a device."""
        if self.worker.generator is None:
            return 0
        weights = (tensor for module in self.worker.generator.components.modules for tensor in tensors_of(module))
        return sum(tensor.nbytes for tensor in weights if tensor.device.type == device.type)

    def unload(self) -> None:
        """Unload the models and free their memory."""
        self.worker.unload()


def load(task_type: str, **flags: Any) -> VideoGenerator:
    """Create the generator of a task's videos.

    Args:
        task_type: one of `tasks.TASK_NAMES`.
        flags: for all videos: `model_id`, `memory`, `quant`, `dtype`, `lora`, ...
    """
    return VideoGenerator(task_type, **flags)


def check_names(flags: dict[str, Any]) -> None:
    """Raise UserError for flags that only the command line has."""
    for name in flags:
        if name in COMMAND_ONLY or (name in BY_NAME and not BY_NAME[name].in_line and name != "quiet"):
            raise UserError(
                f"--{name}", "is for the command line, not for calls that return frames and latents; leave it out"
            )
