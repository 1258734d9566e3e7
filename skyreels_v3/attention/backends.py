"""What the models call for attention, and which kernel does it.

An `AttentionFn` maps q (B, Lq, N, D), k and v (B, Lk, N, D) to (B, Lq, N, D): full softmax attention, scale 1/sqrt(D),
no mask. Models take one; they never look for kernels themselves. `choose_attention` finds one for a device: it tries an
explicit choice before anything long begins, and `auto` follows measurements, see `preferred`.
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

from skyreels_v3.attention.kernels import FLAG, KERNELS, check_attention, is_installed
from skyreels_v3.errors import UserError

logger = logging.getLogger(__name__)

# torch itself prefers cuDNN's attention from here on; older ones have known invalid memory accesses
FIRST_GOOD_CUDNN = 91501  # 9.15.1
TRIED_SHAPE = (1, 256, 2, 128)  # (B, L, N, D); D is that of all published checkpoints
TOLERANCE = 0.1  # values go up to 0.7, and 8-bit kernels are 0.02 off
REASON_CHARACTERS = 300  # of a library's own reason


class AttentionFn(Protocol):
    """Full attention on tensors laid out (B, L, N, D): batch, tokens, heads, head size."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, which picks the fastest kernel the device has."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)  # (B, L, N, D)


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's kernel and no other, by way of torch. It reads (B, L, N, D) as it lies in memory, without copies.

    Raises:
        RuntimeError: cuDNN does not take these tensors.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(query, key, value)


def dispatched(backend: str) -> AttentionFn:
    """A kernel of diffusers' attention dispatcher, by its name there.

    Raises:
        ValueError: the diffusers that is installed does not know it.
        RuntimeError: the package that it needs is missing or too old.
    """
    # imports every kernel package that there is, which takes seconds
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    chosen = AttentionBackendName(backend)
    with attention_backend(chosen):  # checks packages and versions, which the calls below do not
        return partial(dispatch_attention_fn, backend=chosen)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, AttentionFn]:
    """The kernel `name` of `available.ATTENTIONS`, tried on the device, with its name; logs which it is.

    "auto" always finds one. The function returned makes no checks of its own.

    Raises:
        UserError: an explicit choice does not work here.
    """
    if name != "auto":
        attention = tried(name, device, dtype)
        logger.info("attention %s", name)
        return name, attention
    capability, version = gpu_facts(device)
    choice = preferred(capability, version, [kernel for kernel in KERNELS if is_installed(kernel)], dtype)
    try:
        attention = tried(choice, device, dtype)
    except UserError as error:
        logger.info("attention sdpa; preferred, but unusable: %s", error.__cause__ or error)
        return "sdpa", sdpa
    facts = f", for compute capability {capability}, cuDNN {version}, {dtype}" if capability is not None else ""
    logger.info("attention %s%s", choice, facts)
    return choice, attention


def gpu_facts(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """An NVIDIA GPU's compute capability and torch's cuDNN version, such as (9, 0) and 92000; elsewhere None and 0."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's devices have numbers of their own for both
        return None, 0
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return torch.cuda.get_device_capability(device), version or 0


def preferred(
    capability: tuple[int, int] | None, cudnn_version: int, installed: Collection[str], dtype: torch.dtype
) -> str:
    """The fastest kernel that is exact, by name, for a GPU as `gpu_facts` describes it.

    On data centre GPUs of the Hopper and Blackwell generations cuDNN's kernel, and on Hopper FlashAttention 3, is about
    twice as fast as what torch takes otherwise. On other GPUs the differences are a few percent either way.
    """
    if capability is None or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if capability[0] in (9, 10) and cudnn_version >= FIRST_GOOD_CUDNN:
        return "cudnn"
    if capability[0] == 9 and "flash3" in installed:
        return "flash3"
    return "sdpa"


def tried(name: str, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """A kernel by its name, after a small call on the device.

    Raises:
        UserError: it cannot be had, fails, or gives other values than plain attention.
    """
    check_attention(name, device.type, str(dtype).removeprefix("torch."))
    if name == "sdpa":
        return sdpa
    backend = KERNELS[name].backend
    try:
        attention = cudnn if backend is None else dispatched(backend)
        compare(attention, device, dtype)
    except Exception as error:  # whatever other people's kernels raise
        reason = textwrap.shorten(str(error), REASON_CHARACTERS) or type(error).__name__
        raise UserError(FLAG, f"{name}: does not work here ({reason}); use --attention auto") from error
    return attention


def compare(attention: AttentionFn, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError when a kernel's values are not those of `sdpa` in float32."""
    generator = torch.Generator().manual_seed(0)  # its own: the seed of a run is not touched
    inputs = torch.randn((3, *TRIED_SHAPE), generator=generator).to(device, dtype)
    difference = (attention(*inputs) - sdpa(*inputs.float())).abs().max().item()
    if not difference < TOLERANCE:  # nor NaN
        raise RuntimeError(f"its values are off by up to {difference:.2g}")


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Softmax weights (B, Lq, Lk), averaged over the heads, in float32.

    One head at a time: the weights of all heads at once would not fit for a video's worth of tokens.
    """
    scale = query.shape[-1] ** -0.5
    total: Tensor | None = None
    for head in range(query.shape[2]):
        scores = torch.einsum("bqd,bkd->bqk", query[:, :, head].float() * scale, key[:, :, head].float())
        weights = scores.softmax(dim=-1)
        total = weights if total is None else total.add_(weights)
    assert total is not None
    return total / query.shape[2]
