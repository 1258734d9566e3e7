"""Device, dtype, seeds and placement of modules: the only file that names devices.

A request is checked against the machine without torch, which `find_machine` and `start` import.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import shutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from skyreels_v3.attention.kernels import check_attention
from skyreels_v3.cache import compiled_folder
from skyreels_v3.errors import UserError, counted
from skyreels_v3.packages import check_packages
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Machine, Plan
from skyreels_v3.request import GenerationRequest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from tqdm import tqdm

    from skyreels_v3.attention.backends import AttentionFn
    from skyreels_v3.memory.policy import Policy
    from skyreels_v3.memory.stream import BlockStream
    from skyreels_v3.parallel.groups import Parallel

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # of the first GPUs with FP8 matrix units, Ada
PORTABLE = 1  # pinned for every GPU, whichever is current
COMPILERS = ("c++", "g++", "clang++", "cl")
GPU_DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")  # torch calls AMD's devices cuda, too


def check_device(device: str) -> None:
    """Raise UserError when this machine lacks `device`; looks for drivers, without torch."""
    if device == "cuda" and not any(has_library(name) for name in GPU_DRIVERS):
        raise UserError("--device", "cuda: this machine has no NVIDIA or AMD driver; use --device cpu or auto")
    if device == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        raise UserError("--device", "mps: this machine is not an Apple Silicon Mac; use --device cpu or auto")


@cache
def has_library(name: str) -> bool:
    """Whether the system's loader finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def check_compute(request: GenerationRequest) -> None:
    """Raise UserError when the attention kernel, FP8 products, streaming or compilation cannot work here."""
    device = likely_device(request)
    check_attention(request.attention, device, request.dtype or default_dtype(device))
    if request.quant == "fp8_dynamic" and device == "mps":
        raise UserError("--quant", "fp8_dynamic: works on NVIDIA GPUs of the Ada generation or later; use --quant fp8")
    if request.memory == "stream" and device == "mps":
        raise UserError("--memory", "stream: this device shares the host's memory; use --memory auto")
    if request.compile and device == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise UserError("--compile", f"needs a C++ compiler ({' or '.join(COMPILERS)}); install one, or leave it out")
    if request.compile and device == "cuda":
        check_packages("--compile", "triton", "triton")


def likely_device(request: GenerationRequest) -> str:
    """The device that `find_machine` will choose, as far as that is known without torch; for early errors."""
    if request.device != "auto":
        return request.device
    if any(has_library(name) for name in GPU_DRIVERS):
        return "cuda"
    return "mps" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "cpu"


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


class Usage:
    """What a video takes, from now on.

    Attributes:
        seconds: of each stage. Frames are encoded to mp4 while later ones are decoded.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.seconds: dict[str, float] = {}
        self._device = device
        self._start = perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a stage."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the device's memory; without any of its own, of this process's."""
        import psutil
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def figures(self) -> dict[str, Any]:
        """Seconds of each stage and of everything so far, and the peak memory in GB."""
        seconds = self.seconds | {"everything": perf_counter() - self._start}
        return {
            "seconds": {name: round(taken, 2) for name, taken in seconds.items()},
            "peak_gb": round(self.peak_bytes / 1e9, 2),
        }


@dataclass(frozen=True)
class Runtime:
    """The device, dtype, attention kernel and ranks of a run."""

    device: torch.device
    dtype: torch.dtype
    show_progress: bool
    plan: Plan
    kernel: str
    attention: AttentionFn
    parallel: Parallel
    usage: Usage
    streams: dict[nn.Module, BlockStream] = field(default_factory=dict)
    logged_stages: set[str] = field(default_factory=set)

    @property
    def policy(self) -> Policy:
        """Where the components live."""
        return self.plan.policy

    @contextmanager
    def resident(self, module: nn.Module, stage: str, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Have `module` on the device within a `with` block, in the way that the memory policy says.

        Args:
            stage: what it is needed for, such as "encoding the prompt".
            blocks: the parts that may be streamed.
        """
        from skyreels_v3.memory.offload import on_device
        from skyreels_v3.memory.policy import explain_oom
        from skyreels_v3.parallel.groups import is_sharded

        if stage.startswith("encoding") and stage not in self.logged_stages:  # other stages have a bar
            logger.info(stage)
            self.logged_stages.add(stage)
        with explain_oom(stage, self.plan, self.free_memory), self.usage.stage(stage), ExitStack() as stack:
            if is_sharded(module):
                pass  # the shards are on the device
            elif self.policy.mode == "resident":
                module.to(self.device)
            elif self.policy.mode == "stream" and blocks:
                stack.enter_context(self.stream(module, blocks).active())
            else:
                stack.enter_context(on_device(module, self.device))
            yield

    def stream(
        self, module: nn.Module, blocks: Sequence[nn.Module], resident: int = 0, pinned: bool = False
    ) -> BlockStream:
        """The stream of a module's blocks, made once."""
        from skyreels_v3.memory.stream import BlockStream

        if module not in self.streams:
            self.streams[module] = BlockStream(
                module, blocks, self.device, resident, partial(pin, self.device) if pinned else None
            )
        return self.streams[module]

    def make_device_current(self) -> None:
        """Make the device current in this thread, or the driver would set up the first GPU as well."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def free_memory(self) -> int | None:
        """Free bytes of the device's memory, None where it shares the host's."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def generator(self, seed: int) -> torch.Generator:
        """A source of noise. Always the CPU's: the same numbers on every device."""
        import torch

        return torch.Generator().manual_seed(seed)

    def bar(self, name: str, total: int) -> AbstractContextManager[tqdm[None]]:
        """A progress bar on stderr, see `progress.progress_bar`."""
        from skyreels_v3.progress import progress_bar

        return progress_bar(name, total, self.show_progress)


def set_environment() -> None:
    """Set the environment variables that torch reads at import, unless the user has set them."""
    # stages need blocks of different sizes: avoids fragmentation
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    compiled = compiled_folder()
    there = next(folder for folder in (compiled, *compiled.absolute().parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK):  # else torch's own choice: it makes the folder at once
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))


