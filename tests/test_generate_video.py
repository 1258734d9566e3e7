"""Whole runs of the command: what is printed where, what is written, and what is left when a run ends early.

The built-in toy model keeps them short. Runs that need no new process call `main` here, which saves importing torch
again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.numpy import load_file, save_file

from skyreels_v3 import generate as session
from skyreels_v3.cli import parse_request
from skyreels_v3.inputs import Inputs
from skyreels_v3.media.video_reader import probe_video, read_frames
from skyreels_v3.media.video_writer import read_comment, write_video
from skyreels_v3.plan import Plan, plan
from skyreels_v3.resume import RunRecord
from skyreels_v3.runtime import Usage
from tests.conftest import files_in, stop_at

SMALL = ("--device", "cpu", "--height", "32", "--width", "48", "--num_inference_steps", "2")
REFERENCE = ("--task_type", "reference_to_video", "--prompt", "a fox: \u00fcber 'Stock' = \"Stein\"", *SMALL)
TINY_WARNING = (
    "WARNING: tiny is a small model of a drawn world: it shows that everything runs, not what SkyReels can do"
)


@pytest.fixture
def toy(picture) -> tuple[object, ...]:
    """A command line that takes a second."""
    return (*REFERENCE, "--model_id", "tiny", "--ref_imgs", picture, "--num_frames", "5")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return path


def comment_of(video: Path) -> dict[str, object]:
    command = [get_ffmpeg_exe(), "-v", "error", "-i", video, "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    comment = re.search(r"^comment=((?:[^\\\n]|\\.|\\\n)*)$", text, re.MULTILINE)[1]
    return json.loads(re.sub(r"\\(.)", r"\1", comment, flags=re.DOTALL))


@pytest.mark.slow
def test_a_run_and_its_repetition_twice_at_once(start, toy, tmp_path):
    working = tmp_path / "working"
    run = start(*toy, "--seed", "-1", "--save_latents", "latents.safetensors")
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    path = stdout.removesuffix("\n")
    seed = re.fullmatch(r"result/reference_to_video/(\d+)_\d{8}-\d{6}\.mp4", path)[1]
    assert files_in(working) == {path, "latents.safetensors"}
    assert not files_in(tmp_path / "temporary")
    assert f"seed {seed}" in stderr
    assert TINY_WARNING in stderr
    for bar, total in (("loading", 3), ("denoising", 2), ("decoding", 2)):
        assert re.search(rf"{bar}: 100%.* {total}/{total} ", stderr)
    assert probe_video(working / path, 24).frames == 5

    comment = comment_of(working / path)
    assert comment.keys() == {"skyreels_v3", "flags", "inputs", "device", "seconds", "peak_gb"}
    stages = ("loading", "encoding the prompt", "encoding with the VAE", "denoising", "decoding with the VAE")
    assert comment["seconds"].keys() >= {*stages, "everything"}
    assert 0 < sum(comment["seconds"][stage] for stage in stages) <= comment["seconds"]["everything"] + 0.1
    assert 0.1 < comment["peak_gb"] < 10
    assert re.search(r"INFO: [\d.]+ s \(loading [\d.]+, .*denoising [\d.]+, .*\), at most [\d.]+ GB", stderr)
    assert comment["flags"]["prompt"] == REFERENCE[3]
    assert comment["flags"]["seed"] == int(seed) != 42
    (working / "again.yaml").write_text(json.dumps(comment["flags"]))
    again = ("--config", "again.yaml", "--quiet", "--output", "again.mp4", "--save_latents", "again.safetensors")
    runs = [start(*again), start(*again)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sorted(stdout for stdout, _ in outputs) == ["again-2.mp4\n", "again.mp4\n"]
    warnings = [line for _, stderr in outputs for line in stderr.splitlines()]
    assert warnings.count(TINY_WARNING) == 2
    assert sorted(warnings)[:-2] == [  # only from the run that came second
        f"WARNING: again.{suffix} exists already; the output is again-2.{suffix}" for suffix in ("mp4", "safetensors")
    ]
    expected = load_file(working / "latents.safetensors")
    assert expected["latents.0"].shape == (1, 16, 2, 4, 6)
    for name in ("again.safetensors", "again-2.safetensors"):
        np.testing.assert_array_equal(load_file(working / name)["latents.0"], expected["latents.0"])
    assert {name for name in files_in(working) if name.endswith("mp4")} == {path, "again.mp4", "again-2.mp4"}


@pytest.mark.slow
def test_a_closed_terminal_keeps_the_frames_that_there_are(start, toy, tmp_path):
    # large enough that decoding takes seconds on any machine
    size = ("--height", "128", "--width", "192", "--num_frames", "241")
    run = start(*toy, *size, "--output", "a/b.mp4")
    stderr = stop_at(run, r"decoding: .* ([2-9]|[12]\d)/61 ", signal.SIGHUP)
    assert run.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted"
    kept = int(re.search(r"not finished; the first (\d+) frames are in a/b\.partial\.mp4", stderr)[1])
    left = {"a/b.partial.mp4", "a/b.state/request.json", "a/b.state/pass-000.safetensors"}
    assert files_in(tmp_path / "working") == left
    assert not files_in(tmp_path / "temporary")
    frames = list(read_frames(tmp_path / "working" / "a" / "b.partial.mp4", 24))
    assert 0 < len(frames) == kept < 241


def test_interrupted_while_writing_no_bar_comes_after_the_last_word(main, toy, monkeypatch):
    def interrupted(frames: Iterator[np.ndarray], *_: object, **__: object) -> None:
        next(frames)  # the decoding bar is now open
        raise KeyboardInterrupt

    monkeypatch.setattr("skyreels_v3.generate.write_video", interrupted)
    code, stdout, stderr = main(*toy)
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C pressed twice
    assert (code, stdout) == (130, "")
    assert re.search(r"decoding: .* 1/2 ", stderr)
    assert stderr.splitlines()[-1] == "interrupted"


@pytest.mark.slow
def test_interrupted_before_the_first_frame_nothing_is_left(start, toy, tmp_path):
    run = start(*toy)
    stderr = stop_at(run, "INFO: device", signal.SIGTERM)
    assert run.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert not files_in(tmp_path / "working")
    assert not files_in(tmp_path / "temporary")


def test_the_current_folder_is_gone(main, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, stdout, stderr = main(*REFERENCE, "--model_id", "tiny", "--ref_imgs", "/a.png", "--output", "/a.mp4")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: command line: ") and "current folder" in stderr


@pytest.mark.slow
def test_input_and_extension_as_one_video(main, write_lossless, tmp_path, caplog):
    frames = np.random.default_rng(1).integers(0, 256, (12, 32, 48, 3), np.uint8)
    sound = ["-i", write_lossless(tmp_path / "silent.mp4", frames), "-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy"]
    clip = tmp_path / "clip.mp4"
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *sound, clip], stdin=subprocess.DEVNULL, check=True)
    code, stdout, stderr = main(
        "--task_type", "shot_switching_extension", "--prompt", "a", "--input_video", clip, "--model_id", "tiny", *SMALL,
        "--duration", "2", "--include_input", "--output", "frames/", "--save_latents", "latents.safetensors",
    )  # fmt: skip
    assert code == 0, stderr
    assert stdout == "frames\n"
    assert f"{clip} has sound, which PNG frames cannot have; give an mp4 as --output to keep it" in caplog.messages
    written = sorted((tmp_path / "frames").glob("*.png"))
    assert len(written) == 12 + 2 * 24
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in written[:12]], frames)
    latents = load_file(tmp_path / "latents.safetensors")
    assert {name: value.shape for name, value in latents.items()} == {"latents.0": (1, 16, 13, 4, 6)}
    assert json.loads(Image.open(written[0]).text["comment"])["flags"]["include_input"] is True


def test_sound_of_the_input_clip(write_lossless, tmp_path):
    sound = ["-i", write_lossless(tmp_path / "silent.mp4", np.zeros((24, 32, 48, 3), np.uint8)), "-f", "lavfi", "-i"]
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *sound, "sine=d=1", tmp_path / "a.mp4"], check=True)
    argv = ["--task_type", "single_shot_extension", "--prompt", "a", "--input_video", str(tmp_path / "a.mp4"), *SMALL]
    clip = probe_video(tmp_path / "a.mp4", 24)
    unrecorded = RunRecord(tmp_path, {}), Usage(torch.device("cpu"))
    for include in ([], ["--include_input"]):
        request = parse_request([*argv, *include, "--output", str(tmp_path / f"{len(include)}.mp4")])
        frames = iter(np.zeros((48, 32, 48, 3), np.uint8))
        made = SimpleNamespace(request=request, inputs=Inputs(clip=clip))
        path = session.write(made, frames, *unrecorded, tmp_path)
        command = [get_ffmpeg_exe(), "-hide_banner", "-i", path, "-af", "silencedetect=d=0.5", "-f", "null", "-"]
        log = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        assert ("Audio: aac" in log) == bool(include)
        if include:
            assert [round(float(start)) for start in re.findall(r"silence_start: ([\d.]+)", log)] == [1]


NAN = "error: --model_id: the transformer has numbers that are not finite in proj_out.bias; give a"
MISSING = "error: --model_id: {root}/transformer does not fit its model: missing keys proj_out.bias"
BLACK = "the decoded video is not finite in latent frame 0; the VAE is damaged"
PASS = {"a.state/request.json", "a.state/pass-000.safetensors"}


@pytest.mark.parametrize(
    ("model", "change", "code", "says", "left"),
    [
        ("transformer", lambda tensors: tensors["proj_out.bias"].fill(np.nan), 2, NAN, set()),
        ("transformer", lambda tensors: tensors.pop("proj_out.bias"), 2, MISSING, set()),
        ("vae", lambda tensors: tensors["decoder.conv_in.bias"].fill(np.nan), 1, BLACK, PASS),
    ],
)
def test_a_damaged_model_makes_no_video(main, reference, picture, tmp_path, model, change, code, says, left):
    root = shutil.copytree(reference / "pipelines" / "checkpoints" / "reference_to_video", tmp_path / "checkpoint")
    path = root / model / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    flags = ("--model_id", root, "--ref_imgs", picture, "--num_frames", "5", "--output", "out/a.mp4", "--quiet")
    made, stdout, stderr = main(*REFERENCE, *flags, "--save_latents", "out/a.safetensors")
    assert (made, stdout) == (code, "")
    assert says.format(root=root) in stderr and stderr.count("\n") == 1
    assert files_in(tmp_path / "out") == left and (tmp_path / "out").exists() == bool(left)


def test_a_cache_that_cannot_be_written(main, toy, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", "/proc/nothere")
    code, stdout, stderr = main(*toy)
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[-1].startswith("error: --model_id: tiny cannot be unpacked into /proc/nothere (")
    assert "set SKYREELS_CACHE to a folder that can be written to" in stderr


def test_other_errors_are_one_line_and_exit_code_1(main, toy, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full\nand more")

    monkeypatch.setattr("skyreels_v3.main.run", fail)
    code, stdout, stderr = main(*toy)
    assert (code, stdout) == (1, "")
    assert stderr == "error: RuntimeError: the disk is full (--verbose shows where)\n"
    assert not caplog.records
    main(*toy, "--verbose")
    assert caplog.records[0].exc_info[0] is RuntimeError


@pytest.mark.parametrize("model_id", ["tiny", "some/model", "{reference}/pipelines/checkpoints/reference_to_video"])
def test_a_dry_run_leaves_nothing(main, reference, picture, tmp_path, monkeypatch, model_id):
    model_id = model_id.format(reference=reference)
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "cache"))
    argv = [*REFERENCE, "--model_id", model_id, "--ref_imgs", picture, "--dry_run", "--save_latents", "a.safetensors"]
    code, stdout, stderr = main(*argv)
    assert (code, stderr) == (0, "")
    plan = dict(re.split(r"  +|(?<=pass 1) +", line, maxsplit=1) for line in stdout.splitlines())
    assert plan["video"].startswith("48 x 32, 121 new frames at 24 fps")
    assert plan["checkpoint"].startswith(model_id)
    assert ("download" in plan) == (model_id == "some/model")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("output", ["a.mp4", "frames/"])
def test_a_video_is_made_again_from_what_it_says(main, toy, tmp_path, output):
    flags = ("--prompt", "a=fox; #1 \\ \u00fcber\nlines", "--seed", -1, "--output", output, "--quiet")
    assert main(*toy, *flags)[0] == 0
    source = tmp_path / output
    sources = [source, source / "00003.png"] if source.is_dir() else [source]
    for number, config in enumerate(sources):
        code, out, err = main("--config", config, "--quiet", "--output", f"again{number}/")
        assert (code, out) == (0, f"again{number}\n"), err
        if source.is_dir():
            expected = [np.asarray(Image.open(path)) for path in sorted(source.iterdir())]
            made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / f"again{number}").iterdir())]
            assert np.array_equal(expected, made)
    code, out, _ = main("--config", source, "--quiet")  # the output's name is not reused
    assert code == 0
    assert out.startswith("result/reference_to_video/")
    if not source.is_dir():
        first, second = ([*read_frames(path, 24)] for path in (source, tmp_path / out.strip()))
        assert np.array_equal(first, second)
    plan = main("--config", source, "--seed", 5, "--dry_run")[1]
    assert plan.count("5_") == 1  # the command line takes precedence
    assert re.search(r"^time +about \d+ s of denoising", plan, re.MULTILINE)


def test_videos_that_do_not_say_how_they_were_made(main, tmp_path):
    frames = [np.zeros((32, 32, 3), np.uint8)] * 3
    comments = {"none": "", "text": "holiday", "list": "[1]", "odd": '{"flags": 3}', "deep": "[" * 100_000}
    for name, comment in comments.items():
        path = write_video(frames, tmp_path / f"{name}.mp4", height=32, width=32, fps=24, comment=partial(str, comment))
        code, _, err = main("--config", path)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: --config: {path} does not say how it was made; give a video")
    made = json.dumps({"flags": {"prompt": "a", "output": "/etc/a.mp4", "jobs": "x.jsonl", "task": "t2v"}})
    path = write_video(frames, tmp_path / "hostile.mp4", height=32, width=32, fps=24, comment=lambda: made)
    assert "unknown key task" in main("--config", path)[2]
    flags = {"task_type": "t2v", "model_id": "tiny", "prompt": "a", "output": "x.mp4", "jobs": "j"}
    made = json.dumps({"flags": flags})
    path = write_video(frames, tmp_path / "more.mp4", height=32, width=32, fps=24, comment=lambda: made)
    code, out, _ = main("--config", path, "--dry_run")
    assert code == 0
    assert "x.mp4" not in out
    (tmp_path / "folder").mkdir()
    assert "folder does not say how" in main("--config", "folder")[2]


@pytest.fixture
def address(picture) -> Iterator[str]:
    """The image's signed URL on a local web server."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(picture.parent))) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}/{picture.name}?sig=secret"
        server.shutdown()


