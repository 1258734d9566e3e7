"""What plans of memory are counted with, and what is done about it."""

from __future__ import annotations

BYTES = {"bfloat16": 2, "float32": 4}
SCALE = "weight_scale"  # name of the scales beside a weight in FP8; a checkpoint that has them is quantized
STREAM_SLOTS = 2  # blocks on the device at one time, those that stay aside; see memory/stream.py


def kept_blocks(blocks: int, keep: int) -> set[int]:
    """Which of so many blocks stay on the device: spread evenly, which gives the others more time to come."""
    keep = min(keep, blocks)
    return {index * blocks // keep for index in range(keep)}
