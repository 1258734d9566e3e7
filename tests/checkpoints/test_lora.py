"""LoRAs in every naming scheme, against W + scale * (alpha / rank) * B A in float64; files from PEFT and diffusers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.checkpoints import lora
from skyreels_v3.checkpoints.key_maps import KeyMap, invert, restore
from skyreels_v3.checkpoints.load import read_tensors
from skyreels_v3.checkpoints.lora import Changes, Shapes, model_names, shapes_of
from skyreels_v3.errors import UserError
from skyreels_v3.hunyuan.checkpoint import load_transformer as load_hunyuan_transformer
from skyreels_v3.hunyuan.key_maps import NATIVE_TRANSFORMER as NATIVE_HUNYUAN
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.request import Lora
from skyreels_v3.wan.checkpoint import load_transformer
from skyreels_v3.wan.key_maps import NATIVE_TRANSFORMER
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "image_dim": 8,
    "audio_dim": 12,
    "audio_features": 6,
    "audio_hidden_dim": 10,
    "audio_tokens": 3,
}
# our name, native name, out, in; native files stack the last one
LAYERS = (
    ("blocks.0.attn1.to_q", "blocks.0.self_attn.q", 32, 32),
    ("blocks.1.attn1.to_out.0", "blocks.1.self_attn.o", 32, 32),
    ("blocks.0.attn2.to_k", "blocks.0.cross_attn.k", 32, 32),
    ("blocks.0.attn2.add_k_proj", "blocks.0.cross_attn.k_img", 32, 32),
    ("blocks.1.ffn.net.0.proj", "blocks.1.ffn.0", 64, 32),
    ("blocks.1.ffn.net.2", "blocks.1.ffn.2", 32, 64),
    ("blocks.1.attn_audio.to_q", "blocks.1.audio_cross_attn.q_linear", 32, 32),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0", 32, 24),
    ("condition_embedder.time_proj", "time_projection.1", 192, 32),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", 8, 8),
    ("audio_projection.later_frames", "audio_proj.proj1_vf", 10, 48),
    ("proj_out", "head.head", 64, 32),
)
STACKED = "blocks.0.audio_cross_attn.kv_linear"
Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B of each layer, by name
Added = dict[str, Tensor]  # what is added to a model's weights, by name, in float64
FUSE = pytest.mark.parametrize("fuse", [False, True], ids=["live", "fused"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in float32 and in bfloat16 (but for always-float32 weights), which therefore load without a cast."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SkyReelsTransformer3DModel(**SMALL).save_pretrained(path / "float32")
    load_transformer(path / "float32", torch.bfloat16).save_pretrained(path / "bfloat16")
    return path


def mapped(folder: Path, dtype: torch.dtype = torch.float32) -> SkyReelsTransformer3DModel:
    return load_transformer(folder / str(dtype).removeprefix("torch."), dtype)


def apply_loras(model: nn.Module, loras: list[tuple[Path, float]], fuse: bool, partial: bool = False) -> None:
    lora.apply_loras(model, [Lora(str(file), scale, partial) for file, scale in loras], fuse)


def read_lora(file: Path, shapes: Shapes, native: KeyMap = NATIVE_TRANSFORMER) -> Changes:
    return lora.read_lora(file, shapes, native)[0]


def random_pairs(seed: int = 0, native: bool = False) -> Pairs:
    """Random LoRA pairs for all of LAYERS, with ranks from 2 to 4."""
    torch.manual_seed(seed)
    names = [(theirs if native else ours, rows, columns) for ours, theirs, rows, columns in LAYERS]
    ranks = (2 + number % 3 for number in range(len(names)))
    return {
        name: (torch.randn(rank, columns) / columns, torch.randn(rows, rank))
        for rank, (name, rows, columns) in zip(ranks, names, strict=True)
    }


def write(
    path: Path, pairs: Pairs, template: str = "{}.lora_{}.weight", alpha: float | None = None, parts: str = "A B"
) -> Path:
    """Write each layer's A and B (called as in `parts`) under the names from `template`, and `alpha` if given."""
    named = {name: zip(parts.split(), pair, strict=True) for name, pair in pairs.items()}
    tensors = {template.format(name, part): tensor for name, pair in named.items() for part, tensor in pair}
    if alpha is not None:
        tensors |= {f"{template.partition('{}')[0]}{name}.alpha": torch.tensor(alpha) for name in pairs}
    save_file(tensors, path)
    return path


