"""The V1 family: where its components are found (together, in another folder, on a hub), and the cost of a forward."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.checkpoints import hub
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.hunyuan import family
from skyreels_v3.hunyuan.family import check_configs, repositories
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.parallel.ranks import ParallelConfig
from skyreels_v3.plan import build_on_meta
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import task_spec
from tests.planning import LiveBytes

TRANSFORMER = ("config.json", "diffusion_pytorch_model.safetensors")
BASE_ID = "hunyuanvideo-community/HunyuanVideo"
REMEDY = f"download these files of {BASE_ID}"


@pytest.fixture
def whole(t2v_toy, tmp_path) -> Path:
    """A copy that tests may damage."""
    return shutil.copytree(t2v_toy, tmp_path / "whole")


@pytest.fixture
def divided(whole, tmp_path) -> tuple[Path, Path]:
    """The transformer's folder, and one with the other components."""
    transformer = tmp_path / "transformer"
    transformer.mkdir()
    for name in TRANSFORMER:
        (whole / name).rename(transformer / name)
    return transformer, whole.rename(tmp_path / "base")


def request_for(*flags: object, task: str = "t2v") -> GenerationRequest:
    picture = ["--image", "a.png"] if task == "i2v" else []
    return parse_request(["--task_type", task, "--prompt", "a", *picture, *map(str, flags)])


def locate(request: GenerationRequest) -> Path | None:
    return hub.locate(request, repositories(request.task)[0])


def locate_base(request: GenerationRequest, checkpoint: Path | None) -> Path | None:
    return hub.locate(request, repositories(request.task)[1], checkpoint)


# Folders


