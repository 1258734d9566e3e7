"""Device, dtype, seeds and memory policy: the only file that names a device.

torch is imported when `start` runs and not before, so that a request can be checked against the machine without it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyreels_v3.errors import UserError
from skyreels_v3.tasks import GenerationRequest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from tqdm import tqdm

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cuda", "cpu", "mps")
DTYPES = ("bfloat16", "float32")
GPU_DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")  # torch calls AMD's devices cuda, too


def check_device(device: str) -> None:
    """Raise UserError when this machine cannot have `device`; looks for drivers, not for torch."""
    if device == "cuda" and not any(has_library(name) for name in GPU_DRIVERS):
        raise UserError("--device", "cuda: this machine has no NVIDIA or AMD driver; use --device cpu or auto")
    if device == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        raise UserError("--device", "mps: this machine is no Apple Silicon Mac; use --device cpu or auto")


def has_library(name: str) -> bool:
    """Whether the system's loader finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def expected_dtype(request: GenerationRequest) -> str:
    """The dtype that `start` will choose, as far as it can be told without torch."""
    device = request.device
    if device == "auto":
        device = "cuda" if any(has_library(name) for name in GPU_DRIVERS) else "cpu"
    return request.dtype or default_dtype(device)


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    offload: bool
    show_progress: bool

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """Have `module` on the device for the length of a `with` block; without offload it stays there."""
        from skyreels_v3.memory.offload import on_device

        if self.offload:
            with on_device(module, self.device):
                yield
        else:
            module.to(self.device)
            yield

    def generator(self, seed: int) -> torch.Generator:
        """A source of noise. Always the CPU's: the same numbers on every device."""
        import torch

        return torch.Generator().manual_seed(seed)

    def bar(self, name: str, total: int) -> tqdm[None]:
        """A progress bar on stderr, a context manager with `update`."""
        from tqdm import tqdm

        return tqdm(desc=name, total=total, disable=not self.show_progress, file=sys.stderr)


def start(request: GenerationRequest) -> Runtime:
    """Choose device and dtype for `request`; bfloat16 on a GPU and float32 on a CPU unless it says otherwise.

    Raises:
        UserError: the torch that is installed cannot use the device.
    """
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = request.device if request.device != "auto" else next(name for name, there in usable.items() if there)
    if not usable[name]:
        raise UserError("--device", f"{name}: torch {torch.__version__} cannot use it; install a build that can")
    dtype = getattr(torch, request.dtype or default_dtype(name))
    device = torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    logger.info("device %s, dtype %s%s", device, dtype, ", offload" if request.offload else "")
    return Runtime(device, dtype, request.offload and name != "cpu", request.verbosity >= 0)
