"""The methods of skipping a denoising step's blocks. No torch: the command line checks a choice with this.

What a method does is told in `sampling.step_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

# The threshold of each unless told; a higher one skips more. All three are commonly used for HunyuanVideo.
METHODS = {"fbcache": 0.1, "teacache": 0.15, "magcache": 0.06}


@dataclass(frozen=True)
class CacheSettings:
    """A method, one of `METHODS`, and the change or error up to which it takes a step's blocks from an earlier step."""

    method: str
    threshold: float