def test_where_the_other_components_are(divided, t2v_toy):
    """Beside the transformer, or in the base model's folder, which takes precedence; otherwise they must be fetched."""
    transformer, base = divided
    given = request_for("--model_id", transformer, "--base_model_id", base)
    assert locate(given) == transformer
    assert locate_base(given, transformer) == base
    assert locate_base(request_for("--base_model_id", f"{base}/"), None) == base  # with the transformer on a hub
    assert locate_base(given, t2v_toy) == base
    assert locate_base(request_for("--model_id", t2v_toy), t2v_toy) == t2v_toy
    for task in ("t2v", "i2v"):
        assert locate_base(request_for(task=task), None) is None
        assert locate_base(request_for(task=task), transformer) is None
        assert locate_base(request_for("--base_model_id", "some/base", task=task), base) is None
        assert task_spec(task).base_model_id == BASE_ID


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "vae/*.safetensors"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json"),
        ("tokenizer_2", "tokenizer_2/tokenizer.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_file_is_named(divided, lost, named):
    _, base = divided
    (base / lost).rename(base / "elsewhere")
    with pytest.raises(UserError) as caught:
        locate_base(request_for("--base_model_id", base), None)
    message = str(caught.value)
    assert message == f"--base_model_id: {base} is not a complete HunyuanVideo: missing {named}; {REMEDY}"
    assert caught.value.flag == "--base_model_id"


def test_what_is_beside_the_transformer_is_that_flags(whole):
    """If all models are there, a missing file is an error of --model_id; if a model is missing, the rest is ignored."""
    (whole / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^--model_id: .* missing tokenizer/tokenizer\.json; download these"):
        locate_base(request_for("--model_id", whole), whole)
    (whole / "vae").rename(whole / "old_vae")
    assert locate_base(request_for("--model_id", whole), whole) is None


def test_clips_tokenizer_in_one_file(divided):
    """The toy's is split into two files, as in older repositories."""
    _, base = divided
    tokenizer = base / "tokenizer_2"
    assert (tokenizer / "vocab.json").is_file() and not (tokenizer / "tokenizer.json").exists()
    shutil.copy(base / "tokenizer" / "tokenizer.json", tokenizer)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()
    assert locate_base(request_for("--base_model_id", base), None) == base


def test_folders_before_hub_ids(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner").mkdir()
    assert hub.local_folder("owner/name", "--base_model_id", "") is None
    whole.rename(tmp_path / "owner" / "name")
    assert hub.local_folder("owner/name", "--base_model_id", "") == Path("owner/name")
    assert hub.local_folder("~/owner/name", "--base_model_id", "") == tmp_path / "owner" / "name"


# The hub


def download_base(request: GenerationRequest) -> Path:
    return hub.download(request, repositories(request.task)[1])


@pytest.fixture
def fetched(monkeypatch, t2v_toy) -> list[tuple[tuple, dict]]:
    """The calls to the hub's client, which returns the toy."""
    calls: list[tuple[tuple, dict]] = []

    def snapshot_download(*names: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing is here yet")
        calls.append((names, options))
        return str(t2v_toy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(("flags", "name"), [((), BASE_ID), (("--base_model_id", "some/base"), "some/base")])
def test_only_what_is_needed_is_fetched(fetched, t2v_toy, flags, name):
    """The transformer comes from another repository, so HunyuanVideo's own is not fetched."""
    assert download_base(request_for("--model_id", "some/model", *flags)) == t2v_toy
    ((names, options),) = fetched
    assert names == (name,)
    files = [str(path.relative_to(t2v_toy)) for path in t2v_toy.rglob("*") if path.is_file()]
    unneeded = [f"transformer/{file}" for file in TRANSFORMER] + ["model_index.json", "README.md", ".gitattributes"]
    taken = {*filter_repo_objects([*files, *unneeded], **options)}
    assert taken == set(files) - {*TRANSFORMER, "model_index.json"}


@pytest.mark.parametrize(("flags", "name"), [((), BASE_ID), (("--base_model_id", "some/base"), "some/base")])
def test_a_download_that_fails(monkeypatch, flags, name):
    """One line about --base_model_id, even if it was not given."""

    def fail(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise LocalEntryNotFoundError("nothing is here yet") if local_files_only else OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        download_base(request_for("--model_id", "some/model", *flags))
    assert str(caught.value) == (
        f"--base_model_id: {name} could not be fetched from huggingface (no route); check the id and the "
        "connection, try --model_source modelscope, or download it elsewhere and give its folder"
    )


# Runs with two folders


def test_one_folder_or_two_make_the_same(main, t2v_toy, divided):
    """Both folders given by their flags, or all components in the transformer's folder."""
    transformer, base = divided
    common = (
        *("--task_type", "t2v", "--device", "cpu", "--prompt", "FPS-24, a cat", "--negative_prompt", "blur"),
        *("--height", 32, "--width", 48, "--num_frames", 5, "--num_inference_steps", 2, "--quiet", "--no_cache"),
    )
    runs = {"one": ("--model_id", t2v_toy), "two": ("--model_id", transformer, "--base_model_id", base)}
    for name, flags in runs.items():
        code, _, stderr = main(*common, *flags, "--output", f"{name}.mp4", "--save_latents", f"{name}.safetensors")
        assert (code, stderr) == (0, "")
    one, two = (load_file(f"{name}.safetensors")["latents.0"] for name in runs)
    assert one.std() > 0.1
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)


def test_the_transformer_of_the_other_task(whole):
    """Its number of input channels differs; without this check the run would fail at the first step."""
    with pytest.raises(UserError, match=r"in_channels = 16 is not i2v's 32; give a checkpoint of Skywork/SkyReels-V1"):
        check_configs(task_spec("i2v"), whole, whole)
    check_configs(task_spec("t2v"), whole, whole)


# The cost of a forward, measured on the real transformer

SMALL = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 5, "mlp_ratio": 2.7,
    "num_refiner_layers": 0, "text_embed_dim": 40, "pooled_projection_dim": 24, "rope_axes_dim": (24, 4, 4),
}  # fmt: skip


def predict(model: HunyuanTransformer3DModel, frames: int, height: int, width: int, text: int) -> None:
    config, like = model.config, model.proj_out.weight
    model.eval().set_attention(sdpa)
    with torch.inference_mode():
        model(
            hidden_states=like.new_zeros(1, config.in_channels, frames, height, width),
            timestep=like.new_zeros(1),
            encoder_hidden_states=like.new_zeros(1, text, config.text_embed_dim),
            encoder_attention_mask=torch.ones(1, text, dtype=torch.long, device=like.device),
            pooled_projections=like.new_zeros(1, config.pooled_projection_dim),
            guidance=like.new_zeros(1),
        )


def test_the_published_sizes_are_the_librarys():
    with torch.device("meta"):
        config = HunyuanTransformer3DModel().config
    published = task_spec("t2v").transformer
    assert published == {name: config[name] for name in published}


def test_work_of_a_forward():
    """torch's counter includes embeddings, modulation and head, which the plan leaves out."""
    model = HunyuanTransformer3DModel(**SMALL)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predict(model, 4, 24, 32, 20)
    assert family.forward_flop(model.config, 4 * 12 * 16, 20) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("frames", "height", "width"), [(25, 68, 120), (97, 68, 120), (7, 48, 80)])
def test_activations_of_a_forward(frames, height, width, dtype):
    """At the published sizes, on the meta device."""
    model = build_on_meta("hunyuan", {**task_spec("t2v").transformer, "num_layers": 2, "num_single_layers": 2})
    nn.Module.to(model, getattr(torch, dtype))
    with LiveBytes() as counter:
        predict(model, frames, height, width, family.TEXT_TOKENS)
    planned = family.activation_bytes(model.config, frames * height * width // 4, dtype)
    assert planned == pytest.approx(counter.peak, rel=0.05)


def test_activations_of_one_of_several_ranks():
    """More than 1 / n, because of communication buffers; a ring also needs all keys and values of some heads."""
    config = build_on_meta("hunyuan", task_spec("t2v").transformer).config
    alone = family.activation_bytes(config, 50_000, "bfloat16")
    for degrees in (ParallelConfig(1, 1, 2), ParallelConfig(2, 1, 8), ParallelConfig(1, 2, 4)):
        made = family.activation_bytes(config, 50_000, "bfloat16", degrees)
        assert alone / degrees.sequence <= made < 1.5 * alone / degrees.sequence
    ulysses, ring = (
        family.activation_bytes(config, 50_000, "bfloat16", ParallelConfig(1, *pair)) for pair in ((1, 8), (4, 2))
    )
    assert ulysses < ring
