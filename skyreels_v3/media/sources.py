"""Where inputs come from: a path is checked, an http or https URL is downloaded into a folder of the run.

The folder belongs to one run, and every download in it gets a new name: no file is mistaken for another.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from skyreels_v3.errors import UserError, redact_url, shown
from skyreels_v3.media.files import check_readable

MAX_IMAGE_BYTES = 64 << 20
MAX_VIDEO_BYTES = 1 << 30
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file|mailto):", re.IGNORECASE)


def local_file(
    source: str,
    flag: str,
    folder: Path,
    timeout: float,
    max_bytes: int = MAX_VIDEO_BYTES,
    progress: bool = True,
    allow_private: bool = False,
) -> Path:
    """A readable, non-empty local file for a path or an http(s) URL.

    Args:
        folder: where downloads go; the caller owns and removes it. A URL that was downloaded there before is not again.
        timeout: seconds to wait for the connection and for each answer of the server (`--url_timeout`).
        max_bytes: largest download.
        progress: show a bar on stderr for large downloads.
        allow_private: also download from this machine and private networks.

    Raises:
        UserError: there is no such file, the scheme is another one, or the download fails.
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
        raise UserError(flag, f"{shown(source)}: {reason}")
    if source == redact_url(source) and ("://...@" in source or source.endswith("?...")):
        raise UserError(flag, f"{shown(source)}: its query or password was not recorded; give the whole address")
    record = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.path"  # also read by this run's other processes
    if not record.is_file():
        from skyreels_v3.media.download import download  # only URLs pay for it

        record.write_text(download(source, flag, folder, timeout, max_bytes, progress, allow_private).name)
    return folder / record.read_text()


def is_url(source: str) -> bool:
    """Whether a source is a URL, not a path."""
    return SCHEME.match(source) is not None
