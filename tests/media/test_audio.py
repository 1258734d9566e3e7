"""Audio of any format is read as librosa reads it, normalized in loudness as for training, and can be joined."""

from __future__ import annotations

import logging
import os
import re
import warnings
import wave
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import pyloudnorm
import pytest
import soundfile
from PIL import Image
from safetensors.numpy import load_file

from skyreels_v3.media.audio import AudioInfo, mix, normalize_loudness, probe_audio, read_audio
from skyreels_v3.media.files import MediaError
from tests.media.clips import check_refused, cut, ffmpeg, write

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE = ROOT / "tests" / "data" / "reference" / "wav2vec2"
SPEECH = REFERENCE / "speech_16k_2s.wav"
RECORDINGS = ["speech_16k_2s", "speech_22k_1p3s"]
PICTURE = ["-f", "lavfi", "-i", "color=s=32x32:r=25:d=2"]


refused = partial(check_refused, probe_audio)


def save(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> Path:
    """Write [samples] or [samples, channels] with libsndfile."""
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    length = min(len(a), len(b))
    return float(np.corrcoef(a[:length], b[:length])[0, 1])


# reading


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_read_as_librosa_reads_them(name: str) -> None:
    samples = read_audio(REFERENCE / f"{name}.wav")
    expected = librosa.load(REFERENCE / f"{name}.wav", sr=16_000)[0]
    assert samples.dtype == np.float32
    assert samples.shape == expected.shape
    assert np.abs(samples - expected).max() <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (48_000, 2)])
def test_wav_files_are_read_as_librosa_reads_them(tmp_path: Path, subtype: str, rate: int, channels: int) -> None:
    levels = np.random.default_rng(0).uniform(-0.9, 0.9, (rate, channels))
    path = save(tmp_path / "a.wav", levels, rate, subtype)
    samples, expected = read_audio(path), librosa.load(path, sr=16_000)[0]
    assert samples.shape == expected.shape == (16_000,)
    assert np.abs(samples - expected).max() <= 1e-7
    assert probe_audio(path) == AudioInfo(path, 1.0)


@pytest.mark.parametrize("name, codec", [("a.flac", "flac"), ("a.m4a", "alac"), ("a.aiff", "pcm_s16be")])
def test_lossless_formats(tmp_path: Path, name: str, codec: str) -> None:
    ffmpeg("-i", SPEECH, "-c:a", codec, tmp_path / name)
    assert np.abs(read_audio(tmp_path / name) - read_audio(SPEECH)).max() <= 1e-7
    assert probe_audio(tmp_path / name).seconds == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (48_000, 2)])
@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.ogg", "a.opus", "a.mka", "a.mp4", "a.mkv", "a.webm", "a.mov"])
def test_lossy_formats_and_sound_tracks(tmp_path: Path, name: str, rate: int, channels: int) -> None:
    picture = PICTURE if name.endswith(("mp4", "mkv", "webm", "mov")) else []
    speed = ["-deadline", "realtime"] if name.endswith("webm") else []
    ffmpeg(*picture, "-i", SPEECH, "-ar", rate, "-ac", channels, "-b:a", "96k", *speed, tmp_path / name)
    samples = read_audio(tmp_path / name)
    assert correlation(samples, read_audio(SPEECH)) > 0.99
    seconds = probe_audio(tmp_path / name).seconds
    assert seconds == pytest.approx(2.0, abs=0.05)
    assert len(samples) == pytest.approx(seconds * 16_000, abs=1)


def test_mp3_with_a_cover(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / "cover.jpg")
    ffmpeg("-i", SPEECH, "-i", tmp_path / "cover.jpg", "-map", 0, "-map", 1, "-c:v", "copy", tmp_path / "a.mp3")
    assert probe_audio(tmp_path / "a.mp3").seconds == pytest.approx(2.0)


