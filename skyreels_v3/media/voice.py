"""Voices: separating them from music, speaking a text, and silencing what is not speech.

All of this is done by optional packages and programs. Those that separate and speak run in their own processes: they
change process-wide settings, and their memory is freed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.media.audio import SAMPLE_RATE, mix, read_audio
from skyreels_v3.media.ffmpeg import log_end
from skyreels_v3.packages import check_packages, has_packages
from skyreels_v3.subprocesses import program

logger = logging.getLogger(__name__)

Spans = Sequence[tuple[float, float]]  # begin and end in seconds

SPEECH_MARGIN = 0.1  # seconds kept around speech: lips open before they are heard
PYTHON = (sys.executable, "-P")  # does not import from the current folder
SEPARATOR = ("audio_separator", "onnxruntime")
SEPARATE = "from audio_separator.utils.cli import main; main()"
VOCALS = "vocals"  # name of audio-separator's output
KOKORO, ESPEAK = "kokoro", "espeak-ng"
KOKORO_VOICE = "af_heart"  # an American one
LIST_OF = {ESPEAK: f", see {ESPEAK} --voices"}


def check_speakable() -> None:
    """Raise UserError if no text-to-speech program is installed."""
    if not has_packages(KOKORO) and shutil.which(ESPEAK) is None:
        remedy = f"pip install {KOKORO}, install {ESPEAK}, or give a recording as --input_audio"
        raise UserError("--text", f"needs the package {KOKORO}; {remedy}")


def check_separable() -> None:
    """Raise UserError if no package that separates voices from music is installed."""
    check_packages("--vocals", "audio-separator[cpu]", *SEPARATOR)


def check_detectable() -> None:
    """Raise UserError if no package that detects speech is installed."""
    check_packages("--speech_only", "silero-vad", "silero_vad")


def keep_spans(samples: np.ndarray, spans: Spans) -> np.ndarray:
    """16 kHz sound [samples], silenced outside of `spans`."""
    kept = np.zeros_like(samples)
    for span in spans:
        part = slice(*(round(time * SAMPLE_RATE) for time in span))
        kept[part] = samples[part]
    return kept


def keep_speech(samples: np.ndarray) -> np.ndarray:
    """16 kHz sound [samples], silenced where nobody speaks."""
    spans = find_speech(samples)
    seconds, heard = len(samples) / SAMPLE_RATE, sum(end - begin for begin, end in spans)
    if spans:
        logger.info("speech in %.1f of %.1f s of sound; the model hears silence in the rest", heard, seconds)
    else:
        logger.warning("--speech_only: there is no speech in %.1f s of sound; the mouth stays closed", seconds)
    return keep_spans(samples, spans)


def find_speech(samples: np.ndarray) -> Spans:
    """Find the spans of speech in 16 kHz sound [samples] with silero-vad."""
    import torch

    threads = torch.get_num_threads()
    import silero_vad  # sets it to 1

    torch.set_num_threads(threads)
    model, margin = silero_vad.load_silero_vad(), round(1000 * SPEECH_MARGIN)
    found = silero_vad.get_speech_timestamps(torch.from_numpy(samples), model, speech_pad_ms=margin)
    return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in found]


def read_vocals(path: Path, models: Path) -> np.ndarray:
    """Extract the voice from a recording with music, by audio-separator; the result is as from `read_audio`.

    Args:
        models: the folder to download its model to, unless AUDIO_SEPARATOR_MODEL_DIR names one.

    Raises:
        UserError: it fails, for example because its model cannot be downloaded.
    """
    logger.info("separating the voice from the music with audio-separator")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ffmpeg").symlink_to(get_ffmpeg_exe())  # it looks for this name
        mixture = mix([path], True, folder / "mixture.wav")
        output = ["--output_dir", name, "--output_format", "WAV", "--single_stem", "Vocals"]
        output += ["--custom_output_names", json.dumps({"Vocals": VOCALS})]
        command = [*PYTHON, "-c", SEPARATE, str(mixture), *output]
        command += ["--model_file_dir", str(models)]
        programs = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
        run_program(command, "--vocals", "audio-separator fails", "give a recording without music", PATH=programs)
        return read_audio(folder / f"{VOCALS}.wav")


def speak(text: str, voice: str | None, folder: Path) -> Path:
    """Speak a text with kokoro, or else espeak-ng; returns a file in `folder`, reused if it exists.

    Raises:
        UserError: it fails, for example because there is no such voice.
    """
    target = folder / f"speech-{hashlib.sha256(json.dumps([text, voice]).encode()).hexdigest()[:16]}.wav"
    if target.is_file():
        return target
    made = target.with_suffix(".unfinished.wav")
    if has_packages(KOKORO):
        program = KOKORO
        command = [*PYTHON, "-m", KOKORO, "--voice", voice or KOKORO_VOICE, "--output-file", str(made)]
    else:
        program = ESPEAK
        logger.warning("%s speaks the text in a robotic voice; pip install %s for a natural one", ESPEAK, KOKORO)
        command = [ESPEAK, *(("-v", voice) if voice else ()), "-b", "1", "--stdin", "-w", str(made)]
    flag, remedy = (
        ("--voice", f"give one that it has{LIST_OF.get(program, '')}")
        if voice
        else ("--text", "give --input_audio instead")
    )
    run_program(command, flag, f"{program} fails", remedy, text, PYTHONUTF8="1")
    if not made.is_file():
        raise UserError(flag, f"{program} makes no sound from it; {remedy}")
    return made.rename(target)


def run_program(
    command: Sequence[str], flag: str, problem: str, remedy: str, text: str = "", **environment: str
) -> None:
    """Run a program with `text` on its standard input; an exception kills it.

    Processes that it leaves behind are killed as well.

    Raises:
        UserError: it fails; says `problem`, the end of its log and `remedy`.
    """
    with tempfile.TemporaryFile() as log:  # not a pipe: processes left behind may hold its other end
        streams = {"stdin": PIPE, "stdout": DEVNULL, "stderr": log}
        with program(command, env=os.environ | environment, **streams) as process:
            process.communicate(text.encode())
        if process.returncode:
            raise UserError(flag, f"{problem} ({format_value(log_end(log))}); {remedy}")
