"""Files in one folder, for clients who may see nothing else of this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

BLOCK = 1 << 20  # bytes


class Outside(Exception):
    """A path that leads out of the folder, or to where nobody may read."""


def open_below(folder: Path, name: str, without: Path) -> IO[bytes]:
    """A regular file in a folder or in one below it, open for reading.

    Args:
        folder: with no symbolic link in its path. What is in it may be changed meanwhile, by anyone.
        name: relative to the folder, or from the root.
        without: a folder whose files are refused, as if they were outside.

    Raises:
        Outside: it is in another place, or a symbolic link to one, or has `..` in it.
        OSError, ValueError: there is no such file, or it cannot be read.
    """
    path = Path(name)
    real = Path(os.path.realpath(folder / path))
    if ".." in path.parts or folder not in real.parents or without in real.parents:
        raise Outside
    # no link is left in `real`: one that is met now was put there since
    *folders, last = real.relative_to(folder).parts
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        file = os.fdopen(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place), "rb")
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def copy_below(folder: Path, name: str, without: Path, target: Path, most: int) -> None:
    """Copy a file of a folder, or its first `most` + 1 bytes, to a new one; see `open_below`."""
    with open_below(folder, name, without) as source, target.open("xb") as copy:
        while (left := most + 1 - copy.tell()) > 0 and (block := source.read(min(BLOCK, left))):
            copy.write(block)
