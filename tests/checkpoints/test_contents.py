"""What headers and configs tell: every checkpoint that a loader takes passes, and what cannot work is named at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyreels_v3.checkpoints.contents import check_components, check_transformer
from skyreels_v3.checkpoints.hub import weight_files
from skyreels_v3.errors import CheckpointError
from skyreels_v3.hunyuan.checkpoint import load_hunyuan_transformer, load_llama
from skyreels_v3.hunyuan.tiny import write_hunyuan
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.checkpoint import load_text_encoder, load_transformer, load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP8 = torch.float8_e4m3fn
R2V, SHOT, AVATAR, T2V = map(task_spec, ("reference_to_video", "shot_switching_extension", "talking_avatar", "t2v"))
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoints(reference, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint for each task."""
    toy = tmp_path_factory.mktemp("toy")
    write_hunyuan(toy, 16)
    root = reference / "pipelines" / "checkpoints"
    return {
        R2V.name: root / "reference_to_video",
        SHOT.name: root / "video_extension",
        AVATAR.name: root / "talking_avatar",
        T2V.name: toy,
    }


@pytest.fixture
def copy(checkpoints, tmp_path) -> Callable[..., Path]:
    return lambda task: shutil.copytree(checkpoints[task.name], tmp_path / "copy")


def change(file: Path, new: Callable[[Tensors], Tensors], name: str | None = None) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in new(tensors).items()}, file.with_name(name or file.name))


