"""Importing this makes the vector functions of a CPU give the same values in every run, before a model uses them."""

from __future__ import annotations

import torch

# The functions of a CPU that torch takes from MKL's vector library, which rotary tables, embeddings and norms use
VECTOR_FUNCTIONS = ("cos", "erf", "exp", "log", "sin", "sqrt", "tanh")


def choose_vector_kernels() -> None:
    """Call each of MKL's vector functions once, by one thread.

    MKL chooses a function's kernel in its first call. Where that call is divided among threads, one of them can be
    given a kernel of low precision (2e-4 off in a cosine), for that call alone; see
    https://github.com/pytorch/pytorch/issues/188792. torch divides calls of more than 2048 numbers.
    """
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(torch.ones(8, dtype=dtype))


choose_vector_kernels()
