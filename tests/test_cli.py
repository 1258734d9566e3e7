"""Valid requests: flags, presets, config files, and their precedence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from skyreels_v3 import __version__
from skyreels_v3.cli import build_parser, parse_request, without_overruled
from skyreels_v3.errors import UserError
from skyreels_v3.request import FLAGS
from skyreels_v3.tasks import TASK_NAMES, task_spec

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ["--task_type", "reference_to_video", "--prompt", "a fox", "--ref_imgs", "a.png"]
EXTENSION = ["--task_type", "single_shot_extension", "--prompt", "a fox", "--input_video", "a.mp4"]
SHOT = ["--task_type", "shot_switching_extension", "--prompt", "a fox", "--input_video", "a.mp4"]

AVATAR = ["--task_type", "talking_avatar", "--prompt", "a", "--input_image", "p.png", "--input_audio", "a.wav"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a config file and return the flags that select it."""
    monkeypatch.chdir(tmp_path)

    def write(content: object, path: str = "config.yaml") -> list[str]:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        Path(path).write_text(text, encoding="utf-8")
        return ["--config", path]

    return write


@pytest.mark.parametrize("argv", [REFERENCE, EXTENSION, SHOT])
def test_what_is_not_given_comes_from_the_preset(argv):
    request = parse_request(argv)
    spec = task_spec(argv[1])
    assert request.task is spec
    assert (request.model_id, request.duration) == (spec.model_id, spec.default_duration)
    assert (request.resolution, request.shift) == (spec.resolution, spec.shift)
    assert request.num_inference_steps == spec.num_inference_steps == 8
    assert (request.seed, request.guidance_scale, request.device, request.dtype) == (42, 1.0, "auto", None)
    assert (request.output, request.height, request.width, request.verbosity) == (None, None, None, 0)


def test_every_flag_reaches_the_request():
    request = parse_request([
        *REFERENCE, "--ref_imgs", "b.png, c.png", "--model_id", "x/y", "--model_source", "modelscope",
        "--negative_prompt", "blur", "--num_frames", "17", "--resolution", "540P", "--height", "320", "--width", "480",
        "--seed", "7", "--num_inference_steps", "3", "--shift", "2.5", "--guidance_scale", "3",
        "--image_guidance_scale", "1.5", "--device", "cpu", "--dtype", "float32", "--offload", "--output", "f/",
        "--save_latents", "l.safetensors", "--url_timeout", "9", "--dry_run", "--verbose",
        "--quant", "fp8_dynamic", "--save_quantized", "q", "--vae_dtype", "bfloat16", "--attention", "sdpa",
        "--compile", "--lora", "a.safetensors:0.5,C:\\b.safetensors,c/d:-1", "--no_cache",
    ])  # fmt: skip
    assert request.ref_imgs == ("a.png", "b.png", "c.png")
    assert (request.model_id, request.model_source, request.negative_prompt) == ("x/y", "modelscope", "blur")
    assert (request.num_frames, request.frames_out, request.resolution) == (17, 17, "540P")
    assert (request.height, request.width, request.seed, request.num_inference_steps) == (320, 480, 7, 3)
    assert (request.shift, request.guidance_scale, request.image_guidance_scale) == (2.5, 3.0, 1.5)
    assert (request.device, request.dtype, request.memory, request.dry_run) == ("cpu", "float32", "offload", True)
    assert (request.quant, request.save_quantized, request.vae_dtype) == ("fp8_dynamic", Path("q"), "bfloat16")
    assert (request.attention, request.compile, request.no_cache) == ("sdpa", "on", True)
    assert request.lora == (("a.safetensors", 0.5, False), ("C:\\b.safetensors", 1.0, False), ("c/d", -1.0, False))
    assert (request.output, request.frame_folder) == (Path("f"), True)
    assert (request.save_latents, request.url_timeout, request.verbosity) == (Path("l.safetensors"), 9.0, 1)
    clip = parse_request([*EXTENSION, "--include_input", "--duration", "10", "--quiet"])
    assert (clip.include_input, clip.duration, clip.frames_out, clip.verbosity) == (True, 10, 240, -1)


def test_a_value_may_begin_with_a_dash():
    request = parse_request([*REFERENCE, "--prompt", "-a fox-", "--shift=5"])
    assert request.prompt == "-a fox-"
    assert parse_request([*REFERENCE, "--prompt", "-fox"]).prompt == "-fox"
    assert parse_request([*REFERENCE, "--prompt=--fox"]).prompt == "--fox"


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    request = parse_request([*REFERENCE, "--output", "~/a.mp4", "--save_latents", "~/a.safetensors"])
    assert (request.output, request.save_latents) == (Path("/home/someone/a.mp4"), Path("/home/someone/a.safetensors"))


