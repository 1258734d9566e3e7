"""The user's cache folder: the tiny model, compiled code, rewritten and encoded prompts, measured throughput.

torch is imported only when tensors are stored or recalled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from skyreels_v3.media.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_FILES = 256  # of tensors, some hundred kilobytes each
VERSION = 2  # of the cached computations; increase it when they change


def cache_folder() -> Path:
    """$SKYREELS_CACHE, or skyreels_v3 in the user's cache folder."""
    own, caches = os.environ.get("SKYREELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(caches or Path.home() / ".cache") / "skyreels_v3"


def compiled_folder() -> Path:
    """The folder for torch.compile's code, one per kind of CPU because machines may share a cache.

    torch would load code compiled for other instruction sets, which crashes or gives wrong results.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        instructions = platform.processor()
    kind = f"{platform.machine()} {instructions} {os.environ.get('ATEN_CPU_CAPABILITY')}"
    return cache_folder() / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]


def identity_of(files: Iterable[Path], *more: object) -> str:
    """A text of all that an encoder's results depend on: its files (path, size, modification time) and `more`."""
    known = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([VERSION, known, [str(part) for part in more]])


@dataclass(frozen=True)
class FileCache:
    """A cache of files on disk, computed from a text such as a prompt by the model `identity`.

    Nothing is stored if `folder` is None. A file that cannot be read or written is computed again.
    """

    folder: Path | None
    identity: str
    suffix: ClassVar[str] = ".txt"

    def read(self, text: str) -> bytes | None:
        """The content stored for a text, None if there is none."""
        try:
            if self.folder is not None and (file := self.folder / self._name(text)).is_file():
                return file.read_bytes()
        except OSError as error:
            logger.debug("a cached file cannot be read: %s", error)
        return None

    def write(self, text: str, content: bytes) -> None:
        """Store the content for a text, and remove the oldest files beyond `MAX_FILES`."""
        if self.folder is None:
            return
        try:
            replace_file(self.folder / self._name(text), content)
            by_age = sorted(self.folder.glob(f"*{self.suffix}"), key=lambda path: path.stat().st_mtime_ns)
            for old in by_age[:-MAX_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("a file cannot be cached: %s", error)

    def _name(self, text: str) -> str:
        return hashlib.sha256(json.dumps([self.identity, text]).encode()).hexdigest() + self.suffix


class TensorCache(FileCache):
    """A cache of tensors on disk, computed from a text by an encoder."""

    suffix = ".safetensors"

    def recall(self, text: str) -> dict[str, Tensor] | None:
        """The tensors stored for a text, on the CPU; None if there are none."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return None if (content := self.read(text)) is None else load(content)
        except SafetensorError as error:
            logger.debug("a cached file cannot be read: %s", error)
        return None

    def store(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors for a text."""
        from safetensors.torch import save

        self.write(text, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
