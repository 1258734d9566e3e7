"""Importing this module makes CPU vector functions reproducible; import it before a model uses them."""

from __future__ import annotations

import torch

# CPU functions that torch takes from MKL's vector library; rotary tables, embeddings and norms use them
VECTOR_FUNCTIONS = ("cos", "erf", "exp", "log", "sin", "sqrt", "tanh")


def choose_vector_kernels() -> None:
    """Call each of MKL's vector functions once in a single thread.

    MKL chooses a function's kernel in the first call. If that call is divided among threads, one of them can get a
    low-precision kernel (off by 2e-4 in a cosine), in that call only; see
    https://github.com/pytorch/pytorch/issues/188792. torch divides calls with more than 2048 numbers.
    """
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(torch.ones(8, dtype=dtype))


choose_vector_kernels()