def test_minus_one_draws_a_seed():
    seeds = {parse_request([*REFERENCE, "--seed", "-1"]).seed for _ in range(5)}
    assert len(seeds) == 5
    assert min(seeds) >= 0


def test_relative_paths_begin_where_the_config_file_is(config, tmp_path):
    """Only if they exist there; others may be from a run's record, or hub ids."""
    for name in ("here.png", "both.png", "there/both.png", "there/a.safetensors", "there/model/x", "there/tiny/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    content = {
        "task_type": "reference_to_video", "prompt": "a", "output": "frames/", "save_latents": "a.safetensors",
        "ref_imgs": f"both.png,here.png,nowhere.png,{tmp_path}/x.png", "model_id": "model",
        "lora": "a.safetensors:0.5,owner/name",
    }  # fmt: skip
    request = parse_request(config(content, "there/config.yaml"))
    assert request.ref_imgs == ("there/both.png", "here.png", "there/nowhere.png", f"{tmp_path}/x.png")
    assert (request.model_id, request.output) == ("there/model", Path("there/frames"))
    assert (request.save_latents, request.frame_folder) == (Path("there/a.safetensors"), True)
    assert [lora[0] for lora in request.lora] == ["there/a.safetensors", "owner/name"]
    assert request.flags["ref_imgs"] == [*request.ref_imgs]
    content |= {"model_id": "tiny", "ref_imgs": ["http://a/b.png", "both.png"]}
    request = parse_request([*config(content, "there/config.yaml"), "--output", "a.mp4"])
    assert (request.model_id, request.output) == ("tiny", Path("a.mp4"))
    assert request.ref_imgs == ("http://a/b.png", "there/both.png")
    avatar = {"task_type": "talking_avatar", "prompt": "a", "input_image": "both.png", "input_audio": "a.wav"}
    request = parse_request(config(avatar | {"keyframes": "both.png@1.5,x.png@2"}, "there/config.yaml"))
    assert (request.input_image, request.input_audio) == ("there/both.png", ("there/a.wav",))
    assert request.keyframes == (("there/both.png", 1.5), ("there/x.png", 2.0))


def test_on_and_off_in_a_config_file(config):
    """YAML reads them as booleans, even for flags that also have other values."""
    for written, text in (("on", "on"), ("off", "off"), ("true", "on"), ("'on'", "on"), ("auto", "auto")):
        assert parse_request([*REFERENCE, *config(f"compile: {written}\nenhance_prompt: off")]).compile == text


def test_a_config_file_holds_any_flag(config):
    content = {
        "task_type": "reference_to_video", "prompt": "ein Fuchs: \u00fcber 'Stock'", "ref_imgs": ["a.png", "b,c.png"],
        "seed": 7, "shift": 3, "guidance_scale": 2.5, "num_frames": 9, "height": 32, "width": 48, "quiet": True,
        "offload": False, "output": "x.mp4", "device": "cpu",
    }  # fmt: skip
    request = parse_request(config(content))
    assert request.prompt == content["prompt"]
    assert request.ref_imgs == ("a.png", "b,c.png")
    assert (request.seed, request.shift, request.guidance_scale, request.num_frames) == (7, 3.0, 2.5, 9)
    assert isinstance(request.shift, float)
    assert (request.height, request.width, request.verbosity, request.memory) == (32, 48, -1, "auto")
    assert (request.output, request.device) == (Path("x.mp4"), "cpu")


def test_the_command_line_wins(config):
    flags = config({"prompt": "a dog", "seed": 7, "shift": 3, "duration": 4, "quiet": True})
    for argv in ([*flags, *REFERENCE], [*REFERENCE, *flags]):
        request = parse_request([*argv, "--seed", "8", "--num_frames", "5", "--verbose"])
        assert (request.prompt, request.seed, request.shift) == ("a fox", 8, 3.0)
        assert (request.num_frames, request.verbosity) == (5, 1)  # flags also override conflicting ones in the file


def test_the_config_file_wins_over_the_preset(config):
    assert parse_request([*EXTENSION, *config({"shift": 3, "duration": 10})]).duration == 10


