"""Who speaks when, from RTTM files, as written by speaker diarization tools.

A line has 9 or 10 fields: SPEAKER, the recording, its channel, start and duration in seconds, <NA>, <NA>, the speaker's
name, <NA> and <NA>.
"""

from __future__ import annotations

import math
from pathlib import Path

from skyreels_v3.errors import counted, format_value
from skyreels_v3.media.files import MediaError
from skyreels_v3.media.voice import Spans

MAX_BYTES = 1 << 20  # of a file; 200 s need a few kilobytes
FIELDS = (9, 10)
COMMENT, INFO, TURN = ";;", "SPKR-INFO", "SPEAKER"  # kinds of lines that are accepted


def read_turns(path: Path, speakers: int, seconds: float) -> tuple[Spans, ...]:
    """Read when each speaker talks in a recording of `seconds`, in the order of their first turns.

    Raises:
        MediaError: not a file of exactly `speakers` speakers in that recording; names a wrong line.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise MediaError(path, f"is larger than {MAX_BYTES >> 20} MiB; give the turns of one recording")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise MediaError(path, "is not a text file; give an RTTM file") from error
    turns: dict[str, list[tuple[float, float]]] = {}
    recordings: set[str] = set()
    for number, fields in enumerate(map(str.split, lines), start=1):
        if not fields or fields[0].startswith(COMMENT) or fields[0] == INFO:
            continue
        try:
            name, begin, end = read_turn(fields)
            recordings.add(fields[1])
            if len(recordings) > 1:
                raise ValueError("names another recording than the lines before; give the lines of one")
            if begin >= seconds:
                raise ValueError(
                    f"begins at {begin:g} s, but the sound is {seconds:.2f} s long; give the file for this recording"
                )
        except ValueError as error:
            raise MediaError(path, f"line {number} {error}") from error
        turns.setdefault(name, []).append((begin, min(end, seconds)))
    if len(turns) != speakers:
        named = f" ({format_value(', '.join(turns))})" if turns else ""
        raise MediaError(path, f"has {counted(len(turns), 'speaker')}{named}; give a file with {speakers}")
    return tuple(sorted(turns.values(), key=min))


def read_turn(fields: list[str]) -> tuple[str, float, float]:
    """Name, start and end of a turn; raises ValueError saying what is wrong."""
    if fields[0] != TURN or len(fields) not in FIELDS:
        raise ValueError(f"is not SPEAKER and 8 or 9 more fields ({format_value(' '.join(fields))}); give an RTTM file")
    try:
        begin, length = map(float, fields[3:5])
    except ValueError:
        begin = length = math.nan
    if not (0 <= begin < math.inf and 0 < length < math.inf):
        shown = format_value(" ".join(fields[3:5]))
        raise ValueError(f"has no valid beginning or length ({shown}); correct it, or leave it out")
    return fields[7], begin, begin + length
