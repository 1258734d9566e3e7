"""Loading is strict and memory-maps the files; errors name what is wrong, from the headers alone where possible."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skyreels_v3.checkpoints.files import weight_files
from skyreels_v3.checkpoints.load import load_model, load_tokenizer, read_tensors
from skyreels_v3.errors import CheckpointError
from skyreels_v3.families import family_of
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.tasks import TaskSpec, task_spec
from skyreels_v3.wan.checkpoint import load_transformer
from tests import toys

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP8 = torch.float8_e4m3fn
R2V, SHOT, T2V = map(task_spec, ("reference_to_video", "shot_switching_extension", "t2v"))
Tensors = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.norm = nn.LayerNorm(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight


def tensors() -> dict[str, torch.Tensor]:
    return {"first.weight": torch.randn(3, 3), "norm.weight": torch.ones(3), "norm.bias": torch.zeros(3)}


def test_tied_weights_stay_tied_and_dtypes_follow_the_rule(tmp_path):
    model = load_model(Net, tensors(), tmp_path, torch.bfloat16, float32_names=["norm"])
    assert model.tied.weight is model.first.weight
    assert model.first.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_views_of_the_file(tmp_path):
    """No copies: all weights of a file point into a single mapping of it."""
    save_file(tensors(), tmp_path / "model.safetensors")
    read = read_tensors(tmp_path)
    model = load_model(Net, read, tmp_path, torch.float32)
    assert model.first.weight.data_ptr() == read["first.weight"].data_ptr()
    maps = (line for line in open("/proc/self/maps") if "model.safetensors" in line)  # noqa: SIM115
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    assert any(start <= model.first.weight.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), "missing keys norm.bias"),
        (lambda t: t.update(more=torch.ones(1)), "unexpected keys more"),
        (lambda t: t.update({"norm.bias": torch.zeros(4)}), r"wrong shapes norm.bias \(\[4\] instead of \[3\]\)"),
    ],
)
def test_every_key_must_fit(tmp_path, change, message):
    broken = tensors()
    change(broken)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(Net, broken, tmp_path / "net.safetensors", torch.float32)
    assert "net.safetensors" in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(reference, tmp_path):
    marker = tmp_path / "was-run"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for config in ({}, {"tokenizer_class": "Planted", "model_type": "planted"}):
        folder = tmp_path / f"tokenizer-{len(config)}"
        shutil.copytree(reference / "pipelines" / "checkpoints" / "reference_to_video" / "tokenizer", folder)
        planted = {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"], "AutoConfig": "planted.C"}}
        for name in ("tokenizer_config.json", "config.json"):
            old = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
            (folder / name).write_text(json.dumps(old | planted | config))
        (folder / "planted.py").write_text(code)
        for kind in (AutoTokenizer, PreTrainedTokenizerFast):
            with suppress(CheckpointError):  # loading it without running its code is fine too
                load_tokenizer(folder, kind)

    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (code,)

    torch.save({"first.weight": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(CheckpointError, match=r"planted\.pth is damaged or holds something other than tensors"):
        read_tensors(tmp_path / "planted.pth")
    assert not marker.exists()
    torch.load(tmp_path / "planted.pth", weights_only=False)
    assert marker.exists()  # the planted code does run when loaded unsafely


# Small checkpoints of each layout, damaged


@pytest.fixture(scope="module")
def checkpoints(reference, tmp_path_factory) -> dict[str, Path]:
    toy = tmp_path_factory.mktemp("toy")
    toys.write(toy, T2V)
    root = reference / "pipelines" / "checkpoints"
    return {R2V.name: root / "reference_to_video", SHOT.name: root / "video_extension", T2V.name: toy}


@pytest.fixture
def copy(checkpoints, tmp_path) -> Callable[[TaskSpec], Path]:
    return lambda task: shutil.copytree(checkpoints[task.name], tmp_path / "copy")


def load(root: Path, task: TaskSpec, component: str = "transformer", values: bool = True) -> nn.Module:
    return family_of(task).loaders(task, root, root, torch.float32, torch.float32, values)[component]()


def change(file: Path, new: Callable[[Tensors], Tensors], name: str | None = None) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in new(tensors).items()}, file.with_name(name or file.name))


def change_config(folder: Path, **entries: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("task", [R2V, SHOT, T2V], ids=lambda task: task.name)
def test_headers_alone(checkpoints, task):
    """Every component has the same parameters whether it is loaded with values or from headers alone."""
    root = checkpoints[task.name]
    for component in ("transformer", "vae"):
        whole, empty = (load(root, task, component, values) for values in (True, False))
        whole, empty = (dict(getattr(part, "module", part).named_parameters()) for part in (whole, empty))
        assert {name: (weight.shape, weight.dtype) for name, weight in whole.items()} == {
            name: (weight.shape, weight.dtype) for name, weight in empty.items()
        }
        assert all(weight.is_meta for weight in empty.values()) and not any(weight.is_meta for weight in whole.values())
    load(root, task, "text_encoder", values=False)


def test_weights_in_our_fp8(copy):
    folder = copy(R2V) / "transformer"
    model = load_transformer(folder, torch.bfloat16)
    quantize(model.blocks, torch.device("cpu"))
    save_file({name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / WEIGHTS)
    again = load_transformer(folder, torch.bfloat16)
    layer = again.blocks[0].attn1.to_q
    assert layer.weight.dtype == FP8 and layer.weight_scale.dtype == torch.float32
    for key, weight in model.named_parameters():
        assert torch.equal(weight.view(torch.uint8), again.get_parameter(key).view(torch.uint8))
    name = "blocks.0.attn1.to_q.weight"
    change(folder / WEIGHTS, lambda t: t | {name: t[name].bfloat16()})
    with pytest.raises(CheckpointError, match=name):
        load_transformer(folder, torch.bfloat16, values=False)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("task", [R2V, SHOT, T2V], ids=lambda task: task.name)
def test_a_prefix_of_all_names_is_taken_off(copy, checkpoints, task, prefix):
    root = copy(task)
    folder = root / task.transformer_folder
    tensors = {key: tensor for file in weight_files(folder) for key, tensor in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file({prefix + key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
    loaded, wanted = load(root, task).state_dict(), load(checkpoints[task.name], task).state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def scaled(tensors: Tensors, suffix: str, *shape: int) -> Tensors:
    """FP8 matrices, each divided by a scale that makes it fill the format's range."""
    made = dict(tensors)
    for key, weight in tensors.items():
        if weight.ndim == 2 and "blocks" in key:
            scale = weight.float().abs().max() / 448
            made[key] = (weight.float() / scale).to(FP8)
            if suffix:
                made[key.removesuffix("weight") + suffix] = scale.reshape(shape)
    return made


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


