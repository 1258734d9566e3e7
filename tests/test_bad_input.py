"""Requests that cannot work: one line that names the flag, the value and the remedy; exit code 2; nothing left behind.

The cases run in this process, except a few marked slow that run the real command.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.numpy import save_file

from skyreels_v3.batch import MAX_JOBS_BYTES
from skyreels_v3.cli import parse_request
from skyreels_v3.resolve import preflight
from skyreels_v3.runtime import GPU_DRIVERS, has_library
from tests.conftest import ASSETS, ROOT, write_tone

TINY = ["--model_id", "tiny", "--device", "cpu"]
REFERENCE = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "{files}/good.png", *TINY]
EXTENSION = ["--task_type", "single_shot_extension", "--prompt", "a", "--input_video", "{assets}/boat.mp4", *TINY]
SHOT = ["--task_type", "shot_switching_extension", "--prompt", "a", "--input_video", "{assets}/boat.mp4", *TINY]
SPEAKER = ["--task_type", "talking_avatar", "--prompt", "a", *TINY]
PORTRAIT = ["--input_image", "{assets}/portrait.png"]
MUTE = [*SPEAKER, *PORTRAIT]
AVATAR = [*MUTE, "--input_audio", "{files}/6s.wav"]
TWO = [*SPEAKER, *PORTRAIT, "--input_audio", "{files}/6s.wav,{files}/1s.wav"]
DUB = [*SPEAKER, "--input_video", "{files}/4s.mp4", "--input_audio", "{files}/1s.wav"]
LEFT = [*AVATAR, "--height", "32", "--width", "32", "--output", "{files}/left.mp4", "--resume"]
T2V = ["--task_type", "t2v", "--prompt", "FPS-24, a", *TINY]
I2V = ["--task_type", "i2v", "--prompt", "FPS-24, a", "--image", "{files}/good.png", *TINY]
JOBS = ["--jobs", "{files}/jobs.jsonl"]
URL = ["--allow_private_urls", "--url_timeout", "0.3"]
GUIDED = [*REFERENCE, "--guidance_scale", "2"]
USP = [*REFERENCE, "--use_usp"]
FP8 = [*REFERENCE, "--quant", "fp8"]
STREAM = [*REFERENCE, "--memory", "stream"]

Words = str | tuple[str, ...]


def case(argv: Sequence[str], flag: str, *words: str, name: str = "") -> Any:
    """A command line, the flag that its error starts with, and words that follow in this order."""
    return pytest.param([*argv], flag, words, id=f"{name or ' '.join(argv)[-50:]}")


def bad(argv: Sequence[str], flag: str, values: dict[str | tuple[str, ...], Words]) -> Iterator[Any]:
    """Valid command lines, each made invalid by one flag's value; the error shows the value and the remedy.

    Args:
        values: the remedy for each value or tuple of values; or (shown, remedy), if the error shows something else.
    """
    start = argv[1].partition("{files}/")[2] or argv[1]
    if flag in argv:  # some flags accumulate when repeated
        place = list(argv).index(flag)
        argv = [*argv[:place], *argv[place + 2 :]]
    for several, words in values.items():
        for value in several if isinstance(several, tuple) else (several,):
            shown = (value, words) if isinstance(words, str) else words
            yield case([*argv, flag, value], flag, *shown, name=f"{start}{flag}={value[:40]}")


EMPTY = "an empty value"
SIZE = "from 16 to 2048"
WHOLE = "give a whole number"
TO_100 = "give a number from 0 to 100"
COMMAND_LINE = [
    case([], "--task_type", "missing", "choose one of reference_to_video, shot_switching_extension"),
    *bad(REFERENCE, "--task_type", {
        "reference_to_vdeo": "did you mean reference_to_video?",
        "poetry": "choose reference_to_video, shot_switching_extension, single_shot",
        "": (EMPTY, "choose reference_to_video"),
    }),
    case(["--task_type", "reference_to_video", "--prompt", "a"], "--ref_imgs", "missing", "1-4"),
    case(["--task_type", "single_shot_extension", "--prompt", "a"], "--input_video", "missing", "clip to extend"),
    case(["--task_type", "shot_switching_extension", "--prompt", "a"], "--input_video", "missing", "clip to extend"),
    case(["--task_type", "i2v", "--prompt", "a"], "--image", "missing", "first frame of the video"),
    case([*SPEAKER, "--input_audio", "{files}/6s.wav"], "--input_image", "missing", "portrait of the speaker"),
    case([*SPEAKER, *PORTRAIT], "--input_audio", "missing", "speech"),
    case(["--task_type", "reference_to_video", "--ref_imgs", "{files}/good.png"], "--prompt", "missing", "say what"),
    case([*REFERENCE, "--promt", "x"], "--promt", "no such flag", "did you mean --prompt?"),
    case([*REFERENCE, "--heigth=32"], "--heigth", "no such flag", "did you mean --height?"),
    case([*REFERENCE, "--zzz"], "--zzz", "no such flag", "see --help"),
    case([*REFERENCE, "--dur", "5"], "--dur", "no such flag", "did you mean --duration?"),
    case([*REFERENCE, "second", "third"], "command line", "second", "put quotes around"),
    case([*REFERENCE, "-x"], "command line", "-x", "put quotes around"),
    case([*REFERENCE, "--seed"], "--seed", "no value", "see --help"),
    case([*REFERENCE, "--seed", "--offload"], "--seed", "no value", "see --help"),
    case([*REFERENCE, "--quiet=yes"], "--quiet", "yes", "see --help"),
    case([*REFERENCE, "--offload=no"], "--offload", "no", "see --help"),
    case([*REFERENCE, "--ring_degree", "2"], "--ring_degree", "2: is for several", "add --use_usp"),
    case([*REFERENCE, "--shard_weights"], "--shard_weights", "several processes", "add --use_usp"),
    *bad(USP, "--ulysses_degree", {"2": "leave them out"}),
    *bad(USP, "--cfg_degree", {"2": "turn guidance on", "4": "from 1 to 3"}),
    case([*USP, "--shard_weights", "--low_vram"], "--shard_weights", "conflicts with --low_vram", "give one of them"),
    case([*REFERENCE, "--quiet", "--verbose"], "--quiet", "--verbose", "give one of them"),
    *bad(REFERENCE, "--prompt", {
        "": ("empty", "say what happens"),
        " \t\n ": ("empty", "say what happens"),
        "x" * 100_000: ("100000 characters are too many", "give at most 10000"),
        os.fsdecode(b"caf\xe9"): ("is not UTF-8", "type it again"),
    }),
    *bad(GUIDED, "--negative_prompt", {"x" * 100_000: ("100000 characters", "give at most")}),
]  # fmt: skip
NUMBERS = [
    *bad(EXTENSION, "--duration", {
        ("4", "31", "0", "-5", "1000000"): "5 to 30 whole seconds",
        ("5.5", "abc", "nan", "inf", "5s"): WHOLE,
        "": (EMPTY, WHOLE),
    }),
    *bad(REFERENCE, "--duration", {"11": "1 to 10 whole seconds"}),
    *bad(SHOT, "--duration", {("1", "6"): "2 to 5 whole seconds"}),
    *bad(REFERENCE, "--num_frames", {
        "6": "give 5 or 9", "0": "from 1 to", ("-3", "1e9", "nan", "100001"): WHOLE,
    }),
    *bad(T2V, "--num_frames", {"401": "up to 385 frames"}),
    *bad(REFERENCE, "--seed", {
        ("-2", "4294967296"): "from -1 to 4294967295", ("1.5", "nan", "x"): WHOLE,
        "9" * 5000: ("999999...999999", WHOLE),
    }),
    *bad(REFERENCE, "--num_inference_steps", {("0", "-1", "nan", "inf", "8.0", "100000"): "number from 1 to 200"}),
    *bad(REFERENCE, "--shift", {("0", "-1", "nan", "inf", "-inf", "-1e5", "1e999", "five"): "from 0.01 to 100"}),
    *bad(REFERENCE, "--guidance_scale", {("nan", "-1", "inf", "-inf", "1e9"): TO_100}),
    *bad(GUIDED, "--image_guidance_scale", {("nan", "-0.5", "inf", "x"): TO_100}),
    *bad(AVATAR, "--text_guidance_scale", {("-1", "nan", "101"): TO_100}),
    *bad(AVATAR, "--audio_guidance_scale", {("-1", "nan", "101"): TO_100}),
    *bad(AVATAR, "--color_correction_strength", {("-0.1", "1.1", "nan", "inf", "full"): "give a number from 0 to 1"}),
    *bad(REFERENCE, "--url_timeout", {("0", "-1", "nan", "inf"): "give a number from"}),
    *bad(STREAM, "--stream_blocks", {("-1", "1000", "1.5", "all", "nan"): "whole number from 0 to 999"}),
    *bad(T2V, "--fps", {"0": "out of range"}),
    *bad(T2V, "--gpu_num", {"0": "out of range", "65": "from 1 to 64", "two": WHOLE}),
    *bad(T2V, "--video_num", {"0": "from 1 to 10000"}),
    *bad([*REFERENCE, "--width", "480"], "--height", {
        "500": "give 496 or 512", ("160000", "0"): SIZE, "nan": WHOLE,
    }),
    *bad([*T2V, "--width", "960"], "--height", {"540": "give 528 or 544"}),
    *bad([*REFERENCE, "--height", "480"], "--width", {"481": "give 480 or 496", "-16": SIZE}),
    case([*REFERENCE, "--height", "2048", "--width", "2048"], "--height", "2048 x 2048", "at most"),
    case([*REFERENCE, "--height", "480"], "--height", "480", "give --width as well"),
    case([*REFERENCE, "--width", "480"], "--width", "480", "give --height as well"),
]  # fmt: skip
CHOICES = [
    *bad(REFERENCE, "--resolution", {"1080P": "choose 480P, 540P or 720P", "720": "did you mean 720P?"}),
    *bad(REFERENCE, "--device", {
        "gpu": "choose auto, cuda, cpu or mps",
        "cuda": ("cuda: this machine has no", "--device cpu"),
        "mps": ("mps: this machine is no", "--device cpu"),
    }),
    *bad(REFERENCE, "--dtype", {"float16": "choose bfloat16 or float32"}),
    *bad(REFERENCE, "--vae_dtype", {"float16": "choose bfloat16 or float32"}),
    *bad(REFERENCE, "--model_source", {"github": "choose huggingface or modelscope"}),
    *bad([*REFERENCE, "--model_id", "a/b"], "--model_source", {
        "modelscope": ("modelscope: needs the package modelscope", "pip install modelscope"),
    }),
    *bad(REFERENCE, "--memory", {"ofload": "did you mean offload?", "": (EMPTY, "choose auto, resident, off")}),
    *bad(REFERENCE, "--quant", {("int4", "FP8"): "choose fp8 or fp8_dynamic"}),
    *bad(T2V, "--quant", {"int8": "choose fp8 or fp8_dynamic"}),
    *bad(REFERENCE, "--attention", {
        "flash2": "did you mean flash?", "none": "choose auto, sdpa, cudnn, flash, flash3, flash3_fp8, sage or xf",
    }),
    *bad([*REFERENCE, "--dtype", "bfloat16"], "--attention", {
        kernel: (f"{kernel}: works on a GPU", "use --attention auto or sdpa")
        for kernel in ("cudnn", "flash", "flash3", "flash3_fp8", "sage", "xformers")
    }),
    *bad(T2V, "--cache", {
        "teacache:0.1": "optionally with a threshold, such", ("fbcache:much", "fbcache:-1"): "such as fbcache:0.1",
    }),
    case([*T2V, "--cache", "fbcache", "--num_inference_steps", "8"], "--cache", "8 steps", "12 or"),
    case([*REFERENCE, "--cache", "fbcache"], "--cache", "fbcache", "give --num_inference_steps"),
    *bad(TWO, "--audio_type", {"serial": "choose parallel or sequential"}),
]  # fmt: skip
ONE = "give one of them"
NOT_TAKEN = "does not take it"
CONFLICTS = [
    *bad([*REFERENCE, "--num_frames", "5"], "--duration", {"5": f"conflicts with --num_frames; {ONE}"}),
    *bad(EXTENSION, "--num_frames", {"5": "does not take it; give --duration instead"}),
    *bad(SPEAKER, "--image", {"a.png": "talking_avatar does not take it; give --input_image instead"}),
    *bad(AVATAR, "--guidance_scale", {"2.0": "talking_avatar does not take it; give --text_guidance_scale instead"}),
    *bad(AVATAR, "--duration", {"5": "talking_avatar does not take it; leave it out"}),
    *bad(REFERENCE[:4], "--input_image", {"a.png": "reference_to_video does not take it; give --ref_imgs instead"}),
    *bad(I2V[:4], "--ref_imgs", {"a.png": "i2v does not take it; give --image instead"}),
    *bad(REFERENCE, "--image_guidance_scale", {("2", "0"): "give --guidance_scale above 1"}),
    *bad(REFERENCE, "--negative_prompt", {"blur": "give --guidance_scale above 1"}),
    *bad([*REFERENCE, "--guidance_scale", "1"], "--negative_prompt", {"blur": "give --guidance_scale above 1"}),
    *bad(AVATAR, "--negative_prompt", {"blur": "give --text_guidance_scale above 1"}),
    *bad([*AVATAR, "--audio_guidance_scale", "3"], "--negative_prompt", {"dark": "give --text_guidance_scale above 1"}),
    *bad(REFERENCE, "--stream_blocks", {("0", "3"): "add --memory stream or --low_vram"}),
    *bad(REFERENCE, "--exact_steps", {"2": "all steps are exact; add --attention flash3_fp8 or sage, or leave it out"}),
    *bad([*REFERENCE, "--offload"], "--stream_blocks", {"1": "add --memory stream or --low_vram"}),
    case([*REFERENCE, "--offload", "--low_vram"], "--offload", "--low_vram", ONE),
    *bad([*REFERENCE, "--offload"], "--memory", {"stream": f"conflicts with --offload; {ONE}"}),
    *bad([*REFERENCE, "--low_vram"], "--memory", {"resident": f"conflicts with --low_vram; {ONE}"}),
    case([*T2V, "--outdir", "a", "--output", "b.mp4"], "--output", "conflicts", "give one"),
    case([*T2V, "--video_num", "2", "--output", "b.mp4"], "--output", "is for one video", "--outdir"),
    case([*REFERENCE, "--include_input"], "--include_input", NOT_TAKEN, "leave it out"),
    case([*DUB, "--include_input"], "--include_input", "talking_avatar", "leave it out"),
    *(
        next(bad(argv, flag, {value: f"{argv[1]} {NOT_TAKEN}"}))
        for flag, value, others in (
            ("--ref_imgs", "{files}/good.png", (EXTENSION, SHOT, AVATAR)),
            ("--input_video", "{assets}/boat.mp4", (REFERENCE,)),
            ("--image", "{files}/good.png", (REFERENCE,)),
            ("--input_image", "{assets}/portrait.png", (EXTENSION, I2V)),
            ("--input_audio", "{files}/1s.wav", (REFERENCE, EXTENSION)),
            ("--image_guidance_scale", "0", (EXTENSION, AVATAR)),
            ("--num_frames", "5", (AVATAR,)),
            ("--text_guidance_scale", "2.0", (REFERENCE, EXTENSION)),
            ("--audio_guidance_scale", "2.0", (REFERENCE, EXTENSION)),
            ("--color_correction_strength", "0.5", (REFERENCE, SHOT)),
            ("--window_prompt", "b", (REFERENCE, EXTENSION)),
            ("--audio_type", "parallel", (REFERENCE, EXTENSION)),
            ("--speaker_boxes", "0,0,9,9;9,0,19,9", (REFERENCE, EXTENSION)),
            ("--keyframes", "a.png@1", (REFERENCE, EXTENSION)),
            ("--fps", "30", (REFERENCE,)),
            ("--base_model_id", "a/b", (REFERENCE,)),
            ("--resolution", "540P", (T2V,)),
        )
        for argv in others
    ),
]  # fmt: skip
COMPLETE, ORDINARY = "give a complete file", "give an ordinary file"
PATH, PICTURE = "check the path", "give a JPEG, PNG"
BAD_PICTURES: dict[str | tuple[str, ...], Words] = {
    ("{files}/nothere.png", "{files}/good.png/a.png", "{files}/dangling"): PATH,
    "{files}/folder": "give a file",
    ("{files}/fifo", "/dev/zero"): ORDINARY,
    ("{files}/empty", "{files}/cut.png", "{files}/cut.jpg"): COMPLETE,
    ("{files}/text.png", "{assets}/boat.mp4", "{files}/1s.wav"): PICTURE,
    "http://127.0.0.1:9/a.png": "--allow_private_urls",
    ("ftp://example.org/a.png", "file:///etc/passwd"): "download it and give the path",
    "x" * 5000: ("xxx...xxx", "check"),
}
INPUTS = [
    *bad(REFERENCE, "--ref_imgs", BAD_PICTURES | {
        "": (EMPTY, "give 1 to 4 images"),
        ",".join(["{files}/good.png"] * 5): ("5 entries", "give 1 to 4 images"),
        "{files}/good.png,": ("2 entries", "give 1 to 4 images, comma-separated, none empty"),
        "{files}/good.png, ,{files}/good.png": ("3 entries", "none empty"),
        "{files}/good.png,{files}/nothere.png": ("{files}/nothere.png", PATH),
    }),
    *bad(I2V, "--image", BAD_PICTURES | {
        "": ("an empty path", "give a file"),
        "{files}/good.png,{files}/good.png": ("{files}...good.png", PATH),
    }),
    *bad([*I2V, "--gpu_num", "2"], "--image", {("{files}/text.png", "{files}/empty"): "give a"}),
    *bad(AVATAR, "--input_image", BAD_PICTURES | {"": ("an empty path", "give a file"), "{files}/4s.mp4": PICTURE}),
    *bad(EXTENSION, "--input_video", {
        "": ("an empty path", "give a file"),
        ("{files}/nothere.mp4", "{files}/dangling"): PATH,
        "{files}/folder": "give a file",
        "{files}/fifo": ORDINARY,
        "{files}/empty": COMPLETE,
        "{files}/cut.mp4": "give a complete video file",
        ("{files}/text.mp4", "{files}/playlist.m3u8"): "give a",
        ("{files}/good.png", "{files}/sound.m4a", "{files}/1s.wav"): "give a video clip",
        "{files}/short.mp4": "25 frames at 24 frames per second",
    }),
    *bad(SHOT, "--input_video", {"{files}/nothere.mp4": PATH}),
    *bad([*SHOT, "--duration", "2"], "--input_video", {"{files}/short.mp4": "9 frames at 24 frames per second"}),
    *bad([*SHOT, "--duration", "5"], "--input_video", {"{files}/short.mp4": "33 frames at 24 frames per second"}),
    *bad(DUB, "--input_video", {
        "{files}/nothere.mp4": PATH, ("{assets}/portrait.png", "{files}/1s.wav"): "give a video clip",
    }),
    *bad(AVATAR, "--input_audio", {
        "{files}/nothere.wav": PATH,
        "{files}/folder": "give a file",
        "{files}/empty": COMPLETE,
        "{files}/0s.wav": "give a recording of speech",
        "{files}/cut.wav": "give a complete sound file",
        "{files}/text.mp3": "give a",
        "{files}/good.png": "give a sound file, such as an mp3 or wav",
        "{files}/silent.mp4": "give a sound file, or a video with sound",
        "{files}/0.3s.wav": ("has 0.300 s of sound", "but must have 0.4 to 200 s; give a longer recording"),
        "{files}/201s.wav": ("has 201.000 s of sound", "but must have 0.4 to 200 s; cut it"),
        "": ("1 recording, or an empty one", "give one, or two for two speakers"),
        "{files}/1s.wav,": ("2 recordings, or an", "give one, or two for two speakers"),
        "a.wav,b.wav,c.wav": ("3 recordings", "give one, or two for two speakers"),
        "{files}/1s.wav,{files}/nothere.wav": ("{files}/nothere.wav", PATH),
    }),
    *bad([*AVATAR, "--audio_type", "sequential"], "--input_audio", {
        "{files}/150s.wav,{files}/51s.wav": ("201.00 s one after the other", "give 200 s at most"),
    }),
]  # fmt: skip
ADDRESSES = [
    *(
        next(bad([*argv, *URL], flag, {address.replace("FILE", file): remedy}))
        for argv, flag, file in ((REFERENCE, "--ref_imgs", "a.png"), (EXTENSION, "--input_video", "a.mp4"))
        for address, remedy in (
            ("ftp://example.org/FILE", "download it and give the path"),
            ("file:///etc/FILE", "download it and give the path"),
            ("{server}/missing/FILE", "404"),
            ("{server}/html/FILE", "give the address of the file itself"),
            ("{server}/disguised/FILE", "give the address of the file itself"),
            ("{server}/oversize/FILE", "scale it down"),
            ("{server}/empty/FILE", "check the address"),
            ("{server}/silent/FILE", "raise --url_timeout"),
            ("http://127.0.0.1:9/FILE", "check address and network"),
        )
    ),
    *bad([*EXTENSION, *URL], "--input_video", {
        "{server}/text/a.mp4": "not media",
        "{server}/garbage/a.mp4": "is truncated or not a video; give a complete",
    }),
    *bad([*REFERENCE, *URL], "--ref_imgs", {
        "{server}/garbage/a.png": "is not a picture; give a JPEG", "http://:bad:/a.png": "check",
    }),
]  # fmt: skip
BOXES, TIMES = "give two boxes as x0,y0,x1,y1;x0,y0,x1,y1", "give an image and its time in seconds, such as a.png@2.5"
SPEAKERS = [
    *bad(TWO, "--speaker_boxes", {
        ("0,0,9,9", "0,0,9;0,0,9", "0,0,9,9;1,1,9,9;2,2,9,9", "0,0,9,x;0,0,9,9", "0,0,9,9;-1,0,9,9"): BOXES,
        ("0.5,0,9,9;0,0,9,9", "0,0,9,9;"): BOXES,
        "": (EMPTY, "give two boxes"),
        "0,0,9,9;9,0,9,9": ("9,0,9,9 is empty", "give x0 < x1 and y0 < y1"),
        "9,9,0,0;0,0,9,9": ("9,9,0,0 is empty", "give x0 < x1 and y0 < y1"),
        "0,0,9,9;0,0,481,480": ("0,0,481,480 is not inside", "give boxes inside it"),
        "0,0,9,481;0,0,9,9": ("0,0,9,481", "of 480 x 480 pixels; give boxes inside it"),
    }),
    *bad([*TWO, "--height", "256", "--width", "480"], "--speaker_boxes", {
        "0,0,40,40;100,200,400,400": ("0,0,40,40 is cut off", "give a box nearer to the middle"),
    }),
    *bad(AVATAR, "--speaker_boxes", {"0,0,9,9;9,0,19,9": "is for two speakers; give two recordings, or leave it out"}),
    *bad(AVATAR, "--diarization", {
        "{files}/nothere.rttm": PATH,
        "{files}/text.png": ("line 1 is not SPEAKER", "give an RTTM file"),
        "{files}/good.png": ("is not a text", "give an RTTM file"),
    }),
    *bad(TWO, "--diarization", {"a.rttm": "is for one recording of two speakers; give one --input_audio"}),
    *bad(DUB, "--diarization", {"a.rttm": "conflicts with --input_video"}),
    *bad(AVATAR, "--text", {"Hello": "conflicts with --input_audio; give one of them"}),
    *bad(MUTE, "--text", {"?!": "has no words; give some, or leave it out"}),
    *bad([*MUTE, "--text", "Hello"], "--voice", {
        ("../a", "a.pt", "af_heart,b", "a-", "\u0430"): "is not the name of a voice; give one such as af_heart",
    }),
    case([*MUTE, "--text", "Hello", "--vocals"], "--text", "Hello: conflicts with --vocals"),
    case([*MUTE, "--text", "Hello", "--diarization", "a.rttm"], "--text", "Hello: conflicts with --diarization"),
    *bad(AVATAR, "--voice", {"af_heart": "is for text to be spoken; add --text"}),
    *bad(T2V, "--text", {"Hello": "t2v does not take it; leave it out"}),
    *bad(AVATAR, "--audio_type", {"sequential": "is for two speakers; give two recordings, or leave it out"}),
    case([*DUB, "--keep_background"], "--keep_background", "needs to know where the speaker is; add --speaker_boxes"),
    case([*AVATAR, "--keep_background"], "--keep_background", "is for dubbing a clip; add --input_video"),
    *bad([*DUB, "--keep_background"], "--speaker_boxes", {
        ("0,0,9,9;9,9,19,19", "0,0,9"): "give one box as x0,y0,x1,y1 in pixels",
        "0,0,65,48": ("0,0,65,48 is not inside the clip of 64 x 48 pixels", "give boxes inside it"),
    }),
    *bad([*DUB, "--keep_background"], "--speaker_boxes", {"auto": "finds two speakers in a portrait; give the box"}),
    *bad(DUB, "--speaker_boxes", {"0,0,9,9": "is for two speakers; give two recordings, or leave it out"}),
    *bad(AVATAR, "--keyframes", {
        ("a.png", "a.png@", "@2.0", "a.png@two", "a.png@-1", "a.png@nan", "a.png@1e3"): TIMES,
        ("", "{assets}/fox.png@1,"): (EMPTY, "such as a.png@2.5"),
        "{files}/nothere.png@2": ("{files}/nothere.png", PATH),
        "{files}/cut.png@2": ("{files}/cut.png", COMPLETE),
        "{assets}/fox.png@6.5": ("at 6.5 s", "the sound is 6.00 s long; give times within it"),
    }),
    case([*SPEAKER, *PORTRAIT, "--input_audio", "{files}/1s.wav", "--keyframes", "{assets}/fox.png@0.5"],
         "--keyframes", "the sound is 1.00 s long", "sound of at least 3.24 s"),
    case([*AVATAR, "--input_video", "{files}/4s.mp4"], "--input_image", "portrait.png", "conflicts with", ONE),
    case([*DUB, "--input_audio", "{files}/1s.wav"], "--input_video", "only one speaker", "give one --input_audio"),
    case([*DUB, "--keyframes", "{assets}/fox.png@1"], "--keyframes", "fox.png@1", "conflicts with", ONE),
    case([*SPEAKER, "--input_video", "{files}/4s.mp4", "--input_audio", "{files}/6s.wav"], "--input_video",
         "4s.mp4 is 4.00 s long, the sound 6.00 s", "give a longer clip or a shorter sound"),
    *bad(AVATAR, "--window_prompt", {("", "  "): (EMPTY, "'same' for --prompt, or leave it out")}),
]  # fmt: skip
ENDINGS, ANOTHER = "give a name ending in .mp4, or in / for a folder", "give another"
OUTPUTS = [
    *bad(REFERENCE, "--output", {
        ("", " "): (EMPTY, "give FILE.mp4|FOLDER/"),
        ("video", "video.avi", ".mp4"): ENDINGS,
        ("{files}/good.mp4", "{files}/dangling.mp4"): f"{ANOTHER} name",
        ("{files}/folder/", "{files}/folder.mp4"): ("exists already", "give"),
        ("{files}/good.png/a.mp4", "/proc/nothere/a.mp4", "/dev/null/a.mp4"): f"{ANOTHER} path",
        "y" * 250 + ".mp4": ("yyy...yyy", "give a shorter"),
    }),
    *bad(REFERENCE, "--save_latents", {
        "latents.pt": "give a name ending in .safetensors",
        "": (EMPTY, "give FILE.safetensors"),
        "{files}/good.safetensors": f"{ANOTHER} name",
        "/proc/a.safetensors": f"{ANOTHER} path",
    }),
    case([*REFERENCE, "--output", "a.mp4", "--save_latents", "a.mp4/l.safetensors"],
         "--save_latents", "a.mp4/l.safetensors", f"{ANOTHER} path"),
    *bad(REFERENCE, "--save_quantized", {"{files}/q": "add --quant fp8 or --low_vram"}),
    *bad([*REFERENCE, "--low_vram"], "--save_quantized", {"{files}/good.png": ("exists already", f"{ANOTHER} name")}),
    *bad(FP8, "--save_quantized", {
        "": (EMPTY, "give FOLDER"),
        "{files}/folder": ("exists already", "give"), ("{files}/good.png/q", "/proc/q"): f"{ANOTHER} path",
    }),
    *bad(T2V, "--outdir", {
        " ": (EMPTY, "is not a folder name"), ("../a", "a/../../b", "/a"): "to be made in results/",
        "x" * 300: ("results/xxx", "give a shorter"),
    }),
]  # fmt: skip
LINES = "write 'flag: value' lines"
CONFIG_TEXTS = {  # content of a --config file, and what the error says about it
    "list.yaml": ("- seed: 1\n- shift: 2\n", "holds no 'flag: value' lines", "write some"),
    "broken.yaml": ("seed: 1\nprompt: [a\n", "is not YAML (line 3", LINES),
    "nest.yaml": ("prompt: " + "[" * 100_000, "is not YAML", LINES),
    "date.yaml": ("seed: 2024-13-45\n", "is not YAML (month must be", LINES),
    "binary.yaml": ("".join(map(chr, range(128))), "is not YAML", LINES),
    "huge.yaml": ("# " + "x" * (1 << 20), "huge.yaml is not a file of at most", "give one"),
    "key.yaml": ("heigth: 5\n", "unknown key heigth", "did you mean height?"),
    "number-key.yaml": ("5: 5\n", "unknown key 5", "see --help"),
    "config.yaml": ("config: other.yaml\n", "unknown key config", "see --help"),
    "wrong-seed.yaml": ("seed: 1.5\n", "--seed: 1.5", "give a whole number from -1"),
    "wrong-shift.yaml": ("shift: [1, 2]\n", "--shift: a list", "give a number from 0.01"),
    "wrong-hex.yaml": (f"seed: 0x{'f' * 9000}\n", "--seed: a number of thousands of digits", WHOLE),
    "wrong-quiet.yaml": ("quiet: soon\n", "--quiet: soon", "give true or false"),
    "wrong-true.yaml": ("duration: true\n", "--duration: true", WHOLE),
    "wrong-prompt.yaml": ("prompt: {text: a}\n", "--prompt: a mapping", "put it in quotes"),
    "wrong-null.yaml": ("prompt:\n", "--prompt: an empty value", "put it in quotes"),
    "wrong-resolution.yaml": ("resolution: 720\n", "--resolution: 720", "did you mean 720P?"),
    "wrong-images.yaml": ("ref_imgs: [5]\n", "--ref_imgs: 5", "put it in quotes"),
    "range.yaml": ("shift: .nan\n", "--shift: nan", "give a number from 0.01 to 100"),
}
CONFIGS = [
    *bad(REFERENCE, "--config", {
        "": (EMPTY, "give one"),
        "{files}/nothere.yaml": ("nothere.yaml cannot be read", PATH),
        "{files}/folder": ("folder does not say how it was made", "give a video"),
        "{files}/fifo": ("fifo is not a file", "give one"),
        "{files}/empty": ("holds no 'flag: value' lines", "write some"),
        "{files}/text.mp4": ("does not say how it was made", "give a video"),
    } | {f"{{files}}/{name}": tuple(words) for name, (_, *words) in CONFIG_TEXTS.items()}),
    case(["--config", "{files}/both.yaml", *REFERENCE], "--duration", "5", ONE, name="both.yaml"),
]  # fmt: skip
SUCH, DOWNLOAD = "give a folder, an id such as Skywork/", "download these files of hunyuanvideo"
NO_LORA, LORA = "give FILE, FOLDER or OWNER/NAME", "give a .safetensors file"
MODELS = [
    *bad(REFERENCE, "--model_id", {
        "{files}/good.png": "give a checkpoint's folder or a hub id",
        "": (EMPTY, SUCH),
        "no such thing": SUCH,
        ("./nothere", "../a/b", "/nothere/at/all", "~nobodyhere/x"): "give a folder",
        "z" * 5000: ("zzz...zzz", "give a folder"),
        "a\nb": ("a\\nb", "give a folder"),
        "Skywork/SkyReels-V3-V2V-14B": "needs Skywork/SkyReels-V3-R2V-14B",
    }),
    *bad(EXTENSION, "--model_id", {"Skywork/SkyReels-V3-Reference2Video": "needs Skywork/SkyReels-V3-V2V-14B"}),
    *bad(T2V, "--model_id", {
        "{files}/good.png": "give a checkpoint's folder or a hub id",
        "./nothere": "give a folder, an id such as Skywork/SkyReels-V1-Hunyuan-T2V, or tiny",
        "{files}/folder": ("{files}/folder is not a complete t2v checkpoint", "missing config.json"),
        "Skywork/SkyReels-V1-Hunyuan-I2V": (
            "checkpoint of i2v", "needs Skywork/SkyReels-V1-Hunyuan-T2V, or give --task_type i2v",
        ),
    }),
    *bad(I2V, "--model_id", {"Skywork/SkyReels-V3-R2V-14B": "needs Skywork/SkyReels-V1-Hunyuan-I2V"}),
    *bad([*T2V, "--model_id", "a/b"], "--base_model_id", {
        "{files}/good.png": ("good.png is a file", "give a checkpoint's folder or a hub id"),
        "": (EMPTY, "id such as hunyuanvideo-community/HunyuanVideo"),
        ("./nothere", "tiny"): "give a folder, or an id such as hunyuanvideo-community/HunyuanVideo",
        "no such/thing": "neither a folder nor a hub id",
        "{files}/folder": DOWNLOAD,
    }),
    *bad([*T2V, "--model_id", "a/b", "--gpu_num", "2"], "--base_model_id", {"{files}/folder": DOWNLOAD}),
    *bad(REFERENCE, "--lora", {
        ("", "{files}/good.lora.safetensors,"): (EMPTY, NO_LORA),
        ("{files}/good.lora.safetensors:nan", "{files}/good.lora.safetensors:inf"): "with a scale after a colon",
        ("{files}/nothere.safetensors", "{files}/dangling", "/dev/zero"): ("is not a file or folder", LORA),
        "{files}/nothere.safetensors:0.5": ("{files}/nothere", LORA),
        "{files}/good.lora.safetensors:half": ("safetensors:half", LORA),
        "{files}/good.lora.safetensors,{files}/nothere.safetensors": ("nothere", "give a"),
        "{files}/good.png": ("is not a .safetensors file", "convert it"),
        "{files}/folder": ("no .safetensors file", "give the LoRA's own file"),
        "{files}/good.safetensors": ("is truncated or damaged", "download it again"),
        "{files}/cut.lora.safetensors": ("is truncated or damaged", "download it again"),
        "x" * 5000: ("xxx...xxx", LORA),
    }),
    *bad(T2V, "--lora", {"{files}/nothere.safetensors": ("is not a file or folder", LORA)}),
]  # fmt: skip
REPEAT, IN_LINES = "repeat its command", "give it in the lines"
RUNS = [
    case([*LEFT, "--dry_run"], "--resume", "conflicts with --dry_run", ONE),
    case([*AVATAR, "--resume", "--seed", "-1", "--video_num", "2"], "--resume", "random seeds", "as --seed"),
    case([*LEFT, "--seed", "7"], "--resume", "seed 42 -> 7", REPEAT),
    case([*LEFT, "--height", "48"], "--resume", "height 32 -> 48", REPEAT),
    case([*LEFT, "--dtype", "bfloat16"], "--resume", "dtype float32 -> bfloat16", REPEAT),
    case([*LEFT, "--text_guidance_scale", "2"], "--resume", "text_guidance_scale None -> 2.0", REPEAT),
    case([word.replace("left.mp4", "other.mp4") for word in LEFT], "--input_image",
         "portrait.png has changed since the interrupted run", "restore the old file"),
    *bad(JOBS, "--jobs", {
        "{files}/none.jsonl": PATH,
        "": ("an empty path", "give a file"),
        "{files}/folder": "give a file",
        "{files}/blank.jsonl": "write some",
        "{files}/large.jsonl": "split it",
        "{files}/blocked.jsonl": ("{files}/blocked.results.jsonl", "check its permissions"),
    }),
    *bad(JOBS, "--output", {"a.mp4": IN_LINES}),
    *bad(JOBS, "--save_latents", {"a.safetensors": IN_LINES}),
    *bad(JOBS, "--save_quantized", {"folder": IN_LINES}),
    *bad(JOBS, "--concat", {"": (EMPTY, "give FILM.mp4"), "film": "give a name ending in .mp4"}),
    *bad(JOBS, "--seed", {"x": WHOLE}),
    *bad(JOBS, "--video_num", {"2": "write one line per video"}),
    case([*JOBS, "--resume"], "--resume", "--jobs makes several", "leave it out"),
]  # fmt: skip
WORKS_HERE = {  # valid on some machines
    "--device=cuda": any(map(has_library, GPU_DRIVERS)),
    "--device=mps": sys.platform == "darwin",
    "--model_source=modelscope": importlib.util.find_spec("modelscope") is not None,
}


class Handler(BaseHTTPRequestHandler):
    """Answers according to the first folder of the path."""

    release = threading.Event()  # lets blocked handlers finish

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "silent":
            self.release.wait(20)
            return
        web_page = b"<!DOCTYPE html><html><body>sign in</body></html>"
        body = {"html": web_page, "disguised": web_page, "empty": b""}.get(kind, b"\0\1\2\3" * 100)
        media_type = {"html": "text/html", "text": "text/plain"}.get(kind, "application/octet-stream")
        self.send_response(404 if kind == "missing" else 200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(2**40 if kind == "oversize" else len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a running web server."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    Handler.release.set()
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_lossless) -> Path:
    """A folder of input files, most of them bad."""
    folder = tmp_path_factory.mktemp("files")
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    picture.save(folder / "good.png")
    picture.save(folder / "whole.jpg")
    for seconds in ("0", "0.3", "1", "6", "51", "150", "201"):
        write_tone(folder / f"{seconds}s.wav", float(seconds))
    clip = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=4"]
    sound = ["-f", "lavfi", "-i", "sine=duration=4"]
    for name, source in (("4s.mp4", [*clip, *sound]), ("silent.mp4", clip), ("sound.m4a", sound)):
        subprocess.run([get_ffmpeg_exe(), "-v", "error", *source, folder / name], stdin=subprocess.DEVNULL, check=True)
    write_lossless(folder / "short.mp4", np.zeros((5, 48, 64, 3), np.uint8))
    save_file({"blocks.0.attn1.to_q.lora_A.weight": np.zeros((1, 96), "f4")}, folder / "good.lora.safetensors")
    for name, whole, size in (
        ("cut.png", folder / "good.png", 3000), ("cut.jpg", folder / "whole.jpg", 1000),
        ("cut.wav", folder / "6s.wav", 20_000), ("cut.mp4", ASSETS / "boat.mp4", -5000),
        ("cut.lora.safetensors", folder / "good.lora.safetensors", -4),
    ):  # fmt: skip
        (folder / name).write_bytes(whole.read_bytes()[:size])
    for name in ("text.png", "text.mp3", "text.mp4"):
        (folder / name).write_text("nothing but words\n")
    for name in ("empty", "good.mp4", "good.safetensors"):
        (folder / name).touch()
    for name in ("folder", "folder.mp4", "blocked.results.jsonl"):
        (folder / name).mkdir()
    for name in ("dangling", "dangling.mp4"):
        (folder / name).symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "playlist.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{ASSETS}/boat.mp4\n#EXT-X-ENDLIST\n")
    for name, (text, *_) in CONFIG_TEXTS.items():
        (folder / name).write_text(text)
    (folder / "both.yaml").write_text("duration: 5\nnum_frames: 5\n")
    (folder / "blank.jsonl").write_text(" \n\n")
    for name in ("jobs.jsonl", "blocked.jsonl"):
        (folder / name).write_text(json.dumps({"task_type": "t2v", "prompt": "a"}) + "\n")
    with (folder / "large.jsonl").open("wb") as file:
        file.truncate(MAX_JOBS_BYTES + 1)
    write_states(folder)
    return folder


def write_states(folder: Path) -> None:
    """Write what two interrupted runs leave: one of the command `LEFT`, and one with another portrait."""
    flags = parse_request(filled(LEFT, folder)).flags | {"height": 32, "width": 32, "dtype": "float32"}
    for name, portrait in (("left", ASSETS / "portrait.png"), ("other", ASSETS / "fox.png")):
        (folder / f"{name}.state").mkdir()
        files = {"input_image": portrait, "input_audio": folder / "6s.wav"}
        inputs = [[flag, hashlib.sha256(path.read_bytes()).hexdigest()] for flag, path in files.items()]
        content = {"output": f"{folder}/{name}.mp4", "flags": flags, "inputs": inputs, "save_quantized": None}
        (folder / f"{name}.state" / "request.json").write_text(json.dumps(content))


def filled(argv: Sequence[str], files: Path, server: str = "") -> list[str]:
    return [word.format(files=files, assets=ASSETS, server=server) for word in argv]


def check_words(line: str, words: Sequence[str]) -> None:
    """Check that the line has all words in this order; `...` matches anything."""
    place = 0
    for part in "...".join(words).split("..."):
        place = line.find(part, place)
        assert place >= 0, f"{part!r} in {line!r}"
        place += len(part)


@pytest.mark.parametrize(
    ("argv", "flag", "words"),
    [
        *COMMAND_LINE, *NUMBERS, *CHOICES, *CONFLICTS, *INPUTS, *ADDRESSES, *SPEAKERS, *OUTPUTS, *CONFIGS, *MODELS,
        *RUNS,
    ],
)  # fmt: skip
def test_bad_request(refuse, files, server, argv, flag, words):
    if WORKS_HERE.get("=".join(argv[-2:])):
        pytest.skip("it would work on this machine")
    line = refuse(filled(argv, files, server))
    assert line.startswith(f"error: {flag}: ")
    check_words(line.removeprefix(f"error: {flag}"), filled(words, files, server))


def test_compiling_without_a_compiler(refuse, files, monkeypatch):
    monkeypatch.setenv("PATH", "")
    line = refuse(filled([*REFERENCE, "--compile"], files))
    check_words(line, ("error: --compile: on: needs a compiler", "c++ or g++", "leave the flag out"))


@pytest.mark.parametrize(
    ("argv", "flag", "words"),
    [
        ([*AVATAR, "--vocals"], "--vocals", ('package audio-separator; pip install "audio-separator[cpu]", or leave',)),
        ([*DUB, "--speech_only"], "--speech_only", ("package silero-vad; pip install silero-vad, or leave it out",)),
        ([*TWO, "--speaker_boxes", "auto"], "--speaker_boxes", ("package scikit-image; pip install", "give the boxes")),
        ([*MUTE, "--text", "Hello"], "--text", ("pip install kokoro, install espeak-ng, or give a recording",)),
    ],
)
def test_sound_without_its_packages(refuse, files, monkeypatch, argv, flag, words):
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    check_words(refuse(filled(argv, files)), (f"error: {flag}: ", "needs the ", *words))


@pytest.mark.skipif(any(map(has_library, GPU_DRIVERS)), reason="the GPU's default dtype is another one")
def test_flash_attention_as_it_would_be_chosen_here(refuse, files):
    argv = [word for word in filled([*REFERENCE, "--attention", "flash"], files) if word not in ("--device", "cpu")]
    assert "works on a GPU (cuda) only, not on cpu" in refuse(argv)


def test_a_run_that_is_still_going_on_is_not_resumed(refuse, files):
    """A live run holds a lock on its record."""
    fcntl = pytest.importorskip("fcntl")
    with (files / "left.state" / "request.json").open("r+") as request:
        fcntl.flock(request, fcntl.LOCK_EX)
        check_words(refuse(filled(LEFT, files)), ("--resume: ", f"{files}/left.state is in use", "wait for it"))


WITHOUT_TORCH = """
import sys
from skyreels_v3.main import main
code = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("argv", "name", "remedy"), [(I2V, "image", COMPLETE), (AVATAR, "diarization", "an RTTM file")]
)
def test_errors_come_without_torch(files, argv, name, remedy):
    """Even errors that are found late."""
    argv = filled([*argv, f"--{name}", "{files}/cut.png"], files)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 2, made.stderr
    check_words(made.stderr, (f"error: --{name}: ", "cut.png", remedy))


def test_what_an_interrupted_run_left_is_found(files):
    """A control: the refused cases differ from a state that is accepted."""
    request = parse_request(filled(LEFT, files))
    checked = preflight(request, files).request
    assert (checked.resume, checked.output) == (True, request.output)