def test_late_sound_track_begins_at_its_first_sample(tmp_path: Path) -> None:
    ffmpeg(*PICTURE, "-itsoffset", 0.7, "-i", SPEECH, "-c:a", "flac", tmp_path / "a.mkv")
    assert np.abs(read_audio(tmp_path / "a.mkv") - read_audio(SPEECH)).max() <= 1e-7
    assert probe_audio(tmp_path / "a.mkv").seconds == pytest.approx(2.0)


def test_wav_of_unknown_length(tmp_path: Path) -> None:
    """As written by programs that output to a pipe and cannot go back to fill in the header."""
    content = bytearray(SPEECH.read_bytes())
    for size in (0, 0xFFFFFFFF):
        content[40:44] = size.to_bytes(4, "little")
        (tmp_path / "a.wav").write_bytes(content)
        assert probe_audio(tmp_path / "a.wav").seconds == 2.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    levels = tone(1.0)
    levels[500] = value
    path = save(tmp_path / "a.wav", levels, subtype="FLOAT")
    for read in (probe_audio, read_audio):
        check_refused(read, path, "has samples that are not finite", "export")


def test_clipping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a.wav", tone(1.0, level=2.0), subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        samples = read_audio(path)
    assert np.abs(samples - tone(1.0, level=2.0).clip(-1, 1)).max() < 1e-6
    assert re.search(r"a\.wav: the sound peaks at 2 times full scale and is clipped", caplog.text)
    caplog.clear()
    read_audio(save(tmp_path / "b.wav", tone(1.0, level=1.0), subtype="FLOAT"))
    assert not caplog.records


def in_5_1(**channels: np.ndarray) -> np.ndarray:
    """[samples, 6] in the channel order of WAV files; omitted channels are silent."""
    silent = np.zeros_like(next(iter(channels.values())))
    return np.stack([channels.get(name, silent) for name in ("FL", "FR", "FC", "LFE", "BL", "BR")], 1)


def test_surround_is_mixed_to_stereo(tmp_path: Path) -> None:
    """As in ITU-R BS.775, at the same level and without the LFE channel."""
    names = ("FL", "FR", "FC", "LFE", "BL", "BR")
    levels = {name: tone(1.0, hertz=200 + 100 * i, level=0.1) for i, name in enumerate(names)}
    samples = read_audio(save(tmp_path / "a.wav", in_5_1(**levels), subtype="FLOAT"))
    sides = [levels[a] + np.sqrt(0.5) * (levels["FC"] + levels[b]) for a, b in (("FL", "BL"), ("FR", "BR"))]
    assert np.abs(samples - np.mean(sides, 0))[100:-100].max() < 1e-4


def loudness(path: Path) -> float:
    """LUFS as measured by ffmpeg."""
    log = ffmpeg("-i", path, "-af", "ebur128=framelog=quiet", "-f", "null", "-").stderr.decode()
    return float(re.findall(r"I: +(-?[\d.]+) LUFS", log)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["FL", "FC"])
def test_surround_keeps_its_loudness(tmp_path: Path, channel: str) -> None:
    path = save(tmp_path / "a.wav", in_5_1(**{channel: tone(2.0, 48_000, level=0.3)}), 48_000)
    video = write(np.zeros((50, 64, 96, 3), np.uint8), tmp_path / "a.mp4", 25, audio=path)
    mixed = mix([path], True, tmp_path / "mixed.wav")
    assert [loudness(video), loudness(mixed)] == pytest.approx([loudness(path)] * 2, abs=0.3)


def test_loud_surround_is_limited(tmp_path: Path) -> None:
    loud = tone(1.0, 48_000, level=0.9)
    samples = read_audio(save(tmp_path / "a.wav", in_5_1(FL=loud, FR=loud, FC=loud), 48_000))
    assert 0.9 < np.abs(samples).max() < 1


