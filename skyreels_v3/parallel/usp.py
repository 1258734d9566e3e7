"""Attention across the tokens of several ranks: unified sequence parallelism (USP, arXiv:2405.07719).

A `UspFn` computes the attention of one rank's tokens to those of all ranks. All ranks hold equally many tokens;
overall, the first `tokens` are real and the rest is padding at the end of the last ranks' parts.

Ulysses (arXiv:2309.14509) is an all-to-all that trades tokens for heads: each rank then has all tokens of some heads.
With too few heads for that, a ring (arXiv:2310.01889) of such groups passes keys and values around.

On GPUs this is xDiT's USP. `torch_usp` works everywhere else, with any kernel and with the padding that xDiT's ring
does not support; it uses an all-gather instead of a ring.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_v3.attention.backends import AttentionByStep, AttentionFn
from skyreels_v3.packages import has_packages
from skyreels_v3.parallel.groups import Group, Parallel
from skyreels_v3.parallel.ranks import ParallelConfig

logger = logging.getLogger(__name__)

XDIT_KERNELS = {"sdpa": "SDPA_FLASH", "cudnn": "CUDNN", "flash": "FLASH", "flash3": "FLASH_3", "sage": "SAGE"}


class UspFn(Protocol):
    """Attention of this rank's tokens (B, L, N, D) to those of all ranks, the first `tokens` of which are real."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor: ...


def choose_usp(kernel: str, attention: AttentionFn, parallel: Parallel) -> UspFn:
    """xDiT's USP where it works, else `torch_usp`.

    Args:
        kernel, attention: name and function of the attention kernel.
    """
    plain = torch_usp(attention, parallel.group("ulysses"), parallel.group("ring"))
    if isinstance(attention, AttentionByStep) or not has_xdit(kernel, parallel.device):  # xDiT has one kernel for all
        return plain
    xdit = xdit_usp(kernel, parallel.degrees)
    if parallel.degrees.ring == 1:
        return xdit

    def usp(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        # the ring does not support padding, nor its kernels float32
        fits = query.shape[1] * parallel.degrees.sequence == tokens and query.dtype != torch.float32
        return (xdit if fits else plain)(query, key, value, tokens)

    return usp


def torch_usp(kernel: AttentionFn, ulysses: Group, ring: Group) -> UspFn:
    """USP with torch's collectives and any kernel; the size of `ulysses` must divide the number of heads."""

    def to_heads(x: Tensor) -> Tensor:
        """Some tokens and all heads (B, L, N, D) -> all tokens of the group and some heads (B, P * L, N / P, D)."""
        parts = x.unflatten(2, (ulysses.size, -1)).movedim(2, 0)  # (P, B, L, N / P, D)
        return ulysses.all_to_all(parts).movedim(0, 1).flatten(1, 2)

    def to_tokens(x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        parts = x.unflatten(1, (ulysses.size, -1)).movedim(1, 0)  # (P, B, L, N / P, D)
        return ulysses.all_to_all(parts).movedim(0, 2).flatten(2, 3)

    def usp(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        query, key, value = map(to_heads, (query, key, value))
        key, value = map(ring.all_gather_tokens, (key, value))
        return to_tokens(kernel(query, key[:, :tokens], value[:, :tokens]))

    return usp


def has_xdit(kernel: str, device: torch.device) -> bool:
    """Whether xDiT works here: it needs a GPU, the package xfuser, and a kernel that it supports."""
    if device.type != "cuda":
        return False
    if kernel not in XDIT_KERNELS:
        logger.info("xDiT has no %s attention; using torch's collectives", kernel)
    elif not has_packages("xfuser"):
        logger.warning("the package xfuser is not installed: using torch's collectives; pip install xfuser")
    return kernel in XDIT_KERNELS and has_packages("xfuser")


def xdit_usp(kernel: str, degrees: ParallelConfig, backend: str | None = None) -> UspFn:
    """Initialize xDiT's groups and return its USP, which supports no padding with a ring degree above 1.

    Args:
        kernel: a name in `attention.kernels.KERNELS`; xDiT calls kernels itself.
        backend: of torch.distributed; by default xDiT chooses it by device.
    """
    os.environ.setdefault("LOG_LEVEL", "error")  # xDiT logs to stdout, on each rank
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel, runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.core.distributed.parallel_state import destroy_model_parallel, model_parallel_is_initialized
    from xfuser.model_executor.layers.usp import USP

    class State(runtime_state.ExternalRuntimeState):
        """The state that USP needs; without a pipeline, xDiT creates one for single processes only."""

        def __init__(self) -> None:
            arguments = xFuserArgs(
                data_parallel_degree=degrees.cfg, ring_degree=degrees.ring, ulysses_degree=degrees.ulysses
            )
            runtime_state.RuntimeState.__init__(self, arguments.create_config()[0])

    if model_parallel_is_initialized():
        destroy_model_parallel()
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size(), backend=backend)
    initialize_model_parallel(
        data_parallel_degree=degrees.cfg,  # accepts any degree, and orders the ranks like our cfg
        sequence_parallel_degree=degrees.sequence,
        ring_degree=degrees.ring,
        ulysses_degree=degrees.ulysses,
        backend=backend,
    )
    runtime_state._RUNTIME = State()
    # SDPA picks the best kernel, but does not return the log-sum-exp that a ring needs
    chosen = AttentionBackendType["SDPA" if kernel == "sdpa" and degrees.ring == 1 else XDIT_KERNELS[kernel]]
    logger.info("xDiT: %s attention", chosen.name)

    def usp(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        padded = degrees.ring == 1 and key.shape[2] * degrees.ulysses > tokens
        out = USP(query, key, value, backend=chosen, attention_kwargs={"valid_kv_len": tokens} if padded else None)
        return out.transpose(1, 2)

    return usp
