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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable
from skyreels_v3.media.video import LIMITER, TRUNCATED, ffmpeg_command, run_ffmpeg, sound_input, sound_track

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # of what the model hears, in Hz
MIN_SECONDS = 0.4  # one block of the loudness meter
MAX_SECONDS = 200.0
LOUDNESS = -23.0  # LUFS
MEASURABLE = 100.0  # LUFS: a loudness further from 0 is none
# The meter's gate of -70 LUFS as a power; what never gets louder has nothing to hear.
AUDIBLE = 10 ** ((-70 + 0.691) / 10)
CANCELLED = 0.01  # of the loudest channel's power: a mean of channels that has less is not what one hears
MAX_RATE = 192_000  # Hz

MIX_RATE = 48_000  # Hz
# A lone centre channel becomes left and right at its own level; ffmpeg's own way makes it 3 dB quieter.
MIX_FORMAT = (
    f"asetpts=N/SR/TB,aresample={MIX_RATE},aformat=sample_fmts=fltp:channel_layouts=mono|stereo,"
    "pan=stereo|FL=FL+FC|FR=FR+FC"
)

MAX_ERROR_RATE = 0.1  # of the packets; a few that cannot be decoded, as players skip them, are no damage
# Formats that hold a single sound and say how long it is, so that a shorter one has lost its end or parts.
TELLS_LENGTH = re.compile(r"Input #0, (?:mp3|flac|aiff|au|wv|tta|ape), from")
DURATION = re.compile(r"Duration: (\d+):(\d+):(\d+\.\d+)")
CUT_MP3 = "filesize and duration do not match"  # said by ffmpeg of a file that is shorter than its header tells
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


def probe_audio(path: Path, flag: str, say: Callable[[str], object] = logger.warning) -> AudioInfo:
    """Look at a sound file, or at the sound track of a clip: it is decoded once, but not kept (0.5 s for 200 s).

    Args:
        say: called with what the user should know of the sound.

    Raises:
        UserError: `path` is not a whole, decodable file with between 0.4 and 200 s of sound.
    """
    check_readable(path, flag)
    track, downmix = sound_track(path)
    seconds = _packet_seconds(path, flag, track)  # reads hours of sound in a second
    notes: list[str] = []
    if seconds <= MAX_SECONDS + 1:  # packets may hold a little more than is heard
        channels, rate, log = _decode(path, flag, track, downmix)
        seconds = channels.shape[1] / rate
        notes = _check_whole(path, flag, seconds, log)
        notes += _check_heard(channels, rate)
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        remedy = "cut it" if seconds > MAX_SECONDS else "give a longer recording"
        limits = f"{MIN_SECONDS:g} to {MAX_SECONDS:g} s"
        raise UserError(flag, f"{shown(path)} has {seconds:.3f} s of sound, {limits} are possible; {remedy}")
    for note in notes:
        say(f"{shown(path)} {note}")
    return AudioInfo(path, seconds)


def read_audio(path: Path, flag: str) -> np.ndarray:
    """The sound as the model hears it: float32 [samples] in [-1, 1], 16 kHz, the mean of left and right.

    For mono and stereo WAV files these are the very samples that `librosa.load(path, sr=16000)` gives, apart from
    clipping: what float files hold beyond [-1, 1] is clipped, as every player does, with a warning. Of channels that
    cancel each other the loudest one is heard. More than two are mixed to stereo before. The length should have been
    checked by `probe_audio`: everything is held in memory.

    Raises:
        UserError: the sound cannot be decoded, is empty, or has samples that are not numbers.
    """
    import librosa

    channels, rate, _ = _decode(path, flag, *sound_track(path))
    peak = float(np.abs(channels).max())
    if peak > 1:
        logger.warning("%s: the sound peaks at %.4g times full scale and is clipped", path, peak)
        channels = channels.clip(-1, 1)
    return librosa.resample(_to_mono(channels)[0], orig_sr=rate, target_sr=SAMPLE_RATE)


