"""Which pipeline does which task."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from skyreels_v3.components import Components
from skyreels_v3.hunyuan.pipeline import ImageToVideo, TextToVideo
from skyreels_v3.inputs import Inputs
from skyreels_v3.resume import RunState
from skyreels_v3.runtime import Runtime
from skyreels_v3.stages import Pass
from skyreels_v3.tasks import GenerationRequest, TaskSpec
from skyreels_v3.wan.reference_to_video import ReferenceToVideo
from skyreels_v3.wan.shot_switching_extension import ShotSwitchingExtension
from skyreels_v3.wan.single_shot_extension import SingleShotExtension
from skyreels_v3.wan.talking_avatar import TalkingAvatar

Pipeline = Callable[[GenerationRequest, Inputs], Iterator[Pass]]

PIPELINES: dict[str, Callable[[Components, Runtime, RunState | None], Pipeline]] = {
    "reference_to_video": ReferenceToVideo,
    "single_shot_extension": SingleShotExtension,
    "shot_switching_extension": ShotSwitchingExtension,
    "talking_avatar": TalkingAvatar,
    "t2v": TextToVideo,
    "i2v": ImageToVideo,
}


def make_pipeline(task: TaskSpec, components: Components, runtime: Runtime, state: RunState | None) -> Pipeline:
    """The pipeline of `task`: called with a request and its inputs, it gives the passes of the generation."""
    return PIPELINES[task.name](components, runtime, state)
