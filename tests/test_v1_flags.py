"""SkyReels V1's command-line flags, and what they mean here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from skyreels_v3.cli import parse_flags, parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.inputs import open_inputs
from skyreels_v3.outputs import free_name

T2V = ["--task_type", "t2v", "--prompt", "FPS-24, A cat"]
I2V = ["--task_type", "i2v", "--prompt", "FPS-24, A cat", "--image", "cat.webp"]
TOY = ["--model_id", "tiny", "--device", "cpu"]


def test_the_published_defaults():
    request = parse_request(T2V)
    assert request.model_id == "Skywork/SkyReels-V1-Hunyuan-T2V"
    assert request.task.base_model_id == "hunyuanvideo-community/HunyuanVideo"
    assert (request.height, request.width, request.frames_out, request.task.fps) == (544, 960, 97, 24)
    assert (request.num_inference_steps, request.guidance_scale, request.embedded_guidance_scale) == (30, 6.0, 1.0)
    assert request.negative_prompt.startswith("Aerial view")
    assert request.shift is None
    assert parse_request(I2V).model_id == "Skywork/SkyReels-V1-Hunyuan-I2V"
    assert parse_request(I2V).height is None  # it follows from the image


def test_every_flag_of_v1_is_taken():
    request = parse_request([
        "--task_type", "i2v", "--model_id", "a/b", "--outdir", "films", "--guidance_scale", "5", "--num_frames", "49",
        "--num_inference_steps", "20", "--seed", "3", "--prompt", "FPS-24, A cat", "--negative_prompt", "blur",
        "--height", "720", "--width", "720", "--gpu_num", "4", "--video_num", "2", "--image", "cat.webp",
        "--embedded_guidance_scale", "2", "--fps", "30", "--quant", "--offload", "--high_cpu_memory",
        "--parameters_level", "--compiler_transformer", "--sequence_batch",
    ])  # fmt: skip
    assert (request.model_id, request.outdir, request.guidance_scale, request.frames_out) == ("a/b", "films", 5.0, 49)
    assert (request.num_inference_steps, request.seed, request.negative_prompt) == (20, 3, "blur")
    assert (request.height, request.width, request.video_num, request.image) == (720, 720, 2, "cat.webp")
    assert (request.embedded_guidance_scale, request.task.fps) == (2.0, 30)
    assert (request.quant, request.memory, request.high_cpu_memory, request.compile) == ("fp8", "stream", True, "on")
    assert request.use_usp  # implied by --gpu_num


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quant"], {"quant": "fp8", "memory": "auto"}),
        (["--quant", "fp8_dynamic"], {"quant": "fp8_dynamic"}),
        (["--offload"], {"memory": "offload", "quant": None}),
        (["--offload", "--parameters_level"], {"memory": "stream", "quant": None}),
        (["--low_vram"], {"memory": "stream", "quant": "fp8"}),
        (["--low_vram", "--quant", "fp8_dynamic"], {"memory": "stream", "quant": "fp8_dynamic"}),
        (["--compiler_transformer"], {"compile": "on"}),
        (["--sequence_batch"], {}),
        (["--duration", "2"], {"frames_out": 49}),
        (["--fps", "10", "--duration", "3"], {"frames_out": 29}),
        (["--no_riflex"], {"no_riflex": True}),
    ],
)
def test_what_flags_stand_for(flags, expected):
    request = parse_request([*T2V, *flags])
    assert {name: getattr(request, name) for name in expected} == expected


def test_shorthands_are_recorded_as_what_they_stand_for():
    flags = parse_request([*T2V, "--quant", "--offload", "--parameters_level", "--compiler_transformer"]).flags
    assert flags["quant"] == "fp8" and flags["compile"] == "on"
    assert not {"offload", "parameters_level", "compiler_transformer", "memory"} & flags.keys()


def test_the_prefix_is_added_when_it_is_missing():
    request = parse_request(["--task_type", "t2v", "--prompt", "A cat"])
    assert request.prompt == request.flags["prompt"] == "FPS-24, A cat"
    assert '"FPS-24,"' in request.notes[0]
    assert parse_request(T2V).prompt == "FPS-24, A cat"
    assert not parse_request(T2V).notes


@pytest.mark.parametrize(("given", "made"), [(100, 97), (97, 97), (2, 1), (5, 5), (99, 97)])
def test_frames_are_rounded_as_the_library_does(given, made):
    request = parse_request([*T2V, "--num_frames", str(given)])
    assert request.frames_out == made
    assert (f"{given} becomes {made}" in "".join(request.notes)) == (given != made)


def test_notes_are_told_when_all_is_well(main, caplog):
    code, _, _ = main("--task_type", "t2v", "--prompt", "A cat", "--num_frames", 100, *TOY, "--dry_run")
    assert code == 0
    notes = [record.message for record in caplog.records if record.levelname == "INFO"]
    assert len(notes) == 2 and "100 becomes 97" in "".join(notes) and "FPS-24" in "".join(notes)


def test_several_videos_have_seeds_that_follow():
    videos = [*parse_request([*T2V, "--seed", "7", "--video_num", "3"]).videos()]
    assert [(video.seed, video.number, video.flags["seed"]) for video in videos] == [(7, 0, 7), (8, 1, 8), (9, 2, 9)]


def test_names_in_outdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "FPS-24, A/B: a\\\n cat. " + "\u732b" * 200
    request = parse_request(["--task_type", "t2v", "--prompt", prompt, "--outdir", "films", "--seed", "5"])
    name = free_name(request)
    assert name.parent == Path("results/films")
    assert name.name.startswith("FPS-24, AB: a\\ cat. \u732b") and name.name.endswith("_5_0.mp4")
    name.parent.mkdir(parents=True)
    name.touch()  # the file system accepts the name
    assert free_name(request).name.endswith("_5_0-2.mp4")


@pytest.mark.parametrize(("text", "threshold"), [("fbcache", 0.1), ("fbcache:0.3", 0.3), ("fbcache:0", 0.0)])
def test_cache(text, threshold):
    assert parse_request([*T2V, "--cache", text]).cache == threshold


@pytest.mark.parametrize(
    ("flags", "note", "same"),
    [
        (["--image", "cat.webp"], "--image is not used: t2v takes no image; --task_type i2v", []),
        (["--guidance_scale", "1", "--negative_prompt", "blur"],
         "--negative_prompt is not used: it needs --guidance_scale above 1", ["--guidance_scale", "1"]),
        (["--parameters_level"], "--parameters_level is not used: it needs --offload", []),
        (["--height", "720"], "--width is not given: using 1264, for", ["--height", "720", "--width", "1264"]),
        (["--width", "720"], "--height is not given: using 416, for", ["--height", "416", "--width", "720"]),
        (["--height", "32"], "--width is not given: using 64, for", ["--height", "32", "--width", "64"]),
    ],
)  # fmt: skip
def test_what_v1_does_nothing_with_is_noted(flags, note, same):
    """Without them the request is the same; for other tasks they are an error."""
    request, plain = parse_request([*T2V, *flags]), parse_request([*T2V, *same])
    assert request.notes[0].startswith(note) and len(request.notes) == 1
    assert replace(request, notes=()) == plain
    with pytest.raises(UserError, match=f"^{flags[-2] if len(flags) > 1 else flags[0]}: "):
        parse_request(["--task_type", "reference_to_video", "--ref_imgs", "a.png", "--prompt", "a", *flags])


def test_one_side_of_the_built_in_models_size():
    request = parse_request([*T2V, "--model_id", "tiny", "--width", "320"])
    assert (request.height, request.width) == (192, 320)  # in the ratio of 96 x 160


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--height", "64"], (64, 96)),
        (["--width", "64"], (48, 64)),
        (["--width", "960", "--model_id", "tiny"], (640, 960)),
    ],
)
def test_one_side_of_a_picture(tmp_path, flags, size):
    """The other one follows from the image's aspect ratio, here 3:2."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    request = parse_request([*I2V, *flags, "--image", str(tmp_path / "a.png")])
    opened, _ = open_inputs(request, tmp_path)
    assert (opened.height, opened.width) == size
    assert opened.notes[-1].endswith("for the aspect ratio of the picture")


