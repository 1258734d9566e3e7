"""The built-in model: small networks for all tasks, shipped in the wheel and unpacked into the published layouts.

A file in weights/ has the networks of a family. For each checkpoint, its metadata lists the files to write: their text
or, for files of tensors, the name that each tensor has in the checkpoint and in weights/. So what several layouts share
is stored once, under different names. `training/pack.py` writes these files.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zlib
from pathlib import Path

from skyreels_v3.cache import cache_folder
from skyreels_v3.errors import UserError
from skyreels_v3.media.files import follow_umask
from skyreels_v3.tasks import TINY, TaskSpec

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
LAYOUTS = "layouts"  # key in the metadata

logger = logging.getLogger(__name__)


def packed(task: TaskSpec) -> Path:
    """The file with the networks of a task's family."""
    return WEIGHTS / f"{task.family}.safetensors"


def folder_of(task: TaskSpec) -> Path:
    """The folder of a task's checkpoint in the user's cache; it has another name for other weights."""
    return cache_folder() / f"{TINY}-{zlib.crc32(packed(task).read_bytes()):08x}" / Path(task.model_id).name


def make_tiny(task: TaskSpec) -> Path:
    """The folder of the checkpoint for `task`, unpacked if it does not exist yet.

    Raises:
        UserError: it cannot be written.
    """
    folder = folder_of(task)
    logger.warning("tiny is a small model of a drawn world: it shows that everything runs, not what SkyReels can do")
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
        try:
            unpack(task, temporary)
            follow_umask(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run has unpacked it meanwhile: the same files
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = f"{TINY} cannot be unpacked into {cache_folder()} ({error.strerror or error})"
        raise UserError("--model_id", f"{reason}; set SKYREELS_CACHE to a folder that can be written to") from error
    return folder


def unpack(task: TaskSpec, root: Path) -> None:
    """Write the files of the checkpoint for `task` to a new or empty folder."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(packed(task), framework="pt") as pack:
        for path, content in json.loads(pack.metadata()[LAYOUTS])[Path(task.model_id).name].items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
                continue
            tensors = {key: pack.get_tensor(stored).reshape(shape).clone() for key, (stored, shape) in content.items()}
            if target.suffix == ".safetensors":
                save_file(tensors, target, metadata={"format": "pt"})
            else:
                torch.save(tensors, target)