def test_default_track_is_heard(tmp_path: Path) -> None:
    other = save(tmp_path / "other.wav", 0.1 * tone(2.0))
    tracks = ["-i", other, "-i", SPEECH, "-map", 0, "-map", 1, "-c:a", "flac"]
    ffmpeg(*tracks, "-disposition:a:0", 0, "-disposition:a:1", "default", tmp_path / "a.mka")
    assert np.abs(read_audio(tmp_path / "a.mka") - read_audio(SPEECH)).max() <= 1e-7
    target = mix([tmp_path / "a.mka"], True, tmp_path / "mixed.wav")
    assert correlation(read_audio(target), read_audio(SPEECH)) > 0.99
    video = write(np.zeros((50, 64, 96, 3), np.uint8), tmp_path / "a.mp4", 25, audio=tmp_path / "a.mka")
    assert correlation(read_audio(video), read_audio(SPEECH)) > 0.99


# probing


def test_nothing_to_hear_is_said(tmp_path: Path) -> None:
    note = "is silent, below -70 LUFS; the lips will not move to it"
    assert probe_audio(save(tmp_path / "a.wav", np.zeros(16_000))).notes == (note,)
    assert probe_audio(save(tmp_path / "b.wav", np.full(16_000, 0.5))).notes == (note,)  # constant: only DC
    # one second of a tone, 2 dB below and above the gate, in ten seconds of silence; the meter's filter is flat here
    for level, notes in ((-72, (note,)), (-68, ())):
        quiet = np.zeros(160_000)
        quiet[60_000:76_000] = tone(1.0, hertz=997, level=10 ** (level / 20) * np.sqrt(2))
        assert probe_audio(save(tmp_path / "c.wav", quiet, subtype="FLOAT")).notes == notes


def test_channels_that_cancel_are_said_and_heard(tmp_path: Path) -> None:
    speech = soundfile.read(SPEECH)[0]
    path = save(tmp_path / "a.wav", np.stack([-0.99 * speech, speech], 1), subtype="FLOAT")
    assert probe_audio(path).notes == ("has channels that cancel each other; the model hears only the loudest one",)
    assert np.abs(read_audio(path) - read_audio(SPEECH)).max() <= 1e-7
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 16_000))
    for left, right in (noise, (noise[0], 0 * noise[0]), (noise[0], noise[1] - 0.5 * noise[0])):
        assert not probe_audio(save(tmp_path / "b.wav", np.stack([left, right], 1))).notes


@pytest.mark.parametrize("options", [["-b:a", "64k"], ["-q:a", 4]])
def test_cut_mp3_is_said(tmp_path: Path, options: list[object]) -> None:
    """Tools that cut between packets leave the old length in the header, and players ignore it."""
    save(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 80_000))
    ffmpeg("-i", tmp_path / "noise.wav", *options, tmp_path / "a.mp3")
    (note,) = probe_audio(cut(tmp_path / "a.mp3", 0.6)).notes
    assert re.fullmatch(r"should be 5\.\d s long by its header, but holds [23]\.\d s; it may have been cut off", note)


def test_many_channels(tmp_path: Path) -> None:
    """More channels than a layout has speakers are refused, others are mixed to stereo."""
    refused(save(tmp_path / "a.wav", np.zeros((16_000, 64))), "unknown channel layout", "stereo")
    ffmpeg("-i", SPEECH, "-af", "pan=7.1.4|FC=c0", "-c:a", "pcm_f32le", tmp_path / "b.wav")
    assert correlation(read_audio(tmp_path / "b.wav"), read_audio(SPEECH)) > 0.99