def test_one_side_of_a_long_picture(tmp_path):
    Image.new("RGB", (3000, 100)).save(tmp_path / "a.png")
    request = parse_request([*I2V, "--height", "1280", "--image", str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="--height: 2048 x 1280 is 2,621,440 pixels; give a size of at most"):
        open_inputs(request, tmp_path)


def test_the_old_name_makes_a_t2v_where_no_task_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("task_type: i2v")
    for argv, task in (
        ([], "t2v"), (["--task_type", "i2v"], "i2v"), (["--config", str(tmp_path / "a.yaml")], "i2v"),
        (["--jobs", "a.jsonl"], "t2v"),
    ):  # fmt: skip
        assert parse_flags(argv, "t2v")["task_type"] == task
    with pytest.raises(UserError, match="--task_type: missing; choose one of"):
        parse_request(T2V[2:])


def test_the_processes_are_told_of_the_task(main, monkeypatch):
    started = []
    monkeypatch.setattr("skyreels_v3.parallel.launch.launch", lambda command, processes: started.append(command) or 0)
    assert main(*T2V[2:], *TOY, "--gpu_num", "2", default_task="t2v")[0] == 0
    assert parse_flags(started[0][2:])["task_type"] == "t2v"


def test_gpu_num_of_jobs_is_no_usp():
    assert "use_usp" not in parse_flags(["--gpu_num", "2", "--jobs", "a.jsonl"])
    assert parse_flags([*T2V, "--gpu_num", "2"])["use_usp"]


def test_a_seed_that_leaves_no_room_for_the_others(monkeypatch):
    with pytest.raises(UserError, match=r"--seed: 4294967294: .*; give at most 4294967293"):
        parse_request([*T2V, "--video_num", "3", "--seed", "4294967294"])
    assert [*parse_request([*T2V, "--video_num", "3", "--seed", "4294967293"]).videos()][-1].seed == 2**32 - 1
    monkeypatch.setattr("secrets.randbelow", lambda limit: limit - 1)
    drawn = parse_request([*T2V, "--video_num", "3", "--seed", "-1"])
    assert [video.seed for video in drawn.videos()] == [2**32 - 3, 2**32 - 2, 2**32 - 1]


@pytest.mark.parametrize("argv", [T2V, I2V], ids=["t2v", "i2v"])
def test_what_is_recorded_makes_the_same_request(argv, tmp_path, monkeypatch):
    """A video's recorded flags work as a --config file."""
    flags = ["--num_frames", "100", "--quant", "--cache", "fbcache:0.2", "--fps", "30", "--no_riflex", "--seed", "9"]
    request = parse_request([*argv, *flags])
    monkeypatch.chdir(tmp_path)
    Path("made.yaml").write_text(json.dumps(dict(request.flags)))
    again = parse_request(["--config", "made.yaml"])
    assert replace(again, notes=request.notes) == request
    assert again.flags == request.flags


def test_the_rate_changes_no_limit():
    assert parse_request([*T2V, "--fps", "60"]).frames_out == 97  # as at 24 fps
    assert parse_request([*T2V, "--fps", "60", "--duration", "5"]).frames_out == 301
    with pytest.raises(UserError, match="--duration: 16: too long at --fps 60; t2v makes up to 385 frames"):
        parse_request([*T2V, "--fps", "60", "--duration", "16"])
