"""Which ways of step caching there are, without torch; what they do is in step_cache.py."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = {"fbcache": 0.1, "teacache": 0.15, "magcache": 0.06}  # with their thresholds


@dataclass(frozen=True)
class CacheSettings:
    """A method and its threshold."""

    method: str
    threshold: float
