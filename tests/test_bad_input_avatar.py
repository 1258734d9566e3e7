"""Requests for talking avatars that cannot work, as in test_bad_input.py; and unusual ones that can."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from tests.conftest import ROOT, Case, bad, check_refused

ASSETS = ROOT / "assets"
TINY = ("--model_id", "tiny", "--device", "cpu")
BASE = ["--task_type", "talking_avatar", "--prompt", "a", *TINY]
PORTRAIT = ["--input_image", "{assets}/portrait.png"]
SOUND = ["--input_audio", "{files}/6s.wav"]
AVATAR = [*BASE, *PORTRAIT, *SOUND]
TWO = [*BASE, *PORTRAIT, "--input_audio", "{files}/6s.wav,{files}/1s.wav"]
DUB = [*BASE, "--input_video", "{files}/4s.mp4", "--input_audio", "{files}/1s.wav"]
REFERENCE = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "{assets}/fox.png", *TINY]
EXTENSION = ["--task_type", "single_shot_extension", "--prompt", "a", "--input_video", "{assets}/boat.mp4", *TINY]
LEFT = [*AVATAR, "--height", "32", "--width", "32", "--output", "{files}/left.mp4", "--resume"]


def missing(name: str, argv: list[str], flag: str, remedy: str) -> Case:
    return Case(name, argv, flag, "missing", remedy)


def sound(name: str, remedy: str, shown: str | None = None) -> Case:
    """A bad sound file; the error names it unless something else is said."""
    return bad(AVATAR, "--input_audio", f"{{files}}/{name}", remedy, shown, name)


def resumed(name: str, argv: list[str], value: str, remedy: str) -> Case:
    return Case(f"resume-{name}", argv, "--resume", value, remedy)


PORTRAITS = [
    missing("no-image", [*BASE, *SOUND], "--input_image", "needs portrait of the speaker, path or URL"),
    bad(AVATAR, "--input_image", "{files}/nothere.png", "check the path"),
    bad(AVATAR, "--input_image", "", "give a file", "an empty path", "empty"),
    bad(AVATAR, "--input_image", "{files}/folder", "give a file"),
    bad(AVATAR, "--input_image", "{files}/empty", "give a complete file"),
    bad(AVATAR, "--input_image", "{files}/cut.png", "give a complete file"),
    bad(AVATAR, "--input_image", "{files}/cut.jpg", "give a complete file"),
    bad(AVATAR, "--input_image", "{files}/text.png", "give a JPEG, PNG"),
    bad(AVATAR, "--input_image", "{files}/1s.wav", "give a JPEG, PNG"),
    bad(AVATAR, "--input_image", "{files}/4s.mp4", "give a JPEG, PNG"),
    bad(AVATAR, "--input_image", "http://127.0.0.1:9/a.png", "--allow_private_urls"),
]
SOUNDS = [
    missing("no-sound", [*BASE, *PORTRAIT], "--input_audio", "needs speech: sound file or video"),
    sound("nothere.wav", "check the path"),
    sound("folder", "give a file"),
    sound("empty", "give a complete file"),
    sound("zero.wav", "give a recording of speech"),
    sound("cut.wav", "give a complete sound file"),
    sound("text.mp3", "give a"),
    sound("portrait.png", "give a sound file, such as an mp3 or wav"),
    sound("silent.mp4", "give a sound file, or a video with sound"),
    sound("0.3s.wav", "0.4 to 200 s are possible; give a longer recording", "has 0.300 s of sound"),
    sound("201s.wav", "0.4 to 200 s are possible; cut it", "has 201.000 s of sound"),
    bad(AVATAR, "--input_audio", "", "give one, or two for two speakers", "1 sounds, or an empty one", "none"),
    bad(AVATAR, "--input_audio", "{files}/1s.wav,", "give one, or two for two speakers", "2 sounds, or an", "comma"),
    bad(AVATAR, "--input_audio", "a.wav,b.wav,c.wav", "give one, or two for two speakers", "3 sounds", "three"),
    bad(AVATAR, "--input_audio", "{files}/1s.wav,{files}/nothere.wav", "check the path", "{files}/nothere.wav"),
    bad(
        [*AVATAR, "--audio_type", "sequential"], "--input_audio", "{files}/150s.wav,{files}/51s.wav",
        "give 200 s at most", "201.00 s one after the other", "sequential",
    ),
]  # fmt: skip
SPEAKERS = [
    *[
        bad(TWO, "--speaker_boxes", value, "give two boxes as x0,y0,x1,y1;x0,y0,x1,y1")
        for value in (
            "0,0,9,9", "0,0,9;0,0,9", "0,0,9,9;1,1,9,9;2,2,9,9", "0,0,9,x;0,0,9,9", "0,0,9,9;-1,0,9,9",
            "0.5,0,9,9;0,0,9,9", "0,0,9,9;",
        )
    ],
    bad(TWO, "--speaker_boxes", "", "give two boxes", "an empty value", "empty"),
    bad(TWO, "--speaker_boxes", "0,0,9,9;9,0,9,9", "give x0 < x1 and y0 < y1", "9,0,9,9 is empty"),
    bad(TWO, "--speaker_boxes", "9,9,0,0;0,0,9,9", "give x0 < x1 and y0 < y1", "9,9,0,0 is empty"),
    bad(TWO, "--speaker_boxes", "0,0,9,9;0,0,481,480", "give boxes inside it", "0,0,481,480 is not inside"),
    bad(TWO, "--speaker_boxes", "0,0,9,481;0,0,9,9", "of 480 x 480 pixels; give boxes inside it", "0,0,9,481"),
    bad(
        (*TWO, "--height", "256", "--width", "480"), "--speaker_boxes", "0,0,40,40;100,200,400,400",
        "give a box nearer to the middle", "0,0,40,40 is cut off",
    ),
    bad(AVATAR, "--speaker_boxes", "0,0,9,9;9,0,19,9", "is for two speakers; give two sounds, or leave it out"),
    bad(AVATAR, "--audio_type", "sequential", "is for two speakers; give two sounds, or leave it out"),
    bad(TWO, "--audio_type", "serial", "choose parallel or sequential"),
]  # fmt: skip
KEY_FRAMES = [
    *[
        bad(AVATAR, "--keyframes", value, "give an image and its time in seconds, such as a.png@2.5")
        for value in ("a.png", "a.png@", "@2.0", "a.png@two", "a.png@-1", "a.png@nan", "a.png@1e3")
    ],
    bad(AVATAR, "--keyframes", "", "such as a.png@2.5", "an empty value", "empty"),
    bad(AVATAR, "--keyframes", "{assets}/fox.png@1,", "such as a.png@2.5", "an empty value", "trailing-comma"),
    bad(AVATAR, "--keyframes", "{files}/nothere.png@2", "check the path", "{files}/nothere.png"),
    bad(AVATAR, "--keyframes", "{files}/cut.png@2", "give a complete file", "{files}/cut.png"),
    bad(AVATAR, "--keyframes", "{assets}/fox.png@6.5", "the sound is 6.00 s long; give times within it", "at 6.5 s"),
    Case(
        "keyframes-short-sound",
        [*BASE, *PORTRAIT, "--input_audio", "{files}/1s.wav", "--keyframes", "{assets}/fox.png@0.5"],
        "--keyframes", "the sound is 1.00 s long", "sound of at least 3.24 s",
    ),
]  # fmt: skip
DUBBING = [
    Case(
        "image-and-video", [*AVATAR, "--input_video", "{files}/4s.mp4"],
        "--input_image", "portrait.png", "conflicts with --input_video; give one of them",
    ),
    Case(
        "dubbing-two", [*DUB, "--input_audio", "{files}/1s.wav"],
        "--input_video", "one speaker only", "give one --input_audio",
    ),
    Case(
        "dubbing-key-frames", [*DUB, "--keyframes", "{assets}/fox.png@1"],
        "--keyframes", "fox.png@1", "conflicts with --input_video; give one of them",
    ),
    Case(
        "clip-too-short", [*BASE, "--input_video", "{files}/4s.mp4", *SOUND],
        "--input_video", "4s.mp4 is 4.00 s long, the sound 6.00 s", "give a longer clip or a shorter sound",
    ),
    bad(DUB, "--input_video", "{files}/nothere.mp4", "check the path"),
    bad(DUB, "--input_video", "{assets}/portrait.png", "give a video clip"),
    bad(DUB, "--input_video", "{files}/1s.wav", "give a video clip"),
]  # fmt: skip
OTHER_TASKS = [
    *[
        bad(AVATAR, flag, value, "talking_avatar does not take it; ")
        for flag, value in (
            ("--guidance_scale", "2.0"), ("--image_guidance_scale", "2.0"), ("--duration", "5"), ("--num_frames", "5"),
            ("--ref_imgs", "{assets}/fox.png"),
        )
    ],
    Case("avatar--include_input", [*DUB, "--include_input"], "--include_input", "talking_avatar", "leave it out"),
    *[
        bad(base, flag, value, f"{base[1]} does not take it; ")
        for base in (REFERENCE, EXTENSION)
        for flag, value in (
            ("--input_image", "{assets}/portrait.png"), ("--input_audio", "{files}/1s.wav"),
            ("--text_guidance_scale", "2.0"), ("--audio_guidance_scale", "2.0"), ("--color_correction_strength", "0.5"),
            ("--window_prompt", "b"), ("--audio_type", "parallel"), ("--speaker_boxes", "0,0,9,9;9,0,19,9"),
            ("--keyframes", "a.png@1"),
        )
    ],
]  # fmt: skip
VALUES = [
    *[
        bad(AVATAR, "--color_correction_strength", value, "give a number from 0 to 1")
        for value in ("-0.1", "1.1", "nan", "inf", "full")
    ],
    *[
        bad(AVATAR, flag, value, "give a number from 0 to 100")
        for flag in ("--text_guidance_scale", "--audio_guidance_scale")
        for value in ("-1", "nan", "101")
    ],
    bad(AVATAR, "--window_prompt", "", "'same' for --prompt, or leave it out", "an empty value", "empty"),
    bad(AVATAR, "--window_prompt", "  ", "'same' for --prompt, or leave it out", "an empty value", "blank"),
    bad(AVATAR, "--negative_prompt", "blur", "give --text_guidance_scale above 1"),
    bad([*AVATAR, "--audio_guidance_scale", "3"], "--negative_prompt", "dark", "give --text_guidance_scale above 1"),
]
RESUMED = [
    resumed("dry", [*LEFT, "--dry_run"], "conflicts with --dry_run", "give one of them"),
    resumed("random-seeds", [*AVATAR, "--resume", "--seed", "-1", "--video_num", "2"], "the seeds", "as --seed"),
    resumed("other-seed", [*LEFT, "--seed", "7"], "seed 42 -> 7", "repeat its command"),
    resumed("other-size", [*LEFT, "--height", "48"], "height 32 -> 48", "repeat its command"),
    resumed("other-dtype", [*LEFT, "--dtype", "bfloat16"], "dtype float32 -> bfloat16", "repeat its command"),
    resumed("more", [*LEFT, "--text_guidance_scale", "2"], "text_guidance_scale None -> 2.0", "repeat its command"),
    Case(
        "resume-other-portrait",
        [argument.replace("left.mp4", "other.mp4") for argument in LEFT],
        "--input_image",
        "portrait.png has changed since the interrupted run",
        "put the old one back",
    ),
]
CASES = [*PORTRAITS, *SOUNDS, *SPEAKERS, *KEY_FRAMES, *DUBBING, *OTHER_TASKS, *VALUES, *RESUMED]


def ffmpeg(*arguments: object) -> None:
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], stdin=subprocess.DEVNULL, check=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of inputs, most of them bad, and of interrupted runs."""
    folder = tmp_path_factory.mktemp("files")
    for seconds in ("0", "0.3", "1", "6", "51", "150", "201"):
        ffmpeg("-f", "lavfi", "-i", "sine=sample_rate=8000", "-t", seconds, folder / f"{seconds}s.wav")
    (folder / "0s.wav").rename(folder / "zero.wav")
    picture = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=4"]
    ffmpeg(*picture, "-f", "lavfi", "-i", "sine=duration=4", folder / "4s.mp4")
    ffmpeg(*picture, folder / "silent.mp4")
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    noise.save(folder / "portrait.png")
    noise.save(folder / "whole.jpg")
    for name, whole, size in (
        ("cut.png", folder / "portrait.png", 3000),
        ("cut.jpg", folder / "whole.jpg", 1000),
        ("cut.wav", folder / "6s.wav", 20_000),
    ):
        (folder / name).write_bytes(whole.read_bytes()[:size])
    for name in ("text.png", "text.mp3"):
        (folder / name).write_text("nothing but words\n")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    write_states(folder)
    return folder