def _to_mono(channels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The mean of channels [channels, samples], and False; of channels that cancel each other the loudest, and True."""
    mean, powers = channels.mean(axis=0), channels.var(axis=1)
    if mean.var() < CANCELLED * powers.max():
        return channels[powers.argmax()], True
    return mean, False


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
    graph = "".join(f"[{i}:{sound_track(path)[0]}]{MIX_FORMAT}[s{i}];" for i, path in enumerate(paths))
    graph += "".join(f"[s{i}]" for i in range(count)) + f"{joined},{LIMITER}[mixed]"
    inputs = [option for path in paths for option in sound_input(path)]
    output = ["-map", "[mixed]", "-map_metadata", "-1", "-c:a", "pcm_s24le", "-ar", str(MIX_RATE), "-f", "wav", "-y"]
    run_ffmpeg([*inputs, "-filter_complex", graph, *output, f"file:{target}"], "mix the recordings")
    return target


def _packet_seconds(path: Path, flag: str, track: str) -> float:
    """Seconds of sound of a track by the lengths of its packets, which are not decoded.

    Raises:
        UserError: no sound, or nothing that can be read.
    """
    listing = _run(path, flag, track, ["-c:a", "copy", "-f", "framecrc", "pipe:1"]).stdout.decode()
    rate = re.search(r"^#sample_rate 0: (\d+)", listing, re.MULTILINE)
    if rate and int(rate[1]) > MAX_RATE:
        raise UserError(flag, f"{shown(path)} has {rate[1]} samples a second; convert it to 48000")
    time_base, ticks = Fraction(1), 0
    for line in listing.splitlines():
        if line.startswith("#tb 0:"):
            time_base = Fraction(line.split(":")[1].strip())
        elif not line.startswith("#"):
            ticks += int(line.split(",")[3])
    if not ticks:
        raise _without_sound(path, flag)
    return float(ticks * time_base)


def _check_whole(path: Path, flag: str, seconds: float, log: str) -> list[str]:
    """Refuse a file that says, or whose container shows, that it once was longer than the `seconds` decoded of it.

    Returns:
        A note instead for an MP3 file that has been cut, as cutting between packets leaves the length in its header.
    """
    declared = DURATION.search(log)
    notes = []
    if declared and TELLS_LENGTH.search(log) and "Estimating duration" not in log:
        hours, minutes, rest = declared.groups()
        whole = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        if seconds < whole - LENGTH_TOLERANCE:
            if CUT_MP3 not in log:
                raise _damaged(path, flag, True)
            notes.append(f"was {whole:.1f} s long by its header, and holds {seconds:.1f} s; it may have been cut off")
    if TRUNCATED.search(log) or _is_cut_wav(path) or _is_cut_ogg(path):
        raise _damaged(path, flag, True)
    return notes


def _check_heard(channels: np.ndarray, rate: int) -> list[str]:
    """Notes on what the model will not hear of the channels [channels, samples]."""
    mono, cancelled = _to_mono(channels)
    block = min(len(mono), round(MIN_SECONDS * rate))
    blocks = mono[: len(mono) // block * block].reshape(-1, block)
    if blocks.var(axis=1).max() < AUDIBLE:
        return ["has nothing to hear, it is below -70 LUFS; the lips will not follow it"]
    if cancelled:
        return ["has channels that cancel each other; the model hears only the loudest one"]
    return []


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


def _without_sound(path: Path, flag: str) -> UserError:
    return UserError(flag, f"{shown(path)} has a sound track of 0 s; give a recording of speech")


def _decode(path: Path, flag: str, track: str, downmix: list[str]) -> tuple[np.ndarray, int, str]:
    """A track's samples, float32 [1 or 2 channels, samples] with at least one, their rate in Hz, and what ffmpeg said.

    They come as an AU file, the simplest one that names rate and channels.

    Raises:
        UserError: the sound cannot be decoded, is empty, or has samples that are not numbers.
    """
    filters = [option for name in downmix for option in ("-af", name)]
    longest = ["-t", str(MAX_SECONDS + 2)]  # whatever the packets have said
    options = ["-map_metadata", "-1", *longest, *filters, "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    run = _run(path, flag, track, options)
    if len(run.stdout) >= AU_HEADER.size:
        _, offset, _, _, rate, count = AU_HEADER.unpack_from(run.stdout)
        samples = np.frombuffer(run.stdout, ">f4", offset=offset).reshape(-1, count).T
        if samples.size:
            samples = np.ascontiguousarray(samples, np.float32)
            if not np.isfinite(samples).all():
                reason = f"{shown(path)} has samples that are not finite numbers (NaN)"
                raise UserError(flag, f"{reason}; export the sound again")
            return samples, rate, run.stderr.decode(errors="replace")
    raise _without_sound(path, flag)


def _run(path: Path, flag: str, track: str, output: list[str]) -> subprocess.CompletedProcess[bytes]:
    """ffmpeg with a sound track of `path` and the options `output`; its output and log are kept.

    Raises:
        UserError: it fails.
    """
    options = ["-v", "info", "-max_error_rate", str(MAX_ERROR_RATE), *sound_input(path)]
    options += ["-map", f"0:{track}", *output]
    run = subprocess.run(ffmpeg_command(options), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    log = run.stderr.decode(errors="replace")
    if "not on whitelist" in log:
        raise UserError(
            flag,
            f"{shown(path)} is a picture, a text or another kind of file; give a sound file, such as an mp3 or wav",
        )
    if "matches no streams" in log:
        raise UserError(flag, f"{shown(path)} has no sound; give a sound file, or a video with sound")
    if "Rematrix is needed" in log:
        raise UserError(flag, f"{shown(path)} has channels of unknown places; mix it to stereo first")
    if run.returncode:
        raise _damaged(path, flag, bool(TRUNCATED.search(log)))
    return run
