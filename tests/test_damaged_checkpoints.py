"""Incomplete or damaged checkpoints: the error names the folder, what is wrong in it, and the remedy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from skyreels_v3.errors import CheckpointError
from skyreels_v3.float8 import FP8
from skyreels_v3.wan import checkpoint as published
from tests.conftest import ASSETS

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
OFFSETS = b'{"a": {"data_offsets": [0, "x"]}}'
BAD_HEADER = struct.pack("<Q", len(OFFSETS)) + OFFSETS
TEXT_ENCODER, NATIVE_VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
T2V = ["--task_type", "t2v", "--prompt", "FPS-24, a", "--device", "cpu"]

Change = Callable[[Path], object]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(size: int = -100) -> Change:
    """Truncate a file to `size` bytes; a negative size counts from the end."""
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def put(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def entries(**changed: object) -> Change:
    """Change entries of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def two_files(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "a.safetensors")
    (folder / WEIGHTS).rename(folder / "b.safetensors")


# layout (see `damaged`), what is damaged, how, and what the error says
CONFIG, INDEX = "transformer/config.json", f"transformer/{WEIGHTS}.index.json"
DAMAGES: list[tuple[str, str, Change, str]] = [
    ("diffusers", "", lambda root: [remove(path) for path in root.iterdir() if path.is_dir()],
     "missing transformer/config.json, vae/config.json, text_encoder/config.json, transformer/*.safetensors, "),
    ("diffusers", f"transformer/{WEIGHTS}", remove, "missing transformer/*.safetensors"),
    ("diffusers", "tokenizer", remove, "missing tokenizer/tokenizer.json"),
    ("diffusers", f"vae/{WEIGHTS}", cut(), f"vae/{WEIGHTS} is truncated or damaged"),
    ("diffusers", f"vae/{WEIGHTS}", cut(500), f"vae/{WEIGHTS} is truncated"),
    ("diffusers", f"vae/{WEIGHTS}", cut(0), f"vae/{WEIGHTS} is truncated"),
    ("diffusers", f"vae/{WEIGHTS}", put("version https://git-lfs"), "is truncated or damaged"),
    ("diffusers", f"vae/{WEIGHTS}", put(BAD_HEADER), "is truncated or damaged"),
    ("diffusers", "vae", two_files, "vae holds 2 safetensors files and no index"),
    ("diffusers", CONFIG, cut(40), f"{CONFIG} cannot be read"),
    ("diffusers", "vae/config.json", put("[]"), "vae/config.json is not a JSON object"),
    ("diffusers", CONFIG, entries(num_layers="two"), f"{CONFIG}: num_layers = two"),
    ("native", NATIVE_VAE, remove, f"missing {NATIVE_VAE}"),
    ("native", "transformer", remove, "missing transformer/config.json"),
    ("native", f"transformer/{SHARD}", remove, f"missing shards {{root}}/transformer/{SHARD}"),
    ("native", f"transformer/{SHARD}", cut(), f"transformer/{SHARD} is truncated or damaged"),
    ("native", INDEX, put("[" * 100_000), f"{WEIGHTS}.index.json cannot be read"),
    ("native", INDEX, entries(weight_map={"a": "../other/x"}), "missing shards {root}/transformer/../other/x"),
    ("native", TEXT_ENCODER, cut(), f"{TEXT_ENCODER} is truncated"),
    ("native", CONFIG, entries(num_heads=0), f"{CONFIG}: num_heads = 0"),
    *(
        (layout, f"{folder}{file}", change, says)
        for layout, folder in (("whole", ""), ("divided", "transformer/"))
        for file, change, says in (
            (WEIGHTS, remove, "not a complete t2v checkpoint: missing "),
            ("config.json", remove, "missing config.json; download these files of Sky"),
            (WEIGHTS, cut(), f"{WEIGHTS} is truncated or damaged"),
            ("config.json", put("{"), "config.json cannot be read"),
            *(
                ("config.json", entries(**{name: value}), f"config.json: {name} = {value} is not a size")
                for name, value in (
                    ("num_layers", "two"), ("num_attention_heads", 0), ("num_single_layers", -1), ("in_channels", 16.5),
                    ("attention_head_dim", None), ("text_embed_dim", True),
                )
            ),
        )
    ),
    ("base", "vae", remove, "not a complete HunyuanVideo: missing vae/config.json"),
    ("base", f"vae/{WEIGHTS}", remove, "missing vae/*.safetensors"),
    ("base", "scheduler", remove, "missing scheduler/scheduler_config.json"),
    ("base", "text_encoder/model.safetensors", cut(), "is truncated or damaged"),
    ("base", "text_encoder_2/config.json", put("[]"), "is not a JSON object"),
    ("base", "text_encoder_2/config.json", put("[" * 100_000), "config.json cannot be read"),
]  # fmt: skip