QUERY = "blocks.0.attn1.to_q"
# how the transformer's tensors are changed, what the error says, and whether the headers alone reveal it
FORMATS: dict[str, tuple[Callable[[Tensors], Tensors], str, bool]] = {
    "scales for blocks of a row": (lambda t: scaled(t, "weight_scale_inv"), "in FP8 scaled by blocks (blocks.0.", True),
    "two scales for each": (
        lambda t: scaled(t, "weight_scale") | {f"{QUERY}.weight_scale": torch.ones(2)},
        f"a format scaled neither as a whole nor by rows ({QUERY}.weight_scale [2])", True,
    ),
    "MXFP8": (
        lambda t: scaled(t, "weight_scale") | {f"{QUERY}.weight_scale": torch.ones(96, 3, dtype=torch.uint8)},
        f"holds weights in MXFP8 ({QUERY}.weight_scale)", True,
    ),
    "NVFP4": (lambda t: t | {f"{QUERY}.weight_scale_2": torch.ones(())}, "holds weights in NVFP4", True),
    "nunchaku's": (
        lambda t: t | {f"{QUERY}.qweight": torch.ones(9), f"{QUERY}.wscales": torch.ones(9)},
        f"in nunchaku's SVDQuant ({QUERY}.wscales)", True,
    ),
    "smoothed": (lambda t: t | {f"{QUERY}.pre_quant_scale": torch.ones(96)}, "holds weights in AWQ", True),
    "a scale of inputs that are not rounded": (
        lambda t: t | {f"{QUERY}.input_scale": torch.ones(())}, f"{QUERY}.input_scale belongs to no weight", True,
    ),
    "bitsandbytes'": (lambda t: t | {f"{QUERY}.weight.absmax": torch.ones(9)}, "in bitsandbytes' format", True),
    "GPTQ's": (lambda t: t | {f"{QUERY}.qweight": torch.ones(9)}, "in 4-bit integers", True),
    "a scale of nothing": (
        lambda t: t | {"blocks.0.attn9.weight_scale": torch.ones(9)}, "blocks.0.attn9.weight_scale belongs to no", True,
    ),
    "a scale of weights that are not quantized": (
        lambda t: t | {f"{QUERY}.scale_weight": torch.ones(1)}, f"{QUERY}.scale_weight belongs to no weight", True,
    ),
    "two scales of one matrix": (
        lambda t: scaled(t, "weight_scale") | {f"{QUERY}.scale_weight": torch.ones(1)}, " belongs to no weight", True,
    ),
    "one that lost its scale": (
        lambda t: without(scaled(t, "scale_weight", 1), f"{QUERY}.scale_weight"),
        f"{QUERY}.weight is quantized, but its scale is missing", True,
    ),
    "a mark that there are scales": (
        lambda t: scaled(t, "") | {"scaled_fp8": torch.zeros(2, dtype=FP8)}, "but its scale is missing", True,
    ),
    "FP8 that lost its scales": (
        lambda t: scaled(t, ""), "is scaled FP8, but its scale is missing", False,
    ),
    "integers": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "for weights: blocks.0.attn1.norm_k", True),
    "one integer": (
        lambda t: t | {"proj_out.bias": t["proj_out.bias"].to(torch.int64)}, "for weights: proj_out.bias (int64)", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_a_format_that_is_not_read(copy, name):
    new, says, by_header = FORMATS[name]
    folder = copy(R2V) / "transformer"
    change(folder / WEIGHTS, new)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        load_transformer(folder, torch.float32, values=not by_header)
    assert "--quant fp8" in str(caught.value) and "download" not in str(caught.value)


def test_a_plain_cast_to_fp8_is_taken(copy, checkpoints):
    folder = copy(R2V) / "transformer"
    change(folder / WEIGHTS, lambda t: {k: w.to(FP8) if w.ndim == 2 else w for k, w in t.items()})
    made = load_transformer(folder, torch.float32).blocks[0].attn1.to_q.dequantized(torch.float32)
    plain = load(checkpoints[R2V.name], R2V).blocks[0].attn1.to_q.weight
    torch.testing.assert_close(made, plain.to(FP8).float(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("task", "component", "folder", "layers"),
    [
        (R2V, "vae", "vae", "num_res_blocks"),
        (R2V, "text_encoder", "text_encoder", "num_layers"),
        (T2V, "text_encoder", "text_encoder", "num_hidden_layers"),
    ],
)
def test_other_components(copy, task, component, folder, layers):
    """Integer weights, foreign formats, and sizes that do not show in the weights."""
    root = copy(task)
    (file,) = weight_files(root / folder)
    whole = load_file(file)
    key = max(key for key, tensor in whole.items() if tensor.ndim == 2 or component == "vae")
    for tensors, entries, says in (
        (whole | {key: whole[key].to(torch.int16)}, {}, "dtype not supported for weights: "),
        (whole | {f"{key}.scale_weight": torch.ones(1)}, {}, "scale_weight belongs to no weight"),
        (whole, {layers: 10**6}, f"{layers} = 1000000 is more than"),
    ):
        save_file(tensors, file)
        change_config(root / folder, **entries)
        with pytest.raises(CheckpointError, match=says):
            load(root, task, component, values=False)


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
    root = copy(task)
    change_config(root / task.transformer_folder, **entries)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        load(root, task, values=False)


def test_files_of_a_variant(copy):
    """Variant files (.fp16) are read if there are no others: one file, or shards with an index of the same variant."""
    folder = copy(R2V) / "transformer"
    whole = load_file(folder / WEIGHTS)
    change(folder / WEIGHTS, lambda t: t, "diffusion_pytorch_model.fp16.safetensors")
    load_transformer(folder, torch.float32, values=False)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    shards = {f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors": [*whole][n - 1 :: 2] for n in (1, 2)}
    for name, keys in shards.items():
        save_file({key: whole[key].half() for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(folder)] == sorted(shards)
    loaded = load_transformer(folder, torch.float32).proj_out.weight
    torch.testing.assert_close(loaded, whole["proj_out.weight"].half().float(), atol=0, rtol=0)