def add(*loras: tuple[Pairs, float, float | None]) -> Added:
    """The sum of what LoRAs add, given each one's pairs, scale and alpha (None: the rank)."""
    added: Added = {}
    for pairs, scale, alpha in loras:
        for layer, (down, up) in pairs.items():
            factor = scale * (alpha or len(down)) / len(down)
            added[f"{layer}.weight"] = added.get(f"{layer}.weight", 0) + factor * up.double() @ down.double()
    return added


def merged(model: nn.Module) -> Added:
    """A model's weights by their own names, with PEFT's adapters merged in."""
    made = {}
    for name, weight in model.named_parameters():
        plain = name.replace("base_layer.", "")
        layer = model.get_submodule(plain.rpartition(".")[0])
        if "lora_" not in name:
            made[plain] = weight.double()
        if hasattr(layer, "base_layer") and plain.endswith(".weight"):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    made[plain] = made[plain] + layer.get_delta_weight(adapter).double()
    return made


def check_weights(model: nn.Module, folder: Path, added: Added) -> None:
    """Check that the weights of `model` are those in `folder` plus `added`, bit-identical where nothing is added."""
    found, base = merged(model), dict(mapped(folder).named_parameters())
    assert found.keys() == base.keys() and added.keys() < base.keys()
    for name, weight in base.items():
        if name in added:
            torch.testing.assert_close(found[name], weight.double() + added[name], atol=1e-5, rtol=1e-5)
            assert added[name].abs().max() > 1e-2, name
        else:
            assert torch.equal(found[name], weight.double()), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


FORMATS = {
    "diffusers": ("transformer.{}.lora_{}.weight", "A B", False),
    "diffusers, older": ("transformer.{}.lora.{}.weight", "down up", False),
    "plain": ("{}.lora_{}.weight", "A B", False),
    "PEFT": ("base_model.model.{}.lora_{}.weight", "A B", False),
    "PEFT, not saved by it": ("base_model.model.{}.lora_{}.default.weight", "A B", False),
    "native": ("{}.lora_{}.weight", "A B", True),
    "native, ComfyUI": ("diffusion_model.{}.lora_{}.weight", "A B", True),
    "native, down and up": ("diffusion_model.{}.lora_{}.weight", "down up", True),
    "native, an adapter's name": ("{}.lora_{}.other_1.weight", "A B", True),
    "kohya": ("lora_unet_{}.lora_{}.weight", "down up", True),
    "musubi": ("lora_unet__{}.lora_{}.weight", "down up", True),
}