def test_extreme_rates(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.wav", tone(1.0, 400_000), 400_000), "400000 samples per second", "48000")


def test_not_sound(tmp_path: Path) -> None:
    for name in ("notes.txt", "text.mp3", "text.wav", "text.m4a", "text.aac"):
        (tmp_path / name).write_text("hello world\n" * 500)
        refused(tmp_path / name, "give a")
    for name, content in {
        "list.m3u8": f"#EXTM3U\n#EXTINF:2,\nfile://{SPEECH}\n#EXT-X-ENDLIST\n",
        "list.txt": f"ffconcat version 1.0\nfile '{SPEECH}'\n",
    }.items():
        (tmp_path / name).write_text(content)
        refused(tmp_path / name, "sound file")
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(50_000))
    refused(tmp_path / "noise.mp3", "damaged or not a sound file", "give a")
    for name in ("still.png", "still.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
        refused(tmp_path / name, "picture", "give a sound file")
    ffmpeg(*PICTURE, tmp_path / "mute.mp4")
    refused(tmp_path / "mute.mp4", "has no sound", "a video with sound")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.m4a", "a.mp3", "a.ogg"])
def test_zero_length(tmp_path: Path, name: str) -> None:
    ffmpeg("-i", SPEECH, "-t", 0, tmp_path / name)
    refused(tmp_path / name, "give a")
    check_refused(read_audio, tmp_path / name, "give a")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.wav", []),
        ("a.flac", []),
        ("a.m4a", []),
        ("fast.m4a", ["-movflags", "+faststart"]),
        ("a.ogg", []),
        ("a.opus", []),
        ("a.mka", []),
        ("a.aiff", []),
    ],
)
def test_truncated(tmp_path: Path, name: str, options: list[object], kept: float) -> None:
    save(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 80_000))
    ffmpeg("-i", tmp_path / "noise.wav", *options, tmp_path / name)
    assert probe_audio(tmp_path / name).seconds == pytest.approx(5.0, abs=0.05)
    refused(cut(tmp_path / name, kept), "damaged", "give a complete sound file")


