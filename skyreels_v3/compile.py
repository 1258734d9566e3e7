"""Compiling the transformer's repeated parts: what a block does before and after self-attention.

The parts are compiled once and serve all blocks. Attention itself is a kernel already; the work around it is what a
compiler can fuse. Compiled code is kept on disk, where later runs find it.

Whole blocks are not compiled: the hooks around them, which stream their weights, would be compiled with them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from skyreels_v3.models.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel

GRAPHS = 16  # of one part at most: shapes, dtypes and adapters differ


def compile_blocks(model: SkyReelsTransformer3DModel | HunyuanTransformer3DModel) -> None:
    """Compile on first use; code is kept where `runtime.set_environment` says."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for owner, method in parts_of(model):
        setattr(owner, method, torch.compile(getattr(owner, method)))


def parts_of(model: SkyReelsTransformer3DModel | HunyuanTransformer3DModel) -> Iterable[tuple[object, str]]:
    """What takes each token by itself: objects and names of their methods."""
    if isinstance(model, HunyuanTransformer3DModel):
        return model.compilable()
    return [(block, method) for block in model.blocks for method in ("project", "finish")]
