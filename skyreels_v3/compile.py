"""Compiling the parts of a transformer's blocks around attention, which is a kernel already.

A part is compiled once, serves all blocks, and is kept on disk for later runs. Whole blocks are not compiled: the hooks
around them, which stream their weights, would be compiled too.
"""

from __future__ import annotations

import torch

from skyreels_v3.model_api import Transformer

MAX_GRAPHS = 16  # of one part: shapes, dtypes and adapters differ


def compile_blocks(model: Transformer) -> None:
    """Compile a model's parts when they are first called; code is kept where `runtime.set_environment` says."""
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for owner, method in model.compilable():
        setattr(owner, method, torch.compile(getattr(owner, method)))