def find_machine(request: GenerationRequest, ranks: Ranks = SINGLE) -> Machine:
    """Choose device and dtype: by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        UserError: the installed torch cannot use the device, or the device lacks what is asked for.
    """
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = request.device if request.device != "auto" else next(name for name, there in usable.items() if there)
    if not usable[name]:
        raise UserError("--device", f"{name}: torch {torch.__version__} cannot use it; install a build that can")
    device = name
    if name == "cuda":
        count = torch.cuda.device_count()
        if ranks.local_world_size > count:
            reason = f"{ranks.local_world_size} processes on a machine with {counted(count, 'GPU')}"
            flag = "--use_usp" if request.use_usp else "--jobs"
            raise UserError(flag, f"{reason}; give --gpu_num {count}, or torchrun --nproc_per_node={count}")
        # one process takes what is current, of several each its own
        device = f"cuda:{ranks.local_rank if ranks.local_world_size > 1 else torch.cuda.current_device()}"
        if request.quant == "fp8_dynamic" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise UserError("--quant", f"fp8_dynamic: {torch.cuda.get_device_name(device)} has no FP8 units; use fp8")
    free_device, free_host = free_memory(device)
    free = [-1 if free_device is None else free_device, free_host // ranks.local_world_size]
    if request.use_usp and torch.distributed.is_initialized():
        fewest = torch.tensor(free)
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
        free = fewest.tolist()
    return Machine(device, request.dtype or default_dtype(name), None if free_device is None else free[0], free[1])


@cache
def free_memory(device: str) -> tuple[int | None, int]:
    """Free bytes of the device's memory (None where it shares the host's) and of the host's, before loading."""
    import psutil
    import torch

    own = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    return own, psutil.virtual_memory().available


def collect_garbage() -> None:
    """Give memory of objects that nothing uses any more back, the device's too."""
    import torch

    gc.collect()  # hooks and what they are on hold each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def start(plan: Plan) -> Runtime:
    """Set up the device, kernel and ranks of a plan.

    Raises:
        UserError: the attention kernel does not work here.
    """
    import torch

    from skyreels_v3.attention.backends import AttentionByStep, choose_attention
    from skyreels_v3.parallel.groups import Parallel

    device, dtype, policy = torch.device(plan.device), getattr(torch, plan.dtype), plan.policy
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logger.info("device %s, dtype %s, memory %s (%s)", device, dtype, policy.mode, policy.reason)
    if plan.degrees.world_size > 1:
        logger.info("%d processes: %s", plan.degrees.world_size, plan.degrees)
    if policy.mode == "stream" and device.type == "cuda" and not policy.pinned:
        logger.warning("too little host memory is free to pin the transformer; it streams unpinned, which is slower")
    set_convolutions(dtype)
    tokens = max(each.tokens for each in plan.passes)
    kernel, attention = choose_attention(plan.request.attention, device, dtype, tokens)
    if plan.request.exact_steps:
        attention = AttentionByStep(attention, choose_attention("auto", device, dtype)[1])
    parallel = Parallel(plan.ranks, plan.degrees, device)
    return Runtime(device, dtype, plan.request.verbosity >= 0, plan, kernel, attention, parallel, Usage(device))


def set_convolutions(dtype: torch.dtype) -> None:
    """Make cuDNN's float32 convolutions exact in a float32 run; otherwise TF32, torch's default, as published.

    TF32 multiplies 11 significant bits of each factor, at least 5 times as fast. In a bfloat16 run the VAE and the
    audio encoder are float32. Matrix products are exact by torch's default.
    """
    import torch

    cudnn: Any = torch.backends.cudnn  # its types lack this
    cudnn.conv.fp32_precision = "ieee" if dtype == torch.float32 else "tf32"


def pin(device: torch.device, room: torch.Tensor) -> bool:
    """Register host memory with the GPU's driver as pinned, for copies at full speed; False if that fails.

    torch's own allocator of pinned memory rounds sizes up to powers of two, which wastes up to half of a transformer's
    blocks. Without a GPU there is nothing to do.
    """
    import torch

    if not torch.cuda.is_available():
        return True
    torch.cuda.set_device(device)  # of this thread, or the driver would set up the first GPU as well
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(room.data_ptr(), room.nbytes, PORTABLE)) != 0:
        # the driver holds the error until it is read, and would report it for this thread's next kernel
        with suppress(RuntimeError):
            torch.ones(1, device=device)
        return False
    weakref.finalize(room, runtime.cudaHostUnregister, room.data_ptr())
    return True
