"""Loading: views of the mapped files, strict, tied weights tied, float32 where the model wants it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skyreels_v3.checkpoints.load import load_model, read_tensors
from skyreels_v3.errors import CheckpointError
from skyreels_v3.hunyuan.checkpoint import load_llama_tokenizer
from skyreels_v3.wan.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae


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
    """Nothing is copied: all weights of a file lie in one mapping of it."""
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


@pytest.mark.parametrize("folder", ["transformer", "shot_transformer"])
def test_one_file_and_shards(reference, folder):
    model = load_transformer(reference / "pipelines" / "checkpoints" / "video_extension" / folder, torch.float32)
    assert model.config.num_attention_heads * model.config.attention_head_dim == 32
    assert model.config.text_dim == 4096
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("name", "layout"), [("video_extension", "native"), ("reference_to_video", "diffusers")])
def test_whole_checkpoints(reference, name, layout):
    root = reference / "pipelines" / "checkpoints" / name
    encoder, vae = load_text_encoder(root, layout, torch.float32), load_vae(root, layout, torch.float32)
    for module in (encoder.module, vae.module):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert encoder.module.shared.weight is encoder.module.encoder.embed_tokens.weight


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
        for load in (load_tokenizer, load_llama_tokenizer):
            with suppress(CheckpointError):  # to take it without its code is as good
                load(folder)

    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (code,)

    torch.save({"first.weight": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(CheckpointError, match=r"planted\.pth is damaged or holds something other than tensors"):
        read_tensors(tmp_path / "planted.pth")
    assert not marker.exists()
    torch.load(tmp_path / "planted.pth", weights_only=False)
    assert marker.exists()  # it would have worked
