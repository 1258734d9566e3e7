"""Makes videos one after the other, for the command line, --jobs and the Python API.

torch is imported only after the first request has been checked.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Checked, Plan, plan
from skyreels_v3.request import GenerationRequest
from skyreels_v3.resolve import AssetResolver, resolve
from skyreels_v3.runtime import collect_garbage, find_machine, free_memory, set_environment

if TYPE_CHECKING:
    from skyreels_v3.generate import Generator, Video

logger = logging.getLogger(__name__)


class Worker:
    """Resolves requests and makes their videos; models stay loaded while the next request needs the same.

    Args:
        ranks: this process among all processes.
        video_ranks: this process among those that make each video together; SINGLE if each makes its own.
    """

    def __init__(self, ranks: Ranks = SINGLE, video_ranks: Ranks = SINGLE) -> None:
        set_environment()  # before torch is imported
        self.ranks = ranks
        self.video_ranks = video_ranks
        self.resolver = AssetResolver()
        self.generator: Generator | None = None

    def resolve(
        self, request: GenerationRequest, downloads: Path, name: str = "", checked: Checked | None = None
    ) -> Checked:
        """Check and download what a request needs, see `resolve.resolve`."""
        return resolve(request, downloads, self.video_ranks, self.resolver, name, checked)

    def load(self, checked: Checked) -> tuple[Generator, Plan]:
        """Plan a resolved request and load its models; returns a generator that fits, and the plan."""
        if "skyreels_v3.generate" not in sys.modules:
            logger.info("importing torch, diffusers and transformers")  # takes seconds
        from skyreels_v3.generate import Generator

        if self.generator is None:
            free_memory.cache_clear()  # measured before anything is loaded
        made = plan(checked, find_machine(checked.request, self.ranks), self.ranks)
        if self.generator is not None and not self.generator.fits(made):
            self.unload()
        if self.generator is None:
            self.generator = Generator(made)
        return self.generator, made

    def make(self, checked: Checked) -> Video:
        """Make and write the video of a resolved request."""
        generator, made = self.load(checked)
        return generator.write(made)

    def unload(self) -> None:
        """Unload the models and free their memory."""
        self.generator = None
        collect_garbage()
