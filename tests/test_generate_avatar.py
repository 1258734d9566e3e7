"""Talking avatars from the command line with the toy model: picture and sound, two speakers, a folder of PNGs."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from skyreels_v3 import load
from skyreels_v3.api import Frame
from skyreels_v3.media.audio import probe_audio, read_audio
from skyreels_v3.media.video_reader import probe_video
from tests.conftest import ASSETS, files_in, write_tone
from training import world
from training.measure import lip_sync, mouth_openings
from training.run import HELD_OUT
from training.sound import RATE, mouth_of

SMALL = ("--device", "cpu", "--height", "32", "--width", "32", "--num_inference_steps", "1", "--model_id", "tiny")
AVATAR = ("--task_type", "talking_avatar", "--prompt", "a", "--input_image", ASSETS / "portrait.png", *SMALL)
FRAME = 1 / 25
EXPERIMENTAL = "experimental: the published weights are said to be trained on one speaker and a portrait"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The pipeline's warnings."""
    return [record.message for record in caplog.records if record.name.endswith("avatar")]


def sound_of(path: Path) -> str:
    """ffmpeg's description of a file's sound."""
    log = subprocess.run([get_ffmpeg_exe(), "-i", path], capture_output=True, text=True, check=False).stderr
    return next(line for line in log.splitlines() if "Audio:" in line)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "rate", "frames"), [(0.5, 22050, 13), (1.01, 48000, 26), (3.5, 44100, 88)])
def test_picture_and_sound_are_as_long(main, tmp_path, seconds, rate, frames):
    sound = write_tone(tmp_path / "sound.wav", seconds, rate)
    code, stdout, stderr = main(*AVATAR, "--input_audio", sound, "--output", "a.mp4")
    assert (code, stdout) == (0, "a.mp4\n"), stderr
    bars = dict(re.findall(r"^(\w[\w /]+): +(\d+%)", stderr, re.MULTILINE))  # how far each bar got
    assert {"loading", "decoding"} < bars.keys()
    assert {*bars.values()} == {"100%"}
    made = probe_video(tmp_path / "a.mp4", 25)
    assert (made.frames, made.width, made.height) == (frames, 32, 32)
    assert abs(probe_audio(tmp_path / "a.mp4").seconds - made.seconds) < FRAME
    assert f"aac (LC) (mp4a / 0x6134706D), {rate} Hz, mono" in sound_of(tmp_path / "a.mp4")
    assert files_in(tmp_path) >= {"a.mp4", "sound.wav"}
    assert not (tmp_path / "a.state").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("audio_type", "frames"), [("parallel", 25), ("sequential", 38)])
def test_two_speakers_are_experimental(main, tmp_path, caplog, audio_type, frames):
    sounds = f"{write_tone(tmp_path / 'a.wav', 1.0, 16000)},{write_tone(tmp_path / 'b.wav', 0.5, 16000, 2000)}"
    flags = ("--input_audio", sounds, "--audio_type", audio_type, "--output", "a.mp4")
    code, stdout, stderr = main(*AVATAR, *flags)
    assert (code, stdout) == (0, "a.mp4\n"), stderr
    assert warnings_of(caplog) == [EXPERIMENTAL]
    made = probe_video(tmp_path / "a.mp4", 25)
    assert made.frames == frames
    heard = read_audio(tmp_path / "a.mp4")
    assert abs(len(heard) / 16_000 - made.seconds) < FRAME
    late = np.abs(np.fft.rfft(heard[int(1.1 * 16_000) : int(1.4 * 16_000)])) if audio_type == "sequential" else None
    early = np.abs(np.fft.rfft(heard[1600:6400]))
    assert early[132] > 100  # 440 Hz, in bins of 10/3 Hz
    assert (early[600] > 100) == (audio_type == "parallel")  # 2000 Hz
    assert late is None or late[600] > 100 > late[132]


@pytest.mark.slow
def test_a_folder_of_pictures(main, tmp_path):
    sound = write_tone(tmp_path / "sound.wav", 0.5, 16000)
    code, stdout, stderr = main(*AVATAR, "--input_audio", sound, "--output", "frames/", "--quiet")
    assert (code, stdout) == (0, "frames\n"), stderr
    assert files_in(tmp_path / "frames") == {f"{number:05d}.png" for number in range(13)}
    assert np.asarray(Image.open(tmp_path / "frames" / "00012.png")).shape == (32, 32, 3)
    assert not (tmp_path / "frames.state").exists()


