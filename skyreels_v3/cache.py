"""What is kept for later runs in the user's cache folder: the toy model, compiled code, encoded prompts.

torch is imported when prompts are stored and recalled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_v3.media.files import temporary_name

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PROMPTS_KEPT = 256  # of some hundred kilobytes each
FORMAT = 1  # a new number where what is computed for a prompt changes


def cache_folder() -> Path:
    """Where made files are kept: $SKYREELS_CACHE, or skyreels_v3 in the user's cache folder."""
    base = os.environ.get("SKYREELS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyreels_v3"


def identity_of(files: Iterable[Path], *more: object) -> str:
    """What an encoder's results depend on: its files, by place, length and time of change, and `more`."""
    known = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([FORMAT, known, [str(part) for part in more]])


@dataclass(frozen=True)
class PromptCache:
    """Encoded prompts on disk, by the encoder's identity and the prompt. Without a folder nothing is kept.

    A file that cannot be read or written costs no more than the encoding that it would have saved.
    """

    folder: Path | None
    identity: str

    def recall(self, prompt: str) -> Tensor | None:
        """Context (1, L, D) of a prompt that was encoded before, on the CPU, zero rows behind it left out."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not self._file(prompt).is_file():
            return None
        try:
            return load_file(self._file(prompt))["context"]
        except (OSError, SafetensorError, KeyError) as error:
            logger.debug("an encoded prompt cannot be read: %s", error)
            return None

    def store(self, prompt: str, context: Tensor) -> None:
        """Keep the context (1, L, D) of a prompt, and the newest others."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.folder is None:
            return
        rows = int(context[0].any(dim=-1).nonzero().max()) + 1 if context.any() else 1
        file = self._file(prompt)
        temporary = temporary_name(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"context": context[:, :rows].cpu().contiguous()}, temporary)
            os.replace(temporary, file)
            by_age = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
            for old in by_age[:-PROMPTS_KEPT]:
                old.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            logger.debug("an encoded prompt cannot be kept: %s", error)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _file(self, prompt: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(json.dumps([self.identity, prompt]).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"
