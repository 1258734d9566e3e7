"""What a task declares of its work, and how it does it: one file for each task, named after it, in its family's folder.

No torch: the plan of a run is made from what is declared; `run` imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, cast

from skyreels_v3.denoising.guidance import Guidance, text_guidance
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import TaskSpec


class Pipeline:
    """The base of all tasks."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        """The guidance of every pass."""
        return text_guidance(request.guidance_scale)

    def passes(self, request: ResolvedRequest) -> Iterator[tuple[int, int]]:
        """Generated and condition latent frames of each pass; the request has its size and length of sound."""
        raise NotImplementedError

    def run(self, stages: Any) -> Iterator[Any]:
        """Make the video of `stages.request`: events (`stages.Event`) from `stages.Stages`."""
        raise NotImplementedError


def pipeline_of(task: TaskSpec) -> Pipeline:
    """The pipeline of a task: `PIPELINE` in its own file."""
    return cast(Pipeline, import_module(f"skyreels_v3.{task.family}.{task.name}").PIPELINE)
