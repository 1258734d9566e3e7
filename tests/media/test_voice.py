"""Voices: separated from music, synthesized, detected and told apart. The sounds are synthetic, so truth is known."""

from __future__ import annotations

import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import librosa
import numpy as np
import psutil
import pytest
import soundfile
import torch

from skyreels_v3.errors import UserError
from skyreels_v3.media import voice
from skyreels_v3.media.audio import normalize_loudness, probe_audio, read_audio
from skyreels_v3.media.diarization import read_turns
from skyreels_v3.media.files import MediaError
from tests.conftest import ASSETS

RATE = 16_000


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but does not stop pytest."""


needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def music(seconds: float) -> np.ndarray:
    """Chords with a beat."""
    times = np.arange(round(seconds * RATE)) / RATE
    chord = sum(np.sin(2 * np.pi * hertz * times) for hertz in (220, 277.2, 329.6, 440))
    return (0.05 * chord * (1 + np.sign(np.sin(4 * np.pi * times)))).astype(np.float32)


# speech activity


@pytest.mark.parametrize("noise", ["silence", "hiss", "music"])
def test_silence_between_the_words(noise: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sound before, between and after two sentences is muted, the sentences are unchanged."""
    pytest.importorskip("silero_vad")
    sentence = normalize_loudness(read_audio(ASSETS / "speech.mp3"))  # 5.42 s, of which the last 0.25 are silent
    speech = np.concatenate((silence(1.0), sentence, silence(1.5), sentence, silence(1.0)))
    hiss = np.random.default_rng(0).normal(0, 0.01, len(speech)).astype(np.float32)
    noises = {"silence": 0 * speech, "hiss": hiss, "music": 0.2 * music(len(speech) / RATE)}[noise]
    threads = torch.get_num_threads()
    heard = voice.keep_speech(speech + noises)
    assert torch.get_num_threads() == threads  # the package changes it
    times = np.arange(len(speech)) / RATE
    for begin, end in ((0, 0.8), (6.5, 7.7), (13.4, 14.4)):
        assert not heard[(times >= begin) & (times < end)].any()
    kept = heard != 0
    assert np.array_equal(heard[kept], (speech + noises)[kept])
    assert np.square(heard).sum() > 0.999 * np.square(speech).sum()
    assert not caplog.records or caplog.records[0].levelname == "INFO"
    assert not voice.keep_speech(noises).any()
    assert "there is no speech in 14.3 s of sound" in caplog.records[-1].message


# vocal separation

STAND_IN = '''
"""As audio-separator's command line is documented; its "model" is a recording of the music."""
import argparse, json, os, shutil, sys
import soundfile

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("audio_files", nargs="*")
    for name in ("output_dir", "output_format", "single_stem", "model_file_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--custom_output_names", type=json.loads, required=True)
    args = parser.parse_args()
    assert shutil.which("ffmpeg") and args.output_format == "WAV" and len(args.audio_files) == 1
    model = os.path.join(args.model_file_dir, "music.wav")
    if not os.path.isfile(model):
        print("cannot download the model", file=sys.stderr)
        sys.exit(1)
    sound, rate = soundfile.read(args.audio_files[0])
    name = args.custom_output_names[args.single_stem]
    soundfile.write(os.path.join(args.output_dir, f"{name}.wav"), sound - soundfile.read(model)[0][: len(sound)], rate)
'''


@pytest.fixture
def separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a stand-in for audio-separator; returns the folder of its models."""
    packages = tmp_path / "packages"
    (packages / "audio_separator" / "utils").mkdir(parents=True)
    (packages / "audio_separator" / "utils" / "cli.py").write_text(STAND_IN)
    (packages / "onnxruntime.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.syspath_prepend(str(packages))
    return tmp_path / "models"


def test_a_voice_without_its_music(separator: Path, tmp_path: Path) -> None:
    speech = read_audio(ASSETS / "speech.mp3")
    both = np.stack([speech + music(len(speech) / RATE)] * 2, axis=1)
    soundfile.write(tmp_path / "song.flac", librosa.resample(both, orig_sr=RATE, target_sr=48_000, axis=0), 48_000)
    voice.check_separable()
    with pytest.raises(UserError, match=r"--vocals: audio-separator fails \(cannot download the model\); give"):
        voice.read_vocals(tmp_path / "song.flac", separator)
    separator.mkdir()
    background = librosa.resample(np.stack([music(6.0)] * 2, axis=1), orig_sr=RATE, target_sr=48_000, axis=0)
    soundfile.write(separator / "music.wav", background, 48_000, subtype="FLOAT")
    heard = voice.read_vocals(tmp_path / "song.flac", separator)
    assert heard.dtype == np.float32 and len(heard) == len(speech)
    inner = slice(800, -800)
    assert np.corrcoef(heard[inner], speech[inner])[0, 1] > 0.999
    assert np.corrcoef(read_audio(tmp_path / "song.flac")[inner], speech[inner])[0, 1] < 0.9


# speech synthesis


@needs_espeak
def test_a_text_is_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("skyreels_v3.media.voice.has_packages", lambda *names: False)  # no kokoro
    text = "-w /tmp/x --version; $(reboot)\nThe boat sails on into the dusk."
    path = voice.speak(text, None, tmp_path)
    assert caplog.records[0].message.startswith("espeak-ng speaks the text")
    assert 3 < probe_audio(path).seconds < 15 and np.abs(read_audio(path)).max() > 0.1
    before = path.stat().st_mtime_ns
    assert voice.speak(text, None, tmp_path) == path and path.stat().st_mtime_ns == before  # from the cache
    slow = voice.speak("Guten Tag", "de", tmp_path)
    assert slow != path and 0.5 < probe_audio(slow).seconds < 3
    with pytest.raises(UserError, match=r"--voice: espeak-ng fails \(Error: .*voice does not exist.*\); give one"):
        voice.speak("hello", "af_heart", tmp_path)
    assert {*tmp_path.iterdir()} == {path, slow}


def test_kokoro_speaks_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with kokoro's command line, which records how it was called."""
    package = tmp_path / "packages" / "kokoro"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import argparse, sys\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--voice', '-m')\n"
        "parser.add_argument('--output-file', '-o', required=True)\n"
        "args = parser.parse_args()\n"
        "open(args.output_file, 'w', encoding='utf-8').write(args.voice + sys.stdin.read())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))
    voice.check_speakable()
    assert voice.speak("Gr\u00fc\u00dfe", "bf_emma", tmp_path).read_text("utf-8") == "bf_emmaGr\u00fc\u00dfe"
    assert voice.speak("hello", None, tmp_path).read_text("utf-8") == "af_hearthello"