@FUSE
@pytest.mark.parametrize("alpha", [None, 1.5], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("spelling", FORMATS)
def test_spellings(tmp_path, folder, spelling, alpha, fuse):
    template, parts, native = FORMATS[spelling]
    pairs = random_pairs(native=native)
    if "lora_unet" in template:  # underscores replace dots: only the native names say which is which
        pairs = {name.replace(".", "_"): pair for name, pair in pairs.items()}
    model = mapped(folder)
    apply_loras(model, [(write(tmp_path / "a.safetensors", pairs, template, alpha, parts), 0.7)], fuse)
    check_weights(model, folder, add((random_pairs(), 0.7, alpha)))


def test_every_native_linear_layer_has_its_flat_name(folder):
    """Dotted and flat native names map to the same layers, and together they cover all linear layers."""
    inverse = invert(NATIVE_TRANSFORMER)
    layers = {name for name, module in mapped(folder).named_modules() if isinstance(module, nn.Linear)}
    found = set()
    for name in layers:
        native = restore(f"{name}.weight", inverse).removesuffix(".weight")
        native = re.sub(r"attn_audio\.to_[kv]", "audio_cross_attn.kv_linear", native)  # not invertible: k and v are one
        assert native != name
        dotted = model_names(native, "weight", NATIVE_TRANSFORMER)
        assert model_names(f"lora_unet_{native.replace('.', '_')}", "weight", NATIVE_TRANSFORMER) == dotted
        assert f"{name}.weight" in dotted
        found.update(dotted)
    assert found == {f"{name}.weight" for name in layers}


@FUSE
@pytest.mark.parametrize("name", [STACKED, f"lora_unet_{STACKED.replace('.', '_')}"])
def test_a_stacked_layer_becomes_two(tmp_path, folder, name, fuse):
    down, up = torch.randn(3, 12), torch.randn(64, 3)
    model, layer = mapped(folder), "blocks.0.attn_audio.to_"
    apply_loras(model, [(write(tmp_path / "a.safetensors", {name: (down, up)}, alpha=6.0), 1.0)], fuse)
    check_weights(model, folder, add(({layer + "k": (down, up[:32]), layer + "v": (down, up[32:])}, 1.0, 6.0)))


@FUSE
def test_several_loras_add_up(tmp_path, folder, fuse, recwarn):
    """Different layers, ranks, formats and scales; one file is given several times."""
    first = dict(list(random_pairs(1).items())[:6])
    one = write(tmp_path / "1.safetensors", first)
    two = write(tmp_path / "2.safetensors", random_pairs(2, native=True), alpha=1.0)
    model = mapped(folder)
    apply_loras(model, [(one, 0.5), (two, -2.0), (one, 1.0), (one, 0.0)], fuse)
    check_weights(model, folder, add((first, 1.5, None), (random_pairs(2), -2.0, 1.0)))
    assert not recwarn.list


def test_live_keeps_the_mapped_weights(tmp_path, folder):
    """The mapped weights keep their memory and their bits, and LoRA weights get each layer's dtype."""
    model = mapped(folder, torch.bfloat16)
    before = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in before.items()}
    files = [write(tmp_path / f"{seed}.safetensors", random_pairs(seed), alpha=1.0) for seed in range(2)]
    apply_loras(model, [(file, 1.0) for file in files], fuse=False)
    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.named_parameters()}
    for name, tensor in before.items():
        assert after[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(tensor, copies[name])
    for layer, _, _, _ in LAYERS:
        wrapped = model.get_submodule(layer)
        for pair in (*wrapped.lora_A.values(), *wrapped.lora_B.values()):
            assert pair.weight.dtype == wrapped.weight.dtype
    assert model.proj_out.weight.dtype == torch.float32
    assert not any(module.training for module in model.modules())


def test_fused_weights_are_new_and_rounded_once(tmp_path, folder):
    """Equal to float64 sums within one rounding; other weights are untouched and no PEFT layers remain."""
    model = mapped(folder, torch.bfloat16)
    before = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in before.items()}
    loras = [(random_pairs(1), 0.3), (random_pairs(2), 1.7)]
    apply_loras(model, [(write(tmp_path / f"{scale}.safetensors", pairs), scale) for pairs, scale in loras], fuse=True)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in before.items())
    after, added = dict(model.named_parameters()), add(*((pairs, scale, None) for pairs, scale in loras))
    assert list(after) == list(before)
    assert not hasattr(model, "peft_config")
    for name, tensor in after.items():
        assert (tensor is before[name]) == (name not in added)
        assert tensor.dtype == before[name].dtype
        exact = copies[name].double() + added.get(name, 0)
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor.double(), exact, atol=1e-6, rtol=1e-6)
        else:
            assert (tensor == exact.to(tensor.dtype)).double().mean() > 0.99


