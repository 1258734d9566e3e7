"""The attention function passed to the models, and the choice of its kernel.

An `AttentionFn` maps q (B, Lq, N, D), k and v (B, Lk, N, D) to (B, Lq, N, D): full softmax attention, scale 1/sqrt(D),
no mask. Models never choose kernels themselves.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Collection
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyreels_v3.attention.kernels import FLAG, INEXACT, KERNELS, check_attention, is_installed
from skyreels_v3.errors import UserError
from skyreels_v3.float8 import FP8, fitting_scale

logger = logging.getLogger(__name__)

MIN_CUDNN = 91501  # 9.15.1, the first that torch itself prefers; older ones access invalid memory
PROBE_SHAPE = (1, 256, 2, 128)  # (B, L, N, D); D as in all published checkpoints
MANY_TOKENS = 100_000  # above this, users of 8-bit kernels have seen noise
TOLERANCE = 0.1  # the values are up to 0.7, and 8-bit kernels are off by 0.02
MAX_REASON = 300  # characters of a library's own error message


class AttentionFn(Protocol):
    """Full attention on tensors (B, L, N, D): batch, tokens, heads, head dim."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, with the kernel that torch picks."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention with cuDNN's kernel only, which reads (B, L, N, D) without copies.

    Raises:
        RuntimeError: cuDNN does not support these tensors.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(query, key, value)


def flash3_fp8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention 3 on queries, keys and values rounded to float8, with a scale for each head."""
    from flash_attn_interface import flash_attn_func  # the package flash_attn_3

    (q, q_scale), (k, k_scale), (v, v_scale) = map(round_heads, (query, key, value))
    made = flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    return (made[0] if isinstance(made, tuple) else made).to(query.dtype)  # older versions also return the logsumexp


def round_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round (B, L, N, D) to float8 with scales (B, N)."""
    scale = fitting_scale(torch.linalg.vector_norm(x, torch.inf, dim=(1, 3)).float())
    return (x / scale[:, None, :, None].to(x.dtype)).to(FP8), scale


def dispatched(backend: str) -> AttentionFn:
    """The kernel that diffusers' attention dispatcher calls `backend`.

    Raises:
        ValueError: the installed diffusers does not have it.
        RuntimeError: the package that it needs is missing or too old.
    """
    # imports every kernel package that is installed, which takes seconds
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    chosen = AttentionBackendName(backend)
    with attention_backend(chosen):  # checks packages and versions, which the calls below do not
        return partial(dispatch_attention_fn, backend=chosen)


class AttentionByStep:
    """Attention with `kernel`, or with `exact` in the steps for which `use_exact` is set."""

    def __init__(self, kernel: AttentionFn, exact: AttentionFn) -> None:
        self.kernel, self.exact = kernel, exact
        self.use_exact = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (self.exact if self.use_exact else self.kernel)(query, key, value)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, tokens: int = 0) -> tuple[str, AttentionFn]:
    """Choose the kernel `name`, one of `kernels.ATTENTIONS`, and test it; "auto" means the fastest exact one.

    Args:
        tokens: length of the longest sequence, with which 8-bit kernels are tested.

    Returns:
        The kernel's name (for "auto", of the one chosen) and its function.

    Raises:
        UserError: an explicit choice does not work on this device.
    """
    chosen, attention = name, sdpa
    if name == "auto":
        capability, version = gpu_facts(device)
        chosen = preferred(capability, version, [kernel for kernel in KERNELS if is_installed(kernel)], dtype)
    try:
        attention = load_kernel(chosen, device, dtype, tokens)
    except UserError as error:
        if name != "auto":
            raise
        logger.info("%s attention is preferred here, but unusable: %s", chosen, error.__cause__ or error)
        chosen = "sdpa"
    logger.info("attention %s", chosen)
    if chosen in INEXACT and tokens > MANY_TOKENS:
        logger.warning(
            "attention %s rounds to 8 bits, and with more than %d tokens (here %d) that can show as noise; "
            "--exact_steps 2 or --attention auto is safer",
            chosen,
            MANY_TOKENS,
            tokens,
        )
    return chosen, attention


def gpu_facts(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """An NVIDIA GPU's compute capability and torch's cuDNN version, such as (9, 0) and 92000; otherwise None and 0."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD numbers both differently
        return None, 0
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return torch.cuda.get_device_capability(device), version or 0


def preferred(
    capability: tuple[int, int] | None, cudnn_version: int, installed: Collection[str], dtype: torch.dtype
) -> str:
    """The name of the fastest exact kernel for a GPU described by `gpu_facts`.

    On Hopper and Blackwell data center GPUs, cuDNN's kernel is about twice as fast as torch's own choice, and so is
    FlashAttention 3 on Hopper. On other GPUs they differ by a few percent either way.
    """
    if capability is None or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if capability[0] in (9, 10) and cudnn_version >= MIN_CUDNN:
        return "cudnn"
    return "flash3" if capability[0] == 9 and "flash3" in installed else "sdpa"


def load_kernel(name: str, device: torch.device, dtype: torch.dtype, tokens: int = 0) -> AttentionFn:
    """Load a kernel and check its output on the device against that of `sdpa` in float32.

    Raises:
        UserError: it is not available, fails, or its output is wrong.
    """
    check_attention(name, device.type, str(dtype).removeprefix("torch."))
    if name == "sdpa":
        return sdpa
    backend, shape = KERNELS[name].backend, PROBE_SHAPE
    own: dict[str, AttentionFn] = {"cudnn": cudnn, "flash3_fp8": flash3_fp8}
    if not KERNELS[name].exact:
        shape = (1, max(tokens, PROBE_SHAPE[1]), 1, PROBE_SHAPE[3])
    generator = torch.Generator().manual_seed(0)  # separate, to leave the run's random numbers alone
    inputs = torch.randn((3, *shape), generator=generator).to(device, dtype)
    try:
        attention = own[name] if backend is None else dispatched(backend)
        difference = (attention(*inputs) - sdpa(*inputs.float())).abs().max().item()
        if not difference < TOLERANCE:  # includes NaN
            raise RuntimeError(f"its values are off by up to {difference:.2g}")
    except Exception as error:  # third-party kernels may raise anything
        reason = textwrap.shorten(str(error), MAX_REASON) or type(error).__name__
        raise UserError(FLAG, f"{name}: does not work here ({reason}); use --attention auto") from error
    return attention


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Softmax weights (B, Lq, Lk), averaged over the heads, in float32.

    One head at a time, since for a video's tokens the weights of all heads would not fit in memory.
    """
    scale = query.shape[-1] ** -0.5
    total = query.new_zeros((query.shape[0], query.shape[1], key.shape[1]), dtype=torch.float32)
    for head in range(query.shape[2]):
        scores = torch.einsum("bqd,bkd->bqk", query[:, :, head].float() * scale, key[:, :, head].float())
        total += scores.softmax(dim=-1)
    return total / query.shape[2]
