"""Files: inputs from paths and URLs, checks that an output can be written, and its final name.

What takes long to make is written under a hidden temporary name, and `publish` renames it when it is complete. So a
file under its final name is always complete, and nothing is ever overwritten.

A folder for downloads belongs to one run, and each download gets a new name in it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from skyreels_v3.errors import UserError, format_value, redact_url

logger = logging.getLogger(__name__)

NAME_BYTES = 255  # the longest file name on common file systems
NAME_RESERVE = 16  # bytes that `publish` may add to a name
RUN_FOLDER = "skyreels-"  # prefix of a run's temporary folder
IN_USE = ".in-use"  # a file in that folder, locked while the run is alive
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_IMAGE_BYTES = 64 << 20  # of a download
MAX_VIDEO_BYTES = 1 << 30
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file|mailto):", re.IGNORECASE)


class MediaError(RuntimeError):
    """A media file that cannot be used.

    Attributes:
        reason: what is wrong and what to give instead. The message is the path and this; a caller that knows the flag
            or URL that the file came from names those instead of the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{format_value(path)} {reason}")
        self.reason = reason


def local_file(
    source: str,
    flag: str,
    folder: Path,
    timeout: float,
    max_bytes: int = MAX_VIDEO_BYTES,
    progress: bool = True,
    allow_private: bool = False,
) -> Path:
    """Return a readable, non-empty local file for a path or an http(s) URL.

    Args:
        folder: where downloads go; the caller removes it. A URL is downloaded into it once.
        timeout: seconds to wait for the connection and for each response of the server (--url_timeout).
        max_bytes: largest download.
        progress: show a bar on stderr for large downloads.
        allow_private: also download from this machine and private networks.

    Raises:
        UserError: there is no such file, the scheme is not http or https, or the download fails.
    """
    scheme = SCHEME.match(source)
    if scheme is None:
        if not source.strip():
            raise UserError(flag, "an empty path; give a file or an http(s) address")
        path = Path(os.path.expanduser(source))
        check_readable(path, flag)
        return path
    if (scheme[1] or scheme[2]).lower() not in ("http", "https"):
        reason = "only http and https addresses are fetched; download it and give the path"
        raise UserError(flag, f"{format_value(source)}: {reason}")
    if source == redact_url(source) and ("://...@" in source or source.endswith("?...")):
        raise UserError(flag, f"{format_value(source)}: its query or password was not recorded; give the whole address")
    record = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.path"  # also read by this run's other processes
    if not record.is_file():
        from skyreels_v3.media.download import download  # imported for URLs only

        record.write_text(download(source, flag, folder, timeout, max_bytes, progress, allow_private).name)
    return folder / record.read_text()


def is_url(source: str) -> bool:
    """Whether a source is a URL rather than a path."""
    return SCHEME.match(source) is not None


def check_readable(path: Path, flag: str) -> None:
    """Check that `path` is a readable, non-empty file.

    Raises:
        UserError: it is missing, empty, unreadable or not a regular file.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(flag, f"{format_value(path)} is a folder; give a file")
        if not stat.S_ISREG(mode):
            raise UserError(flag, f"{format_value(path)} is not a regular file; give an ordinary file")
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(flag, f"{format_value(path)} is empty (0 bytes); give a complete file")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(flag, f"{format_value(path)} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(
            flag, f"{format_value(path)} cannot be read ({reason_of(error)}); check its permissions"
        ) from error


def check_writable(path: Path, flag: str) -> None:
    """Check that a file or folder `path` could be created, without leaving anything behind.

    Raises:
        UserError: it exists, its name is invalid, or its folder cannot be written to.
    """
    if os.path.lexists(path):
        remedy = "give a file name in it" if path.is_dir() else "give another name or move it away"
        raise UserError(flag, f"{format_value(path)} exists already and is never overwritten; {remedy}")
    if "\0" in str(path) or any(len(os.fsencode(part)) > NAME_BYTES - NAME_RESERVE for part in path.parts):
        raise UserError(flag, f"{format_value(path)} is not a possible file name; give a shorter, plain one")
    ancestor = existing_folder(path)
    if not ancestor.is_dir():
        raise UserError(
            flag, f"{format_value(path)} cannot be made: {format_value(ancestor)} is not a folder; give another path"
        )
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = f"{format_value(ancestor)} is not writable ({reason_of(error)})"
        raise UserError(flag, f"{format_value(path)} cannot be made: {reason}; give another path") from error


@contextmanager
def run_folder() -> Iterator[Path]:
    """A temporary folder for the duration of a `with` block. Also removes the folders of runs that were killed."""
    for marker in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER}*/{IN_USE}"):
        with suppress(OSError), open_own(marker) as file:
            if lock(file):
                shutil.rmtree(marker.parent)
    folder = tempfile.TemporaryDirectory(prefix=RUN_FOLDER, ignore_cleanup_errors=True)
    with folder as name, Path(name, f"{IN_USE}.new").open("xb") as file:
        if lock(file):
            os.rename(file.name, Path(name, IN_USE))  # so that nobody sees it unlocked
        yield Path(name)


def open_own(path: Path) -> IO[bytes]:
    """Open a file of this user for reading; raises OSError for anything that others may have put in its place."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    status = os.fstat(file.fileno())
    if path.parent.is_symlink() or not stat.S_ISREG(status.st_mode) or status.st_uid != getattr(os, "getuid", int)():
        file.close()
        raise PermissionError(f"{path} is not this user's file")
    return file


def lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed or the process ends; returns False if locks are not supported.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (OSError, ImportError) as error:
        logger.debug("%s cannot be locked (%s)", file.name, error)
        return False
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically, and create its folder if needed: readers see either the old content or the new.

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
    """A new hidden name next to `final`, with the same suffix; nothing is created."""
    return final.with_name(f".{final.stem[:32]}.{secrets.token_hex(6)}.tmp{final.suffix}")


def publish(temporary: Path, final: Path, partial: bool = False) -> Path:
    """Rename a finished file or folder to `final`, or to `<stem>-2`, `-3`, ... if that is taken.

    If two processes publish under the same name, one gets the next name.

    Args:
        partial: it is the output of an interrupted run, and is named `<stem>.partial`.

    Returns:
        The path used; a warning is logged if it is not `final`.
    """
    stem, suffix = (final.name, "") if temporary.is_dir() else (final.stem, final.suffix)
    stem += ".partial" * partial
    for number in count(1):
        path = final.with_name(f"{stem}{f'-{number}' if number > 1 else ''}{suffix}")
        with suppress(FileExistsError):
            rename_to_new(temporary, path)
            if number > 1:
                logger.warning("%s exists already; the output is %s", final.with_name(stem + suffix), path)
            return path
    raise AssertionError("unreachable")


def rename_to_new(temporary: Path, path: Path) -> None:
    """Rename a file or folder without replacing anything.

    Raises:
        FileExistsError: the name is taken.
    """
    if temporary.is_dir():
        path.mkdir()
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
        else:
            temporary.unlink()
            return
    try:
        temporary.replace(path)  # replaces the empty file or folder that reserved the name
    except OSError:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Delete a file, or a folder and all it contains, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def existing_folder(path: Path) -> Path:
    """The closest existing folder above `path`, or whatever exists in its place."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def reason_of(error: Exception, path: Path | None = None) -> str:
    """Why a file could not be read or written; if the disk at `path` is full, also how much is free there."""
    if path is None or not is_full(error):
        return getattr(error, "strerror", None) or str(error)
    folder = existing_folder(path)
    return f"{os.strerror(errno.ENOSPC)}, {giga(shutil.disk_usage(folder).free)} free in {format_value(folder)}"


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk or quota; the messages of libraries and ffmpeg count as well."""
    return getattr(error, "errno", None) in DISK_FULL or any(os.strerror(code) in str(error) for code in DISK_FULL)


def giga(size: float) -> str:
    """Format a number of bytes for people."""
    if size >= 5e7 or not size:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all it contains, the permissions that the umask gives new ones.

    safetensors and tempfile restrict theirs to the user. Files with other hard links are left alone.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for each in (path, *path.rglob("*")):
        if each.is_dir() or each.stat().st_nlink == 1:
            with suppress(OSError):  # a file system without permissions
                each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
