"""Reading the header of a GGUF file: its tensors, and the few settings that matter here. No torch.

Files are not trusted: every number is checked against the size of the file before it is used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from skyreels_v3.errors import CheckpointError, format_value

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20
MAX_ENTRIES = 1 << 20  # of any list
MAX_AXES = 8
NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # struct formats of value types, by number
STRING, ARRAY = 8, 9
# Tensor types by number: name, elements per block, bytes per block; unsupported ones have no sizes
TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)},
}
OTHER_TYPES = {
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # prefix of a tensor's shape, for shapes that GGUF cannot hold

T = TypeVar("T")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file.

    Attributes:
        kind: the name of its type.
        shape: the original one; the last axis is contiguous.
        columns: of the stored matrix, whose rows are whole blocks; its shape may differ from `shape`.
        start: offset in the file, in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    columns: int
    start: int
    nbytes: int


class Cursor:
    """Reads consecutive values, never past the end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise ValueError("it ends within its header")
        self.place += count
        return self.content[self.place - count : self.place]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def several(self, count: int, read: Callable[[], T]) -> list[T]:
        if count > MAX_ENTRIES:
            raise ValueError(f"a list of {count}")
        return [read() for _ in range(count)]

    def value(self, kind: int) -> Any:
        """The value of a setting, of type `kind`: a number, a string, or a list of either."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == ARRAY:
                raise ValueError("a list of lists")
            return self.several(count, lambda: self.value(inner))
        if kind >= len(NUMBERS):
            raise ValueError(f"a value of type {kind}")
        return self.number(NUMBERS[kind])


def read_gguf(file: Path) -> dict[str, GgufTensor]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has tensors of an unsupported type.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            header = handle.read(min(size, MAX_HEADER_BYTES))
        return parse(header, size, file)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF file ({error}); download it again") from error


def parse(header: bytes, size: int, file: Path) -> dict[str, GgufTensor]:
    """The tensors of a file of `size` bytes that begins with `header`; raises ValueError if it is damaged."""
    cursor = Cursor(header)
    if cursor.take(4) != MAGIC or cursor.number("I") not in VERSIONS:
        raise ValueError("not GGUF of version 2 or 3")
    tensor_count, setting_count = cursor.number("Q"), cursor.number("Q")
    settings = dict(cursor.several(setting_count, lambda: (cursor.text(), cursor.value(cursor.number("I")))))
    entries = cursor.several(tensor_count, lambda: read_entry(cursor))
    alignment = settings.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"general.alignment = {format_value(alignment)}")
    start = math.ceil(cursor.place / alignment) * alignment
    made: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in made:
            raise ValueError(f"{format_value(name)} twice")
        if number not in TYPES:
            kind = OTHER_TYPES.get(number, f"type {number}")
            reason = f"{file} holds weights in GGUF's {kind} ({format_value(name)}), which is not supported"
            raise CheckpointError(f"{reason}; give a file in Q4_K, a type with more bits, or FP8")
        kind, elements, block = TYPES[number]
        columns = shape[-1]
        nbytes = math.prod(shape) // elements * block
        if columns % elements or offset % alignment or start + offset + nbytes > size:
            raise ValueError(f"{format_value(name)} does not fit into it as {kind}")
        original = settings.get(f"{ORIGINAL_SHAPE}{name}", list(shape))
        whole = isinstance(original, list) and len(original) <= MAX_AXES and all(type(n) is int for n in original)
        if not whole or math.prod(original) != math.prod(shape) or min(original, default=1) < 1:
            raise ValueError(f"{ORIGINAL_SHAPE}{format_value(name)} = {format_value(original)}")
        made[name] = GgufTensor(kind, tuple(original), columns, start + offset, nbytes)
    return made


def read_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type number and offset of a tensor."""
    name, axes = cursor.text(), cursor.number("I")
    if axes > MAX_AXES:
        raise ValueError(f"{axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1] or (1,)
    if 0 in shape:
        raise ValueError(f"{format_value(name)} is empty")
    return name, shape, cursor.number("I"), cursor.number("Q")
