"""Audio: checking it, reading it for the model, loudness, and mixing recordings.

ffmpeg decodes, so any file with a sound track can be read, and the model hears what `write_video` writes. The rest is
done by the libraries that the model was trained with, which take seconds to import.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skyreels_v3.media.ffmpeg import AUDIO, Track, find_track, input_options, read_packets, read_track, write_file
from skyreels_v3.media.files import MediaError

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz, of the model's input
MIN_SECONDS = 0.4  # one block of the loudness meter
MAX_SECONDS = 200.0
MIN_RATE, MAX_RATE = 1_000, 192_000  # Hz
LOUDNESS = -23.0  # LUFS
AUDIBLE = 10 ** ((-70 + 0.691) / 10)  # the meter's gate of -70 LUFS as a power
CANCELLED = 0.01  # share of the loudest channel's power; a mean below it means that the channels cancel out

SURROUND = re.compile(r" Hz, (?!mono|stereo|[12] channels)")  # in a track's description
LIMITER = "alimiter=limit=0.98:level=0:latency=1"  # no make-up gain, no look-ahead delay
# In floating point, where ffmpeg does not attenuate the sum to rule out clipping.
DOWNMIX = f"aformat=sample_fmts=fltp:channel_layouts=stereo,{LIMITER}"
MIX_RATE = 48_000  # Hz
# Mono (FC) goes to left and right at full level; ffmpeg's default makes it 3 dB quieter.
MIX_FORMAT = (
    f"asetpts=N/SR/TB,aresample={MIX_RATE},aformat=sample_fmts=fltp:channel_layouts=mono|stereo,"
    "pan=stereo|FL=FL+FC|FR=FR+FC"
)

# Single-track formats that state the length; a shorter track is truncated.
STATES_LENGTH = re.compile(
    r"Input #0, (?:mp3|flac|aiff|au|wv|tta|ape), from.*?Duration: (\d+):(\d+):(\d+\.\d+)", re.DOTALL
)
CUT_MP3 = "filesize and duration do not match"  # ffmpeg's warning for a file shorter than its header says
LENGTH_TOLERANCE = 0.1  # seconds; a few packets of mp3
OGG_TAIL = 1 << 17  # bytes; two Ogg pages of the maximum size
WAV_SLACK = 1024  # bytes that may be missing compared to a WAV header; a few ms at most
MAX_CHUNKS = 1000  # before the samples of a WAV file
WAV_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe
AU_HEADER = struct.Struct(">4s5I")  # ".snd", offset of the samples, their size, encoding, Hz, channels
AU_FLOAT = 6  # encoding: float32


@dataclass(frozen=True)
class AudioInfo:
    """A sound file that can be decoded.

    Attributes:
        seconds: length of the sound track used.
        notes: warnings for the user, printed after the file's name.
    """

    path: Path
    seconds: float
    notes: tuple[str, ...] = ()


def probe_audio(path: Path) -> AudioInfo:
    """Check a sound file, or the sound track of a clip, by decoding it once (0.5 s for 200 s of sound).

    Raises:
        MediaError: `path` is not a complete, decodable file with between 0.4 and 200 s of sound.
    """
    track = find_track(path, AUDIO)
    rate = re.search(r"(\d+) Hz", track.description)
    if rate and not MIN_RATE <= int(rate[1]) <= MAX_RATE:
        raise MediaError(path, f"has {rate[1]} samples per second; convert it to 48000")
    tick, packets = read_packets(track)  # hours of sound take a second
    seconds = float(sum(duration for _, duration in packets) * tick)
    notes: list[str] = []
    if seconds <= MAX_SECONDS + 1:  # packets may hold a little more than is played
        channels, sample_rate = decode(track)
        seconds = channels.shape[1] / sample_rate
        notes = [*check_complete(track, seconds), *check_audible(channels, sample_rate)]
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        remedy = "cut it" if seconds > MAX_SECONDS else "give a longer recording"
        limits = f"{MIN_SECONDS:g} to {MAX_SECONDS:g} s"
        raise MediaError(path, f"has {seconds:.3f} s of sound, but must have {limits}; {remedy}")
    return AudioInfo(path, seconds, tuple(notes))


def read_audio(path: Path) -> np.ndarray:
    """Read the sound as the model hears it: float32 [samples] in [-1, 1], 16 kHz, the mean of left and right.

    For mono and stereo WAV files this equals `librosa.load(path, sr=16000)`, except that values of float files beyond
    [-1, 1] are clipped, as in every player, with a warning. If the channels cancel each other, the loudest one is used.
    More than two are mixed to stereo first. Everything is held in memory, so call `probe_audio` first.

    Raises:
        MediaError: the sound cannot be decoded, is empty, or has samples that are not finite.
    """
    import librosa

    channels, rate = decode(find_track(path, AUDIO))
    peak = float(np.abs(channels).max())
    if peak > 1:
        logger.warning("%s: the sound peaks at %.4g times full scale and is clipped", path, peak)
        channels = channels.clip(-1, 1)
    return librosa.resample(to_mono(channels)[0], orig_sr=rate, target_sr=SAMPLE_RATE)


def normalize_loudness(samples: np.ndarray) -> np.ndarray:
    """Normalize mono 16 kHz sound, float32 [samples], to -23 LUFS; short peaks may leave [-1, 1], as in training.

    Sound without a measurable loudness is returned unchanged: silence (below the meter's gate of -70 LUFS) and anything
    shorter than the meter's block of 0.4 s.
    """
    if len(samples) < MIN_SECONDS * SAMPLE_RATE:
        return samples
    import pyloudnorm

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(samples)
    if not np.isfinite(loudness):
        return samples
    # pyloudnorm.normalize computes the same, but warns of clipping where nothing clips
    return (samples * np.float64(10) ** ((LOUDNESS - loudness) / 20)).astype(np.float32)


def mix(paths: Sequence[Path], sequential: bool, target: Path) -> Path:
    """Combine recordings into one 48 kHz stereo WAV file of 24 bits per sample.

    Args:
        paths: files that `probe_audio` has accepted.
        sequential: one after the other; otherwise all start at time 0, at their own levels, with a limiter where their
            sum would clip, and the longest one determines the length.
        target: the file to write; replaced if it exists.

    Returns:
        `target`.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    tracks = [find_track(path, AUDIO) for path in paths]
    count = len(tracks)
    joined = f"concat=n={count}:v=0:a=1" if sequential else f"amix=inputs={count}:duration=longest:normalize=0"
    graph = "".join(f"[{i}:{track.number}]{MIX_FORMAT}[s{i}];" for i, track in enumerate(tracks))
    graph += "".join(f"[s{i}]" for i in range(count)) + f"{joined},{LIMITER}[mixed]"
    inputs = [option for path in paths for option in input_options(path, AUDIO)]
    output = ["-map", "[mixed]", "-map_metadata", "-1", "-c:a", "pcm_s24le", "-ar", str(MIX_RATE), "-f", "wav", "-y"]
    write_file([*inputs, "-filter_complex", graph, *output, f"file:{target}"], "mix the recordings")
    return target


def write_audio(samples: np.ndarray, rate: int, path: Path) -> Path:
    """Write samples, float32 [channels, samples] in [-1, 1], to an AU file, which stores them unchanged."""
    header = AU_HEADER.pack(b".snd", AU_HEADER.size, samples.size * 4, AU_FLOAT, rate, len(samples))
    path.write_bytes(header + samples.T.astype(">f4").tobytes())
    return path


def downmix_filters(track: Track) -> list[str]:
    """ffmpeg filters that downmix a track with more than two channels to stereo."""
    return [DOWNMIX] if SURROUND.search(track.description) else []


def decode(track: Track) -> tuple[np.ndarray, int]:
    """Decode a track to float32 [channels, samples], one or two channels and at least one sample, and the sample rate.

    Raises:
        MediaError: the sound cannot be decoded, is empty, or has samples that are not finite.
    """
    filters = [option for name in downmix_filters(track) for option in ("-af", name)]
    limit = ["-t", str(MAX_SECONDS + 2)]  # whatever the packets say
    # AU is the simplest format that states rate and channels
    output = read_track(track, ["-map_metadata", "-1", *limit, *filters, "-c:a", "pcm_f32be", "-f", "au"])
    _, offset, _, _, rate, channels = AU_HEADER.unpack_from(output.ljust(AU_HEADER.size, b"\0"))
    if len(output) <= offset:
        raise MediaError(track.path, "has a sound track of 0 s; give a recording of speech")
    samples = np.ascontiguousarray(np.frombuffer(output, ">f4", offset=offset).reshape(-1, channels).T, np.float32)
    if not np.isfinite(samples).all():
        raise MediaError(track.path, "has samples that are not finite numbers (NaN); export the sound again")
    return samples, rate


def to_mono(channels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The mean of channels [channels, samples] and False; or, if they cancel each other, the loudest one and True."""
    mean, powers = channels.mean(axis=0), channels.var(axis=1)
    if mean.var() < CANCELLED * powers.max():
        return channels[powers.argmax()], True
    return mean, False


def check_audible(channels: np.ndarray, rate: int) -> list[str]:
    """Warnings if channels [channels, samples] are silent or cancel each other."""
    mono, cancelled = to_mono(channels)
    block = min(len(mono), round(MIN_SECONDS * rate))
    blocks = mono[: len(mono) // block * block].reshape(-1, block)
    if blocks.var(axis=1).max() < AUDIBLE:
        return ["is silent, below -70 LUFS; the lips will not move to it"]
    return ["has channels that cancel each other; the model hears only the loudest one"] if cancelled else []


def check_complete(track: Track, seconds: float) -> list[str]:
    """Raise MediaError if the header or container shows that a file was longer than the decoded `seconds`.

    Returns:
        For an MP3 file a warning instead, since cutting one between packets leaves the old length in its header.
    """
    stated = STATES_LENGTH.search(track.log)
    if stated and "Estimating duration" not in track.log:
        hours, minutes, rest = stated.groups()
        whole = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        if seconds < whole - LENGTH_TOLERANCE and CUT_MP3 in track.log:
            return [f"should be {whole:.1f} s long by its header, but holds {seconds:.1f} s; it may have been cut off"]
        if seconds < whole - LENGTH_TOLERANCE:
            raise MediaError(track.path, AUDIO.damaged)
    if is_truncated_wav(track.path) or is_truncated_ogg(track.path):
        raise MediaError(track.path, AUDIO.damaged)
    return []


def is_truncated_wav(path: Path) -> bool:
    """Whether a WAV file has less data than its header says, which ffmpeg accepts as a shorter file."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        for _ in range(MAX_CHUNKS):
            if len(head := file.read(8)) < 8:
                break
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return size not in WAV_UNKNOWN_SIZE and file.tell() + size > path.stat().st_size + WAV_SLACK
            file.seek(size + size % 2, 1)  # chunks are padded to even lengths
    return True


def is_truncated_ogg(path: Path) -> bool:
    """Whether the last page of an Ogg file is cut off, which ffmpeg accepts as a shorter file."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(-min(OGG_TAIL, path.stat().st_size), 2)
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