@FUSE
@pytest.mark.parametrize("writer", ["PEFT", "diffusers"])
def test_what_the_libraries_save(tmp_path, folder, writer, fuse):
    """Per-layer ranks and alphas, read from settings beside the file or from its header."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "net.0.proj", "net.2", "proj_out"],
        rank_pattern={"attn1.to_q": 2, r"blocks\.1\.ffn\.net\.2": 3},
        alpha_pattern={"attn2.to_k": 10, "^blocks.0.ffn.net.0.proj": 1}, init_lora_weights=False,
    )  # fmt: skip
    theirs = mapped(folder)
    if writer == "PEFT":
        adapted = get_peft_model(theirs, config)
        adapted.save_pretrained(tmp_path)
        theirs = adapted.base_model.model
    else:
        theirs.add_adapter(config)
        theirs.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    model, base, wanted = mapped(folder), dict(mapped(folder).named_parameters()), merged(theirs)
    apply_loras(model, [(file, 1.0)], fuse)
    added = {name: wanted[name] - weight.double() for name, weight in base.items()}
    added = {name: difference for name, difference in added.items() if difference.any()}
    assert len(added) == 2 * 8 + 2 + 1  # two blocks, the image embedding and the head
    check_weights(model, folder, added)


def test_settings_beside_are_of_files_with_pefts_names_and_no_alpha(tmp_path, folder):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    pairs = dict(list(random_pairs().items())[:1])
    for template, alpha, factor in (
        ("base_model.model.{}.lora_{}.weight", None, 4),
        ("base_model.model.{}.lora_{}.weight", 1.0, 0.5),
        ("transformer.{}.lora_{}.weight", None, 1),
    ):
        file = read_lora(write(tmp_path / "a.safetensors", pairs, template, alpha), shapes_of(mapped(folder)))
        (change,) = file[f"{LAYERS[0][0]}.weight"]
        assert change.scale == factor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True not supported"),
        ({"use_rslora": True}, "use_rslora = True not supported"),
        ({"peft_type": "LOHA"}, "peft_type = LOHA not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa not supported"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern whose keys are not names"),
        (
            {"alpha_pattern": {"(.+)+": 1}},
            "alpha_pattern whose keys are not names",
        ),  # catastrophic as a regular expression
        ({"alpha_pattern": [1]}, "alpha_pattern whose keys are not names"),
        ({"lora_alpha": math.inf}, "give inf for the lora_alpha of blocks.0"),
        ({"lora_alpha": None}, "give None for the lora_alpha of blocks.0"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_settings_that_mean_something_else(tmp_path, change, message, place):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_dora": False, "init_lora_weights": True} | change
    tensors = {
        "base_model.model.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 32),
        "base_model.model.blocks.0.attn1.to_q.lora_B.weight": torch.randn(32, 2),
    }
    header = {}
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": v for key, v in settings.items()})
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(UserError, match=re.escape(message)):
        read_lora(tmp_path / "a.safetensors", {"blocks.0.attn1.to_q.weight": (32, 32)})


def pair(name: str, rows: int = 32, columns: int = 32, rank: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, columns), f"{name}.lora_B.weight": torch.ones(rows, rank)}


QUERY = "blocks.0.attn1.to_q"
NOTHING = "does not fit its model, which has no weights for "
WIDE = pair(QUERY, rows=48, columns=40)
NORM, MODULATION, BIAS = "blocks.0.norm3.diff", "head.diff_m", "blocks.0.self_attn.norm_q.diff_b"


def convolution(*kernel: int) -> dict[str, Tensor]:
    return {
        "patch_embedding.lora_A.weight": torch.ones(2, 16, *kernel),
        "patch_embedding.lora_B.weight": torch.ones(32, 2, 1, 1, 1),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it is empty"),
        ({f"{QUERY}.weight": torch.ones(32, 32)}, f"not supported: {QUERY}.weight; give a LoRA with only low-rank"),
        (pair(QUERY) | {f"{QUERY}.dora_scale": torch.ones(32)}, f"not supported: {QUERY}.dora_scale"),
        ({f"{QUERY}.lokr_w1": torch.ones(2, 2)}, f"not supported: {QUERY}.lokr_w1"),
        (pair(QUERY) | {f"{QUERY}.lora_B.bias": torch.ones(32)}, f"not supported: {QUERY}.lora_B.bias"),
        (pair(QUERY) | pair("text_encoder.block.0"), f"{NOTHING}text_encoder.block.0.lora_A.weight, text_encoder."),
        ({f"{QUERY}.lora_B.weight": torch.ones(32, 2)}, f"A or B is missing for {QUERY}"),
        (pair(QUERY) | {f"{QUERY}.lora_B.weight": torch.ones(32, 3)}, f"{QUERY}.lora_B.weight ([32, 3] instead of [32"),
        (convolution(1, 2, 1), "patch_embedding.lora_A.weight ([2, 16, 1, 2, 1] instead of [2, 16, 1, 2, 2])"),
        (pair(QUERY) | {f"{QUERY}.alpha": torch.ones(2)}, f"wrong shapes {QUERY}.alpha ([2] instead of [])"),
        (WIDE, f"wrong shapes {QUERY}.lora_A.weight ([2, 40] instead of [2, 32]), {QUERY}.lora_B.weight ([48, 2] inst"),
        (pair(QUERY) | pair("blocks.0.self_attn.q"), "more than one LoRA of blocks.0.self_attn.q.lora_A.weight"),
        (
            pair("lora_unet_blocks_0_attn9_q"),
            f"{NOTHING}lora_unet_blocks_0_attn9_q.lora_A.weight, lora_unet_blocks_0_a",
        ),
        (pair("blocks.7.ffn.0"), "blocks.7.ffn.0.lora_B.weight; give a LoRA of this model"),
        (
            pair(QUERY) | pair("blocks.7.ffn.0"),
            "blocks.7.ffn.0.lora_B.weight; bad.safetensors:1:partial applies the re",
        ),
        (pair(QUERY) | {BIAS: torch.ones(32)}, f"{NOTHING}{BIAS}; bad.safetensors:1:partial applies the rest"),
        (pair(QUERY) | {NORM: torch.ones(32).char()}, f"dtype not supported for weights: {NORM} (int8)"),
        (pair(QUERY) | {NORM: torch.full([32], torch.nan)}, f"holds numbers that are not finite: {NORM};"),
        (pair(QUERY) | {MODULATION: torch.full([1, 2, 32], torch.inf)}, f"numbers that are not finite: {MODULATION};"),
    ],
)
@FUSE
def test_files_that_do_not_fit(tmp_path, folder, tensors, message, fuse):
    good, bad = write(tmp_path / "good.safetensors", random_pairs()), tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    model = mapped(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        apply_loras(model, [(good, 1.0), (bad, 1.0)], fuse)
    assert str(caught.value).startswith(f"--lora: {bad}")
    assert "\n" not in str(caught.value)
    check_weights(model, folder, {})  # LoRAs are applied all or none


def test_files_that_are_none(tmp_path):
    file = write(tmp_path / "a.safetensors", random_pairs())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"--lora: .*a\.safetensors is truncated"):
        read_lora(file, {})
    save_file(pair(QUERY), file, metadata={"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(UserError, match="in its header is not a JSON"):
        read_lora(file, {})
    with pytest.raises(UserError, match=r"--lora: .*none\.safetensors cannot be read"):
        read_lora(tmp_path / "none.safetensors", {})


# Differences stored beside the pairs: native name, our weight, its shape
DIFFERENCES = (
    ("blocks.0.self_attn.q.diff_b", "blocks.0.attn1.to_q.bias", (32,)),
    ("blocks.0.self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight", (32,)),
    ("blocks.1.cross_attn.norm_k_img.diff", "blocks.1.attn2.norm_added_k.weight", (32,)),
    ("blocks.1.cross_attn.v.diff", "blocks.1.attn2.to_v.weight", (32, 32)),
    ("blocks.0.norm3.diff", "blocks.0.norm2.weight", (32,)),
    ("blocks.0.norm3.diff_b", "blocks.0.norm2.bias", (32,)),
    ("blocks.1.diff_m", "blocks.1.scale_shift_table", (1, 6, 32)),
    ("blocks.0.audio_cross_attn.kv_linear.diff_b", "blocks.0.attn_audio.to_{}.bias", (64,)),
    ("patch_embedding.diff_b", "patch_embedding.bias", (32,)),
    ("time_embedding.0.diff_b", "condition_embedder.time_embedder.linear_1.bias", (32,)),
    ("head.head.diff", "proj_out.weight", (64, 32)),
    ("head.diff_m", "scale_shift_table", (1, 2, 32)),
)


def differences(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file of pairs and differences, and what it adds to each weight, in float64."""
    torch.manual_seed(seed)
    file: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, weight, shape in DIFFERENCES:
        file[f"diffusion_model.{name}"] = change = torch.randn(shape)
        halves = ((weight.format(part), half) for part, half in zip("kv", change.chunk(2), strict=True))
        added |= {k: v.double() for k, v in (halves if "{}" in weight else [(weight, change)])}
    down, up = torch.randn(3, 16, 1, 2, 2), torch.randn(32, 3, 1, 1, 1)  # of a convolution
    file |= {f"diffusion_model.patch_embedding.lora_{part}.weight": t for part, t in (("down", down), ("up", up))}
    added["patch_embedding.weight"] = torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
    for ours, theirs in (
        ("blocks.0.attn1.to_k", "blocks.0.self_attn.k"),
        ("blocks.1.attn2.to_v", "blocks.1.cross_attn.v"),
    ):
        down, up = torch.randn(2, 32), torch.randn(32, 2)
        file |= {f"diffusion_model.{theirs}.lora_{part}.weight": t for part, t in (("down", down), ("up", up))}
        file[f"diffusion_model.{theirs}.alpha"] = torch.tensor(1.0)
        added[f"{ours}.weight"] = added.get(f"{ours}.weight", 0) + 0.5 * up.double() @ down.double()
    return file, added


