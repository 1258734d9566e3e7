"""What is kept for later runs in the user's cache folder: the toy model, compiled code, encoded prompts.

torch is imported when tensors are stored and recalled.
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
from typing import TYPE_CHECKING

from skyreels_v3.media.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

KEPT = 256  # tensors' files of some hundred kilobytes each
FORMAT = 2  # a new number where what is computed changes


def cache_folder() -> Path:
    """Where made files are kept: $SKYREELS_CACHE, or skyreels_v3 in the user's cache folder."""
    base = os.environ.get("SKYREELS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyreels_v3"


def compiled_folder() -> Path:
    """Where compiled code is kept: on machines that share a cache folder, for each kind of processor its own.

    torch finds code again that is for other instructions than this processor's, which crashes or computes wrong.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        instructions = platform.processor()
    kind = f"{platform.machine()} {instructions} {os.environ.get('ATEN_CPU_CAPABILITY')}"
    return cache_folder() / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]


def identity_of(files: Iterable[Path], *more: object) -> str:
    """What an encoder's results depend on: its files, by place, length and time of change, and `more`."""
    known = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([FORMAT, known, [str(part) for part in more]])


@dataclass(frozen=True)
class TensorCache:
    """Tensors on disk that were computed for a text, such as a prompt, by something of a known identity.

    Without a folder nothing is kept. A file that cannot be read or written costs no more than the computing that it
    would have saved.
    """

    folder: Path | None
    identity: str

    def recall(self, text: str) -> dict[str, Tensor] | None:
        """What was computed before for a text, on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not self._file(text).is_file():
            return None
        try:
            return load_file(self._file(text))
        except (OSError, SafetensorError) as error:
            logger.debug("a kept file cannot be read: %s", error)
            return None

    def store(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was computed for a text, and the newest others."""
        from safetensors.torch import save

        if self.folder is None:
            return
        try:
            content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            replace_file(self._file(text), content)
            by_age = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
            for old in by_age[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("a file cannot be kept: %s", error)

    def _file(self, text: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(json.dumps([self.identity, text]).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"
