"""The attention kernels to choose from, and their requirements. No torch, so the command line can check a choice.

`backends.choose_attention` finds out whether a kernel works on this GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from skyreels_v3.errors import UserError
from skyreels_v3.packages import has_packages

FLAG = "--attention"
FLASH3 = "flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True)
class Kernel:
    """A kernel's requirements.

    Attributes:
        backend: its name in diffusers' attention dispatcher; None if `backends` calls it itself.
        package: the package to import, None for torch's own kernels.
        install: the arguments for `pip install`.
        devices: the supported device types.
        half_only: float32 is not supported.
        exact: False for kernels that round queries, keys or values to 8 bits.
    """

    backend: str | None = None
    package: str | None = None
    install: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    half_only: bool = True
    exact: bool = True


KERNELS = {
    "sdpa": Kernel(devices=("cuda", "cpu", "mps"), half_only=False),
    "cudnn": Kernel(),
    "flash": Kernel("flash", "flash_attn", "flash-attn --no-build-isolation"),
    "flash3": Kernel("_flash_3", "flash_attn_3", FLASH3),
    "flash3_fp8": Kernel(None, "flash_attn_3", FLASH3, exact=False),
    # PyPI has only version 1, which diffusers does not support
    "sage": Kernel(
        "sage", "sageattention", "git+https://github.com/thu-ml/SageAttention --no-build-isolation", exact=False
    ),
    "xformers": Kernel("xformers", "xformers", "xformers", half_only=False),
}
ATTENTIONS = ("auto", *KERNELS)
INEXACT = tuple(name for name, kernel in KERNELS.items() if not kernel.exact)


def is_installed(name: str) -> bool:
    """Whether the package that a kernel needs is installed; does not import it."""
    package = KERNELS[name].package
    return package is None or has_packages(package)


def check_attention(name: str, device: str, dtype: str | None = None) -> None:
    """Check a choice of kernel as far as possible without torch.

    Args:
        name: one of `ATTENTIONS`.
        device: cuda, cpu or mps, or auto if not known yet.
        dtype: of queries, keys and values, if known.

    Raises:
        UserError: the kernel does not support the device or the dtype, or its package is not installed.
    """
    if name == "auto":
        return
    kernel = KERNELS[name]
    if device not in ("auto", *kernel.devices):
        raise UserError(FLAG, f"{name}: works on a GPU (cuda) only, not on {device}; use --attention auto or sdpa")
    if kernel.half_only and dtype == "float32":
        raise UserError(FLAG, f"{name}: does not compute in float32; use --dtype bfloat16 or --attention auto")
    if not is_installed(name):
        way = f"pip install {kernel.install}, or use --attention auto"
        raise UserError(FLAG, f"{name}: the package {kernel.package} is not installed; {way}")