@FUSE
def test_differences_are_added_beside_the_pairs(tmp_path, folder, fuse):
    """Differences of biases, norms, modulation, convolutions and whole weights are added, each file times its scale."""
    scales = (0.5, -2.0)
    added: Added = {}
    for number, scale in enumerate(scales):
        file, changes = differences(number)
        save_file(file, tmp_path / f"{number}.safetensors")
        for name, change in changes.items():
            added[name] = added.get(name, 0) + scale * change
    model = mapped(folder)
    apply_loras(model, [(tmp_path / f"{number}.safetensors", scale) for number, scale in enumerate(scales)], fuse)
    check_weights(model, folder, added)


SIBLING = (
    pair("blocks.0.self_attn.q") | pair("blocks.1.self_attn.k_img") | pair("lora_te1_text") | pair("blocks.7.ffn.0")
)


@FUSE
def test_a_part_of_a_lora_of_another_model(tmp_path, folder, fuse, caplog):
    """`partial` skips and counts entries for layers that the model lacks; entries that do not fit are still refused."""
    save_file(SIBLING, tmp_path / "a.safetensors")
    model = mapped(folder)
    with pytest.raises(UserError, match=r"has no weights for .* and 1 more; a\.safetensors:1:partial applies the rest"):
        apply_loras(model, [(tmp_path / "a.safetensors", 1.0)], fuse)
    apply_loras(model, [(tmp_path / "a.safetensors", 0.5)], fuse, partial=True)
    check_weights(model, folder, add(({QUERY: (torch.ones(2, 32), torch.ones(32, 2))}, 0.5, None)))
    assert (
        "6 entries are left out, as the model has no weights for blocks.1.self_attn.k_img.lora_A.weight" in caplog.text
    )
    for wrong, says in (
        ({"blocks.0.norm3.diff": torch.ones(33)}, "wrong shapes"),
        (pair("blocks.7.ffn.0"), "which has"),
    ):
        save_file(wrong, tmp_path / "b.safetensors")
        with pytest.raises(UserError, match=says):
            apply_loras(mapped(folder), [(tmp_path / "b.safetensors", 1.0)], fuse, partial=True)


