"""Requests for SkyReels V1 that cannot work, as in test_bad_input.py: its picture, its two folders, its processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import torch
from safetensors.numpy import save_file

from skyreels_v3.batch import read_jobs
from skyreels_v3.hunyuan.family import write_tiny
from skyreels_v3.memory.quantize import FP8
from skyreels_v3.tasks import task_spec
from tests.conftest import ROOT, bad, check_refused

ASSETS = ROOT / "assets"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = ["--model_id", "tiny"]
T2V = ["--task_type", "t2v", "--prompt", "FPS-24, a", "--device", "cpu"]
I2V = ["--task_type", "i2v", "--prompt", "FPS-24, a", "--device", "cpu"]
PICTURE = ["--image", "{files}/good.png"]
TOY_I2V = [*I2V, *TINY]
# both in one folder, and in two
WHOLE = [*T2V, "--model_id", "{root}"]
DIVIDED = [*T2V, "--model_id", "{root}/transformer", "--base_model_id", "{root}"]

PICTURES = [
    bad(TOY_I2V, "--image", "", "give a file", "an empty path", "empty"),
    bad(TOY_I2V, "--image", "{files}/nothere.png", "check the path"),
    bad(TOY_I2V, "--image", "{files}/good.png/a.png", "check the path"),
    bad(TOY_I2V, "--image", "{files}/dangling", "check the path"),
    bad(TOY_I2V, "--image", "{files}/folder", "give a file"),
    bad(TOY_I2V, "--image", "/dev/zero", "give an ordinary file"),
    bad(TOY_I2V, "--image", "{files}/empty", "give a complete file"),
    bad(TOY_I2V, "--image", "{files}/cut.png", "give a complete file"),
    bad(TOY_I2V, "--image", "{files}/text.png", "give a JPEG, PNG"),
    bad(TOY_I2V, "--image", "{assets}/boat.mp4", "give a JPEG, PNG"),
    bad(TOY_I2V, "--image", "ftp://example.org/a.png", "download it and give the path"),
    bad(TOY_I2V, "--image", "file:///etc/passwd", "download it and give the path"),
    bad(TOY_I2V, "--image", "http://127.0.0.1:9/a.png", "--allow_private_urls"),
    bad(TOY_I2V, "--image", "{files}/good.png,{files}/good.png", "check the path", "{files}...good.png"),
    bad([*TOY_I2V, *PICTURE], "--ref_imgs", "{files}/good.png", "i2v does not take it; leave it out"),
    bad([*TOY_I2V, *PICTURE], "--input_image", "{files}/good.png", "i2v does not take it; leave it out"),
    bad(["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "{files}/good.png"], "--image",
        "{files}/good.png", "reference_to_video does not take it; leave it out"),
]  # fmt: skip
FOLDERS = [
    bad(T2V, "--model_id", "{files}/good.png", "give a checkpoint's folder or a hub id"),
    bad(T2V, "--model_id", "./nothere", "give a folder, an id such as Skywork/SkyReels-V1-Hunyuan-T2V, or tiny"),
    bad(T2V, "--model_id", "{files}/folder", "missing config.json", "{files}/folder is no complete t2v checkpoint"),
    bad(T2V, "--model_id", "Skywork/SkyReels-V1-Hunyuan-I2V", "needs Skywork/SkyReels-V1-Hunyuan-T2V"),
    bad([*I2V, *PICTURE], "--model_id", "Skywork/SkyReels-V3-R2V-14B", "needs Skywork/SkyReels-V1-Hunyuan-I2V"),
    bad(T2V, "--base_model_id", "{files}/good.png", "give a checkpoint's folder or a hub id", "good.png is a file"),
    bad(T2V, "--base_model_id", "", "id such as hunyuanvideo-community/HunyuanVideo", "an empty value", "empty"),
    bad(T2V, "--base_model_id", "./nothere", "give a folder, or an id such as hunyuanvideo-community/HunyuanVideo"),
    bad(T2V, "--base_model_id", "{files}/folder", "download these files of hunyuanvideo-community/HunyuanVideo"),
    bad(T2V, "--base_model_id", "tiny", "give a folder, or an id such as hunyuanvideo-community/HunyuanVideo"),
    bad(["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", "{files}/good.png"], "--base_model_id",
        "a/b", "reference_to_video does not take it; leave it out"),
    bad([*T2V, *TINY], "--lora", "{files}/nothere.safetensors", "give a .safetensors file", "is no file or folder"),
]  # fmt: skip
JOBS = ["--jobs", "{files}/jobs.jsonl"]
RUNS = [
    bad(T2V, "--gpu_num", "65", "from 1 to 64"),
    bad(T2V, "--gpu_num", "two", "give a whole number"),
    bad(T2V, "--video_num", "0", "from 1 to 10000"),
    bad(JOBS, "--video_num", "2", "write a line for each"),
    bad([*TOY_I2V, "--gpu_num", "2"], "--image", "{files}/text.png", "give a JPEG, PNG"),
    bad([*T2V, "--gpu_num", "2"], "--base_model_id", "{files}/folder", "download these files of hunyuanvideo"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of inputs, most of them bad."""
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "text.png").write_text("nothing but words\n")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "jobs.jsonl").write_text(json.dumps({"task_type": "t2v", "prompt": "a"}) + "\n")
    return folder


@pytest.mark.parametrize("case", [*PICTURES, *FOLDERS, *RUNS], ids=lambda case: case.name)
def test_bad_request(refuse, files, case):
    check_refused(case, refuse, files=files, assets=ASSETS)


# Folders that are there and damaged


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


