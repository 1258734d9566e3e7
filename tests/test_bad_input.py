"""Requests that cannot work: one line that names flag, value and way out, exit code 2, at once, without torch.

Every case runs in a process of its own, with hubs that cannot be reached, and must leave its folder as it was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.numpy import save_file

from skyreels_v3.runtime import GPU_DRIVERS, has_library
from tests.conftest import Case, bad, check_refused

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
REFERENCE = [
    *("--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "{files}/good.png"),
    *("--model_id", "tiny", "--device", "cpu"),
]
EXTENSION = [
    *("--task_type", "single_shot_extension", "--prompt", "a", "--input_video", "{assets}/boat.mp4"),
    *("--model_id", "tiny", "--device", "cpu"),
]
SHOT = [*EXTENSION, "--task_type", "shot_switching_extension"]
LOCAL = ["--allow_private_urls"]
URL = [*LOCAL, "--url_timeout", "0.5"]


def config(name: str, shown: str, remedy: str) -> Case:
    """A good command line with a bad config file."""
    return Case(f"config-{name}", [*REFERENCE, "--config", f"{{files}}/{name}"], "--config", shown, remedy)


TASK = [
    Case("nothing", [], "--task_type", "missing", "choose one of reference_to_video, shot_switching_extension"),
    bad(REFERENCE, "--task_type", "reference_to_vdeo", "did you mean reference_to_video?"),
    bad(REFERENCE, "--task_type", "poetry", "choose reference_to_video, shot_switching_extension, single_shot"),
    bad(REFERENCE, "--task_type", "", "choose reference_to_video", "an empty value", "empty"),
    Case("reference-no-images", ["--task_type", "reference_to_video", "--prompt", "a"], "--ref_imgs", "missing", "1-4"),
    Case(
        "single-no-clip", ["--task_type", "single_shot_extension", "--prompt", "a"],
        "--input_video", "missing", "clip to extend",
    ),
    Case(
        "shot-no-clip", ["--task_type", "shot_switching_extension", "--prompt", "a"],
        "--input_video", "missing", "clip to extend",
    ),
    Case(
        "no-prompt", ["--task_type", "reference_to_video", "--ref_imgs", "{files}/good.png"],
        "--prompt", "missing", "say what happens",
    ),
]  # fmt: skip

COMMAND_LINE = [
    Case("unknown-flag", [*REFERENCE, "--promt", "x"], "--promt", "no such flag", "did you mean --prompt?"),
    Case("unknown-flag=", [*REFERENCE, "--heigth=32"], "--heigth", "no such flag", "did you mean --height?"),
    Case("unknown-strange", [*REFERENCE, "--zzz"], "--zzz", "no such flag", "see --help"),
    Case("abbreviated-flag", [*REFERENCE, "--dur", "5"], "--dur", "no such flag", "did you mean --duration?"),
    Case("stray", [*REFERENCE, "second", "third"], "command line", "second", "put quotes around"),
    Case("stray-dash", [*REFERENCE, "-x"], "command line", "-x", "put quotes around"),
    Case("no-value-at-end", [*REFERENCE, "--seed"], "--seed", "no value", "see --help"),
    Case("no-value-before-flag", [*REFERENCE, "--seed", "--offload"], "--seed", "no value", "see --help"),
    Case("switch-with-value", [*REFERENCE, "--quiet=yes"], "--quiet", "yes", "see --help"),
    Case("ring alone", [*REFERENCE, "--ring_degree", "2"], "--ring_degree", "2: is for several", "add --use_usp"),
    Case("shards alone", [*REFERENCE, "--shard_weights"], "--shard_weights", "several processes", "add --use_usp"),
    bad([*REFERENCE, "--use_usp"], "--ulysses_degree", "2", "leave them out"),
    bad([*REFERENCE, "--use_usp"], "--cfg_degree", "2", "turn guidance on"),
    bad([*REFERENCE, "--use_usp"], "--cfg_degree", "4", "from 1 to 3"),
    Case(
        "streamed shards",
        [*REFERENCE, "--use_usp", "--shard_weights", "--low_vram"],
        "--shard_weights",
        "conflicts with --low_vram",
        "give one of them",
    ),
]

NUMBERS = [
    *[bad(EXTENSION, "--duration", value, "5 to 30 whole seconds") for value in ("4", "31", "0", "-5", "1000000")],
    bad(REFERENCE, "--duration", "11", "1 to 10 whole seconds"),
    *[bad(SHOT, "--duration", value, "2 to 5 whole seconds") for value in ("1", "6")],
    *[bad(EXTENSION, "--duration", value, "give a whole number") for value in ("5.5", "abc", "nan", "inf", "5s")],
    bad(EXTENSION, "--duration", "", "give a whole number", "an empty value", "empty"),
    *[bad(REFERENCE, "--num_frames", value, remedy) for value, remedy in (("6", "give 5 or 9"), ("0", "from 1 to"))],
    *[bad(REFERENCE, "--num_frames", value, "give a whole number") for value in ("-3", "1e9", "nan", "100001")],
    *[bad(REFERENCE, "--seed", value, "from -1 to 4294967295") for value in ("-2", "4294967296")],
    *[bad(REFERENCE, "--seed", value, "give a whole number") for value in ("1.5", "nan", "x")],
    bad(REFERENCE, "--seed", "9" * 5000, "give a whole number", "999999...999999"),
    *[
        bad(REFERENCE, "--num_inference_steps", value, "whole number from 1 to 200")
        for value in ("0", "-1", "nan", "inf", "8.0", "100000")
    ],
    *[
        bad(REFERENCE, "--shift", value, "give a number from 0.01 to 100")
        for value in ("0", "-1", "nan", "inf", "-inf", "-1e5", "1e999", "five")
    ],
    *[
        bad(REFERENCE, "--guidance_scale", value, "give a number from 0 to 100")
        for value in ("nan", "-1", "inf", "-inf", "1e9")
    ],
    *[
        bad([*REFERENCE, "--guidance_scale", "2"], "--image_guidance_scale", value, "give a number from 0 to 100")
        for value in ("nan", "-0.5", "inf", "x")
    ],
    *[bad(REFERENCE, "--url_timeout", v, "give a number from") for v in ("0", "-1", "nan", "inf")],
    bad(REFERENCE, "--resolution", "1080P", "choose 480P, 540P or 720P"),
    bad(REFERENCE, "--resolution", "720", "did you mean 720P?"),
    bad(REFERENCE, "--device", "gpu", "choose auto, cuda, cpu or mps"),
    bad(REFERENCE, "--dtype", "float16", "choose bfloat16 or float32"),
    bad(REFERENCE, "--model_source", "github", "choose huggingface or modelscope"),
]  # fmt: skip

SIZES = [
    Case("height-not-16", [*REFERENCE, "--height", "500", "--width", "480"], "--height", "500", "give 496 or 512"),
    Case("width-not-16", [*REFERENCE, "--height", "480", "--width", "481"], "--width", "481", "give 480 or 496"),
    Case("absurd", [*REFERENCE, "--height", "160000", "--width", "16"], "--height", "160000", "from 16 to 2048"),
    Case("zero", [*REFERENCE, "--height", "0", "--width", "16"], "--height", "0", "from 16 to 2048"),
    Case("negative", [*REFERENCE, "--height", "16", "--width", "-16"], "--width", "-16", "from 16 to 2048"),
    Case("too-many-pixels", [*REFERENCE, "--height", "2048", "--width", "2048"], "--height", "2048 x 2048", "at most"),
    Case("no-width", [*REFERENCE, "--height", "480"], "--height", "480", "give --width as well"),
    Case("no-height", [*REFERENCE, "--width", "480"], "--width", "480", "give --height as well"),
    Case("height-nan", [*REFERENCE, "--height", "nan", "--width", "16"], "--height", "nan", "give a whole number"),
]

CONFLICTS = [
    bad([*REFERENCE, "--num_frames", "5"], "--duration", "5", "conflicts with --num_frames; give one of them"),
    Case("quiet+verbose", [*REFERENCE, "--quiet", "--verbose"], "--quiet", "--verbose", "give one of them"),
    bad(EXTENSION, "--ref_imgs", "{files}/good.png", "single_shot_extension does not take it; leave it out"),
    bad(SHOT, "--ref_imgs", "{files}/good.png", "shot_switching_extension does not take it; leave it out"),
    bad(REFERENCE, "--input_video", "{assets}/boat.mp4", "reference_to_video does not take it; leave it out"),
    bad(EXTENSION, "--num_frames", "5", "does not take it; give --duration instead"),
    bad(EXTENSION, "--image_guidance_scale", "0", "does not take it; leave it out"),
    Case("include_input", [*REFERENCE, "--include_input"], "--include_input", "does not take it", "leave it out"),
    bad(REFERENCE, "--image_guidance_scale", "2", "give --guidance_scale above 1"),
    bad(REFERENCE, "--image_guidance_scale", "0", "give --guidance_scale above 1"),
    bad(REFERENCE, "--negative_prompt", "blur", "give --guidance_scale above 1"),
    Case(
        "guidance-off", [*REFERENCE, "--guidance_scale", "1", "--negative_prompt", "blur"],
        "--negative_prompt", "blur", "give --guidance_scale above 1",
    ),
    Case(
        "latents-in-video", [*REFERENCE, "--output", "a.mp4", "--save_latents", "a.mp4/l.safetensors"],
        "--save_latents", "a.mp4/l.safetensors", "give another path",
    ),
]  # fmt: skip

PROMPTS = [
    bad(REFERENCE, "--prompt", "", "say what happens", "empty", "empty"),
    bad(REFERENCE, "--prompt", " \t\n ", "say what happens", "empty", "blank"),
    bad(REFERENCE, "--prompt", "x" * 100_000, "give at most 10000", "100000 characters are too many"),
    bad([*REFERENCE, "--guidance_scale", "2"], "--negative_prompt", "x" * 100_000, "give at most", "100000 characters"),
    bad(REFERENCE, "--prompt", os.fsdecode(b"caf\xe9"), "type it again", "is not UTF-8", "latin-1"),
]

FIVE = ",".join(["{files}/good.png"] * 5)
IMAGES = [
    bad(REFERENCE, "--ref_imgs", "", "give 1 to 4 images", "an empty value", "none"),
    bad(REFERENCE, "--ref_imgs", FIVE, "give 1 to 4 images", "5 entries", "five"),
    bad(REFERENCE, "--ref_imgs", "{files}/good.png,", "give 1 to 4 images, comma-separated, none empty", "2 entries"),
    bad(REFERENCE, "--ref_imgs", "{files}/good.png, ,{files}/good.png", "none empty", "3 entries", "empty-entry"),
    bad(REFERENCE, "--ref_imgs", "{files}/nothere.png", "check the path"),
    bad(REFERENCE, "--ref_imgs", "{files}/good.png,{files}/nothere.png", "check the path", "{files}/nothere.png"),
    bad(REFERENCE, "--ref_imgs", "{files}/good.png/a.png", "check the path"),
    bad(REFERENCE, "--ref_imgs", "{files}/dangling", "check the path"),
    bad(REFERENCE, "--ref_imgs", "{files}/folder", "give a file"),
    bad(REFERENCE, "--ref_imgs", "{files}/fifo", "give an ordinary file"),
    bad(REFERENCE, "--ref_imgs", "/dev/zero", "give an ordinary file"),
    bad(REFERENCE, "--ref_imgs", "{files}/empty", "give a complete file"),
    bad(REFERENCE, "--ref_imgs", "{files}/cut.png", "give a complete file"),
    bad(REFERENCE, "--ref_imgs", "{files}/cut.jpg", "give a complete file"),
    bad(REFERENCE, "--ref_imgs", "{files}/text.png", "give a JPEG, PNG"),
    bad(REFERENCE, "--ref_imgs", "{assets}/boat.mp4", "give a JPEG, PNG"),
    bad(REFERENCE, "--ref_imgs", "x" * 5000, "check", "xxx...xxx"),
]

CLIPS = [
    bad(EXTENSION, "--input_video", "", "give a file", "an empty path", "empty"),
    bad(EXTENSION, "--input_video", "{files}/nothere.mp4", "check the path"),
    bad(SHOT, "--input_video", "{files}/nothere.mp4", "check the path"),
    bad(EXTENSION, "--input_video", "{files}/dangling", "check the path"),
    bad(EXTENSION, "--input_video", "{files}/folder", "give a file"),
    bad(EXTENSION, "--input_video", "{files}/fifo", "give an ordinary file"),
    bad(EXTENSION, "--input_video", "{files}/empty", "give a complete file"),
    bad(EXTENSION, "--input_video", "{files}/cut.mp4", "give a complete video file"),
    bad(EXTENSION, "--input_video", "{files}/text.mp4", "give a"),
    bad(EXTENSION, "--input_video", "{files}/good.png", "give a video clip"),
    bad(EXTENSION, "--input_video", "{files}/sound.m4a", "give a video clip"),
    bad(EXTENSION, "--input_video", "{files}/sound.wav", "give a video clip"),
    bad(EXTENSION, "--input_video", "{files}/playlist.m3u8", "give a"),
    bad(EXTENSION, "--input_video", "{files}/short.mp4", "25 frames at 24 frames per second"),
    bad([*SHOT, "--duration", "2"], "--input_video", "{files}/short.mp4", "9 frames at 24 frames per second"),
    bad([*SHOT, "--duration", "5"], "--input_video", "{files}/short.mp4", "33 frames at 24 frames per second"),
]

ADDRESSES = [
    *[
        bad([*base, *URL], flag, value.format(server="{server}", file=file), remedy)
        for base, flag, file in ((REFERENCE, "--ref_imgs", "a.png"), (EXTENSION, "--input_video", "a.mp4"))
        for value, remedy in (
            ("ftp://example.org/{file}", "download it and give the path"),
            ("file:///etc/{file}", "download it and give the path"),
            ("{server}/missing/{file}", "404"),
            ("{server}/html/{file}", "give the address of the file itself"),
            ("{server}/disguised/{file}", "give the address of the file itself"),
            ("{server}/oversize/{file}", "scale it down"),
            ("{server}/empty/{file}", "check the address"),
            ("http://127.0.0.1:9/{file}", "check address and network"),
        )
    ],
    bad([*REFERENCE, *LOCAL], "--ref_imgs", "{server}/silent/a.png", "raise --url_timeout"),  # with the default timeout
    bad([*EXTENSION, *LOCAL], "--input_video", "{server}/silent/a.mp4", "raise --url_timeout"),
    bad([*EXTENSION, *URL], "--input_video", "{server}/text/a.mp4", "not media"),
    bad([*EXTENSION, *URL], "--input_video", "{server}/garbage/a.mp4", "is truncated or not a video; give a complete"),
    bad([*REFERENCE, *URL], "--ref_imgs", "{server}/garbage/a.png", "is not a picture; give a JPEG"),
    bad([*REFERENCE, *URL], "--ref_imgs", "http://:bad:/a.png", "check"),
]  # fmt: skip

OUTPUTS = [
    bad(REFERENCE, "--output", "", "give a name ending in .mp4", "an empty value", "empty"),
    bad(REFERENCE, "--output", "video", "give a name ending in .mp4, or in / for a folder"),
    bad(REFERENCE, "--output", "video.avi", "give a name ending in .mp4, or in / for a folder"),
    bad(REFERENCE, "--output", ".mp4", "give a name ending in .mp4, or in / for a folder"),
    bad(REFERENCE, "--output", "{files}/good.mp4", "give another name"),
    bad(REFERENCE, "--output", "{files}/folder/", "give", "exists already"),
    bad(REFERENCE, "--output", "{files}/folder.mp4", "give", "exists already"),
    bad(REFERENCE, "--output", "{files}/dangling.mp4", "give another name"),
    bad(REFERENCE, "--output", "{files}/good.png/a.mp4", "give another path"),
    bad(REFERENCE, "--output", "/proc/nothere/a.mp4", "give another path"),
    bad(REFERENCE, "--output", "/dev/null/a.mp4", "give another path"),
    bad(REFERENCE, "--output", "y" * 250 + ".mp4", "give a shorter", "yyy...yyy"),
    bad(REFERENCE, "--save_latents", "latents.pt", "give a name ending in .safetensors"),
    bad(REFERENCE, "--save_latents", "", "give a name ending in .safetensors", "an empty value", "empty"),
    bad(REFERENCE, "--save_latents", "{files}/good.safetensors", "give another name"),
    bad(REFERENCE, "--save_latents", "/proc/a.safetensors", "give another path"),
]

CONFIGS = [
    config("nothere.yaml", "nothere.yaml cannot be read", "check the path"),
    config("folder", "folder does not say how it was made", "give a video"),
    config("fifo", "fifo is not a file", "give one"),
    config("huge.yaml", "huge.yaml is not a file of at most", "give one"),
    config("empty", "holds no 'flag: value' lines", "write some"),
    config("text.mp4", "does not say how it was made", "give a video"),
    config("list.yaml", "holds no 'flag: value' lines", "write some"),
    config("broken.yaml", "is not YAML (line 3", "write 'flag: value' lines"),
    config("nest.yaml", "is not YAML", "write 'flag: value' lines"),
    config("date.yaml", "is not YAML (month must be", "write 'flag: value' lines"),
    config("binary.yaml", "is not YAML", "write 'flag: value' lines"),
    config("key.yaml", "unknown key heigth", "did you mean height?"),
    config("number-key.yaml", "unknown key 5", "see --help"),
    config("wrong-seed.yaml", "--seed: 1.5", "give a whole number from -1"),
    config("wrong-shift.yaml", "--shift: a list", "give a number from 0.01"),
    config("wrong-hex.yaml", "--seed: an endless number", "give a whole number"),
    config("wrong-quiet.yaml", "--quiet: soon", "give true or false"),
    config("wrong-true.yaml", "--duration: True", "give a whole number"),
    config("wrong-prompt.yaml", "--prompt: a mapping", "put it in quotes"),
    config("wrong-null.yaml", "--prompt: None", "put it in quotes"),
    config("wrong-resolution.yaml", "--resolution: 720", "did you mean 720P?"),
    config("wrong-images.yaml", "--ref_imgs: 5", "put it in quotes"),
    config("range.yaml", "--shift: nan", "give a number from 0.01 to 100"),
    Case("config-empty-name", [*REFERENCE, "--config", ""], "--config", "an empty value", "give one"),
    config("config.yaml", "unknown key config", "see --help"),
    Case(
        "config-conflict", ["--config", "{files}/both.yaml", *REFERENCE], "--duration", "5", "give one of them",
    ),
]  # fmt: skip

MODELS = [
    bad(REFERENCE, "--model_id", "{files}/good.png", "give a checkpoint's folder or a hub id"),
    bad(REFERENCE, "--model_id", "", "give a folder, an id such as Skywork/", "an empty value", "empty"),
    bad(REFERENCE, "--model_id", "no such thing", "give a folder, an id such as Skywork/"),
    bad(REFERENCE, "--model_id", "./nothere", "give a folder"),
    bad(REFERENCE, "--model_id", "../a/b", "give a folder"),
    bad(REFERENCE, "--model_id", "/nothere/at/all", "give a folder"),
    bad(REFERENCE, "--model_id", "~nobodyhere/x", "give a folder"),
    bad(REFERENCE, "--model_id", "z" * 5000, "give a folder", "zzz...zzz"),
    bad(REFERENCE, "--model_id", "a\nb", "give a folder", "a\\nb", "two-lines"),
    bad(REFERENCE, "--model_id", "Skywork/SkyReels-V3-V2V-14B", "needs Skywork/SkyReels-V3-R2V-14B"),
    bad(EXTENSION, "--model_id", "Skywork/SkyReels-V3-Reference2Video", "needs Skywork/SkyReels-V3-V2V-14B"),
    Case(
        "cuda-without-driver", [*REFERENCE, "--device", "cuda"], "--device", "cuda: this machine has no", "--device cpu"
    ),
    Case("mps-elsewhere", [*REFERENCE, "--device", "mps"], "--device", "mps: this machine is no", "--device cpu"),
    Case(
        "modelscope-without-package", [*REFERENCE, "--model_id", "a/b", "--model_source", "modelscope"],
        "--model_source", "modelscope needs its package", "pip install modelscope",
    ),
]  # fmt: skip


STREAM = [*REFERENCE, "--memory", "stream"]
MEMORY = [
    bad(REFERENCE, "--memory", "ofload", "did you mean offload?"),
    bad(REFERENCE, "--memory", "", "choose auto, resident, offload or stream", "an empty value", "empty"),
    bad(REFERENCE, "--quant", "int4", "choose fp8 or fp8_dynamic"),
    bad(REFERENCE, "--quant", "FP8", "choose fp8 or fp8_dynamic"),
    bad(REFERENCE, "--attention", "flash2", "did you mean flash?"),
    bad(REFERENCE, "--attention", "none", "choose auto, sdpa, cudnn, flash, flash3, sage or xformers"),
    bad(REFERENCE, "--vae_dtype", "float16", "choose bfloat16 or float32"),
    *[
        bad(
            [*REFERENCE, "--dtype", "bfloat16"],
            "--attention",
            kernel,
            "use --attention auto or sdpa",
            f"{kernel}: works on a GPU",
        )
        for kernel in ("cudnn", "flash", "flash3", "sage", "xformers")
    ],
    *[bad(REFERENCE, "--stream_blocks", value, "add --memory stream or --low_vram") for value in ("0", "3")],
    bad([*REFERENCE, "--offload"], "--stream_blocks", "1", "add --memory stream or --low_vram"),
    *[bad(STREAM, "--stream_blocks", v, "whole number from 0 to 999") for v in ("-1", "1000", "1.5", "all", "nan")],
    bad(REFERENCE, "--save_quantized", "{files}/q", "add --quant fp8 or --low_vram"),
    bad([*REFERENCE, "--quant", "fp8"], "--save_quantized", "{files}/folder", "give", "exists already"),
    bad([*REFERENCE, "--low_vram"], "--save_quantized", "{files}/good.png", "give another name", "exists already"),
    bad([*REFERENCE, "--quant", "fp8"], "--save_quantized", "{files}/good.png/q", "give another path"),
    bad([*REFERENCE, "--quant", "fp8"], "--save_quantized", "/proc/q", "give another path"),
    Case("offload+low_vram", [*REFERENCE, "--offload", "--low_vram"], "--offload", "--low_vram", "give one of them"),
    bad([*REFERENCE, "--offload"], "--memory", "stream", "conflicts with --offload; give one of them"),
    bad([*REFERENCE, "--low_vram"], "--memory", "resident", "conflicts with --low_vram; give one of them"),
    Case("offload=no", [*REFERENCE, "--offload=no"], "--offload", "no", "see --help"),
]

LORAS = [
    bad(REFERENCE, "--lora", "", "give FILE, FOLDER or OWNER/NAME", "an empty value", "empty"),
    bad(REFERENCE, "--lora", "{files}/good.lora.safetensors,", "give FILE, FOLDER or OWNER/NAME", "an empty value"),
    bad(REFERENCE, "--lora", "{files}/good.lora.safetensors:nan", "its scale after a colon"),
    bad(REFERENCE, "--lora", "{files}/good.lora.safetensors:inf", "its scale after a colon"),
    bad(REFERENCE, "--lora", "{files}/nothere.safetensors", "give a .safetensors file", "is no file or folder"),
    bad(REFERENCE, "--lora", "{files}/nothere.safetensors:0.5", "give a .safetensors file", "{files}/nothere"),
    bad(REFERENCE, "--lora", "{files}/good.lora.safetensors:half", "give a .safetensors file", "safetensors:half"),
    bad(REFERENCE, "--lora", "{files}/good.lora.safetensors,{files}/nothere.safetensors", "give a", "nothere"),
    bad(REFERENCE, "--lora", "{files}/good.png", "convert it", "is no .safetensors file"),
    bad(REFERENCE, "--lora", "{files}/folder", "give the LoRA's own file", "no .safetensors file"),
    bad(REFERENCE, "--lora", "{files}/good.safetensors", "download it again", "is truncated or no safetensors"),
    bad(REFERENCE, "--lora", "{files}/cut.lora.safetensors", "download it again", "is truncated or damaged"),
    bad(REFERENCE, "--lora", "{files}/dangling", "give a .safetensors file", "is no file or folder"),
    bad(REFERENCE, "--lora", "/dev/zero", "give a .safetensors file", "is no file or folder"),
    bad(REFERENCE, "--lora", "x" * 5000, "give a .safetensors file", "xxx...xxx"),
]


def cut(path: Path, size: int = -100) -> None:
    """Cut a file off; a negative size counts from its end."""
    path.write_bytes(path.read_bytes()[:size])


def two_files(root: Path) -> None:
    shutil.copy(root / "vae" / WEIGHTS, root / "vae" / "a.safetensors")
    (root / "vae" / WEIGHTS).rename(root / "vae" / "b.safetensors")


REFERENCE_TO_VIDEO, VIDEO_EXTENSION = "reference_to_video", "video_extension"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OFFSETS = b'{"a": {"data_offsets": [0, "x"]}}'
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


def damage_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# name: (checkpoint, how it is damaged, what the error must say)
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty-folder": (
        REFERENCE_TO_VIDEO,
        lambda root: [shutil.rmtree(path) for path in root.iterdir() if path.is_dir()],
        "missing transformer/config.json, vae/config.json, text_encoder/config.json, tokenizer/tokenizer.json",
    ),
    "no-weights": (
        REFERENCE_TO_VIDEO,
        lambda root: (root / "transformer" / WEIGHTS).unlink(),
        "missing transformer/*.safetensors",
    ),
    "no-tokenizer": (
        REFERENCE_TO_VIDEO,
        lambda root: shutil.rmtree(root / "tokenizer"),
        "missing tokenizer/tokenizer.json",
    ),
    "no-vae-file": (
        VIDEO_EXTENSION,
        lambda root: (root / "Wan2.1_VAE.pth").unlink(),
        "missing Wan2.1_VAE.pth",
    ),
    "no-transformer": (
        VIDEO_EXTENSION,
        lambda root: (root / "transformer").rename(root / "x"),
        "missing transformer/config.json",
    ),
    "missing-shard": (
        VIDEO_EXTENSION,
        lambda root: (root / "transformer" / SHARD).unlink(),
        f"missing shards {{root}}/transformer/{SHARD}",
    ),
    "truncated-shard": (
        VIDEO_EXTENSION,
        lambda root: cut(root / "transformer" / SHARD),
        f"transformer/{SHARD} is truncated or damaged",
    ),
    "truncated-file": (
        REFERENCE_TO_VIDEO,
        lambda root: cut(root / "vae" / WEIGHTS),
        f"vae/{WEIGHTS} is truncated or damaged",
    ),
    "cut-in-header": (
        REFERENCE_TO_VIDEO,
        lambda root: cut(root / "vae" / WEIGHTS, 500),
        f"vae/{WEIGHTS} is truncated",
    ),
    "empty-file": (
        REFERENCE_TO_VIDEO,
        lambda root: cut(root / "vae" / WEIGHTS, 0),
        f"vae/{WEIGHTS} is truncated",
    ),
    "no-safetensors": (
        REFERENCE_TO_VIDEO,
        lambda root: (root / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"),
        f"vae/{WEIGHTS} is truncated or no safetensors file",
    ),
    "wrong-offsets": (
        REFERENCE_TO_VIDEO,
        lambda root: (root / "vae" / WEIGHTS).write_bytes(struct.pack("<Q", len(OFFSETS)) + OFFSETS),
        f"vae/{WEIGHTS} is truncated or no safetensors file",
    ),
    "two-files": (
        REFERENCE_TO_VIDEO,
        two_files,
        "vae holds 2 safetensors files and no index",
    ),
    "broken-index": (
        VIDEO_EXTENSION,
        lambda root: (root / "transformer" / f"{WEIGHTS}.index.json").write_text("[" * 100_000),
        f"{WEIGHTS}.index.json cannot be read",
    ),
    "index-of-elsewhere": (
        VIDEO_EXTENSION,
        lambda root: damage_json(
            root / "transformer" / f"{WEIGHTS}.index.json", weight_map={"a": "../shot_transformer/x"}
        ),
        "missing shards {root}/transformer/../shot_transformer/x",
    ),
    "truncated-pth": (
        VIDEO_EXTENSION,
        lambda root: cut(root / "models_t5_umt5-xxl-enc-bf16.pth"),
        "models_t5_umt5-xxl-enc-bf16.pth is truncated",
    ),
    "broken-config": (
        REFERENCE_TO_VIDEO,
        lambda root: cut(root / "transformer" / "config.json", 40),
        "transformer/config.json cannot be read",
    ),
    "list-config": (
        REFERENCE_TO_VIDEO,
        lambda root: (root / "vae" / "config.json").write_text("[]"),
        "vae/config.json is no JSON object",
    ),
    "wrong-size": (
        REFERENCE_TO_VIDEO,
        lambda root: damage_json(root / "transformer" / "config.json", num_layers="two"),
        "transformer/config.json: num_layers = two",
    ),
    "no-heads": (
        VIDEO_EXTENSION,
        lambda root: damage_json(root / "transformer" / "config.json", num_heads=0),
        "transformer/config.json: num_heads = 0",
    ),
}

# what would work on some machines
NOT_BAD = {
    name
    for name, works in {
        "cuda-without-driver": any(has_library(name) for name in GPU_DRIVERS),
        "mps-elsewhere": sys.platform == "darwin",
        "modelscope-without-package": importlib.util.find_spec("modelscope") is not None,
    }.items()
    if works
}
CASES = [
    *TASK, *COMMAND_LINE, *NUMBERS, *SIZES, *CONFLICTS, *PROMPTS, *IMAGES, *CLIPS, *ADDRESSES, *OUTPUTS, *CONFIGS,
    *MODELS, *MEMORY, *LORAS,
]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers by the path's first folder."""

    release = threading.Event()  # lets waiting handlers end

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        case = self.path.split("/")[1]
        if case == "silent":
            self.release.wait(20)
            return
        web_page = b"<!DOCTYPE html><html><body>sign in</body></html>"
        kind = {"html": "text/html", "text": "text/plain"}.get(case, "application/octet-stream")
        body = {"html": web_page, "disguised": web_page, "empty": b""}.get(case, b"\0\1\2\3" * 100)
        self.send_response(404 if case == "missing" else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(2**40 if case == "oversize" else len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a web server."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    Handler.release.set()
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_lossless) -> Path:
    """A folder of inputs, most of them bad."""
    folder = tmp_path_factory.mktemp("files")
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    picture.save(folder / "good.png")
    picture.save(folder / "whole.jpg")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1000])
    (folder / "cut.mp4").write_bytes((ASSETS / "boat.mp4").read_bytes()[:-5000])
    for name in ("text.png", "text.mp4"):
        (folder / name).write_text("nothing but words\n")
    for name in ("empty", "good.mp4", "good.safetensors"):
        (folder / name).touch()
    for name in ("folder", "folder.mp4"):
        (folder / name).mkdir()
    for name in ("dangling", "dangling.mp4"):
        (folder / name).symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "playlist.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{ASSETS}/boat.mp4\n#EXT-X-ENDLIST\n")
    write_lossless(folder / "short.mp4", np.zeros((5, 48, 64, 3), np.uint8))
    tone = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=duration=1"]
    subprocess.run([*tone, folder / "sound.m4a", folder / "sound.wav"], check=True)
    save_file({"blocks.0.attn1.to_q.lora_A.weight": np.zeros((1, 96), "f4")}, folder / "good.lora.safetensors")
    (folder / "cut.lora.safetensors").write_bytes((folder / "good.lora.safetensors").read_bytes()[:-4])
    write_configs(folder)
    return folder