def test_texts_and_references_in_config_files(config):
    assert parse_request([*REFERENCE, *config('shift: "2.5"\nseed: "9"\n')]).shift == 2.5
    assert parse_request([*REFERENCE[:4], *config("ref_imgs: a.png,b.png\n")]).ref_imgs == ("a.png", "b.png")
    assert parse_request([*REFERENCE, *config("\ufeffseed: 3\n")]).seed == 3  # with the BOM that Windows editors write
    assert parse_request([*REFERENCE, *config("{}")]).seed == 42
    for references in ([], ["a.png", ""], ["a"] * 5):
        with pytest.raises(UserError, match=r"--ref_imgs: .*give 1 to 4 images"):
            parse_request([*REFERENCE[:4], *config({"ref_imgs": references})])


def test_the_record_makes_the_same_request_again(config):
    argv = [*REFERENCE, "--ref_imgs", "a.png,b.png", "--seed", "-1", "--num_frames", "9", "--shift", "3", "--low_vram"]
    request = parse_request([*argv, "--output", "a.mp4", "--save_latents", "l.safetensors", "--quiet", "--dry_run"])
    record = json.loads(json.dumps(dict(request.flags)))
    assert record["seed"] == request.seed
    assert record["num_inference_steps"] == 8  # a preset's values are recorded too, since presets may change
    assert not {"output", "save_latents", "quiet", "dry_run", "duration"} & record.keys()
    again = parse_request(config(json.dumps(record)))
    assert again.flags == request.flags
    assert (again.output, again.dry_run, again.verbosity) == (None, False, 0)
    assert (again.ref_imgs, again.num_frames, again.quant) == (request.ref_imgs, 9, "fp8")
    assert (request.memory, again.memory) == ("stream", "auto")  # not recorded: the video does not change


@pytest.mark.parametrize(("task", "durations"), [(REFERENCE, (1, 10)), (EXTENSION, (5, 30)), (SHOT, (2, 5))])
def test_limits_are_allowed(task, durations):
    for duration in durations:
        assert parse_request([*task, "--duration", str(duration)]).duration == duration
    for name, values in {
        "seed": (0, 2**32 - 1),
        "shift": (0.01, 100),
        "num_inference_steps": (1, 200),
        "guidance_scale": (0, 100),
        "prompt": ("x" * 10_000,),
    }.items():
        for value in values:
            assert getattr(parse_request([*task, f"--{name}", str(value)]), name) == value
    assert parse_request([*task, "--height", "1088", "--width", "1920"]).height == 1088


def test_flags_that_change_nothing_are_no_conflict():
    assert not parse_request([*REFERENCE, "--negative_prompt", ""]).negative_prompt
    assert parse_request([*REFERENCE, "--image_guidance_scale", "1"]).image_guidance_scale == 1


def test_help_names_every_flag_and_task(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    for flag in FLAGS:
        assert f"--{flag.name} " in text or f"--{flag.name}\n" in text
    for name in TASK_NAMES:
        assert name in text
    assert max(map(len, text.splitlines())) <= 80
    groups = re.findall(r"^([A-Z][\w ]+):$", text, re.MULTILINE)
    assert len(groups) == 10
    assert len({*groups}) == 10


def test_help_has_a_command_for_each_task():
    text = build_parser().format_help().replace("\\\n", "")
    commands = [
        shlex.split(command) for command in re.findall(r"^ +python3 generate_video\.py (.+)", text, re.MULTILINE)
    ]
    assert tuple(parse_request(command).task.name for command in commands) == TASK_NAMES


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "variables", "code", "words"),
    [
        (["--help"], {}, 0, ["usage: python3 generate_video.py --task_type TASK"]),
        (["--version"], {}, 0, [f"skyreels_v3 {__version__}\n"]),
        (
            [*REFERENCE, "--prompt", "caf\u00e9"], {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            2, ["error: --prompt: ", "UTF-8", "ascii", "set PYTHONUTF8=1 or LC_ALL"],
        ),
        (
            [*REFERENCE, "--gpu_num", "4"], TWO | {"MASTER_ADDR": "127.0.0.1"},
            2, ["error: rank 0: --gpu_num: 4: 2 processes are already running; leave it out"],
        ),
        ([*REFERENCE, "--shift", "nan"], {}, 2, ["error: --shift: nan", "give a number from 0.01 to 100"]),
    ],
    ids=["help", "version", "locale", "torchrun", "usage"],
)  # fmt: skip
def test_the_command(start, argv, variables, code, words):
    run = start(*argv, **variables)
    stdout, stderr = run.communicate()
    assert run.returncode == code
    said, nothing = (stderr, stdout) if code else (stdout, stderr)
    assert said.startswith(words[0]) and all(word in said for word in words) and nothing == ""