TRANSFORMER: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), "no complete t2v checkpoint: missing "),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "missing config.json; download these files of Sky"),
    "cut": (lambda folder: cut(folder / WEIGHTS), f"{WEIGHTS} is truncated or damaged"),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    **{
        f"{name}={value}": (
            lambda folder, name=name, value=value: change(folder / "config.json", **{name: value}),
            f"config.json: {name} = {value} is no size",
        )
        for name, value in (
            ("num_layers", "two"), ("num_attention_heads", 0), ("num_single_layers", -1), ("in_channels", 16.5),
            ("attention_head_dim", None), ("text_embed_dim", True),
        )
    },
}  # fmt: skip
BASE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-vae": (lambda folder: shutil.rmtree(folder / "vae"), "no complete HunyuanVideo: missing vae/config.json"),
    "no-vae-weights": (lambda folder: (folder / "vae" / WEIGHTS).unlink(), "missing vae/*.safetensors"),
    "no-scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "missing scheduler/scheduler_config.json"),
    "cut-llama": (lambda folder: cut(folder / "text_encoder" / "model.safetensors"), "is truncated or damaged"),
    "clip-config": (lambda folder: (folder / "text_encoder_2" / "config.json").write_text("[]"), "is no JSON object"),
    "brackets": (
        lambda folder: (folder / "text_encoder_2" / "config.json").write_text("[" * 100_000),
        "config.json cannot be read",
    ),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_tiny(folder, task_spec("t2v"))
    return folder


@pytest.fixture
def root(toy, tmp_path) -> Path:
    """HunyuanVideo's folder as it is published: with the transformer in one of its folders."""
    folder = shutil.copytree(toy, tmp_path / "root")
    (folder / "transformer").mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(folder / name, folder / "transformer")
    return folder


def refused(refuse: Callable[[list[str]], str], argv: list[str], root: Path, tmp_path: Path) -> str:
    return refuse([*(argument.format(root=root) for argument in argv), "--output", str(tmp_path / "a.mp4")])


@pytest.mark.parametrize("name", TRANSFORMER)
@pytest.mark.parametrize("argv", [WHOLE, DIVIDED], ids=["whole", "divided"])
def test_damaged_transformers(refuse, root, tmp_path, name, argv):
    damage, says = TRANSFORMER[name]
    folder = root if argv is WHOLE else root / "transformer"
    damage(folder)
    line = refused(refuse, argv, root, tmp_path)
    assert line.startswith(f"error: --model_id: {folder}")
    assert says in line and "download" in line


@pytest.mark.parametrize("name", BASE)
def test_damaged_other_components(refuse, root, tmp_path, name):
    damage, says = BASE[name]
    damage(root)
    line = refused(refuse, DIVIDED, root, tmp_path)
    assert line.startswith(f"error: --base_model_id: {root}")
    assert says in line and "download" in line


def test_the_base_is_looked_at_before_a_transformer_is_fetched(refuse, root, tmp_path):
    shutil.rmtree(root / "vae")
    line = refused(refuse, [*T2V, "--base_model_id", "{root}"], root, tmp_path)
    assert line.startswith(f"error: --base_model_id: {root} is no complete HunyuanVideo: missing vae/config.json")


def test_a_checkpoint_in_fp8_takes_no_lora(refuse, root, files, tmp_path):
    file = root / "transformer" / WEIGHTS
    tensors = torch.load_file(file)
    layer = "transformer_blocks.0.attn.to_q"
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(FP8)
    torch.save_file(tensors | {f"{layer}.weight_scale": tensors[f"{layer}.bias"].abs()}, file)
    save_file({"a.lora_A.weight": np.zeros((1, 4), "f4")}, tmp_path / "a.safetensors")
    line = refused(refuse, [*DIVIDED, "--lora", str(tmp_path / "a.safetensors")], root, tmp_path)
    assert line.startswith("error: --lora: ") and "--save_quantized" in line


# Processes and jobs


@pytest.fixture
def two_processes(monkeypatch) -> None:
    """What torchrun says to the first of two."""
    says = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in (says | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))


def test_another_number_of_processes_than_torchruns(two_processes, refuse):
    line = refuse([*T2V, *TINY, "--gpu_num", "4"])
    says = "--gpu_num: 4: 2 processes were started already; leave it out, or start without torchrun"
    assert line == f"error: rank 0: {says}"


@pytest.mark.parametrize(("name", "value"), [("gpu_num", 2), ("video_num", 2), ("gpu_num", 1), ("video_num", 1)])
def test_what_cannot_stand_in_a_line_of_jobs(tmp_path, name, value):
    good = {"task_type": "t2v", "prompt": "FPS-24, a", "model_id": "tiny"}
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps(line) for line in (good | {name: value}, good)))
    refused, taken = read_jobs(str(tmp_path / "jobs.jsonl"), {})
    assert refused.request is None and refused.problem.startswith(f"--{name}: is not allowed in a line of --jobs")
    assert refused.problem.isprintable() and "\n" not in refused.problem
    assert taken.request is not None


def test_v1s_flags_can_stand_in_a_line_of_jobs(tmp_path):
    line = {
        "task_type": "i2v", "prompt": "a", "image": "a.png", "outdir": "films", "base_model_id": "a/b", "fps": 30,
        "embedded_guidance_scale": 2, "no_riflex": True, "offload": True, "parameters_level": True, "quant": "fp8",
    }  # fmt: skip
    (tmp_path / "jobs.jsonl").write_text(json.dumps(line))
    (job,) = read_jobs(str(tmp_path / "jobs.jsonl"), {})
    assert job.problem == "" and job.request is not None
    assert (job.request.image, job.request.base_model_id, job.request.task.fps) == (
        str(tmp_path / "a.png"),
        "a/b",
        30,
    )