def write_states(folder: Path) -> None:
    """What interrupted runs leave: one of the command `LEFT`, and one whose portrait was another."""
    from skyreels_v3.cli import parse_request

    argv = [argument.format(assets=ASSETS, files=folder) for argument in LEFT]
    flags = parse_request(argv).flags | {"height": 32, "width": 32, "dtype": "float32"}
    for name, portrait in (("left", ASSETS / "portrait.png"), ("other", ASSETS / "fox.png")):
        (folder / f"{name}.state").mkdir()
        files = {"input_image": portrait, "input_audio": folder / "6s.wav"}
        inputs = [[flag, hashlib.sha256(path.read_bytes()).hexdigest()] for flag, path in files.items()]
        content = {"output": f"{folder}/{name}.mp4", "flags": flags, "inputs": inputs, "save_quantized": None}
        (folder / f"{name}.state" / "request.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_request(refuse, files, case):
    check_refused(case, refuse, files=files, assets=ASSETS)


def test_a_run_that_is_still_going_on_is_not_resumed(refuse, files):
    """Another process holds the lock on what it has finished."""
    fcntl = pytest.importorskip("fcntl")
    with (files / "left.state" / "request.json").open("r+") as request:
        fcntl.flock(request, fcntl.LOCK_EX)
        case = resumed("live", LEFT, "{files}/left.state is in use", "wait for it, or stop it first")
        check_refused(case, refuse, files=files, assets=ASSETS)


def dry(main: Callable[..., tuple[int, str, str]], *arguments: object) -> str:
    """The plan of an avatar that is fine."""
    code, stdout, stderr = main(*BASE, *arguments, "--dry_run")
    assert (code, stderr) == (0, "")
    return stdout


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_portraits_of_many_kinds_are_taken(main, files, tmp_path, name):
    Image.effect_noise((640, 360), 80).convert("RGB").save(tmp_path / name)
    plan = dry(main, "--input_image", tmp_path / name, "--input_audio", files / "1s.wav")
    assert "1280 x 720, 25 new frames at 25 fps" in plan


def test_a_portrait_is_turned_upright(main, files, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    Image.effect_noise((640, 360), 80).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    plan = dry(main, "--input_image", tmp_path / "a.jpg", "--input_audio", files / "1s.wav")
    assert "720 x 1280, 25 new frames" in plan


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.flac", "a.ogg", "a.mp4"])
def test_sound_of_many_kinds_is_taken(main, files, tmp_path, name):
    picture = ["-f", "lavfi", "-i", "color=size=64x48:duration=1"] if name == "a.mp4" else []
    ffmpeg("-i", files / "1s.wav", *picture, tmp_path / name)
    plan = dry(main, "--input_image", ASSETS / "portrait.png", "--input_audio", tmp_path / name)
    frames = int(plan.split(" new frames")[0].split()[-1])
    assert 25 <= frames <= 27  # encoders fill up their last block


def test_what_an_interrupted_run_left_is_found(files):
    """The state that the refused cases above differ from is a good one."""
    from skyreels_v3.cli import parse_request
    from skyreels_v3.preflight import preflight

    request = parse_request([argument.format(assets=ASSETS, files=files) for argument in LEFT])
    seen = preflight(request, files).request
    assert (seen.resume, seen.output) == (True, request.output)