def write_configs(folder: Path) -> None:
    """Bad files for --config."""
    for name, text in {
        "list.yaml": "- seed: 1\n- shift: 2\n",
        "broken.yaml": "seed: 1\nprompt: [a\n",
        "nest.yaml": "prompt: " + "[" * 100_000,
        "huge.yaml": "# " + "x" * (1 << 20),
        "date.yaml": "seed: 2024-13-45\n",
        "key.yaml": "heigth: 5\n",
        "number-key.yaml": "5: 5\n",
        "wrong-seed.yaml": "seed: 1.5\n",
        "wrong-shift.yaml": "shift: [1, 2]\n",
        "wrong-hex.yaml": f"seed: 0x{'f' * 9000}\n",
        "wrong-quiet.yaml": "quiet: soon\n",
        "wrong-true.yaml": "duration: true\n",
        "wrong-prompt.yaml": "prompt: {text: a}\n",
        "wrong-null.yaml": "prompt:\n",
        "wrong-resolution.yaml": "resolution: 720\n",
        "wrong-images.yaml": "ref_imgs: [5]\n",
        "range.yaml": "shift: .nan\n",
        "config.yaml": "config: other.yaml\n",
        "both.yaml": "duration: 5\nnum_frames: 5\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_request(refuse, files, server, case):
    if case.name in NOT_BAD:
        pytest.skip("it would work on this machine")
    check_refused(case, refuse, files=files, assets=ASSETS, server=server)


def needs(flags: list[str], files: Path) -> list[str]:
    return [argument.format(files=files) for argument in (*REFERENCE, *flags)]


@pytest.fixture
def no_programs(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")


def test_compiling_without_a_compiler(no_programs, refuse, files):
    line = refuse(needs(["--compile"], files))
    assert line.startswith("error: --compile: needs a C++ compiler (c++ or g++")
    assert line.endswith("install one, or leave it out")


@pytest.mark.skipif(any(map(has_library, GPU_DRIVERS)), reason="the GPU's default dtype is another one")
def test_flash_attention_as_it_would_be_chosen_here(refuse, files):
    argv = [argument for argument in needs(["--attention", "flash"], files) if argument not in ("--device", "cpu")]
    assert "works on a GPU (cuda) only, not on cpu" in refuse(argv)


def damaged(reference: Path, folder: Path, name: str) -> Path:
    """A copy of one of the small checkpoints."""
    return shutil.copytree(reference / "pipelines" / "checkpoints" / name, folder / "checkpoint")


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(refuse, reference, files, tmp_path, name):
    checkpoint, damage, says = DAMAGES[name]
    root = damaged(reference, tmp_path, checkpoint)
    damage(root)
    base = REFERENCE if checkpoint == REFERENCE_TO_VIDEO else EXTENSION
    argv = [*base, "--model_id", str(root), "--output", str(tmp_path / "out.mp4")]
    line = refuse([argument.format(files=files, assets=ASSETS) for argument in argv])
    assert line.startswith("error: --model_id: ")
    assert str(root) in line
    assert says.format(root=root) in line
    assert "download" in line


# What only the loaders see. name: (layout, file, how its content is changed, what the error must say of it)
TEXT_ENCODER, NATIVE_VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
WRONG_CONTENT: dict[str, tuple[str, str, Callable[[dict], object], str]] = {
    "transformer-missing": (
        "diffusers", f"transformer/{WEIGHTS}", lambda t: t.pop("proj_out.bias"), "missing keys proj_out.bias",
    ),
    "transformer-extra": (
        "native", f"transformer/{SHARD}", lambda t: t.update(surplus=t["text_embedding.0.bias"].clone()),
        "unexpected keys surplus",
    ),
    "transformer-misshapen": (
        "diffusers", f"transformer/{WEIGHTS}", lambda t: t.update({"proj_out.bias": t["proj_out.bias"][:5].clone()}),
        "wrong shapes proj_out.bias ([5] instead of [64])",
    ),
    "transformer-sizes-missing": (
        "native", f"transformer/{SHARD}", lambda t: t.pop("text_embedding.0.weight"), "text_embedding.0.weight",
    ),
    "transformer-sizes-misshapen": (
        "native", f"transformer/{SHARD}",
        lambda t: t.update({"text_embedding.0.weight": t["text_embedding.0.bias"].clone()}),
        "wrong shape text_embedding.0.weight",
    ),
    "transformer-config": (
        "diffusers", "transformer/config.json", lambda c: c.update(magic=1, wand=2), "unknown entries magic, wand",
    ),
    "native-transformer-config": (
        "native", "transformer/config.json", lambda c: c.update(magic=1), "unknown entries magic",
    ),
    "unsupported-config": (
        "diffusers", "transformer/config.json", lambda c: c.update(qk_norm="layer_norm"), "qk_norm = layer_norm",
    ),
    "vae-missing": ("native", NATIVE_VAE, lambda t: t.pop("conv1.bias"), "missing keys conv1.bias"),
    "vae-extra": ("native", NATIVE_VAE, lambda t: t.update(surplus=t["conv1.bias"]), "unexpected keys surplus"),
    "vae-misshapen": (
        "native", NATIVE_VAE, lambda t: t.update({"conv1.bias": t["conv1.bias"][:5]}),
        "wrong shapes conv1.bias ([5] instead of [32])",
    ),
    "vae-sizes-misshapen": (
        "native", NATIVE_VAE, lambda t: t.update({"conv2.weight": t["conv2.weight"].sum()}),
        "wrong shape conv2.weight",
    ),
    "nan-config": (
        "diffusers", "transformer/config.json", lambda c: c.update(eps=float("nan")), "eps = nan is no positive number",
    ),
    "text-encoder-config-number": (
        "diffusers", "text_encoder/config.json", lambda c: c.update(layer_norm_epsilon="x"), "epsilon = x is no",
    ),
    "vae-config": ("diffusers", "vae/config.json", lambda c: c.update(magic=1), "unknown entries magic"),
    "vae-config-type": ("diffusers", "vae/config.json", lambda c: c.update(base_dim="x"), "base_dim = x is no size"),
    "vae-config-knob": (
        "diffusers", "vae/config.json", lambda c: c.update(is_residual=True), "is_residual = True is not supported",
    ),
    "vae-statistics": (
        "diffusers", "vae/config.json", lambda c: c.update(latents_std=[1]), "latents_std = [1] is not 16 numbers",
    ),
    "vae-no-tensor": ("native", NATIVE_VAE, lambda t: t.update(epoch=3), "other than a dictionary of tensors"),
    "vae-nested": ("native", NATIVE_VAE, lambda t: t.update(state_dict=dict(t)), "other than a dictionary of tensors"),
    "vae-class": ("native", NATIVE_VAE, lambda t: t.update(unpickled=Path("/")), "something other than tensors"),
    "text-encoder-missing": (
        "native", TEXT_ENCODER, lambda t: t.pop("norm.weight"), "missing keys norm.weight",
    ),
    "text-encoder-sizes-missing": ("native", TEXT_ENCODER, lambda t: t.pop("token_embedding.weight"), "lacks"),
    "text-encoder-sizes-misshapen": (
        "native", TEXT_ENCODER, lambda t: t.update({"token_embedding.weight": t["norm.weight"]}),
        "wrong shape token_embedding.weight",
    ),
    "text-encoder-config-type": (
        "diffusers", "text_encoder/config.json", lambda c: c.update(d_model="x"), "d_model = x is no size",
    ),
    "tokenizer": ("diffusers", "tokenizer/tokenizer.json", lambda c: c.clear(), "cannot be read"),
    "text-encoder-extra": (
        "native", TEXT_ENCODER, lambda t: t.update(surplus=t["norm.weight"]), "unexpected keys surplus",
    ),
    "text-encoder-misshapen": (
        "diffusers", "text_encoder/model.safetensors",
        lambda t: t.update({"shared.weight": t["shared.weight"][:5].clone()}), "vocab_size = 264 is more than",
    ),
    "text-encoder-layers": (
        "diffusers", "text_encoder/config.json", lambda c: c.update(num_layers=1), "unexpected keys encoder.block.1",
    ),
}  # fmt: skip


def change_content(path: Path, change: Callable[[dict], object]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return
    load, save = (load_file, save_file) if path.suffix == ".safetensors" else (torch.load, torch.save)
    content = load(path)
    change(content)
    save(content, path)


@pytest.mark.parametrize("name", WRONG_CONTENT)
def test_wrong_content(reference, tmp_path, name):
    """The loaders' own checks; that the command prints them is in test_generate_video.py."""
    import torch

    from skyreels_v3.errors import CheckpointError
    from skyreels_v3.wan import checkpoint as published

    layout, file, change, says = WRONG_CONTENT[name]
    root = damaged(reference, tmp_path, REFERENCE_TO_VIDEO if layout == "diffusers" else VIDEO_EXTENSION)
    change_content(root / file, change)
    load = {"Wan": published.load_vae, "vae": published.load_vae}
    folder = root / "transformer" if file.startswith("tra") else root
    with pytest.raises(CheckpointError) as caught:
        if folder.name == "transformer":
            published.load_transformer(folder, torch.float32)
        else:
            load.get(file[:3], published.load_text_encoder)(folder, torch.float32)
    message = str(caught.value)
    assert message.startswith("--model_id: ")
    assert str(root / file.split("/")[0]) in message
    assert says in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "kinds",
    [
        ("animated.gif", "animated.webp", "cmyk.jpg", "grey16.png"),
        ("alpha.png", "grey-alpha.png", "palette.png", "animated.png"),
        ("one-bit.png", "float.tiff", "cmyk.tiff", "turned.jpg"),
    ],
)
def test_unusual_images_are_taken(main, tmp_path, kinds):
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    picture = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    more = {"save_all": True, "append_images": [picture.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    save: dict[str, Callable[[Path], None]] = {
        "animated.gif": lambda path: picture.save(path, **more),
        "animated.webp": lambda path: picture.save(path, **more),
        "animated.png": lambda path: picture.save(path, **more),
        "cmyk.jpg": lambda path: picture.convert("CMYK").save(path),
        "cmyk.tiff": lambda path: picture.convert("CMYK").save(path),
        "grey16.png": lambda path: Image.fromarray((grey * 257).astype(np.uint16)).save(path),
        "float.tiff": lambda path: Image.fromarray((grey / 255).astype(np.float32)).save(path),
        "alpha.png": lambda path: picture.convert("RGBA").save(path),
        "grey-alpha.png": lambda path: picture.convert("LA").save(path),
        "palette.png": lambda path: picture.quantize(8).save(path, transparency=3),
        "one-bit.png": lambda path: picture.convert("1").save(path),
        "turned.jpg": lambda path: picture.save(path, exif=exif),
    }
    for name in kinds:
        save[name](tmp_path / name)
    code, stdout, stderr = main(
        "--task_type", "reference_to_video", "--prompt", "a", "--model_id", "tiny", "--device", "cpu", "--dry_run",
        "--ref_imgs", ",".join(str(tmp_path / name) for name in kinds),
    )  # fmt: skip
    assert code == 0, stderr
    assert stdout.startswith("task          reference_to_video")
