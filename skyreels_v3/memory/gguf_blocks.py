"""Dequantize GGUF's block types with plain tensor operations that run on any device.

A row of a matrix is a sequence of blocks of 32 values, or 256 in the K types. A block holds small integers and a
float16 scale for them; in the _1 types, also a float16 minimum. In the K types, each group of 16 or 32 values has its
own scale, and in some a minimum, stored as integers that are multiplied by a float16 of the block.

The integers are packed into fields of 4 bits. Types with more bits keep the upper ones in separate fields of 1 or 2
bits (see `fields`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def unpack(rows: Tensor, kind: str, columns: int) -> Tensor:
    """Dequantize rows of blocks, uint8 (out, bytes), to a float32 matrix (out, columns)."""
    values = 256 if kind.endswith("_K") else 32
    blocks = rows.reshape(len(rows) * columns // values, -1)
    return BLOCKS[kind](blocks).view(len(rows), columns)


def fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """Unpack fields, (N, bytes) -> (N, bytes * 8 / bits): of every `width` bytes the lowest fields, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.reshape(len(packed), -1, 1, width) >> shifts[:, None]) & (2**bits - 1)).flatten(1)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 (N, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def plain(blocks: Tensor, bits: int, minimum: bool) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum if any, fifth bits of the integers if any, and their low 4 bits."""
    header = 4 if minimum else 2
    values = fields(blocks[:, -16:], 16, 4)
    if bits == 5:
        values |= fields(blocks[:, header : header + 4], 1, 1) << 4
    if minimum:
        return values.float().mul_(half(blocks, 0)).add_(half(blocks, 2))
    return values.float().sub_(2 ** (bits - 1)).mul_(half(blocks, 0))


def q8_0(blocks: Tensor) -> Tensor:
    """Q8_0: scale, and signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def k_with_minimum(blocks: Tensor, bits: int) -> Tensor:
    """Q4_K, Q5_K: scales of scales and minima; 8 of each in 6 bits; fifth bits of the integers, and their low 4 bits.

    The first four scales and the first four minima have a byte each; its two spare bits are the high bits of the last
    four. The low bits of these are in a third group of bytes, which hold a scale and a minimum each.
    """
    scales, minima, low = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales, minima = (
        torch.cat((first & 63, rest | ((first >> 2) & 48)), dim=1).float()
        for first, rest in ((scales, low & 15), (minima, low >> 4))
    )
    values = fields(blocks[:, -128:], 32, 4)
    if bits == 5:
        values |= fields(blocks[:, 16:48], 32, 1) << 4
    groups = values.float().unflatten(1, (8, 32)).mul_((half(blocks, 0) * scales)[..., None])
    return groups.sub_((half(blocks, 2) * minima)[..., None]).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    """Q6_K: low 4 bits of the integers, their high bits, 16 scales in signed bytes, and a scale for these."""
    values = fields(blocks[:, :128], 64, 4) | (fields(blocks[:, 128:192], 32, 2) << 4)
    scales = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return values.float().sub_(32).unflatten(1, (16, 16)).mul_(scales[..., None]).flatten(1)


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": q8_0,
    "Q6_K": q6_k,
    "Q5_K": partial(k_with_minimum, bits=5),
    "Q4_K": partial(k_with_minimum, bits=4),
    "Q5_1": partial(plain, bits=5, minimum=True),
    "Q5_0": partial(plain, bits=5, minimum=False),
    "Q4_1": partial(plain, bits=4, minimum=True),
    "Q4_0": partial(plain, bits=4, minimum=False),
}