def change_config(folder: Path, **entries: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("task", [R2V, SHOT, AVATAR, T2V], ids=lambda task: task.name)
def test_what_is_whole_passes(checkpoints, task):
    """And the shapes are those of the model that is loaded."""
    folder = checkpoints[task.name] / task.transformer_folder
    load = load_hunyuan_transformer if task is T2V else load_transformer
    loaded = {name: tuple(weight.shape) for name, weight in load(folder, torch.float32).named_parameters()}
    assert check_transformer(folder, task) == loaded
    check_components(checkpoints[task.name], task)


def test_weights_in_our_fp8_pass(copy):
    folder = copy(R2V) / "transformer"
    model = load_transformer(folder, torch.bfloat16)
    quantize(model.blocks, torch.device("cpu"))
    save_file({name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / WEIGHTS)
    check_transformer(folder, R2V)
    layer = "blocks.0.attn1.to_q"
    change(folder / WEIGHTS, lambda t: t | {f"{layer}.weight": t[f"{layer}.weight"].bfloat16()})
    for refuse in (lambda: check_transformer(folder, R2V), lambda: load_transformer(folder, torch.bfloat16)):
        with pytest.raises(CheckpointError, match=f"{layer}.weight"):
            refuse()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("task", [R2V, SHOT, T2V], ids=lambda task: task.name)
def test_a_prefix_of_all_names_is_taken_off(copy, checkpoints, task, prefix):
    root = copy(task)
    folder, original = root / task.transformer_folder, checkpoints[task.name] / task.transformer_folder
    change(next(folder.glob("*.safetensors")), lambda t: {prefix + key: tensor for key, tensor in t.items()})
    for index in folder.glob("*.index.json"):  # of shards, of which all must have it
        index.unlink()
        merged = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
        for file in folder.glob("*.safetensors"):
            file.unlink()
        save_file({prefix + key.removeprefix(prefix): t for key, t in merged.items()}, folder / WEIGHTS)
    load = load_hunyuan_transformer if task is T2V else load_transformer
    assert check_transformer(folder, task) == check_transformer(original, task)
    loaded, wanted = load(folder, torch.float32).state_dict(), load(original, torch.float32).state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def scaled(tensors: Tensors, suffix: str, *shape: int) -> Tensors:
    """Matrices in FP8, each divided by one scale, which fills the format's range."""
    made = dict(tensors)
    for key, weight in tensors.items():
        if weight.ndim == 2 and "blocks" in key:
            scale = weight.float().abs().max() / 448
            made[key] = (weight.float() / scale).to(FP8)
            if suffix:
                made[key.removesuffix("weight") + suffix] = scale.reshape(shape)
    return made


QUERY = "blocks.0.attn1.to_q"
# how the transformer's tensors are changed, what is said, and whether only the weights themselves tell
FORMATS: dict[str, tuple[Callable[[Tensors], Tensors], str, bool]] = {
    "ComfyUI's older": (
        lambda t: scaled(t, "scale_weight", 1) | {"scaled_fp8": torch.zeros(2, dtype=FP8)},
        "holds weights in ComfyUI's scaled FP8 (", False,
    ),
    "ComfyUI's": (
        lambda t: scaled(t, "weight_scale") | {f"{QUERY}.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
        f"holds weights in ComfyUI's mixed precision ({QUERY}.comfy_quant)", False,
    ),
    "one scale for each": (
        lambda t: scaled(t, "weight_scale"), "FP8 that is scaled otherwise than by rows (blocks.0.attn1", False,
    ),
    "ModelOpt's": (lambda t: t | {f"{QUERY}.input_scale": torch.ones(())}, "in ModelOpt's FP8 or NVFP4", False),
    "bitsandbytes'": (lambda t: t | {f"{QUERY}.weight.absmax": torch.ones(9)}, "in bitsandbytes' format", False),
    "GPTQ's": (lambda t: t | {f"{QUERY}.qweight": torch.ones(9)}, "in 4-bit integers", False),
    "a scale of nothing": (lambda t: t | {"blocks.0.attn9.weight_scale": torch.ones(9)}, "scaled otherwise", False),
    "FP8 that lost its scales": (
        lambda t: scaled(t, ""), "attn1.to_q.weight is FP8 that was divided by a scale, and there is none", True,
    ),
    **{
        str(dtype): (
            lambda t, dtype=dtype: {key: tensor.to(dtype) for key, tensor in t.items()},
            f"no weights: blocks.0.attn1.norm_k.weight ({name}), ", False,
        )
        for dtype, name in (
            (torch.int8, "I8"), (torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL"),
            (torch.complex64, "C64"),
        )
    },
    "one integer": (
        lambda t: t | {"proj_out.bias": t["proj_out.bias"].to(torch.int64)}, "no weights: proj_out.bias (I64);", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_a_format_that_is_not_read(copy, name):
    """Named by the header alone where that tells it, and by the loader in every case."""
    new, says, late = FORMATS[name]
    folder = copy(R2V) / "transformer"
    change(folder / WEIGHTS, new)
    if late:
        check_transformer(folder, R2V)
    else:
        with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
            check_transformer(folder, R2V)
        assert "--quant fp8" in str(caught.value) and "download" not in str(caught.value)
    with pytest.raises(CheckpointError):
        load_transformer(folder, torch.float32)


def test_a_plain_cast_to_fp8_is_taken(copy, checkpoints):
    folder = copy(R2V) / "transformer"
    change(folder / WEIGHTS, lambda t: {k: w.to(FP8) if w.ndim == 2 else w for k, w in t.items()})
    check_transformer(folder, R2V)
    made = load_transformer(folder, torch.float32).blocks[0].attn1.to_q.weight
    plain = load_transformer(checkpoints[R2V.name] / "transformer", torch.float32).blocks[0].attn1.to_q.weight
    torch.testing.assert_close(made, plain.to(FP8).float(), atol=0, rtol=0)


# the other components: task, folder, file, its loader
OTHERS = {
    "vae": (R2V, "vae", WEIGHTS, lambda root: load_vae(root, "diffusers", torch.float32)),
    "text encoder": (
        R2V, "text_encoder", "model.safetensors", lambda root: load_text_encoder(root, "diffusers", torch.float32),
    ),
    "llama": (T2V, "text_encoder", "model.safetensors", lambda root: load_llama(root / "text_encoder", torch.float32)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_components(copy, name):
    """Integers, foreign formats and sizes beyond the weights: by the headers, and by the loaders."""
    task, folder, file, load = OTHERS[name]
    root = copy(task)
    whole = load_file(root / folder / file)
    key = max(key for key, tensor in whole.items() if tensor.ndim == 2 or name == "vae")
    layers = {"vae": "num_res_blocks", "text encoder": "num_layers", "llama": "num_hidden_layers"}[name]
    for tensors, entries, says in (
        (whole | {key: whole[key].to(torch.int16)}, {}, f"no weights: {key}"),
        (whole | {f"{key}.scale_weight": torch.ones(1)}, {}, "ComfyUI's scaled FP8"),
        (whole, {layers: 10**6}, f"{layers} = 1000000 is more than"),
    ):
        save_file(tensors, root / folder / file)
        change_config(root / folder, **entries)
        with pytest.raises(CheckpointError, match=says):
            check_components(root, task)
        with pytest.raises(CheckpointError, match=says.split(":")[0]):
            load(root)


@pytest.mark.parametrize(
    ("task", "entries", "says"),
    [
        (R2V, {"num_layers": 10**6}, "num_layers = 1000000 is more than the weights beside it have"),
        (R2V, {"num_layers": 3}, "missing keys blocks.2.attn1.norm_k.weight, "),
        (R2V, {"ffn_dim": 10**9}, "ffn_dim = 1000000000 is more than"),
        (R2V, {"ffn_dim": 24}, "wrong shapes blocks.0.ffn.net.0.proj.bias ([96] instead of [24])"),
        (R2V, {"patch_size": [1, 1, 1]}, "patch_size = [1, 1, 1] is not supported, only [1, 2, 2]"),
        (R2V, {"rope_theta": 5}, "unknown entries rope_theta"),
        (SHOT, {"num_layers": 10**6}, "num_layers = 1000000 is more than"),
        (SHOT, {"dim": 10**6}, "dim = 1000000 is more than"),
        (SHOT, {"in_dim": 1}, "wrong shapes patch_embedding.weight ([32, 16, 1, 2, 2] instead of [32, 1, 1, 2, 2])"),
        (T2V, {"num_single_layers": 10**6}, "num_single_layers = 1000000 is more than"),
        (T2V, {"mlp_ratio": 2.0}, "wrong shapes single_transformer_blocks.0.proj_mlp.bias ([256] instead of [128])"),
    ],
)  # fmt: skip
def test_configs_are_held_against_the_headers(copy, task, entries, says):
    folder = copy(task) / task.transformer_folder
    change_config(folder, **entries)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        check_transformer(folder, task)


def test_hunyuans_own_names(copy):
    root = copy(T2V)
    change(
        root / WEIGHTS, lambda t: {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": next(iter(t.values()))}
    )
    with pytest.raises(
        CheckpointError, match=r"under HunyuanVideo's own names .* not supported; give one under diffusers'"
    ):
        check_transformer(root, T2V)


def test_files_of_a_variant(copy):
    """Read where there are no others: one file, or shards with an index of their own name."""
    folder = copy(R2V) / "transformer"
    whole = load_file(folder / WEIGHTS)
    change(folder / WEIGHTS, lambda t: t, "diffusion_pytorch_model.fp16.safetensors")
    check_transformer(folder, R2V)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    shards = {f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors": [*whole][n - 1 :: 2] for n in (1, 2)}
    for name, keys in shards.items():
        save_file({key: whole[key].half() for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    check_transformer(folder, R2V)
    assert [file.name for file in weight_files(folder)] == sorted(shards)
    loaded = load_transformer(folder, torch.float32).proj_out.weight
    np.testing.assert_array_equal(loaded, whole["proj_out.weight"].half().float())