@pytest.mark.parametrize(("end", "error"), [("exit 1", UserError), ("kill -9 $$", UserError), ("wait", Interrupted)])
def test_what_a_program_has_started_ends_with_it(tmp_path: Path, end: str, error: type[BaseException]) -> None:
    """Also when the program itself has exited or was killed: what it left running is not waited for."""
    file = tmp_path / "pid"

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(error):
            voice.run_program(["sh", "-c", f"sleep 60 & echo $! >{file}; {end}"], "--text", "it fails", "leave it out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with suppress(psutil.NoSuchProcess):
        started, end_by = psutil.Process(int(file.read_text())), time.monotonic() + 5
        while started.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end_by
            time.sleep(0.01)


# speakers

TURNS = """;; made by hand
SPKR-INFO talk 1 <NA> <NA> <NA> unknown bob <NA> <NA>
SPEAKER talk 1 2.0 0.5 <NA> <NA> anna <NA> <NA>
SPEAKER talk 1 0.50 1.0 <NA> <NA> bob <NA> <NA>

SPEAKER talk 1 3.0 9.0 <NA> <NA> anna <NA>
SPEAKER talk 1 2.25 0.5 <NA> <NA> bob <NA> <NA>
"""


def test_turns_of_two_speakers(tmp_path: Path) -> None:
    (tmp_path / "a.rttm").write_text(TURNS)
    turns = read_turns(tmp_path / "a.rttm", 2, 4.0)
    assert turns == ([(0.5, 1.5), (2.25, 2.75)], [(2.0, 2.5), (3.0, 4.0)])  # bob speaks first; cut at the end
    sound = np.ones(4 * RATE, np.float32)
    times = np.arange(len(sound)) / RATE
    bob, anna = (voice.keep_spans(sound, spans) for spans in turns)
    assert np.array_equal(bob, ((times >= 0.5) & (times < 1.5)) | ((times >= 2.25) & (times < 2.75)))
    assert np.array_equal(anna, ((times >= 2.0) & (times < 2.5)) | (times >= 3.0))


GOOD = "SPEAKER a 1 0 1 <NA> <NA> x <NA> <NA>\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has 0 speakers; give a file with 2"),
        (GOOD, r"has 1 speaker \(x\); give a file with 2"),
        (GOOD + GOOD.replace(" x ", " y ") + GOOD.replace(" x ", " z "), r"has 3 speakers \(x, y, z\)"),
        (GOOD + "SPEAKER a 1 0 1 x\n", "line 2 is not SPEAKER and 8 or 9 more fields"),
        ("LEXEME a 1 0 1 <NA> <NA> x <NA> <NA>", "line 1 is not SPEAKER"),
        (GOOD + "\n" + GOOD.replace(" 0 1 ", " nan 1 "), "line 3 has no valid beginning or length"),
        *(
            (GOOD.replace(" 0 1 ", times), "line 1 has no valid beginning")
            for times in (" 0 inf ", " -1 2 ", " 0 0 ", " x 1 ")
        ),
        (GOOD.replace(" 0 1 ", " 4 1 "), "line 1 begins at 4 s, but the sound is 4.00 s long"),
        (GOOD + GOOD.replace(" a ", " b "), "line 2 names another recording"),
        (b"\xff\xfe\0", "is not a text"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "line 1 is not SPEAKER"),
        (b"\n" * ((1 << 20) + 1), "is larger than 1 MiB"),
    ],
)
def test_bad_turns(tmp_path: Path, content: str | bytes, problem: str) -> None:
    (tmp_path / "a.rttm").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MediaError, match=problem) as error:
        read_turns(tmp_path / "a.rttm", 2, 4.0)
    assert str(error.value).isprintable()
