"""Running the ffmpeg of imageio-ffmpeg, and parsing what it reports about a file.

imageio-ffmpeg's own `read_frames` and `write_frames` are not used. They hide ffmpeg's exit status, so a clip that
breaks off or a full disk would look like success, and they kill the encoder when Ctrl-C arrives during a write.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import IO

from imageio_ffmpeg import get_ffmpeg_exe

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.media.files import MediaError
from skyreels_v3.subprocesses import program

MAX_FRAME_PIXELS = 40_000_000  # 8K has 35 million
# Containers accepted as a clip. Pictures, text and playlists, which may name other files and URLs, are not.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,webp_anim,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,ivf,obu,flv,"
    "asf,ogg,nut,mxf,dv,mjpeg,yuv4mpegpipe,wtv,rm"
)
# A track in ffmpeg's description of a file, with its metadata.
TRACK = re.compile(r"^  Stream #0:(\d+)(?:\[[^]]*\])?(?:\(.*?\))?: (Video|Audio): (.*(?:\n {4,}.*)*)", re.MULTILINE)
# Only for containers with an index: broadcast recordings may start and stop in the middle of a packet.
TRUNCATED = re.compile(r"partial file|ended prematurely|moov atom not found|/(mov|avi)[^]]*\] corrupt input packet")
MAX_ERROR_RATE = 0.1  # of a sound track's packets. Players skip a few broken ones, and so do we.
NO_TIMESTAMP = -(2**63)
DISCARDED = 0x4  # packet flag: decoded but not shown, because of an edit list
TRIAL_SECONDS = 10.0
LOG_LINES = 5  # of ffmpeg's log that an error quotes


@dataclass(frozen=True)
class TrackKind:
    """Video or audio: ffmpeg's name for such a track, and the errors for a file without a usable one."""

    name: str
    containers: str
    missing: str
    other_file: str
    damaged: str
    max_packets: int  # enough for hours of any format


VIDEO = TrackKind(
    name="Video",
    containers=CONTAINERS,
    missing="has no video stream; give a video clip",
    other_file="is a picture or another kind of file; give a video clip, such as an mp4",
    damaged="is truncated or not a video; give a complete video file, such as an mp4",
    max_packets=2_000_000,
)
AUDIO = TrackKind(
    name="Audio",
    containers=CONTAINERS + ",mp3,wav,flac,aac,aiff,w64,au,caf,amr,ac3,eac3,tta,ape,wv",
    missing="has no sound; give a sound file, or a video with sound",
    other_file="is a picture, a text or another kind of file; give a sound file, such as an mp3 or wav",
    damaged="is truncated, damaged or not a sound file; give a complete sound file, such as an mp3 or wav",
    max_packets=500_000,
)


@dataclass(frozen=True)
class Track:
    """The track of a file to use.

    Attributes:
        number: of the track within the file, as in ffmpeg's `-map 0:NUMBER`.
        description: ffmpeg's description of the track, with its metadata.
        log: all that ffmpeg reports about the file.
    """

    path: Path
    kind: TrackKind
    number: int
    description: str
    log: str

    @property
    def source(self) -> list[str]:
        """ffmpeg options to read only this track."""
        return [*input_options(self.path, self.kind), "-map", f"0:{self.number}"]


def find_track(path: Path, kind: TrackKind) -> Track:
    """Find the default track of a kind, or else the first one; cover pictures do not count as video.

    Raises:
        MediaError: the file has none, or is not a media file.
    """
    _, _, log = run(["-v", "info", *input_options(path, kind)])  # without an output ffmpeg only describes the file
    tracks = []
    for number, name, description in TRACK.findall(log):
        head = description.partition("\n")[0]
        if name == kind.name and "(attached pic)" not in head:
            tracks.append(("(default)" not in head, int(number), description))
    if not tracks:
        other = kind.missing if "Stream #0" in log else kind.damaged
        raise MediaError(path, kind.other_file if "not on whitelist" in log else other)
    _, number, description = min(tracks)
    return Track(path, kind, number, description, log)


def read_track(track: Track, options: list[str]) -> bytes:
    """Convert a track with ffmpeg's output `options`; returns what is written to stdout.

    Raises:
        MediaError: the track is damaged.
    """
    code, output, log = run(["-max_error_rate", str(MAX_ERROR_RATE), *track.source, *options, "pipe:1"])
    if "Rematrix is needed" in log:
        raise MediaError(track.path, "has an unknown channel layout; mix it to stereo first")
    if code or TRUNCATED.search(log):
        raise MediaError(track.path, track.kind.damaged)
    return output