# SkyReels V1. The references are diffusers' model with its own LoRA loading, and its name converter.

TOY_HUNYUAN = {
    **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1},
    **{"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": (8, 4, 4)},
}
# HunyuanVideo's own names of all linear layers but one, with out and in as multiples of the width
NATIVE_LAYERS = {
    **{f"{part}_in.mlp.{layer}": (1, 1) for part in ("time", "guidance") for layer in (0, 2)},
    **{"vector_in.in_layer": (1, 1), "vector_in.out_layer": (1, 1), "txt_in.input_embedder": (1, 1)},
    **{"txt_in.t_embedder.mlp.0": (1, 1), "txt_in.t_embedder.mlp.2": (1, 1)},
    **{"txt_in.c_embedder.linear_1": (1, 1), "txt_in.c_embedder.linear_2": (1, 1)},
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (3, 1),
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (1, 1),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": (4, 1),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc2": (1, 4),
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": (2, 1),
    **{
        f"double_blocks.0.{part}_{layer}": shape
        for part in ("img", "txt")
        for layer, shape in (
            ("attn_qkv", (3, 1)), ("attn_proj", (1, 1)), ("mod.linear", (6, 1)),
            ("mlp.fc1", (4, 1)), ("mlp.fc2", (1, 4)),
        )
    },
    **{"single_blocks.0.linear1": (7, 1), "single_blocks.0.linear2": (1, 5)},
    "single_blocks.0.modulation.linear": (3, 1),
    "final_layer.linear": (1, 1),
}  # fmt: skip
CONVERTED_WIDTH = 3072  # the only width that the converter supports


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hunyuan")
    torch.manual_seed(0)
    HunyuanVideoTransformer3DModel(**TOY_HUNYUAN).save_pretrained(path)
    return path


