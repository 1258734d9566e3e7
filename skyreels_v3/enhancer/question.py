"""The question to an enhancer, and the error if it has no answer."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass


class EnhancerError(Exception):
    """Why there is no new prompt."""


@dataclass(frozen=True)
class Question:
    """A question to the enhancer: rules, the prompt, and pictures as JPEG files."""

    rules: str
    prompt: str
    pictures: tuple[bytes, ...] = ()

    @property
    def key(self) -> str:
        """The key in the cache, the same for equal questions."""
        return json.dumps([self.rules, self.prompt, [hashlib.sha256(each).hexdigest() for each in self.pictures]])

    @property
    def urls(self) -> list[str]:
        """The pictures as `data:` URLs."""
        return [f"data:image/jpeg;base64,{base64.b64encode(each).decode()}" for each in self.pictures]
