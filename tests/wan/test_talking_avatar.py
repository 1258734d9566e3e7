"""The inputs of a talking avatar's passes: sound, speakers, key frames, prompts, a dubbed clip. With the toy model."""

from __future__ import annotations

import wave
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from skyreels_v3.cache import TensorCache
from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.cli import parse_request
from skyreels_v3.components import Components, load_components
from skyreels_v3.errors import UserError
from skyreels_v3.inputs import open_inputs
from skyreels_v3.media.audio import normalize_loudness, read_audio
from skyreels_v3.request import GenerationRequest
from skyreels_v3.resume import RunRecord, open_state
from skyreels_v3.runtime import start
from skyreels_v3.stages import Pass, Stages, Step, video_to_frames
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.avatar import Avatar, Known, audio_windows, in_turn, token_span
from skyreels_v3.wan.background import soft_box
from skyreels_v3.wan.talking_avatar import PIPELINE
from skyreels_v3.wan.windows import plan_windows
from tests.planning import planned

REQUEST = GenerationRequest(
    task=task_spec("talking_avatar"),
    model_id="tiny",
    prompt="p",
    device="cpu",
    height=32,
    width=32,
    audio_seconds=4.0,
    num_inference_steps=1,
    quiet=True,
)
RED, BLUE = (255, 0, 0), (0, 0, 255)
VOCALS = np.random.default_rng(1).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def components(cache) -> Components:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKYREELS_CACHE", str(cache))
        plan = planned(REQUEST, make_tiny(REQUEST.task))
        return load_components(plan, start(plan))


@pytest.fixture
def make(components, tmp_path) -> Iterator[Callable[..., Avatar]]:
    """Create the pipeline from flags; the portrait is 96 x 64 by default."""
    Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "portrait.png")
    state = open_state(RunRecord(tmp_path / "a.mp4", {}))

    def make(*flags: object) -> Avatar:
        image = () if "--input_video" in flags else ("--input_image", tmp_path / "portrait.png")
        base = ("--task_type", "talking_avatar", "--prompt", "she sings", "--num_inference_steps", "1", *image)
        size = () if "--height" in flags else ("--height", "32", "--width", "32")
        request = parse_request([str(flag) for flag in (*base, *size, *flags)])
        request, inputs = open_inputs(replace(request, device="cpu"), tmp_path)
        PIPELINE.check_inputs(request, inputs)
        plan = planned(request, inputs=inputs)
        return Avatar(Stages(components, start(plan), plan, state), PIPELINE.guidance(request))

    yield make
    state.close(completed=True)


@pytest.fixture
def sound(tmp_path) -> Callable[[float], Path]:
    """Write noise of the given length in seconds."""

    def write(seconds: float) -> Path:
        path = tmp_path / f"{seconds}.wav"
        samples = np.random.default_rng(0).normal(0, 3000, int(16_000 * seconds)).astype("<i2")
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16_000, len(samples), "NONE", ""))
            file.writeframes(samples.tobytes())
        return path

    return write


