"""Access to the files in one folder, for clients that may read nothing else on this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

BLOCK = 1 << 20  # bytes


class Outside(Exception):
    """A path that leads out of the folder, or into the excluded one."""


def open_below(folder: Path, name: str, without: Path) -> IO[bytes]:
    """Open a regular file in a folder or its subfolders for reading.

    Args:
        folder: without symbolic links in its path. Anyone may change its contents meanwhile.
        name: relative to the folder, or absolute.
        without: a folder whose files are refused, as if they were outside.

    Raises:
        Outside: the path leads elsewhere, directly or through a symbolic link, or has `..` in it.
        OSError, ValueError: there is no such file, or it cannot be read.
    """
    path = Path(name)
    real = Path(os.path.realpath(folder / path))
    if ".." in path.parts or folder not in real.parents or without in real.parents:
        raise Outside
    # `real` contains no links: O_NOFOLLOW refuses those put there since
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
        raise OSError("it is not a regular file")
    return file


def copy_below(folder: Path, name: str, without: Path, target: Path, most: int) -> None:
    """Copy a file in a folder, or its first `most` + 1 bytes, to a new one; see `open_below`."""
    with open_below(folder, name, without) as source, target.open("xb") as copy:
        while (left := most + 1 - copy.tell()) > 0 and (block := source.read(min(BLOCK, left))):
            copy.write(block)
