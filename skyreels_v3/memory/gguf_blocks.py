"""Unpacking GGUF's block types, in plain operations that run on any device.

A row of a matrix is a sequence of blocks of 32 values, or 256 in the K types. A block holds small integers, and a
float16 scale to multiply them by. Those of the types _1 have a float16 minimum besides. In a K type, groups of 16 or 32
values have scales of their own, and in some a minimum, as integers that are multiplied by a float16 of the block.

The integers are stored in fields of 4 bits, and where a type has more bits, these are in fields of 1 or 2 bits of their
own (`fields`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def unpack(rows: Tensor, kind: str, columns: int) -> Tensor:
    """Rows of blocks, uint8 (out, bytes), as a float32 matrix (out, columns)."""
    values = 256 if kind.endswith("_K") else 32
    blocks = rows.reshape(len(rows) * columns // values, -1)
    return BLOCKS[kind](blocks).view(len(rows), columns)


def fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """(N, bytes) -> (N, bytes * 8 / bits): of each `width` bytes the lowest fields of `bits` bits, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.reshape(len(packed), -1, 1, width) >> shifts[:, None]) & (2**bits - 1)).flatten(1)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 numbers in two bytes of each block, as float32 (N, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def plain(blocks: Tensor, bits: int, minimum: bool) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum, fifth bits of the integers, and their other bits."""
    header = 4 if minimum else 2
    values = fields(blocks[:, -16:], 16, 4)
    if bits == 5:
        values |= fields(blocks[:, header : header + 4], 1, 1) << 4
    if minimum:
        return values.float().mul_(half(blocks, 0)).add_(half(blocks, 2))
    return values.float().sub_(2 ** (bits - 1)).mul_(half(blocks, 0))


def q8_0(blocks: Tensor) -> Tensor:
    """Scale and signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def k_with_minimum(blocks: Tensor, bits: int) -> Tensor:
    """Q4_K, Q5_K: scales of scales and minima; 8 of each in 6 bits; fifth bits of the integers, and their other bits.

    Of the 6 bits, the first four scales and minima have theirs in a byte each, whose two other bits belong to the last
    four. These have their low bits in a third group of bytes, of scale and minimum together.
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
    """Low bits of the integers, high bits, 16 scales in signed bytes, scale of these."""
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
