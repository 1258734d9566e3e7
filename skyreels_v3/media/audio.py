"""Sound: probing, reading for the model, loudness, and two recordings put together.

Decoding is done by the ffmpeg program that imageio-ffmpeg brings, so that everything with a sound track can be read
and what the model hears is what `video.write_video` puts into the file. Everything after it is done by the libraries
that the model was trained with; they take seconds to import, which only `read_audio` and `normalise_loudness` pay for.
"""

from __future__ import annotations

import logging
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable
from skyreels_v3.media.video import TRUNCATED, ffmpeg_command, run_ffmpeg, sound_input

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # of what the model hears, in Hz
MIN_SECONDS = 0.4  # one block of the loudness meter
MAX_SECONDS = 200.0
LOUDNESS = -23.0  # LUFS
MEASURABLE = 100.0  # LUFS: a loudness further from 0 is none

MIX_RATE = 48_000  # Hz
# A lone centre channel becomes left and right at its own level; ffmpeg's own way makes it 3 dB quieter.
MIX_FORMAT = (
    f"asetpts=N/SR/TB,aresample={MIX_RATE},aformat=sample_fmts=fltp:channel_layouts=mono|stereo,"
    "pan=stereo|FL=FL+FC|FR=FR+FC"
)
MIX_LIMIT = "alimiter=limit=0.98:level=0:latency=1"  # no make-up gain, and no delay by its look-ahead

MAX_ERROR_RATE = 0.1  # of the packets; a few that cannot be decoded, as players skip them, are no damage
# Formats that hold a single sound and say how long it is, so that a shorter one has lost its end or parts.
TELLS_LENGTH = re.compile(r"Input #0, (?:mp3|flac|aiff|au|wv|tta|ape), from")
DURATION = re.compile(r"Duration: (\d+):(\d+):(\d+\.\d+)")
LENGTH_TOLERANCE = 0.1  # s; a few packets of mp3
OGG_TAIL = 1 << 17  # two pages of an Ogg file at their longest
WAV_SLACK = 1024  # bytes by which a WAV file's header may exaggerate: a few ms at most
UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written into a pipe
AU_HEADER = struct.Struct(">4s5I")  # ".snd", offset of the samples, their size, encoding, Hz, channels


@dataclass(frozen=True)
class AudioInfo:
    """A sound file that can be decoded, and the length of its (first) sound track in seconds."""

    path: Path
    seconds: float


def probe_audio(path: Path, flag: str) -> AudioInfo:
    """Look at a sound file, or at the sound track of a clip: it is decoded once, but not kept (0.3 s for 200 s).

    Raises:
        UserError: `path` is not a whole, decodable file with between 0.4 and 200 s of sound.
    """
    check_readable(path, flag)
    seconds = _measure(path, flag, "copy")[0]  # reads hours of sound in a second
    if seconds <= MAX_SECONDS + 1:  # packets may hold a little more than is heard
        seconds, log = _measure(path, flag, "pcm_s16le")
        _check_whole(path, flag, seconds, log)
    if not seconds:
        raise UserError(flag, f"{shown(path)} has a sound track of 0 s; give a recording of speech")
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        remedy = "cut it" if seconds > MAX_SECONDS else "give a longer recording"
        limits = f"{MIN_SECONDS:g} to {MAX_SECONDS:g} s"
        raise UserError(flag, f"{shown(path)} has {seconds:.3f} s of sound, {limits} are possible; {remedy}")
    return AudioInfo(path, seconds)


def read_audio(path: Path, flag: str) -> np.ndarray:
    """The sound as the model hears it: float32 [samples] in [-1, 1], 16 kHz, the mean of all channels.

    For WAV files these are the very samples that `librosa.load(path, sr=16000)` gives, apart from clipping: what float
    files hold beyond [-1, 1] is clipped, as every player does, with a warning. The length should have been checked by
    `probe_audio`: everything is held in memory.

    Raises:
        UserError: the sound cannot be decoded, is empty, or has samples that are not numbers.
    """
    import librosa

    channels, rate = _decode(path, flag)
    peak = float(np.abs(channels).max())
    if not np.isfinite(peak):
        raise UserError(flag, f"{shown(path)} has samples that are not finite numbers (NaN); export the sound again")
    if peak > 1:
        logger.warning("%s: the sound peaks at %.4g times full scale and is clipped", path, peak)
        channels = channels.clip(-1, 1)
    return librosa.resample(librosa.to_mono(channels), orig_sr=rate, target_sr=SAMPLE_RATE)


def normalise_loudness(samples: np.ndarray) -> np.ndarray:
    """Bring mono 16 kHz sound to -23 LUFS, float32 [samples]; short peaks may then leave [-1, 1], as in training.

    What has no measurable loudness comes back as it is: silence (below the meter's gate of -70 LUFS) and clips shorter
    than the meter's block of 0.4 s.
    """
    if len(samples) < MIN_SECONDS * SAMPLE_RATE:
        return samples
    import pyloudnorm

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(samples)
    if not abs(loudness) <= MEASURABLE:  # also NaN
        return samples
    # pyloudnorm.normalize does the same in the same precision, but warns of clipping where nothing clips
    return (samples * np.float64(10) ** ((LOUDNESS - loudness) / 20)).astype(np.float32)


