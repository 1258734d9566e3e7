"""Compiling the transformer's repeated parts: what a block does before and after self-attention.

The parts are compiled once and serve all blocks. Attention itself is a kernel already; the work around it is what a
compiler can fuse. Compiled code is kept on disk, where later runs find it.

Whole blocks are not compiled: the hooks around them, which stream their weights, would be compiled with them.
"""

from __future__ import annotations

import torch

from skyreels_v3.model_api import Transformer

GRAPHS = 16  # of one part at most: shapes, dtypes and adapters differ


def compile_blocks(model: Transformer) -> None:
    """Compile on first use; code is kept where `runtime.set_environment` says."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for owner, method in model.compilable():
        setattr(owner, method, torch.compile(getattr(owner, method)))