def test_addresses_are_recorded_without_their_secrets(main, address, tmp_path, monkeypatch):
    flags = (*REFERENCE, "--model_id", "tiny", "--num_frames", "1", "--ref_imgs", address)
    code, _, stderr = main(*flags, "--output", "a.mp4")
    assert code == 2
    assert "--allow_private_urls" in stderr
    code, stdout, more = main(*flags, "--output", "a.mp4", "--allow_private_urls", "--verbose")
    assert (code, stdout) == (0, "a.mp4\n"), more
    assert "secret" not in stderr + more
    safe = address.replace("me:secret", "...").replace("sig=secret", "...")
    assert comment_of(tmp_path / "a.mp4")["flags"]["ref_imgs"] == [safe]
    assert b"secret" not in (tmp_path / "a.mp4").read_bytes()
    other = [*flags[:-1], address.replace("sig=secret", "sig=another")]
    code, stdout, more = main(*other, "--output", "a.mp4", "--allow_private_urls", "--resume")
    assert (code, stdout) == (0, "a.mp4\n"), more  # the same input with another signature: the video is already done
    (tmp_path / "again.yaml").write_text(json.dumps(comment_of(tmp_path / "a.mp4")["flags"]))
    code, _, stderr = main("--config", "again.yaml", "--output", "b.mp4")
    assert code == 2
    assert f"--ref_imgs: {safe}: its query or password was not recorded; give the whole address" in stderr


@pytest.mark.parametrize("output", ["a.mp4", "a/"])
def test_a_video_that_shall_not_say_what_made_it(main, toy, tmp_path, output):
    assert main(*toy, "--output", output, "--no_metadata")[0] == 0
    assert all(b"fox" not in (tmp_path / name).read_bytes() for name in files_in(tmp_path) if name.startswith("a"))
    assert read_comment(tmp_path / output) == ""


@pytest.mark.parametrize("videos", [1, 2])
def test_each_video_is_planned_once(main, toy, monkeypatch, videos):
    made: list[Plan] = []
    monkeypatch.setattr("skyreels_v3.worker.plan", lambda *given: made.append(plan(*given)) or made[-1])
    code, stdout, stderr = main(*toy, "--video_num", videos, "--outdir", "many")
    assert code == 0, stderr
    assert len(made) == videos == len(stdout.splitlines())