@pytest.fixture
def damaged(reference, t2v_toy, tmp_path) -> Callable[[str], tuple[Path, list[str]]]:
    """Copy a checkpoint in one of the layouts; returns its root and a command line that needs it.

    Layouts: "diffusers" and "native" are V3's. "whole" is V1's transformer beside HunyuanVideo's other components;
    "divided" and "base" are HunyuanVideo's own folder, with the transformer in one of its folders.
    """

    def copy(layout: str) -> tuple[Path, list[str]]:
        root, output = tmp_path / "checkpoint", ["--output", str(tmp_path / "a.mp4")]
        checkpoints = reference / "pipelines" / "checkpoints"
        if layout == "diffusers":
            shutil.copytree(checkpoints / "reference_to_video", root)
            task = ["--task_type", "reference_to_video", "--ref_imgs", str(ASSETS / "fox.png"), "--prompt", "a"]
            return root, [*task, "--model_id", str(root), "--device", "cpu", *output]
        if layout == "native":
            shutil.copytree(checkpoints / "video_extension", root)
            task = ["--task_type", "single_shot_extension", "--input_video", str(ASSETS / "boat.mp4"), "--prompt", "a"]
            return root, [*task, "--model_id", str(root), "--device", "cpu", *output]
        shutil.copytree(t2v_toy, root)
        if layout == "whole":
            return root, [*T2V, "--model_id", str(root), *output]
        (root / "transformer").mkdir()
        for name in ("config.json", WEIGHTS):
            shutil.copy(root / name, root / "transformer")
        return root, [*T2V, "--model_id", str(root / "transformer"), "--base_model_id", str(root), *output]

    return copy


@pytest.mark.parametrize(
    ("layout", "file", "change", "says"), DAMAGES, ids=[f"{layout}-{says[-40:]}" for layout, _, _, says in DAMAGES]
)
def test_a_damaged_checkpoint(refuse, damaged, layout, file, change, says):
    root, argv = damaged(layout)
    change(root / file)
    line = refuse(argv)
    assert line.startswith(f"error: --{'base_model_id' if layout == 'base' else 'model_id'}: ")
    assert str(root) in line and says.format(root=root) in line and "download" in line


def test_the_base_is_looked_at_before_a_transformer_is_fetched(refuse, damaged, tmp_path):
    root, _ = damaged("base")
    shutil.rmtree(root / "vae")
    line = refuse([*T2V, "--base_model_id", str(root), "--output", str(tmp_path / "a.mp4")])
    assert line.startswith(f"error: --base_model_id: {root} is not a complete HunyuanVideo: missing vae/config.json")


def test_a_checkpoint_in_fp8_takes_no_lora(refuse, damaged, tmp_path):
    root, argv = damaged("divided")
    file = root / "transformer" / WEIGHTS
    tensors = safetensors.torch.load_file(file)
    layer = "transformer_blocks.0.attn.to_q"
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(FP8)
    safetensors.torch.save_file(tensors | {f"{layer}.weight_scale": tensors[f"{layer}.bias"].abs()}, file)
    save_file({"a.lora_A.weight": np.zeros((1, 4), "f4")}, tmp_path / "a.safetensors")
    line = refuse([*argv, "--lora", str(tmp_path / "a.safetensors")])
    assert line.startswith("error: --lora: ") and "--save_quantized" in line


