"""Device, dtype, seeds and placement of modules: the only file that names devices.

Early checks of a request do not need torch; `find_machine` and `start` import it.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import shutil
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from skyreels_v3.attention.kernels import check_attention
from skyreels_v3.cache import compiled_folder
from skyreels_v3.errors import UserError, counted
from skyreels_v3.packages import has_packages
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Machine, Plan
from skyreels_v3.prompts import AUTO
from skyreels_v3.request import ON, GenerationRequest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from tqdm import tqdm

    from skyreels_v3.attention.backends import AttentionFn
    from skyreels_v3.memory.policy import Policy
    from skyreels_v3.memory.stream import BlockStream
    from skyreels_v3.parallel.groups import Parallel

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs with FP8 matrix units, Ada
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not only the current one
COMPILERS = {"cpu": ("c++", "g++", "clang++", "cl"), "cuda": ("gcc", "clang")}  # that torch.compile calls
GPU_DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")  # torch calls AMD devices cuda, too


def check_device(device: str) -> None:
    """Raise UserError if this machine lacks `device`; looks for drivers, without torch."""
    if device == "cuda" and not any(has_library(name) for name in GPU_DRIVERS):
        raise UserError("--device", "cuda: this machine has no NVIDIA or AMD driver; use --device cpu or auto")
    if device == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        raise UserError("--device", "mps: this machine is not an Apple Silicon Mac; use --device cpu or auto")


@cache
def has_library(name: str) -> bool:
    """Whether the dynamic loader finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def check_compute(request: GenerationRequest) -> None:
    """Raise UserError if the attention kernel, FP8 products, streaming or compilation cannot work here."""
    device = likely_device(request)
    check_attention(request.attention, device, request.dtype or default_dtype(device))
    if request.quant == "fp8_dynamic" and device == "mps":
        raise UserError("--quant", "fp8_dynamic: works on NVIDIA GPUs of the Ada generation or later; use --quant fp8")
    if request.memory == "stream" and device == "mps":
        raise UserError("--memory", "stream: this device shares the host's memory; use --memory auto")
    if request.compile == ON and (missing := missing_to_compile(device)):
        raise UserError("--compile", f"on: needs {missing}; install it, or leave the flag out")


def missing_to_compile(device: str) -> str:
    """What torch.compile needs for `device` and this machine lacks; "" if nothing."""
    if device == "cuda" and not has_packages("triton"):
        return "the package triton"
    compilers, chosen = COMPILERS.get(device, ()), os.environ.get("CXX" if device == "cpu" else "CC", "")
    if compilers and not any(map(shutil.which, (*compilers, chosen))):
        return f"a compiler ({' or '.join(compilers)})"
    if device == "cuda" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's header files (on Debian and Ubuntu the package python3-dev)"
    return ""


def likely_device(request: GenerationRequest) -> str:
    """The device that `find_machine` will probably choose, guessed without torch for early errors."""
    if request.device != "auto":
        return request.device
    if any(has_library(name) for name in GPU_DRIVERS):
        return "cuda"
    return "mps" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "cpu"


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


class Usage:
    """Measures the time and memory of a video from now on.

    Attributes:
        seconds: by stage. Decoding overlaps with encoding to mp4.
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
        """Add the duration of a `with` block to a stage's seconds."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    @property
    def peak_bytes(self) -> int:
        """Peak bytes allocated on a GPU; on other devices, of this process's memory."""
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
        """The memory policy: where the components live."""
        return self.plan.policy

    @contextmanager
    def resident(self, module: nn.Module, stage: str, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Keep `module` on the device within a `with` block, as the memory policy says.

        Args:
            stage: what it is needed for, such as "encoding the prompt".
            blocks: the parts that may be streamed.
        """
        from skyreels_v3.memory.offload import on_device
        from skyreels_v3.memory.policy import explain_oom
        from skyreels_v3.parallel.groups import is_sharded

        if stage.startswith("encoding") and stage not in self.logged_stages:  # other stages have a progress bar
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
        """The stream of a module's blocks, created on the first call."""
        from skyreels_v3.memory.stream import BlockStream

        if module not in self.streams:
            self.streams[module] = BlockStream(
                module, blocks, self.device, resident, partial(pin, self.device) if pinned else None
            )
        return self.streams[module]

    @property
    def can_compile(self) -> bool:
        """Whether the transformer can run compiled: if asked for, or by auto on a GPU whose compiler is complete."""
        if self.plan.request.compile == AUTO:
            return self.device.type == "cuda" and not missing_to_compile("cuda")
        return self.plan.request.compile == ON

    @property
    def compiles(self) -> bool:
        """Whether it does so in this run."""
        return self.plan.compiles and self.can_compile

    def make_device_current(self) -> None:
        """Make the device current in this thread; otherwise the driver would initialize the first GPU as well."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def free_memory(self) -> int | None:
        """Free bytes of the device's memory, None if it shares the host's."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def generator(self, seed: int) -> torch.Generator:
        """A noise generator, always on the CPU so that every device gets the same numbers."""
        import torch

        return torch.Generator().manual_seed(seed)

    def bar(self, name: str, total: int) -> AbstractContextManager[tqdm[None]]:
        """A progress bar on stderr, see `progress.progress_bar`."""
        from skyreels_v3.progress import progress_bar

        return progress_bar(name, total, self.show_progress)


def set_environment() -> None:
    """Set the environment variables that torch reads at import, unless the user has set them."""
    # avoids fragmentation: stages allocate blocks of different sizes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    compiled = compiled_folder()
    there = next(folder for folder in (compiled, *compiled.absolute().parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK):  # otherwise left to torch, which creates the folder at once
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
        # a single process uses the current GPU; of several, each has its own
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
    """Free bytes of the device's memory (None if it shares the host's) and of the host's, before loading."""
    import psutil
    import torch

    own = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    return own, psutil.virtual_memory().available


def collect_garbage() -> None:
    """Free the memory of unused objects, on the device too."""
    import torch

    gc.collect()  # hooks and their modules refer to each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def start(plan: Plan) -> Runtime:
    """Set up the device, attention kernel and ranks of a plan.

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
    """Use exact float32 convolutions in cuDNN for a float32 run; otherwise TF32, torch's default, as published.

    TF32 multiplies 11 significant bits of each factor and is at least 5 times as fast. In a bfloat16 run it applies to
    the float32 VAE and audio encoder. Matrix products are exact by torch's default.
    """
    import torch

    cudnn: Any = torch.backends.cudnn  # missing in its stubs
    cudnn.conv.fp32_precision = "ieee" if dtype == torch.float32 else "tf32"


def pin(device: torch.device, room: torch.Tensor) -> bool:
    """Pin host memory for copies at full speed; returns False if that fails.

    torch's own pinned allocator rounds sizes up to powers of two, so up to half of the memory for a transformer's
    blocks would be wasted. Without a GPU there is nothing to do.
    """
    import torch

    if not torch.cuda.is_available():
        return True
    torch.cuda.set_device(device)  # in this thread; otherwise the driver would initialize the first GPU as well
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(room.data_ptr(), room.nbytes, PORTABLE)) != 0:
        # clear the pending error, which the driver would report for this thread's next kernel
        with suppress(RuntimeError):
            torch.ones(1, device=device)
        return False
    weakref.finalize(room, runtime.cudaHostUnregister, room.data_ptr())
    return True