PICTURE, STYLE, SOUND = "made Apr 2, 2025, 03_04 PM.png", "style, v2.safetensors", "Hello, take 2.wav"
SCALED = "http://host/fit,w_300,h_200/a.png?x=1,2"
LISTS = {
    "a name with commas": ("ref_imgs", [PICTURE], [PICTURE]),
    "among others": ("ref_imgs", [f"b.png, {PICTURE},c.png"], ["b.png", PICTURE, "c.png"]),
    "nothing of that name": ("ref_imgs", ["no, such.png"], ["no", "such.png"]),
    "an address with commas": ("ref_imgs", [SCALED], [SCALED]),
    "addresses": ("ref_imgs", [f"{SCALED},https://host/b.png", "c.png"], [SCALED, "https://host/b.png", "c.png"]),
    "an address and a file": ("ref_imgs", [f"http://host/b.png,{PICTURE}"], ["http://host/b.png", PICTURE]),
    "sounds": ("input_audio", [SOUND, "b.wav"], [SOUND, "b.wav"]),
    "two sounds": ("input_audio", [f"b.wav,{SOUND}"], ["b.wav", SOUND]),
    "key frames": ("keyframes", [f"{PICTURE}@1.5,b.png@3"], [(PICTURE, 1.5), ("b.png", 3.0)]),
    "addresses of key frames": (
        "keyframes", ["http://host/a,b.png@1,b.png@2", "c.png@3"],
        [("http://host/a,b.png", 1.0), ("b.png", 2.0), ("c.png", 3.0)],
    ),
    "LoRAs": (
        "lora", [f"{STYLE}:0.5,a/b", f"c.safetensors:partial,{STYLE}:-1:partial"],
        [(STYLE, 0.5, False), ("a/b", 1.0, False), ("c.safetensors", 1.0, True), (STYLE, -1.0, True)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_what_commas_separate(case, tmp_path, monkeypatch):
    """Commas in file names and URLs do not separate; repeated flags add up."""
    name, given, expected = LISTS[case]
    for file in (PICTURE, STYLE, SOUND):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    base = REFERENCE[:-2] if name in ("ref_imgs", "lora") else AVATAR
    base = base if name != "input_audio" else base[:-2]
    more = REFERENCE[-2:] if name == "lora" else []
    flags = [word for value in given for word in (f"--{name}", value)]
    assert getattr(parse_request([*base, *more, *flags]), name) == tuple(expected)


@pytest.mark.parametrize("entries", [[PICTURE, "b.png"], ["http://host/a.png,b.png", "c, d.png"]])
def test_lists_of_a_config_file(entries, tmp_path, monkeypatch):
    """Their entries are not split at commas, and the command line replaces the whole list."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(yaml.safe_dump({"ref_imgs": entries, "lora": [f"{STYLE}:2"]}))
    request = parse_request([*REFERENCE[:-2], "--config", "a.yaml"])
    assert request.ref_imgs == tuple(entries)
    assert request.flags["ref_imgs"] == entries
    assert request.lora == ((STYLE, 2.0, False),)
    assert parse_request([*REFERENCE, "--config", "a.yaml"]).ref_imgs == ("a.png",)


@pytest.mark.parametrize(
    "url", ["https://h/v.mp4?sig=a,SECRET", "https://us,er:SECRET@h/a.mp4", "https://h/v.mp4?a=1,b@2,SECRET"]
)
def test_secrets_behind_commas_are_not_recorded(url):
    request = parse_request([*EXTENSION, "--input_video", url])
    assert request.input_video == url and "SECRET" not in json.dumps(dict(request.flags))


def test_a_switch_that_is_off_overrules_nothing(config):
    assert parse_request([*REFERENCE, "--verbose", *config("quiet: false\n")]).verbosity == 1
    assert without_overruled({"offload": True}, {"low_vram": False}) == {"offload": True}


def test_a_size_overrules_a_size(config):
    sized = config("width: 320\nheight: 192\n")
    request = parse_request([*REFERENCE, *sized, "--resolution", "480P"])
    assert (request.resolution, request.width, request.height) == ("480P", None, None)
    request = parse_request([*REFERENCE, *config("resolution: 540P\n"), "--width", "320", "--height", "192"])
    assert (request.width, request.height) == (320, 192)