def loaded_hunyuan(folder: Path) -> HunyuanTransformer3DModel:
    model = load_hunyuan_transformer(folder, torch.float32)
    model.set_attention(sdpa)
    return model


def all_pairs(folder: Path, seed: int = 0) -> Pairs:
    """A LoRA for every linear layer of the model."""
    torch.manual_seed(seed)
    layers = {n: m for n, m in loaded_hunyuan(folder).named_modules() if isinstance(m, nn.Linear)}
    return {
        name: (torch.randn(3, layer.in_features) / layer.in_features, torch.randn(layer.out_features, 3) / 2)
        for name, layer in layers.items()
    }


@torch.inference_mode()
def velocities(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, 2, 4, 6, generator=draw),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, 5, 24, generator=draw),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.long),
        pooled_projections=torch.randn(1, 12, generator=draw),
        guidance=torch.tensor([6000.0]),
        return_dict=False,
    )[0]


def stock_hunyuan(folder: Path, files: list[tuple[Path, float]], prefix: str | None) -> HunyuanVideoTransformer3DModel:
    """diffusers' model, with LoRAs loaded by diffusers."""
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder).eval()
    for number, (file, _) in enumerate(files):
        model.load_lora_adapter(read_tensors(file), prefix=prefix, adapter_name=f"lora_{number}")
    model.set_adapters([f"lora_{number}" for number in range(len(files))], [scale for _, scale in files])
    return model


