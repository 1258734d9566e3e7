"""Numbers that all plans of memory are counted with."""

from __future__ import annotations

BYTES = {"bfloat16": 2, "float32": 4}
STREAM_SLOTS = 2  # blocks on the device at one time, those that stay aside; see memory/stream.py