@pytest.mark.parametrize("name", ["a.m4a", "a.mp3", "a.flac"])
def test_overwritten_with_zeros(tmp_path: Path, name: str) -> None:
    ffmpeg("-i", SPEECH, "-movflags", "+faststart", tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    begin = max(len(content) // 3, content.find(b"mdat") + 4)
    content[begin:] = bytes(len(content) - begin)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "damaged")


@pytest.mark.slow
def test_limits(tmp_path: Path) -> None:
    for samples in (6_400, 3_200_000):
        assert probe_audio(save(tmp_path / "a.wav", np.zeros(samples))).seconds == samples / 16_000
    refused(save(tmp_path / "short.wav", np.zeros(6_384)), "has 0.399 s", "0.4 to 200 s", "give a longer")
    refused(save(tmp_path / "long.wav", np.zeros(3_200_016)), "has 200.001 s", "0.4 to 200 s", "cut it")
    ffmpeg("-f", "lavfi", "-i", "sine=r=16000:d=300", "-b:a", "32k", tmp_path / "long.mp3")
    refused(tmp_path / "long.mp3", "has 300.", "cut it")


@pytest.mark.slow
def test_probe_is_fast(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=r=44100:d=200", "-ac", 2, "-q:a", 6, tmp_path / "a.mp3")
    begin = sum(os.times()[:4])  # CPU time: the machine may be busy
    assert probe_audio(tmp_path / "a.mp3").seconds == pytest.approx(200.0)
    assert sum(os.times()[:4]) - begin < 1.5


# loudness


@pytest.mark.parametrize("name", RECORDINGS)
def test_loudness_as_recorded(name: str) -> None:
    expected = load_file(REFERENCE / "cases.safetensors")[f"{name}.normalised"]
    samples = normalize_loudness(read_audio(REFERENCE / f"{name}.wav"))
    assert samples.dtype == np.float32
    assert np.abs(samples - expected).max() <= 1e-6


@pytest.mark.parametrize("seconds, level", [(0.4, 0.01), (0.4, 0.9), (5.0, 0.002), (5.0, 0.9)])
def test_loudness_is_reached(seconds: float, level: float) -> None:
    samples = normalize_loudness(tone(seconds, level=level).astype(np.float32))
    assert pyloudnorm.Meter(16_000).integrated_loudness(samples) == pytest.approx(-23, abs=0.01)


def test_unmeasurable_loudness_is_left_alone() -> None:
    silence = np.zeros(16_000, np.float32)
    murmur = (1e-5 * tone(1.0)).astype(np.float32)
    short = tone(0.399).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (silence, murmur, short, silence[:0]):
            assert np.array_equal(normalize_loudness(samples), samples)


def test_loud_peaks_are_kept_without_a_warning() -> None:
    samples = (1e-3 * tone(3.0)).astype(np.float32)
    samples[20_000] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        louder = normalize_loudness(samples)
    assert louder[20_000] > 1
    assert louder[20_000] / 0.9 == pytest.approx(float(louder[5] / samples[5]), rel=1e-5)


# joining two recordings


def test_mix_parallel(tmp_path: Path) -> None:
    a = save(tmp_path / "a.wav", tone(2.0, hertz=440, level=0.4))
    b = save(tmp_path / "b.wav", np.stack([tone(1.0, 44_100, 1000, 0.3)] * 2, 1), 44_100)
    target = mix([a, b], False, tmp_path / "mixed.wav")
    assert target == tmp_path / "mixed.wav"
    samples, rate = soundfile.read(target)
    assert (rate, samples.shape) == (48_000, (96_000, 2))
    assert np.abs(samples[:, 0] - samples[:, 1]).max() < 1e-6
    inner = slice(500, 47_500)  # away from the ends, where resampling rings
    expected = tone(2.0, 48_000, 440, 0.4)
    expected[:48_000] += tone(1.0, 48_000, 1000, 0.3)
    assert np.abs(samples[inner, 0] - expected[inner]).max() < 1e-3
    assert np.abs(samples[48_500:95_500, 0] - expected[48_500:95_500]).max() < 1e-3


def test_mix_sequential(tmp_path: Path) -> None:
    a = save(tmp_path / "a.wav", tone(1.0, hertz=440, level=0.4))
    b = save(tmp_path / "b.wav", tone(1.5, 48_000, 1000, 0.3), 48_000)
    for paths, parts in {
        (a, b): ((1.0, 440, 0.4), (1.5, 1000, 0.3)),
        (b, a): ((1.5, 1000, 0.3), (1.0, 440, 0.4)),
    }.items():
        samples = soundfile.read(mix(paths, True, tmp_path / "mixed.wav"))[0]
        assert samples.shape == (120_000, 2)
        expected = np.concatenate([tone(seconds, 48_000, hertz, level) for seconds, hertz, level in parts])
        seam = round(parts[0][0] * 48_000)
        for inner in (slice(500, seam - 500), slice(seam + 500, 119_500)):
            assert np.abs(samples[inner] - expected[inner, None]).max() < 1e-3


def test_loud_mix_is_limited_not_clipped(tmp_path: Path) -> None:
    a = save(tmp_path / "a.wav", tone(2.0, 48_000, 440, 0.9), 48_000)
    samples = soundfile.read(mix([a, a], False, tmp_path / "mixed.wav"))[0][:, 0]
    assert 0.9 < np.abs(samples).max() < 0.999
    spectrum = np.abs(np.fft.rfft(samples[24_000:72_000] * np.hanning(48_000)))
    assert spectrum[1300:1340].max() < 0.03 * spectrum[430:450].max()  # a clipped sine has a third harmonic of 25 %


def test_a_flood_of_packets_is_refused(tmp_path: Path) -> None:
    """Three million one-byte packets, which would take half a minute and a gigabyte to list."""
    path = tmp_path / "a.amr"
    path.write_bytes(b"#!AMR\n" + b"\x7c" * 3_000_000)
    with pytest.raises(MediaError, match="has more than 500,000 packets; cut it"):
        probe_audio(path)


@pytest.mark.parametrize("rate", [1, 999])
def test_a_rate_too_low_to_hear(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(b"\1\0" * rate * 2)
    with pytest.raises(MediaError, match=f"has {rate} samples per second"):
        probe_audio(path)
