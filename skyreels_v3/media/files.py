"""Files in and out: is an input readable, can an output be written, and under which name does it end up.

Everything that takes long to make is written under a hidden temporary name beside its final one and put there by
`publish` when it is complete. So a file under its final name is always whole, and nothing is ever overwritten.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from skyreels_v3.errors import UserError, shown

try:
    import fcntl
except ImportError:  # Windows: whether a folder is in use cannot be told
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME_BYTES = 255  # longest file name of the usual file systems
NAME_RESERVE = 16  # for what `publish` and `partial_name` may add to a name
RUN_FOLDER = "skyreels-"  # what the names of runs' temporary folders begin with
IN_USE = ".in-use"  # a file in them, locked as long as its run lives
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


def check_readable(path: Path, flag: str) -> None:
    """Check that `path` is a file with something in it that may be read.

    Raises:
        UserError: not there, a folder, something else that is no file, empty, or not readable.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(flag, f"{shown(path)} is a folder; give a file")
        if not stat.S_ISREG(mode):
            raise UserError(flag, f"{shown(path)} is not a regular file; give an ordinary file")
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(flag, f"{shown(path)} is empty (0 bytes); give a complete file")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(flag, f"{shown(path)} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(flag, f"{shown(path)} cannot be read ({reason_of(error)}); check its rights") from error


def check_writable(path: Path, flag: str) -> None:
    """Check, without leaving anything behind, that a file or folder `path` could be made.

    Raises:
        UserError: `path` exists already, has an impossible name, or the folder that it would be made in is not a folder
            or cannot be written to.
    """
    if os.path.lexists(path):
        remedy = "give a file name in it" if path.is_dir() else "give another name or move it away"
        raise UserError(flag, f"{shown(path)} exists already and is never overwritten; {remedy}")
    if "\0" in str(path) or any(len(os.fsencode(part)) > NAME_BYTES - NAME_RESERVE for part in path.parts):
        raise UserError(flag, f"{shown(path)} is not a possible file name; give a shorter, plain one")
    ancestor = existing_folder(path)
    if not ancestor.is_dir():
        raise UserError(flag, f"{shown(path)} cannot be made: {shown(ancestor)} is not a folder; give another path")
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = f"{shown(ancestor)} is not writable ({reason_of(error)})"
        raise UserError(flag, f"{shown(path)} cannot be made: {reason}; give another path") from error


@contextmanager
def run_folder() -> Iterator[Path]:
    """A temporary folder for as long as a `with` block; those that killed runs have left are removed as well."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER}*"):
        with suppress(OSError):
            if is_abandoned(folder):
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=RUN_FOLDER, ignore_cleanup_errors=True) as name, occupy(Path(name)):
        yield Path(name)


def occupy(folder: Path) -> IO[bytes]:
    """Have other runs see that a folder is in use until the file is closed, be it by the system."""
    file = (folder / f"{IN_USE}.new").open("xb", buffering=0)
    with suppress(OSError):  # a full disk, a file system without locks
        file.write(platform.node().encode())
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(file.name, folder / IN_USE)  # nobody finds it unlocked
    return file


def is_abandoned(folder: Path) -> bool:
    """Whether a folder is this user's, and the run that has made it, on this machine, is no more.

    Raises:
        OSError: there is no telling.
    """
    status = folder.lstat()
    if fcntl is None or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    with (folder / IN_USE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.read() == platform.node().encode()


def replace_file(path: Path, content: bytes) -> None:
    """Give a file, in a folder that is made if need be, new content; whoever looks finds it whole, old or new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(final: Path) -> Path:
    """A new hidden name beside `final`, with its suffix; nothing is created."""
    return final.with_name(f".{final.stem[:32]}.{secrets.token_hex(6)}.tmp{final.suffix}")


def partial_name(final: Path, folder: bool = False) -> Path:
    """The name under which the finished part of an interrupted `final` is kept."""
    stem, suffix = _split_name(final, folder)
    return final.with_name(f"{stem}.partial{suffix}")


def publish(temporary: Path, final: Path) -> Path:
    """Put the complete file or folder `temporary` under the name `final`, or `<stem>-2`, `-3`, ... if that is taken.

    Race-free: of two programs that publish under one name, one gets the next name.

    Returns:
        The path that was really used; a warning is logged when it is not `final`.
    """
    is_folder = temporary.is_dir()
    stem, suffix = _split_name(final, is_folder)
    move = _move_folder if is_folder else _move_file
    for number in count(1):
        path = final if number == 1 else final.with_name(f"{stem}-{number}{suffix}")
        try:
            move(temporary, path)
        except FileExistsError:
            continue
        if number > 1:
            logger.warning("%s exists already; the output is %s", final, path)
        return path
    raise AssertionError("unreachable")


def _move_file(temporary: Path, path: Path) -> None:
    """Rename a file; raises FileExistsError instead of replacing one, which rename alone would do."""
    try:
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # takes the name, as link would have done
        temporary.replace(path)


def _move_folder(temporary: Path, path: Path) -> None:
    """Rename a folder; raises FileExistsError instead of replacing an empty one, which rename alone would do."""
    path.mkdir()  # takes the name
    try:
        temporary.replace(path)
    except BaseException:
        path.rmdir()
        raise


def _split_name(path: Path, folder: bool) -> tuple[str, str]:
    """Stem and suffix; a folder's name has no suffix, whatever dots are in it."""
    return (path.name, "") if folder else (path.stem, path.suffix)


def existing_folder(path: Path) -> Path:
    """The innermost folder above `path` that is there, or whatever is there in its place."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def reason_of(error: Exception, path: Path | None = None) -> str:
    """Why something could not be done with a file; where there was no room for `path`, how much is free there."""
    if path is None or not is_full(error):
        return getattr(error, "strerror", None) or str(error)
    folder = existing_folder(path)
    return f"{os.strerror(errno.ENOSPC)}, {giga(shutil.disk_usage(folder).free)} free in {shown(folder)}"


def is_full(error: Exception) -> bool:
    """Whether an error, of a library or a program too, is for want of room on a disk, or of the user's part of it."""
    return getattr(error, "errno", None) in NO_ROOM or any(os.strerror(number) in str(error) for number in NO_ROOM)


def giga(size: float) -> str:
    """A number of bytes, for people."""
    if size >= 5e7 or not size:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def follow_umask(path: Path) -> None:
    """Give a file, or all in a folder and itself, the rights that new ones have; safetensors and tempfile do not.

    What has other names elsewhere is left as it is there.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for each in (path, *path.rglob("*")):
        if each.is_dir() or each.stat().st_nlink == 1:
            with suppress(OSError):  # a file system without rights
                each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