# Damage that only the loaders detect: layout, file, how its content is changed, what the error says about it
CONTENT: list[tuple[str, str, Callable[[dict[str, Any]], object], str]] = [
    ("diffusers", f"transformer/{WEIGHTS}", lambda t: t.pop("proj_out.bias"), "missing keys proj_out.bias"),
    ("native", f"transformer/{SHARD}", lambda t: t.update(surplus=t["text_embedding.0.bias"].clone()),
     "unexpected keys surplus"),
    ("diffusers", f"transformer/{WEIGHTS}", lambda t: t.update({"proj_out.bias": t["proj_out.bias"][:5].clone()}),
     "wrong shapes proj_out.bias ([5] instead of [64])"),
    ("native", f"transformer/{SHARD}", lambda t: t.pop("text_embedding.0.weight"), "text_embedding.0.weight"),
    ("native", f"transformer/{SHARD}",
     lambda t: t.update({"text_embedding.0.weight": t["text_embedding.0.bias"].clone()}),
     "wrong shape text_embedding.0.weight"),
    ("diffusers", CONFIG, lambda c: c.update(magic=1, wand=2), "unknown entries magic, wand"),
    ("native", CONFIG, lambda c: c.update(magic=1), "unknown entries magic"),
    ("diffusers", CONFIG, lambda c: c.update(qk_norm="layer_norm"), "qk_norm = layer_norm"),
    ("diffusers", CONFIG, lambda c: c.update(eps=float("nan")), "eps = nan is not a positive number"),
    ("native", NATIVE_VAE, lambda t: t.pop("conv1.bias"), "missing keys conv1.bias"),
    ("native", NATIVE_VAE, lambda t: t.update(surplus=t["conv1.bias"]), "unexpected keys surplus"),
    ("native", NATIVE_VAE, lambda t: t.update({"conv1.bias": t["conv1.bias"][:5]}),
     "wrong shapes conv1.bias ([5] instead of [32])"),
    ("native", NATIVE_VAE, lambda t: t.update({"conv2.weight": t["conv2.weight"].sum()}), "wrong shape conv2.weight"),
    ("native", NATIVE_VAE, lambda t: t.update(epoch=3), "other than a dictionary of tensors"),
    ("native", NATIVE_VAE, lambda t: t.update(state_dict=dict(t)), "other than a dictionary of tensors"),
    ("native", NATIVE_VAE, lambda t: t.update(unpickled=Path("/")), "something other than tensors"),
    ("native", NATIVE_VAE, lambda t: t.update({1: t["conv1.bias"]}), "other than a dictionary of tensors"),
    ("diffusers", "vae/config.json", lambda c: c.update(magic=1), "unknown entries magic"),
    ("diffusers", "vae/config.json", lambda c: c.update(base_dim="x"), "base_dim = x is not a size"),
    ("diffusers", "vae/config.json", lambda c: c.update(is_residual=True), "is_residual = True is not supported"),
    ("diffusers", "vae/config.json", lambda c: c.update(latents_std=[1]), "latents_std = [1] is not 16 numbers"),
    ("native", TEXT_ENCODER, lambda t: t.pop("norm.weight"), "missing keys norm.weight"),
    ("native", TEXT_ENCODER, lambda t: t.pop("token_embedding.weight"), "lacks"),
    ("native", TEXT_ENCODER, lambda t: t.update({"token_embedding.weight": t["norm.weight"]}),
     "wrong shape token_embedding.weight"),
    ("native", TEXT_ENCODER, lambda t: t.update(surplus=t["norm.weight"]), "unexpected keys surplus"),
    ("diffusers", "text_encoder/config.json", lambda c: c.update(layer_norm_epsilon="x"), "epsilon = x is no"),
    ("diffusers", "text_encoder/config.json", lambda c: c.update(d_model="x"), "d_model = x is not a size"),
    ("diffusers", "text_encoder/config.json", lambda c: c.update(num_layers=1), "unexpected keys encoder.block.1"),
    ("diffusers", "text_encoder/model.safetensors",
     lambda t: t.update({"shared.weight": t["shared.weight"][:5].clone()}), "vocab_size = 264 is more than"),
    ("diffusers", "tokenizer/tokenizer.json", lambda c: c.clear(), "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "file", "change", "says"), CONTENT, ids=[f"{row[1][-20:]}-{row[3][-30:]}" for row in CONTENT]
)
def test_wrong_content(damaged, layout, file, change, says):
    root, _ = damaged(layout)
    path = root / file
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        safe = path.suffix == ".safetensors"
        content = safetensors.torch.load_file(path) if safe else torch.load(path)
        change(content)
        safetensors.torch.save_file(content, path) if safe else torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        if file.startswith("transformer"):
            published.load_transformer(root / "transformer", torch.float32)
        elif file.startswith(("vae", NATIVE_VAE)):
            published.load_vae(root, torch.float32)
        else:
            published.load_text_encoder(root, torch.float32)
    message = str(caught.value)
    assert message.startswith("--model_id: ") and message.isprintable()
    assert str(root / file.split("/")[0]) in message and says in message