@pytest.mark.slow
def test_a_dubbed_clip_is_experimental(main, tmp_path, caplog):
    sound = write_tone(tmp_path / "sound.wav", 0.5, 16000)
    clip = ("--task_type", "talking_avatar", "--prompt", "a", "--input_video", ASSETS / "boat.mp4", *SMALL)
    code, _, stderr = main(*clip, "--input_audio", sound, "--output", "a.mp4")
    assert code == 0, stderr
    assert warnings_of(caplog) == [EXPERIMENTAL]
    assert probe_video(tmp_path / "a.mp4", 25).frames == 13


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.skipif(find_spec("kokoro") is not None, reason="kokoro would speak, and download its model")
def test_a_text_is_spoken(main, tmp_path, caplog):
    """The picture lasts as long as the speech, which is louder than silence and is in the file."""
    code, stdout, stderr = main(*AVATAR, "--text", "Good evening.", "--voice", "en-gb", "--output", "a.mp4")
    assert (code, stdout) == (0, "a.mp4\n"), stderr
    assert [record.message for record in caplog.records if "espeak-ng" in record.message]
    made = probe_video(tmp_path / "a.mp4", 25)
    spoken = tmp_path / "spoken.wav"
    subprocess.run(["espeak-ng", "-v", "en-gb", "-w", spoken, "Good evening."], check=True)
    expected, heard = read_audio(spoken), read_audio(tmp_path / "a.mp4")
    assert made.frames == np.ceil(len(expected) / 16_000 * 25)
    count = min(len(expected), len(heard))
    assert np.corrcoef(expected[:count], heard[:count])[0, 1] > 0.95  # apart from AAC's losses
    assert files_in(tmp_path) == {"a.mp4", "spoken.wav"}


@pytest.mark.slow
def test_the_sound_of_the_video_is_the_recording(main, tmp_path, monkeypatch):
    """Whatever processing the model's input gets."""
    heard = []
    monkeypatch.setattr("skyreels_v3.inputs.check_voice", lambda request: None)
    monkeypatch.setattr("skyreels_v3.wan.avatar.read_vocals", lambda path, models: read_audio(path) * 0)
    monkeypatch.setattr("skyreels_v3.wan.avatar.keep_speech", lambda samples: heard.append(samples) or samples)
    sound = write_tone(tmp_path / "sound.wav", 0.5, 16000)
    code, _, stderr = main(*AVATAR, "--input_audio", sound, "--vocals", "--speech_only", "--output", "a.mp4")
    assert code == 0, stderr
    assert len(heard) == 1 and not heard[0].any()
    expected, made = read_audio(sound), read_audio(tmp_path / "a.mp4")
    assert np.corrcoef(expected, made[: len(expected)])[0, 1] > 0.99


@pytest.mark.extended
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_lips_follow_a_voice_in_music(tmp_path, monkeypatch):
    """The built-in model's mouth for a voice in equally loud music, with and without --vocals, against the clean voice.

    The stand-in separator leaves music 13 dB below the voice, the published figure for the default model.
    """
    spoken = ["espeak-ng", "-v", "en-us", "-w", tmp_path / "voice.wav", "The boat sails on into the dusk."]
    subprocess.run(spoken, check=True)
    clean = np.pad(read_audio(tmp_path / "voice.wav"), (RATE // 2, RATE))
    times = np.arange(len(clean)) / RATE
    music = sum(np.sin(2 * np.pi * hertz * times) for hertz in (196, 247, 294, 392)) * np.exp(-4 * (times % 0.5))
    music += np.random.default_rng(0).normal(0, 1, len(times)) * (times % 0.5 < 0.05)  # a beat
    music *= np.sqrt(np.mean(clean[np.abs(clean) > 0.01] ** 2) / np.mean(music**2))
    face = world.make_face(HELD_OUT, mouth_of(clean), blinks=False)
    still = replace(face, mouth=np.zeros(1), lids=np.zeros(1))
    picture = world.render_faces([still], 128, 128)[0, :, 0].permute(1, 2, 0)
    Image.fromarray(((picture + 1) * 127.5).round().byte().numpy()).save(tmp_path / "face.png")
    generator = load("talking_avatar", model_id="tiny", device="cpu", height=128, width=128, quiet=True)
    monkeypatch.setattr("skyreels_v3.inputs.check_separable", lambda: None)
    separated = (clean + 10 ** (-13 / 20) * music).astype(np.float32)
    monkeypatch.setattr("skyreels_v3.wan.avatar.read_vocals", lambda path, models: separated)

    def agreement(sound: np.ndarray, **flags: bool) -> float:
        soundfile.write(tmp_path / "sound.wav", sound, RATE, subtype="FLOAT")
        inputs = {"input_image": str(tmp_path / "face.png"), "input_audio": str(tmp_path / "sound.wav")}
        events = generator(prompt=face.caption, **inputs, **flags)
        frames = np.stack([event.image for event in events if isinstance(event, Frame)])
        video = torch.from_numpy(frames / 127.5 - 1).permute(3, 0, 1, 2)
        return lip_sync(mouth_openings(video, face), face.mouth[: len(frames)]).correlation

    mixed = (clean + music) / 2  # without clipping
    found = [agreement(clean), agreement(mixed), agreement(mixed, vocals=True)]
    assert found[0] > 0.7 and found[1] < found[0] - 0.2
    assert found[2] == pytest.approx(found[0], abs=0.1)
