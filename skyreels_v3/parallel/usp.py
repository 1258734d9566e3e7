"""Attention among tokens that lie on several processes: unified sequence parallelism (USP, arXiv:2405.07719).

A `UspFn` is an `AttentionFn` of one process's tokens to those of all, and takes how many there are of them in all: what
lies behind those, at the end of the last processes' parts, is padding. With padding all processes have equally many.

Ulysses (arXiv:2309.14509) exchanges tokens for heads: a process then has all tokens of some heads, and attention is as
on one process. Where the heads do not suffice, groups of processes have some of the tokens each, and every group needs
the keys and values of the others: a ring (arXiv:2310.01889) attends to its own while theirs are on the way.

On GPUs it is xDiT that does this. `torch_usp` is for where xDiT does not run, a CPU above all, and for what its ring
does not take, padding: there groups collect keys and values before they begin.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_v3.attention.backends import AttentionFn
from skyreels_v3.parallel.collectives import all_gather, exchange

logger = logging.getLogger(__name__)

XDIT_KERNELS = {"sdpa": "SDPA_FLASH", "cudnn": "CUDNN", "flash": "FLASH", "flash3": "FLASH_3", "sage": "SAGE"}


class UspFn(Protocol):
    """Attention of tokens (B, L, N, D) to those of all processes, of which the first `tokens` are no padding."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor: ...


def torch_usp(kernel: AttentionFn, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup) -> UspFn:
    """USP by torch's own exchanges around any kernel.

    Args:
        ulysses: the processes that exchange tokens for heads; must divide the heads.
        ring: those that have the same heads afterwards, in the order of their tokens.
    """
    rings = dist.get_world_size(ring)

    def usp(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        query, key, value = (tokens_for_heads(x, ulysses) for x in (query, key, value))
        if rings > 1:
            key, value = (collected(x, ring) for x in (key, value))
        return heads_for_tokens(kernel(query, key[:, :tokens], value[:, :tokens]), ulysses)

    return usp


def tokens_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Some tokens and all heads (B, L, N, D) -> all tokens of the group and some heads (B, P * L, N / P, D)."""
    split = x.unflatten(2, (dist.get_world_size(group), -1)).movedim(2, 0)  # (P, B, L, N / P, D)
    return exchange(split, group).movedim(0, 1).flatten(1, 2)


def heads_for_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What `tokens_for_heads` was given."""
    split = x.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0)  # (P, B, L, N / P, D)
    return exchange(split, group).movedim(0, 2).flatten(2, 3)


def collected(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens (B, L, N, D) of all P processes, (B, P * L, N, D)."""
    return all_gather(x, group).movedim(0, 1).flatten(1, 2)


def has_xdit(kernel: str, device: torch.device) -> bool:
    """Whether xDiT can do it here: it needs a GPU, its package, and a kernel that it knows."""
    if device.type != "cuda":
        return False
    if kernel not in XDIT_KERNELS:
        logger.info("xDiT has no %s attention; torch's own exchanges are used", kernel)
    elif find_spec("xfuser") is None:
        logger.warning("the package xfuser is not installed; torch's own exchanges are used, pip install xfuser")
    return kernel in XDIT_KERNELS and find_spec("xfuser") is not None


def xdit_usp(kernel: str, cfg: int, ring: int, ulysses: int, backend: str | None = None) -> UspFn:
    """xDiT's USP, with its groups set up; takes no padding where `ring` > 1.

    Args:
        kernel: a name of `available.KERNELS`; xDiT calls kernels itself.
        cfg, ring, ulysses: degrees, in xDiT's order of processes, which is that of `ranks.Degrees`.
        backend: of the exchanges, for torch.distributed; xDiT chooses by the device unless given.
    """
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.core.distributed.parallel_state import destroy_model_parallel, model_parallel_is_initialized
    from xfuser.model_executor.layers.usp import USP

    if model_parallel_is_initialized():
        destroy_model_parallel()
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size(), backend=backend)
    initialize_model_parallel(
        data_parallel_degree=cfg,  # it numbers the processes as for guidance, and takes any number
        sequence_parallel_degree=ring * ulysses,
        ring_degree=ring,
        ulysses_degree=ulysses,
        backend=backend,
    )
    set_up_state(cfg, ring, ulysses)
    name = XDIT_KERNELS[kernel]
    # plain SDPA picks the best kernel there is, but says nothing of the sums that a ring needs
    chosen = AttentionBackendType["SDPA" if kernel == "sdpa" and ring == 1 else name]
    logger.info("xDiT: %s attention", chosen.name)

    def usp(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        padded = key.shape[2] * ulysses > tokens if ring == 1 else False
        out = USP(query, key, value, backend=chosen, attention_kwargs={"valid_kv_len": tokens} if padded else None)
        return out.transpose(1, 2)

    return usp


def set_up_state(cfg: int, ring: int, ulysses: int) -> None:
    """Give xDiT the state that its USP asks for; its own way to one without a pipeline is for one process only."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import runtime_state

    class State(runtime_state.ExternalRuntimeState):
        def __init__(self) -> None:
            arguments = xFuserArgs(data_parallel_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)
            runtime_state.RuntimeState.__init__(self, arguments.create_config()[0])

    runtime_state._RUNTIME = State()