def spy_on_windows(avatar: Avatar, monkeypatch) -> list[tuple[dict[str, Tensor], Known, int]]:
    """Replace the making of windows; returns a list of the texts, known frames and start that each one is given."""
    calls: list[tuple[dict[str, Tensor], Known, int]] = []

    def make_window(texts: dict[str, Tensor], known: Known, start: int, name: str) -> Generator[Step, None, Tensor]:
        calls.append((texts, known, start))
        yield from ()
        return torch.zeros(1, 16, 21, *(side // 8 for side in avatar.portrait.shape[3:]))

    monkeypatch.setattr(avatar, "make_window", make_window)
    return calls


def read_all(avatar: Avatar) -> int:
    """Run all passes; returns the number of frames."""
    return sum(1 for one in avatar.run() if isinstance(one, Pass) for _ in one.frames)


def test_voices_are_padded_to_one_length():
    long, short = np.arange(1, 6), np.arange(1, 3)
    np.testing.assert_array_equal(in_turn([long, short], False), [[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(in_turn([short, long], False), [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(in_turn([long[:3], short], True), [[1, 2, 3, 0, 0], [0, 0, 0, 1, 2]])
    for sequential in (False, True):
        np.testing.assert_array_equal(in_turn([long], sequential), [long])


@pytest.mark.parametrize(("flags", "seconds"), [((), 1.0), (("--audio_type", "sequential"), 1.5)])
def test_two_speakers_sound_as_long_as_the_video(make, sound, flags, seconds):
    avatar = make("--input_audio", f"{sound(1.0)},{sound(0.5)}", *flags)
    features = avatar.encode_audio()
    assert avatar.request.audio_seconds == seconds
    assert features.shape[:2] == (2, avatar.request.frames_out)
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 64, (0, 8)), (16, 32, (2, 4)), (10, 30, (0, 4)), (40, 41, (4, 6)), (0, 0, (0, 2)), (64, 64, (6, 8))],
)
def test_the_tokens_between_two_places(start, end, expected):
    """For a side of 64 pixels: 4 tokens, 8 latent pixels."""
    assert token_span(start, end, 64) == slice(*expected)


def masks(make: Callable[..., Avatar], sounds: str, *flags: object) -> Tensor | None:
    return make("--input_audio", sounds, *flags).speaker_masks


def test_one_speaker_has_no_mask(make, sound):
    assert masks(make, str(sound(0.5))) is None


def test_two_speakers_are_the_halves_of_the_portrait(make, sound):
    """96 x 64 is scaled to 48 x 32, losing 8 columns on either side."""
    made = masks(make, f"{sound(0.5)},{sound(0.5)}")
    left = torch.tensor([[1.0, 1, 0, 0]] * 4)
    torch.testing.assert_close(made, torch.stack((left, 1 - left, torch.zeros(4, 4))))


def test_boxes_move_with_the_crop(make, sound):
    """96 x 64 keeps its height and is cropped to 64 x 64, losing 16 columns on either side."""
    size = ("--height", "64", "--width", "64")
    made = masks(make, f"{sound(0.5)},{sound(0.5)}", "--speaker_boxes", "16,0,48,32;64,32,96,64", *size)
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[:4, :4] = 1  # columns 0 to 32
    second[4:, 6:] = 1  # columns 48 to 64; the rest is cropped
    torch.testing.assert_close(made, torch.stack((first, second, 1 - first - second)))


def test_a_box_that_is_cut_off_is_refused(make, sound):
    size = ("--height", "64", "--width", "64")
    with pytest.raises(UserError, match="0,0,10,64 is cut off"):
        masks(make, f"{sound(0.5)},{sound(0.5)}", "--speaker_boxes", "0,0,10,64;48,0,96,64", *size)


def test_sound_around_each_frame():
    features = torch.arange(100.0).view(1, 100, 1, 1)
    first, last = (audio_windows(features, start)[..., 0, 0] for start in (0, 64))
    assert first.shape == (1, 81, 5)
    assert first[0, 0].tolist() == [0, 0, 0, 1, 2]
    assert first[0, 80].tolist() == [78, 79, 80, 81, 82]
    assert last[0, 0].tolist() == [62, 63, 64, 65, 66]
    assert last[0, 34].tolist() == [96, 97, 98, 99, 99]
    assert (last[0, 38:] == 99).all()


def key_frames(make: Callable[..., Avatar], sound: Path, keyframes: str) -> dict[int, Tensor]:
    """Key frames of three windows that end at frames 80, 144 and 208; generated ones are as gray as their number."""
    avatar = make("--input_audio", sound, "--keyframes", keyframes)
    plan = plan_windows(avatar.request.frames_out)
    assert [window.start for window in plan.windows] == [0, 64, 128]
    decoded = (torch.full((1, 3, 1, 32, 32), float(number)) for number in range(81))
    return avatar.key_frames(plan, decoded)


def test_key_frames_of_the_user(make, sound, tmp_path):
    for name, color in (("red.png", RED), ("blue.png", BLUE)):
        Image.new("RGB", (50, 40), color).save(tmp_path / name)
    keys = key_frames(make, sound(8.0), f"{tmp_path}/red.png@5.5,{tmp_path}/blue.png@0.1")
    assert (video_to_frames(keys[0], True) == BLUE).all()
    assert (video_to_frames(keys[64], True) == RED).all()
    assert (keys[128] == 80).all()  # the pass's last frame
    keys = key_frames(make, sound(8.0), f"{tmp_path}/red.png@8")
    assert (video_to_frames(keys[128], True) == RED).all()
    assert len(keys[0].unique()) == len(keys[64].unique()) == 1


@pytest.mark.slow
def test_windows_begin_and_end_in_what_is_known(make, sound, monkeypatch):
    made = make("--input_audio", sound(4.0))
    calls = spy_on_windows(made, monkeypatch)
    assert read_all(made) == 100
    assert [start for *_, start in calls] == [0, 0, 64]
    assert [first.shape[2] for _, (first, _), _ in calls] == [1, 1, 5]
    assert [last is not None and last.shape[2] for _, (_, last), _ in calls] == [False, 5, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        ((), "a person is talking"),
        (("--window_prompt", "same"), "she sings"),
        (("--window_prompt", "she whispers"), "she whispers"),
    ],
)
def test_the_prompt_of_the_windows(make, sound, monkeypatch, components, flags, windows):
    made = make("--input_audio", sound(4.0), *flags)
    heard: list[str] = []

    class Spy:
        module = components.text_encoder.module
        blocks = ()

        def encode(self, text: str) -> dict[str, Tensor]:
            heard.append(text)
            return {"context": torch.full((1, 512, 8), float(len(heard)))}

    unknown = TensorCache(None, "")
    monkeypatch.setattr(made.stages, "components", replace(components, text_encoder=Spy(), prompt_cache=unknown))
    calls = spy_on_windows(made, monkeypatch)
    read_all(made)
    assert heard == [*dict.fromkeys(["she sings", windows])]  # each prompt is encoded once
    own, shared = 1, heard.index(windows) + 1
    assert [texts["full"]["context"].unique().item() for texts, *_ in calls] == [own, shared, shared]


def numbered(write_lossless, path: Path, frames: int) -> Path:
    """A clip in which each frame's gray level is its number."""
    levels = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    return write_lossless(path, np.broadcast_to(levels, (frames, 32, 32, 3)), 25)


def gray_levels(video: Tensor) -> list[int]:
    frames = video_to_frames(video, True)
    assert (frames == frames[:, :1, :1, :1]).all()
    return frames[:, 0, 0, 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "first", "last"),
    [
        (4.0, [[0, 1, 2, 3, 4], [64, 65, 66, 67, 68]], [[76, 77, 78, 79, 80], [99] * 5]),  # the clip's last frame is 99
        (1.0, [[0, 1, 2, 3, 4]], [[76, 77, 78, 79, 80]]),
    ],
)
def test_dubbing_takes_the_clips_frames(make, sound, monkeypatch, write_lossless, tmp_path, seconds, first, last):
    clip = numbered(write_lossless, tmp_path / "clip.mp4", 100)
    made = make("--input_video", clip, "--input_audio", sound(seconds))
    calls = spy_on_windows(made, monkeypatch)
    assert read_all(made) == 25 * seconds
    assert [[gray_levels(frames) for frames in known] for _, known, _ in calls] == [
        *map(list, zip(first, last, strict=True))
    ]
    assert [start for *_, start in calls] == [0, 64][: len(first)]


def test_colors_are_the_portraits_unless_that_is_off(make, sound):
    avatar = make("--input_audio", sound(0.5), "--color_correction_strength", "0")
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.cat(list(avatar.stages.decode_video(latents)), dim=2)
    made = []
    for strength in (0.0, 0.5, 1.0):
        avatar.request = replace(avatar.request, color_correction_strength=strength)
        made.append(torch.cat(list(avatar.decode_matched(latents)), dim=2))
    off, half, full = made
    torch.testing.assert_close(off, plain, rtol=0, atol=0)
    torch.testing.assert_close(half, (plain + full) / 2)
    portrait = avatar.portrait.mean()
    assert abs(full.mean() - portrait) < 0.5 * abs(plain.mean() - portrait)


def test_two_speakers_in_one_recording(make, sound, tmp_path):
    """By the RTTM file, each track is silent while only the other speaker talks; there are masks for two."""
    lines = ("SPEAKER a 1 0.0 0.6 <NA> <NA> x <NA> <NA>", "SPEAKER a 1 0.5 0.5 <NA> <NA> y <NA> <NA>")
    (tmp_path / "a.rttm").write_text("\n".join(lines))
    whole = make("--input_audio", sound(1.0)).voices()[0]
    avatar = make("--input_audio", sound(1.0), "--diarization", tmp_path / "a.rttm")
    first, second = avatar.voices()
    assert not first[9600:].any() and not second[:8000].any()
    for voice, part in ((first, slice(0, 9600)), (second, slice(8000, 16000))):
        assert np.corrcoef(voice[part], whole[part])[0, 1] > 0.999  # apart from the loudness
    assert avatar.encode_audio().shape[:2] == (2, 25)
    assert avatar.speaker_masks is not None
    assert [name for name, *_ in avatar.inputs.files] == ["input_image", "diarization", "input_audio"]


def test_what_is_heard_is_changed_only_if_asked_for(make, sound, monkeypatch):
    """The audio flags, one at a time: vocals, loudness, speech."""
    calls = []
    monkeypatch.setattr("skyreels_v3.inputs.check_voice", lambda request: None)
    monkeypatch.setattr("skyreels_v3.wan.avatar.read_vocals", lambda path, models: calls.append(path) or VOCALS)
    monkeypatch.setattr("skyreels_v3.wan.avatar.keep_speech", lambda samples: calls.append(samples) or samples * 0)
    plain = make("--input_audio", sound(1.0))
    np.testing.assert_array_equal(plain.voices()[0], normalize_loudness(read_audio(sound(1.0))))
    assert not calls
    heard = make("--input_audio", sound(1.0), "--vocals", "--speech_only").voices()
    assert calls[0] == sound(1.0)
    np.testing.assert_array_equal(calls[1], normalize_loudness(VOCALS))
    assert len(heard) == 1 and not heard[0].any()


@pytest.mark.slow
def test_a_background_is_kept(make, sound, write_lossless, tmp_path, caplog):
    """Outside the box the clip's pixels are kept, inside it frames are as without the flag, with a blend in between.

    The clip ends before the sound's last frames.
    """
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    clip = write_lossless(tmp_path / "clip.mp4", noise, 25)
    flags = ("--input_video", clip, "--input_audio", sound(1.0), "--height", "48", "--width", "64")
    caplog.set_level("INFO", "skyreels_v3")
    made, kept = (
        np.stack([frame for event in make(*flags, *more).run() if isinstance(event, Pass) for frame in event.frames])
        for more in ((), ("--keep_background", "--speaker_boxes", "16,0,48,40"))
    )
    source = np.concatenate((noise, noise[-1:]))
    outside = np.ones((48, 64), bool)
    outside[:40, 16:48] = False
    assert made.shape == kept.shape == source.shape and (made != source)[:, outside].any()
    np.testing.assert_array_equal(kept[:, outside], source[:, outside])
    np.testing.assert_array_equal(kept[:, :34, 22:42], made[:, :34, 22:42])  # the box touches the frame's top edge
    between = np.minimum(made, source) <= kept, kept <= np.maximum(made, source)
    assert np.all(between) and (kept != source)[:, 1:38, 18:46].mean() > 0.9
    (line,) = [record.message for record in caplog.records if "speaker's box" in record.message]
    error = np.square(made[:, outside].astype(float) - source[:, outside]).mean()
    assert f"PSNR to the clip is {10 * np.log10(255**2 / error):.1f} dB" in line


def test_the_soft_edge_of_a_box():
    """For a box of 20 x 40 pixels at the left edge, the soft edge is 3 pixels wide on the other three sides."""
    weights = soft_box((0, 5, 20, 45), 50, 60)
    assert weights.shape == (50, 60, 1) and weights.dtype == np.float32
    np.testing.assert_allclose(weights[25, 15:22, 0], [1, 1, 5 / 6, 3 / 6, 1 / 6, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[3:9, 0, 0], [0, 0, 1 / 6, 3 / 6, 5 / 6, 1], rtol=1e-6)
    assert weights[25, 0, 0] == weights[40, 5, 0] == 1 and not weights[45:].any() and not weights[:, 20:].any()