def read_packets(track: Track) -> tuple[Fraction, list[tuple[int, int]]]:
    """Start and duration of every packet of a track, in order of presentation, without decoding.

    Returns:
        The length of a tick in seconds, and the packets in ticks.

    Raises:
        MediaError: there are more packets than in any real file; or as in `read_track`.
    """
    tick = Fraction(1)
    packets: list[tuple[int, int]] = []
    limit = [f"-frames:{track.kind.name[0].lower()}", str(track.kind.max_packets)]
    # lines of the listing: stream, dts, pts, duration, size, checksum, flags and side data
    listing = read_track(track, ["-c", "copy", *limit, "-f", "framecrc"]).decode().splitlines()
    if len(listing) > track.kind.max_packets:
        raise MediaError(track.path, f"has more than {track.kind.max_packets:,} packets; cut it")
    for line in listing:
        if line.startswith("#tb 0:"):
            tick = Fraction(line.split(":")[1].strip())
        elif not line.startswith("#"):
            dts, pts, duration = (int(word) for word in line.split(",")[1:4])
            flags = re.search(r"F=0x([0-9A-Fa-f]+)", line)
            if not (flags and int(flags[1], 16) & DISCARDED):
                packets.append((dts if pts == NO_TIMESTAMP else pts, duration))
    return tick, sorted(packets)


def log_end(log: str | IO[bytes]) -> str:
    """The end of ffmpeg's log in one line, for an error message."""
    if not isinstance(log, str):
        log.seek(0)
        log = log.read().decode(errors="replace")
    return " / ".join(log.strip().splitlines()[-LOG_LINES:]) or "no message"


def run(arguments: list[str], timeout: float | None = None) -> tuple[int, bytes, str]:
    """Run ffmpeg and return its exit status, output and log. An exception kills it."""
    with program(ffmpeg_command(arguments), stdin=DEVNULL, stdout=PIPE, stderr=PIPE) as process:
        output, log = process.communicate(timeout=timeout)
    return process.returncode, output, log.decode(errors="replace")


@contextmanager
def ffmpeg_process(
    arguments: list[str], purpose: str, stdin: int = DEVNULL, stdout: int = DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A running ffmpeg with `stdin` or `stdout` as a pipe, killed if the `with` block raises.

    Raises:
        RuntimeError: it fails. The message is "ffmpeg could not <purpose>: <the end of its log>".
    """
    with (
        tempfile.TemporaryFile() as log,
        program(ffmpeg_command(arguments), stdin=stdin, stdout=stdout, stderr=log) as process,
    ):
        yield process
        if process.wait():
            raise RuntimeError(f"ffmpeg could not {purpose}: {log_end(log)}")


def write_file(arguments: list[str], purpose: str) -> None:
    """Run ffmpeg to write a file.

    Raises:
        RuntimeError: it fails. The message is "ffmpeg could not <purpose>: <the end of its log>".
    """
    code, _, log = run(arguments)
    if code:
        raise RuntimeError(f"ffmpeg could not {purpose}: {log_end(log)}")


def ffmpeg_command(arguments: list[str]) -> list[str]:
    return [get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-v", "warning", *arguments]


def input_options(path: Path, kind: TrackKind) -> list[str]:
    """ffmpeg options to read a local file in an accepted container, and nothing but that file."""
    limits = ["-protocol_whitelist", "file,pipe", "-format_whitelist", kind.containers]
    return [*limits, "-max_pixels", str(MAX_FRAME_PIXELS), "-i", f"file:{path}"]


@cache
def check_ffmpeg() -> None:
    """Check ffmpeg by encoding one tiny frame with sound, once per process (0.05 s).

    Raises:
        UserError: there is no ffmpeg, or it does not start, is too old or lacks an encoder.
    """
    graph = "color=s=16x16:d=0.04,format=yuv420p[v];anullsrc=d=0.04[a]"
    streams = ["-map", "[v]", "-map", "[a]", "-fps_mode", "passthrough", "-c:v", "libx264", "-c:a", "aac"]
    output = ["-f", "mp4", "-movflags", "frag_keyframe+empty_moov", "pipe:1"]
    try:
        code, made, log = run(["-filter_complex", graph, *streams, *output], timeout=TRIAL_SECONDS)
        problem = "" if made and not code else log_end(log)
    except (OSError, RuntimeError, TimeoutExpired) as error:  # RuntimeError: imageio-ffmpeg finds none
        problem = str(error)
    if problem:
        reason = (
            f"{format_value(os.environ.get('IMAGEIO_FFMPEG_EXE', 'not set'))}: ffmpeg fails ({format_value(problem)})"
        )
        remedy = "unset it to use imageio-ffmpeg's own, or set it to ffmpeg 5.1 or newer with libx264 and aac"
        raise UserError("IMAGEIO_FFMPEG_EXE", f"{reason}; {remedy}")
