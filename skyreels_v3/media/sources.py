"""Where inputs come from: a path is checked, an http or https address is downloaded into a folder of the run.

The folder belongs to one run and every download in it gets a new name: nothing is mistaken for something else.
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


def localise(
    source: str,
    flag: str,
    folder: Path,
    timeout: float,
    max_bytes: int = MAX_VIDEO_BYTES,
    progress: bool = True,
    allow_private: bool = False,
) -> Path:
    """A readable, non-empty local file for a path or an http(s) address.

    Args:
        folder: where downloads go; the caller owns and removes it. Not touched for a path.
        timeout: seconds to wait for the connection and for each answer of the server (`--url_timeout`).
        max_bytes: largest download.
        progress: show a bar on stderr for large downloads.
        allow_private: also fetch from this machine and private networks.

    Raises:
        UserError: no such file, another scheme, or anything that goes wrong with a download.
    """
    scheme = SCHEME.match(source)
    if scheme is None:
        if not source.strip():
            raise UserError(flag, "an empty path; give a file or an http(s) address")
        path = Path(os.path.expanduser(source))
        check_readable(path, flag)
        return path
    if (scheme[1] or scheme[2]).lower() not in ("http", "https"):
        raise UserError(
            flag, f"{shown(source)}: only http and https addresses are fetched; download it and give the path"
        )
    if source == redact_url(source) and ("://...@" in source or source.endswith("?...")):
        raise UserError(flag, f"{shown(source)}: its query or password was not recorded; give the whole address")
    there = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.path"
    if not there.is_file():  # not fetched before, by this process or the one that leads it
        from skyreels_v3.media.download import download  # only addresses pay for it

        there.write_text(download(source, flag, folder, timeout, max_bytes, progress, allow_private).name)
    return folder / there.read_text()


def is_url(source: str) -> bool:
    """Whether a source is an address, not a path."""
    return SCHEME.match(source) is not None