def mix(paths: Sequence[Path], sequential: bool, target: Path) -> Path:
    """Put recordings together into one 48 kHz stereo WAV file of 24 bits a sample.

    Args:
        paths: files that `probe_audio` has accepted.
        sequential: one after the other; else all from time 0 on at their own levels, to the end of the longest. Where
            their sum would clip it is limited.
        target: the file to write, in a temporary folder of the caller; replaced if it exists.

    Returns:
        `target`.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    count = len(paths)
    joined = f"concat=n={count}:v=0:a=1" if sequential else f"amix=inputs={count}:duration=longest:normalize=0"
    graph = "".join(f"[{i}:a:0]{MIX_FORMAT}[s{i}];" for i in range(count))
    graph += "".join(f"[s{i}]" for i in range(count)) + f"{joined},{MIX_LIMIT}[mixed]"
    inputs = [option for path in paths for option in sound_input(path)]
    output = ["-map", "[mixed]", "-map_metadata", "-1", "-c:a", "pcm_s24le", "-ar", str(MIX_RATE), "-f", "wav", "-y"]
    run_ffmpeg([*inputs, "-filter_complex", graph, *output, f"file:{target}"], "mix the recordings")
    return target


def _measure(path: Path, flag: str, codec: str) -> tuple[float, str]:
    """Seconds of sound and ffmpeg's log; `codec` "copy" adds up the packets' lengths, "pcm_s16le" decodes them.

    Raises:
        UserError: no sound, or nothing that can be read.
    """
    run = _run(path, ["-v", "info", "-c:a", codec, "-f", "framecrc", "pipe:1"])
    log = run.stderr.decode(errors="replace")
    if "not on whitelist" in log:
        raise UserError(
            flag,
            f"{shown(path)} is a picture, a text or another kind of file; give a sound file, such as an mp3 or wav",
        )
    if "matches no streams" in log:
        raise UserError(flag, f"{shown(path)} has no sound; give a sound file, or a video with sound")
    if run.returncode:
        raise _damaged(path, flag, bool(TRUNCATED.search(log)))
    time_base, ticks = Fraction(1), 0
    for line in run.stdout.decode().splitlines():
        if line.startswith("#tb 0:"):
            time_base = Fraction(line.split(":")[1].strip())
        elif not line.startswith("#"):
            ticks += int(line.split(",")[3])
    return float(ticks * time_base), log


def _check_whole(path: Path, flag: str, seconds: float, log: str) -> None:
    """Refuse a file that says, or whose container shows, that it once was longer than the `seconds` decoded of it."""
    declared = DURATION.search(log)
    if declared and TELLS_LENGTH.search(log) and "Estimating duration" not in log:
        hours, minutes, rest = declared.groups()
        if seconds < int(hours) * 3600 + int(minutes) * 60 + float(rest) - LENGTH_TOLERANCE:
            raise _damaged(path, flag, True)
    if TRUNCATED.search(log) or _is_cut_wav(path) or _is_cut_ogg(path):
        raise _damaged(path, flag, True)


def _damaged(path: Path, flag: str, truncated: bool) -> UserError:
    what = "truncated or damaged" if truncated else "not a sound file or damaged"
    return UserError(flag, f"{shown(path)} is {what}; give a complete sound file, such as an mp3 or wav")


def _is_cut_wav(path: Path) -> bool:
    """Whether a WAV file has less data than its header says; ffmpeg takes it as a shorter one."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        total = path.stat().st_size
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return size not in UNKNOWN_SIZE and file.tell() + size > total + WAV_SLACK
            file.seek(size + size % 2, 1)  # chunks are padded to even lengths
    return True


def _is_cut_ogg(path: Path) -> bool:
    """Whether an Ogg file's last page has lost its end; ffmpeg takes it as a shorter file."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(-min(OGG_TAIL, path.stat().st_size), 2)
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return len(page) < 27 or len(page) < 27 + page[26] + sum(segments)


def _decode(path: Path, flag: str) -> tuple[np.ndarray, int]:
    """All samples of all channels, float32 [channels, samples] with at least one, and their rate in Hz.

    They come as an AU file, the simplest one that names rate and channels.
    """
    run = _run(path, ["-map_metadata", "-1", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"])
    if run.returncode:
        raise _damaged(path, flag, False)
    if len(run.stdout) >= AU_HEADER.size:
        _, offset, _, _, rate, channels = AU_HEADER.unpack_from(run.stdout)
        samples = np.frombuffer(run.stdout, ">f4", offset=offset).astype(np.float32)
        if samples.size:
            return samples.reshape(-1, channels).T, rate
    raise UserError(flag, f"{shown(path)} has a sound track of 0 s; give a recording of speech")


def _run(path: Path, output: list[str]) -> subprocess.CompletedProcess[bytes]:
    """ffmpeg with the first sound track of `path` and the options `output`; its output and log are kept."""
    options = ["-max_error_rate", str(MAX_ERROR_RATE), *sound_input(path), "-map", "0:a:0", *output]
    return subprocess.run(ffmpeg_command(options), stdin=subprocess.DEVNULL, capture_output=True, check=False)