@pytest.mark.slow
@FUSE
@pytest.mark.parametrize("prefix", ["transformer", None, "base_model.model"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_hunyuans_loras_are_the_librarys(tmp_path, hunyuan, prefix, fuse):
    """Two LoRAs for all linear layers, with scales, give the weights that diffusers computes."""
    template = "{}.lora_{}.weight" if prefix is None else prefix + ".{}.lora_{}.weight"
    files = [
        (write(tmp_path / f"{seed}.safetensors", all_pairs(hunyuan, seed), template), scale)
        for seed, scale in ((0, 0.8), (1, -0.4))
    ]
    model = loaded_hunyuan(hunyuan)
    plain = velocities(model)
    apply_loras(model, files, fuse)
    wanted = velocities(stock_hunyuan(hunyuan, files, prefix))
    assert (wanted - plain).std() > 0.1 * plain.std()
    torch.testing.assert_close(velocities(model), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
def test_hunyuans_own_names_as_the_library_converts_them(tmp_path, prefix):
    """Except for the refiner's queries, keys and values: the converter also splits A, so its result fits no layer."""
    pairs = {
        name: (torch.randn(1, columns * CONVERTED_WIDTH), torch.randn(rows * CONVERTED_WIDTH, 1))
        for name, (rows, columns) in NATIVE_LAYERS.items()
        if "self_attn_qkv" not in name
    }
    tensors = {f"{name}.lora_{part}.weight": t for name, p in pairs.items() for part, t in zip("AB", p, strict=True)}
    converted = _convert_hunyuan_video_lora_to_diffusers(tensors)
    shapes = {}
    for key, up in converted.items():
        layer, _, part = key.removeprefix("transformer.").rpartition(".lora_")
        if part == "B.weight":
            shapes[f"{layer}.weight"] = (len(up), converted[f"transformer.{layer}.lora_A.weight"].shape[1])
    file = read_lora(write(tmp_path / "a.safetensors", pairs, prefix + "{}.lora_{}.weight"), shapes, NATIVE_HUNYUAN)
    made = {}
    for name, (change,) in file.items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        made |= {f"{layer}.lora_A.weight": change.down, f"{layer}.lora_B.weight": change.up}
    assert made.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[key]) for key, tensor in made.items())


def test_every_linear_layer_has_hunyuans_name_dotted_and_flat(hunyuan):
    """Except for one layer, whose rows HunyuanVideo orders differently."""
    layers = {name for name, module in loaded_hunyuan(hunyuan).named_modules() if isinstance(module, nn.Linear)}
    found = set()
    for name in NATIVE_LAYERS:
        dotted = model_names(name, "weight", NATIVE_HUNYUAN)
        for other in (name, comfyui(name)):
            assert model_names(other, "weight", NATIVE_HUNYUAN) == dotted
            assert model_names(f"lora_unet_{other.replace('.', '_')}", "weight", NATIVE_HUNYUAN) == dotted
        assert found.isdisjoint(dotted)
        found.update(dotted)
    assert found == {f"{name}.weight" for name in layers - {"norm_out.linear"}}


def comfyui(name: str) -> str:
    """ComfyUI's name for one of HunyuanVideo's native names."""
    for one, other in (
        ("attn_qkv", "attn.qkv"), ("attn_proj", "attn.proj"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"),
        ("mod.linear", "mod.lin"), ("modulation.linear", "modulation.lin"),
        ("time_in.mlp.0", "time_in.in_layer"), ("time_in.mlp.2", "time_in.out_layer"),
        ("guidance_in.mlp.0", "guidance_in.in_layer"), ("guidance_in.mlp.2", "guidance_in.out_layer"),
        ("t_embedder.mlp.0", "t_embedder.in_layer"), ("t_embedder.mlp.2", "t_embedder.out_layer"),
        ("c_embedder.linear_1", "c_embedder.in_layer"), ("c_embedder.linear_2", "c_embedder.out_layer"),
    ):  # fmt: skip
        name = name.replace(one, other)
    return name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("blocks.0.attn1.to_q"), NOTHING + "blocks.0.attn1.to_q.lora_A.weight, blocks.0.attn1.to_q.lora_B.weight"),
        (pair("blocks.0.self_attn.q"), NOTHING + "blocks.0.self_attn.q.lora_A.weight"),
        (pair("lora_unet_blocks_0_self_attn_q"), NOTHING + "lora_unet_blocks_0_self_attn_q"),
        (pair("double_blocks.9.img_attn_proj"), NOTHING + "double_blocks.9.img_attn_proj.lora_A.weight"),
        (pair("final_layer.adaLN_modulation.1", 64), NOTHING + "final_layer.adaLN_modulation.1.lora_A.weight"),
        (pair("single_blocks.0.linear1", rows=100), "single_blocks.0.linear1.lora_B.weight ([100, 2] instead of [224"),
        (pair("double_blocks.0.img_attn_qkv", rows=95), "wrong shapes double_blocks.0.img_attn_qkv.lora_B.weight ([95"),
        (
            pair("double_blocks.0.img_attn_proj") | pair("transformer.transformer_blocks.0.attn.to_out.0"),
            "more than one LoRA of transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_hunyuans(tmp_path, hunyuan, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        apply_loras(loaded_hunyuan(hunyuan), [(tmp_path / "bad.safetensors", 1.0)], fuse=True)
    assert str(caught.value).startswith(f"--lora: {tmp_path}/bad.safetensors")
