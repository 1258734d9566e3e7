"""`skyreels convert`: from community formats to our layout, and back to a single native file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.families import family_of
from skyreels_v3.main import run_command
from skyreels_v3.memory.quantize import dequantize_layers
from skyreels_v3.tasks import TaskSpec, task_spec
from tests import toys
from tests.checkpoints import writers
from tests.conftest import REFERENCE, files_in

Convert = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys) -> Convert:
    """Run the command in a folder of its own."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")

    def convert(*arguments: object) -> tuple[int, str, str]:
        return run_command(["convert", *map(str, arguments)]), *capsys.readouterr()

    return convert


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("task", "folder"), [("single_shot_extension", "video_extension"), ("talking_avatar", "talking_avatar")]
)
def test_there_and_back(convert, task, folder, tmp_path):
    """The recorded native checkpoints: to our layout with diffusers' names, and back to the same tensors."""
    source = REFERENCE / "pipelines" / "checkpoints" / folder
    own = task_spec(task).transformer_folder
    plain = ("--task_type", task, "--dtype", "float32")
    code, stdout, stderr = convert(*plain, "--model_id", source, "--output", tmp_path / "ours" / own)
    assert (code, stdout) == (0, f"{tmp_path / 'ours' / own}\n"), stderr
    made = tensors_of(tmp_path / "ours" / own)
    assert "condition_embedder.time_proj.weight" in made and "_class_name" in json.loads(
        (tmp_path / "ours" / own / "config.json").read_text()
    )
    code, _, stderr = convert(*plain, "--model_id", tmp_path / "ours", "--output", tmp_path / "b.safetensors")
    assert code == 0, stderr
    back, wanted = load_file(tmp_path / "b.safetensors"), tensors_of(source / own)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key].float()) for key in wanted)
    assert not [name for name in files_in(tmp_path) if ".tmp" in name]


@pytest.fixture
def toy(tmp_path) -> Callable[[str], tuple[TaskSpec, Path]]:
    def write(name: str) -> tuple[TaskSpec, Path]:
        toys.write(tmp_path / "toy", task_spec(name))
        return task_spec(name), tmp_path / "toy"

    return write


@pytest.mark.parametrize("task", ["reference_to_video", "t2v"])
@pytest.mark.parametrize("form", ["scale_weight", "Q4_1"])
def test_quantized_files(convert, toy, task, form, tmp_path):
    """The output holds the dequantized values."""
    spec, root = toy(task)
    file = tmp_path / ("a.safetensors" if form == "scale_weight" else "a.gguf")
    if form == "scale_weight":
        writers.write_older(file, writers.native_tensors(root, spec))
    else:
        pytest.importorskip("gguf")  # in requirements-dev.txt
        writers.write_gguf(file, writers.native_tensors(root, spec), form)
    argv = ("--task_type", task, "--transformer", file, "--model_id", root)
    code, _, stderr = convert(*argv, "--output", tmp_path / "made" / spec.transformer_folder)
    assert code == 0, stderr

    def load(folder: Path, files: dict[str, Path]) -> dict[str, torch.Tensor]:
        family = family_of(spec)
        model = family.loaders(spec, folder, folder, torch.bfloat16, torch.float32, True, files)["transformer"]()
        dequantize_layers(model, torch.bfloat16)
        return dict(model.named_parameters())

    made, wanted = load(tmp_path / "made", {}), load(root, {"transformer": file})
    assert made.keys() == wanted.keys()
    assert all(made[key].dtype == wanted[key].dtype and torch.equal(made[key], wanted[key]) for key in wanted)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "made" / spec.transformer_folder).values()} <= {
        torch.bfloat16,
        torch.float32,
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "--task_type"),
        (("--task_type", "paint", "--output", "a"), "--task_type"),
        (("--task_type", "t2v", "--output", "a"), "--transformer: missing; give a file"),
        (
            ("--task_type", "t2v", "--output", "a", "--transformer", "nothere.gguf"),
            "--transformer: nothere.gguf is not",
        ),
        (
            ("--task_type", "t2v", "--output", "a", "--transformer", "own/er/a.gguf"),
            "--transformer: own/er/a.gguf is not",
        ),
        (
            ("--task_type", "t2v", "--output", "a.safetensors", "--transformer", "a.gguf"),
            "--output: a.safetensors: a single file",
        ),
        (("--task_type", "t2v", "--output", "{there}", "--transformer", "a.gguf"), "--output: "),
        (("--task_type", "t2v", "--output", "a", "--model_id", "{there}"), "--model_id: "),
    ],
)
def test_what_cannot_be_converted(convert, argv, says, tmp_path):
    (tmp_path / "there").mkdir()
    code, stdout, stderr = convert(*(word.format(there=tmp_path / "there") for word in argv))
    assert (code, stdout) == (2, "") and stderr.startswith("error: ") and says in stderr
    assert len(stderr.splitlines()) == 1 and not files_in(tmp_path)


def test_published_sizes_where_there_is_no_config(convert, toy, tmp_path):
    """A file without a config is checked against the published one."""
    spec, root = toy("single_shot_extension")
    shutil.copy(root / spec.transformer_folder / "diffusion_pytorch_model.safetensors", tmp_path / "a.safetensors")
    argv = ("--task_type", spec.name, "--transformer", tmp_path / "a.safetensors", "--output", tmp_path / "made")
    code, _, stderr = convert(*argv)
    assert code == 2 and stderr.startswith("error: --transformer: ") and "more than the weights" in stderr
