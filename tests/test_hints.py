"""Suggestions for unknown flags and for invalid choices."""

from __future__ import annotations

import re

import pytest

from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.hints import remedies
from skyreels_v3.request import BY_NAME

RENAMED = {
    "frame_num": "num_frames", "sample_steps": "num_inference_steps", "sample_shift": "shift", "base_seed": "seed",
    "sample_guide_scale": "guidance_scale", "save_file": "output", "ulysses_size": "ulysses_degree",
    "ring_size": "ring_degree", "ckpt_dir": "model_id", "audio": "input_audio", "steps": "num_inference_steps",
    "batch-size": "video_num", "cfg": "guidance_scale",
}  # fmt: skip
# a command line for another tool, and its equivalent here
SUGGESTIONS = {
    **{f"--{theirs} 7": f"give --{ours} 7" for theirs, ours in RENAMED.items()},
    "--size 832*480": "give --height 480 --width 832",
    "--size=1280x720": "give --height 720 --width 1280",
    "--video-size 720": "give --height and --width",
    "--offload_model True": "give --offload",
    "--offload_model False": "leave it out",
    "---seed 1": "did you mean --seed?",
    "--HELP": "did you mean --help?",
    "--task t2v-14B": "give --task_type t2v",
    "--task s2v-14B": "give --task_type talking_avatar",
    "--task vace": "give --task_type",
    "--t5_cpu": "leave it out: text encoders and VAE are offloaded",
    "--dit_fsdp": "give --use_usp --shard_weights",
    "--convert_model_dtype": "leave it out: weights are loaded in --dtype",
    "--teacache_thresh 0.1": "give --cache fbcache",
    "--n_prompt=ugly": "give --negative_prompt ugly",
    "--Num-Steps": "give --num_inference_steps",
    "--gpu_id 1": "set CUDA_VISIBLE_DEVICES=1",
    "--num-frames 5": "did you mean --num_frames?",
    "-seed 1": "did you mean --seed?",
    "--guidence_scale 1": "did you mean --guidance_scale?",
    "--dur 5": "did you mean --duration?",
    "--denoise 1": "see --help",
    "--in 1": "see --help",
}


@pytest.mark.parametrize("words", SUGGESTIONS)
def test_a_flag_of_another_tool(words):
    flag = re.match(r"[\w-]+", words)[0]
    with pytest.raises(UserError, match=rf"^{flag}: there is no such flag; {re.escape(SUGGESTIONS[words])}"):
        parse_request(["--task_type", "t2v", "--prompt", "x", *words.split()])


def test_hints_are_of_flags_that_there_are():
    assert not remedies().keys() & BY_NAME.keys()
    for remedy in remedies().values():
        assert {*re.findall(r"--(\w+)", remedy)} <= BY_NAME.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resolution", "1080P"], "480P, 540P or 720P, or --height and --width for other sizes"),
        (["--resolution", "832x480"], "480P, 540P or 720P, or --height 480 --width 832"),
        (["--resolution", "720p"], "did you mean 720P"),
        (["--resolution", "640P"], "480P, 540P or 720P$"),
        (["--task_type", "i2v-A14B"], "did you mean i2v"),
        (["--task_type", "text-to-video"], "did you mean t2v"),
        (["--dtype", "float16"], "bfloat16 or float32$"),
        (["--device", "gpu"], "did you mean cuda"),
        (["--device", "cuda:1"], "to choose a GPU set CUDA_VISIBLE_DEVICES=1"),
        (["--offload", "True"], "^--offload: True: a switch takes no value; give --offload alone for yes"),
        (
            ["\u2014seed", "1"],
            "^command line: \u2014seed begins with a typographic dash instead of two hyphens; type --seed",
        ),
        (["--prompt a fox"], 'there is no such flag; put quotes around the value only: --prompt "a fox"'),
        ([""], "^command line: an empty value does not belong to any flag"),
        (["a", "fox"], "^command line: a does not belong to any flag; put quotes"),
    ],
)
def test_a_value_that_is_none(argv, message):
    with pytest.raises(UserError, match=message):
        parse_request(argv)


def test_keys_of_files_have_no_dashes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("size: 832*480\n")
    with pytest.raises(UserError, match=r"unknown key size; give height 480 width 832$"):
        parse_request(["--config", str(path)])
