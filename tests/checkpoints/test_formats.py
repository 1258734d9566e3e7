"""Third-party quantized transformers are read, dequantized and streamed; damaged or unsupported files are refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.checkpoints import gguf as reader
from skyreels_v3.checkpoints.formats import describe, read_format
from skyreels_v3.checkpoints.load import read_tensors, rename
from skyreels_v3.errors import CheckpointError
from skyreels_v3.families import family_of
from skyreels_v3.memory.quantize import UNPACKED_AT_ONCE, Packed, QuantizedLinear, quantize
from skyreels_v3.memory.stream import BlockStream, tensors_of
from skyreels_v3.plan import count_quantized
from skyreels_v3.tasks import TASK_NAMES, TaskSpec, task_spec
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.checkpoint import load_transformer
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from tests import toys
from tests.checkpoints import writers
from tests.conftest import ASSETS, write_tone
from training import layouts

gguf = pytest.importorskip("gguf")  # in requirements-dev.txt

SHOT = task_spec("shot_switching_extension")
R2V, SINGLE, AVATAR, T2V = map(task_spec, ("reference_to_video", "single_shot_extension", "talking_avatar", "t2v"))
FLOAT8 = torch.float8_e4m3fn
K_TYPES = ("Q6_K", "Q5_K", "Q4_K")
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # the gguf package cannot quantize to K types
HALVES = {"Q6_K": (208,), "Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,)}  # offsets of float16 scales if not (0, 2)
WIDE = {  # rows that divide into blocks of 256
    **{"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 4, "ffn_dim": 512, "text_dim": 32},
    **{"freq_dim": 64},
}
Write = Callable[[Path, dict[str, Tensor]], None]


def by_gguf(kind: str) -> Write:
    return lambda file, tensors: writers.write_gguf(file, tensors, kind)


EIGHT_BITS: dict[str, Write] = {
    "scale_weight.safetensors": writers.write_older,
    "comfy_quant.safetensors": lambda file, tensors: writers.write_newer(file, tensors, FLOAT8),
    "header.safetensors": lambda file, tensors: writers.write_newer(file, tensors, FLOAT8, header=True),
    "int8.safetensors": lambda file, tensors: writers.write_newer(file, tensors, torch.int8),
    "int8_rows.safetensors": lambda file, tensors: writers.write_newer(file, tensors, torch.int8, by_rows=True),
    "cast.safetensors": writers.write_cast,
    "Q8_0.gguf": by_gguf("Q8_0"),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A toy checkpoint for each task."""
    root = tmp_path_factory.mktemp("toys")
    for name in TASK_NAMES:
        toys.write(root / name, task_spec(name))
    return {name: root / name for name in TASK_NAMES}


def load(folder: Path, task: TaskSpec, file: Path | None = None, values: bool = True) -> Any:
    files = {} if file is None else {"transformer": file}
    made = family_of(task).loaders(task, folder, folder, torch.float32, torch.float32, values, files)
    return made["transformer"]()


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """The dequantized weights of a model, by name."""
    made = {name: parameter.detach() for name, parameter in model.named_parameters() if "weight_scale" not in name}
    layers = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    return made | {f"{name}.weight": layer.dequantized(torch.float32) for name, layer in layers.items()}


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Blocks of random bits, except that their float16 scales have ordinary sizes."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for start in HALVES.get(kind, (0, 2)):
        numbers = random.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = numbers.view(np.uint8)
    return blocks.reshape(rows, -1)


# Dequantization arithmetic


@pytest.mark.parametrize("kind", [*K_TYPES, *(kind for kind in WRITTEN if kind[0] == "Q")])
def test_blocks_are_unpacked_as_by_gguf(kind, monkeypatch):
    data = random_blocks(kind, 7, 768)
    wanted = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    packed = Packed(torch.from_numpy(data), (7, 768), kind=kind)
    assert torch.equal(packed.dequantized(torch.float32), wanted)
    assert torch.equal(packed.dequantized(torch.bfloat16), wanted.bfloat16())  # rounded once
    monkeypatch.setattr("skyreels_v3.memory.quantize.UNPACKED_AT_ONCE", 1000)  # one row at a time
    assert torch.equal(packed.dequantized(torch.float32), wanted)
    parts = [part.dequantized(torch.float32) for part in packed.split((2, 5))]
    assert torch.equal(torch.cat(parts), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_with_scales_are_rounded_once(dtype, by_rows):
    torch.manual_seed(0)
    data, scale = writers.scaled(torch.randn(48, 64), dtype, by_rows)
    packed = Packed(data, (48, 64), scale.flatten().expand(48))
    wanted = data.double() * scale.double()
    torch.testing.assert_close(packed.dequantized(torch.float32).double(), wanted, rtol=2**-24, atol=0)
    assert torch.equal(packed.dequantized(torch.bfloat16), (data.float() * scale.float()).bfloat16())


# Files


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf_files(checkpoints, kind, prefix, tmp_path):
    folder, file = checkpoints[AVATAR.name], tmp_path / "a.gguf"
    native = writers.native_tensors(folder, AVATAR)
    writers.write_gguf(file, native, kind, prefix=prefix)
    found = {part.name: part for part in gguf.GGUFReader(file).tensors}
    assert {part.tensor_type.name for part in found.values()} == {kind, "F32"}
    read = read_tensors(file)
    assert read.keys() == native.keys()
    for name, tensor in read.items():
        part = found[prefix + name]
        wanted = torch.from_numpy(gguf.quants.dequantize(part.data.copy(), part.tensor_type)).reshape(
            native[name].shape
        )
        assert torch.equal(tensor.dequantized(torch.float32) if isinstance(tensor, Packed) else tensor.float(), wanted)
        assert isinstance(tensor, Packed) == (part.tensor_type.name[0] == "Q")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_weights_of_all_tasks(checkpoints, task, tmp_path):
    """For every task, a GGUF file with native names puts the right weights in the right places."""
    spec, folder, file = task_spec(task), checkpoints[task], tmp_path / "a.gguf"
    writers.write_gguf(
        file, writers.native_tensors(folder, spec), "Q8_0", "hyvid" if spec.family == "hunyuan" else "wan"
    )
    model = load(folder, spec, file)
    made, wanted = whole(model), whole(load(folder, spec))
    assert made.keys() == wanted.keys()
    for name, weight in wanted.items():
        atol = float(weight.abs().max()) / 127  # half a quantization step, plus float16 scales
        torch.testing.assert_close(made[name], weight, atol=atol, rtol=0)
    layers = {name for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(layers) > 15 and all("blocks." in name for name in layers)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_weights_of_all_formats(checkpoints, name, tmp_path):
    folder = checkpoints[SINGLE.name]
    EIGHT_BITS[name](tmp_path / name, writers.native_tensors(folder, SINGLE))
    made, wanted = whole(load(folder, SINGLE, tmp_path / name)), whole(load(folder, SINGLE))
    for key, weight in wanted.items():
        # float8 keeps 4 significant bits; its subnormals are multiples of 2 ** -9 (of the weight, if there is no scale)
        atol = max(float(weight.abs().max()) / 127, 2**-10)
        torch.testing.assert_close(made[key], weight, atol=atol, rtol=2**-4)


def test_hunyuans_own_names_are_those_that_diffusers_converts(checkpoints):
    tensors = load_file(checkpoints[T2V.name] / "diffusion_pytorch_model.safetensors")
    native = writers.native_hunyuan(tensors)
    stacked = {key for key in native if ".linear1." in key}  # diffusers splits these by the published sizes only
    assert len(stacked) == 2 * toys.HUNYUAN["num_single_layers"]
    converted = convert_hunyuan_video_transformer_to_diffusers(
        {key: tensor for key, tensor in native.items() if key not in stacked}
    )
    for key in stacked:
        block, parameter = key.replace("single_blocks", "single_transformer_blocks").split(".linear1.")
        names = (f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp")
        sizes = [len(tensors[f"{name}.{parameter}"]) for name in names]
        converted |= {f"{name}.{parameter}": part for name, part in zip(names, native[key].split(sizes), strict=True)}
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[key], tensors[key]) for key in tensors)


def test_hunyuans_names_in_comfyui(checkpoints, tmp_path):
    folder = checkpoints[T2V.name]
    names = {
        **{"_attn_qkv": "_attn.qkv", "_attn_proj": "_attn.proj", "_mod.linear": "_mod.lin"},
        **{"modulation.linear": "modulation.lin", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
        **{"_attn_q_norm.weight": "_attn.norm.query_norm.scale", "_attn_k_norm.weight": "_attn.norm.key_norm.scale"},
        **{".q_norm.weight": ".norm.query_norm.scale", ".k_norm.weight": ".norm.key_norm.scale"},
        **{"time_in.mlp.0": "time_in.in_layer", "time_in.mlp.2": "time_in.out_layer"},
        **{"guidance_in.mlp.0": "guidance_in.in_layer", "guidance_in.mlp.2": "guidance_in.out_layer"},
        **{"t_embedder.mlp.0": "t_embedder.in_layer", "t_embedder.mlp.2": "t_embedder.out_layer"},
        **{"c_embedder.linear_1": "c_embedder.in_layer", "c_embedder.linear_2": "c_embedder.out_layer"},
        **{"self_attn_qkv": "self_attn.qkv", "self_attn_proj": "self_attn.proj"},
    }
    made = {}
    for key, tensor in writers.native_tensors(folder, T2V).items():
        for old, new in names.items():
            key = key.replace(old, new)
        made[f"model.diffusion_model.{key}"] = tensor.contiguous()
    save_file(made, tmp_path / "a.safetensors")
    model, wanted = load(folder, T2V, tmp_path / "a.safetensors"), load(folder, T2V)
    for name, weight in wanted.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)


def test_modulation_without_its_first_axis(checkpoints, tmp_path):
    folder, file = checkpoints[SINGLE.name], tmp_path / "a.gguf"
    native = writers.native_tensors(folder, SINGLE)
    squeezed = {key: tensor[0] if key.endswith("modulation") else tensor for key, tensor in native.items()}
    writers.write_gguf(file, squeezed, "Q8_0")
    table = load(folder, SINGLE, file).scale_shift_table
    assert torch.equal(table, native["head.modulation"])


def test_a_file_in_the_checkpoints_folder(checkpoints, tmp_path):
    """A GGUF file replaces the published weights: config.json is diffusers', the tensors have Wan's names."""
    source, folder = checkpoints[R2V.name] / "transformer", tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    writers.write_gguf(folder / "SkyReels-v3-r2v-Q8_0.gguf", writers.native_tensors(checkpoints[R2V.name], R2V), "Q8_0")
    model = load_transformer(folder, torch.bfloat16)
    assert (
        model.blocks[0].attn1.to_q.kind == "Q8_0" and model.condition_embedder.time_proj.weight.dtype == torch.float32
    )
    (folder / "another.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="holds 2 gguf files and no index"):
        load_transformer(folder, torch.bfloat16)


def test_what_is_said_of_a_file(checkpoints, tmp_path):
    native = writers.native_tensors(checkpoints[SINGLE.name], SINGLE)
    said = {}
    for name, write in EIGHT_BITS.items():
        write(tmp_path / name, native)
        said[name] = describe([tmp_path / name])
        assert read_format([tmp_path / name]).is_quantized
    assert said["scale_weight.safetensors"].startswith("scaled FP8 (F8_E4M3, F32)")
    assert said["header.safetensors"].startswith("scaled FP8 (") and said["int8.safetensors"].startswith(
        "scaled INT8 ("
    )
    assert said["cast.safetensors"].startswith("FP8 (") and said["Q8_0.gguf"].startswith("GGUF (")
    own = checkpoints[SINGLE.name] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert describe([own]).startswith("(F32), ") and not read_format([own]).is_quantized


# Memory: weights are kept and streamed as the file's bytes


@pytest.fixture(scope="session")
def q6_k(tmp_path_factory) -> Path:
    """A checkpoint folder whose transformer has random Q6_K weights, inside its blocks and outside."""
    folder, types = tmp_path_factory.mktemp("q6_k"), gguf.GGMLQuantizationType
    model = layouts.random_model(lambda: SkyReelsTransformer3DModel(**WIDE))
    layouts.write_native_transformer(folder, model)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    writer = gguf.GGUFWriter(str(folder / "a.gguf"), "wan")
    for key, tensor in tensors.items():
        made, kind = tensor.numpy(), types.F32
        if key.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % 256 == 0:
            made, kind = random_blocks("Q6_K", *tensor.shape), types.Q6_K
        elif tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [*made.shape])
            made = made.reshape(len(made), -1)
        writer.add_tensor(key, made, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def forward(model: SkyReelsTransformer3DModel) -> Tensor:
    model.set_attention(sdpa)
    torch.manual_seed(1)
    video, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 512, 32)
    with torch.inference_mode():
        (made,) = model([Segment(video)], torch.tensor([[500]]), text)
    return made


@pytest.mark.parametrize("pin", [None, lambda buffer: True], ids=["mapped", "pinned"])
def test_blocks_stream_as_they_are_stored(q6_k, pin):
    model = load_transformer(q6_k, torch.float32)
    wanted = forward(model)
    assert torch.isfinite(wanted).all() and wanted.std() > 0
    stream = BlockStream(model, model.blocks, torch.device("cpu"), pin=pin)
    with stream.active():
        slots = [len(slot.buffer) for slot in stream._slots]
        assert torch.equal(forward(model), wanted)
    entries = reader.read_gguf(q6_k / "a.gguf")
    stored = sum(entry.nbytes for name, entry in entries.items() if name.startswith("blocks.0."))
    assert stored <= sum(tensor.nbytes for tensor in tensors_of(model.blocks[0])) <= stored + 4096
    assert len(slots) == 2 and all(stored <= size <= 1.1 * stored for size in slots)
    elements = sum(np.prod(entry.shape) for name, entry in entries.items() if name.startswith("blocks.0."))
    assert stored < 0.9 * elements  # 6.6 bits per weight; bfloat16 would take 16


@pytest.mark.parametrize(("kind", "size", "streamed"), [("Q6_K", 12.5e9, 1.4e9), ("F8_E4M3", 14.5e9, 1.7e9)])
def test_a_plan_of_the_published_size(kind, size, streamed, tmp_path):
    """Planning reads the headers alone: the files' data are holes."""
    with torch.device("meta"):
        model = family_of(SINGLE).build_transformer(dict(SINGLE.transformer))
    model.save_config(tmp_path / "transformer")
    native = layouts.native(layouts.weights(model), key_maps.NATIVE_TRANSFORMER)
    file = tmp_path / f"a.{'gguf' if kind == 'Q6_K' else 'safetensors'}"
    write = writers.write_hollow_gguf if kind == "Q6_K" else writers.write_hollow_safetensors
    write(file, native, kind)
    assert file.stat().st_size == pytest.approx(size, rel=0.03) and file.stat().st_blocks * 512 < 1e8
    weights = count_quantized(SINGLE.name, tmp_path, file, "bfloat16", None)
    assert weights.total == pytest.approx(size, rel=0.1)
    assert weights.on_device(0) == pytest.approx(streamed, rel=0.1)


# Whole runs

BASE = ("--device", "cpu", "--prompt", "a boat", "--height", 64, "--width", 96, "--num_inference_steps", 2, "--quiet")
INPUTS: dict[str, tuple[object, ...]] = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 5),
    "shot_switching_extension": ("--input_video", ASSETS / "boat.mp4", "--duration", 2),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", "{sound}"),
    "t2v": ("--num_frames", 5),
}


@pytest.fixture
def make(main, tmp_path) -> Callable[..., np.ndarray]:
    """Run a task with its toy checkpoint; returns the frames."""
    sound, runs = write_tone(tmp_path / "sound.wav", 0.5), iter(range(100))

    def make(task: str, *flags: object) -> np.ndarray:
        folder = tmp_path / f"run-{next(runs)}"
        inputs = [str(value).format(sound=sound) for value in INPUTS[task]]
        argv = ("--task_type", task, *BASE, "--model_id", "tiny", *inputs, "--output", f"{folder}/", *flags)
        code, _, stderr = main(*argv)
        assert code == 0, stderr
        return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(float)

    return make


def psnr(made: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((made - expected) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("reference_to_video", [*EIGHT_BITS]),
        ("shot_switching_extension", ["comfy_quant.safetensors"]),
        ("talking_avatar", ["scale_weight.safetensors", "Q8_0.gguf"]),
        ("t2v", ["comfy_quant.safetensors", "int8_rows.safetensors", "Q8_0.gguf"]),
    ],
)
def test_frames_with_8_bits(make, checkpoints, task, names, tmp_path):
    """A PSNR of at least 30 dB against full precision, and the same frames in every memory mode."""
    native = writers.native_tensors(checkpoints[task], task_spec(task))
    plain = make(task)
    for name in names:
        EIGHT_BITS[name](tmp_path / name, native)
        made = make(task, "--transformer", tmp_path / name)
        assert made.shape == plain.shape and psnr(made, plain) > 30, name
    for flags in (("--memory", "stream"), ("--memory", "offload")):
        assert np.array_equal(make(task, "--transformer", tmp_path / names[-1], *flags), made)


def companions(root: Path, task: TaskSpec, to: Path) -> dict[str, Path]:
    """Single-file text encoders and VAE: FP8 with transformers' names as in ComfyUI, the others with Wan's names."""
    if task.layout == "diffusers":
        text = load_file(root / "text_encoder" / "model.safetensors")
        native = layouts.native(text, key_maps.NATIVE_TEXT_ENCODER)
        vae = layouts.native(load_file(root / "vae" / "diffusion_pytorch_model.safetensors"), key_maps.NATIVE_VAE)
    else:
        native = torch.load(root / key_maps.NATIVE_TEXT_ENCODER_FILE, weights_only=True)
        text = rename(native, key_maps.NATIVE_TEXT_ENCODER, root, {})
        vae = torch.load(root / key_maps.NATIVE_VAE_FILE, weights_only=True)
    made: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=FLOAT8), "spiece_model": torch.ones(9).byte()}
    for key, tensor in text.items():
        made[key] = tensor.half() if key == "shared.weight" else tensor
        if re.search(r"SelfAttention\.[qkvo]\.weight|DenseReluDense\.w\w+\.weight", key):
            made[key], made[key.replace(".weight", ".scale_weight")] = writers.scaled(tensor, FLOAT8)
    files = {name: to / f"{name}.safetensors" for name in ("fp8_scaled", "native", "vae")}
    for tensors, file in zip((made, native, vae), files.values(), strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return files


@pytest.mark.parametrize("task", [R2V, SHOT], ids=lambda task: task.name)
def test_companions(make, main, checkpoints, task, tmp_path):
    """UMT5 and the VAE load from single files, in both checkpoint layouts, with no weights in the checkpoint itself."""
    root = tmp_path / "root"
    toys.write(root, task)
    files = companions(root, task, tmp_path)
    for weights in (*root.glob("text_encoder/*.safetensors"), *root.glob("vae/*.safetensors"), *root.glob("*.pth")):
        weights.unlink()
    plain = make(task.name)
    own = ("--model_id", root, "--vae", files["vae"], "--text_encoder")
    assert np.array_equal(make(task.name, *own, files["native"]), plain)
    made = make(task.name, *own, files["fp8_scaled"])
    assert psnr(made, plain) > 30 and not np.array_equal(made, plain)
    assert np.array_equal(make(task.name, *own, files["fp8_scaled"], "--memory", "stream"), made)
    argv = ("--task_type", task.name, *BASE, *INPUTS[task.name], *own, files["fp8_scaled"], "--dry_run")
    code, stdout, stderr = main(*argv)
    assert code == 0, stderr
    assert (
        f"text encoder  {files['fp8_scaled']}: scaled FP8 (" in stdout
        and f"VAE           {files['vae']}: (F32)" in stdout
    )
    code, _, stderr = main(*argv, "--vae", files["native"])
    assert code == 2 and stderr.startswith("error: --vae: ")
    encoder = family_of(task).loaders(
        task, root, root, torch.float32, torch.float32, False, {"text_encoder": files["fp8_scaled"]}
    )["text_encoder"]()
    kept = {name for name, part in encoder.module.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(kept) == 12 and not any(name.endswith("wo") for name in kept)


def test_dry_run_says_what_it_found(main, checkpoints, tmp_path):
    file = tmp_path / "Q8_0.gguf"
    writers.write_gguf(file, writers.native_tensors(checkpoints[SINGLE.name], SINGLE), "Q8_0")
    argv = ("--task_type", SINGLE.name, "--prompt", "a", "--input_video", ASSETS / "boat.mp4", "--device", "cpu")
    code, stdout, stderr = main(*argv, "--model_id", checkpoints[SINGLE.name], "--transformer", file, "--dry_run")
    assert code == 0, stderr
    (line,) = (line for line in stdout.splitlines() if str(file) in line)
    assert line.startswith(f"transformer   {file}: GGUF (") and "Q8_0" in line and "(on this machine)" in line
    weights = count_quantized(SINGLE.name, checkpoints[SINGLE.name], file, "float32", None)
    model = load(checkpoints[SINGLE.name], SINGLE, file)
    assert weights.total == sum(weight.nbytes for weight in model.parameters())
    assert weights.blocks == tuple(sum(weight.nbytes for weight in block.parameters()) for block in model.blocks)
    assert weights.dequantized > 8 * UNPACKED_AT_ONCE
    stored = sum(entry.nbytes for name, entry in reader.read_gguf(file).items() if name.startswith("blocks."))
    assert sum(weights.blocks) == stored
    # a checkpoint folder without weights is enough
    assert main(*argv, "--model_id", checkpoints[SINGLE.name], "--dry_run")[1].count("weights       (F32), ") == 1


def test_weights_are_not_needed_beside_a_file(main, checkpoints, tmp_path, make):
    file, root = tmp_path / "a.gguf", tmp_path / "copy"
    writers.write_gguf(file, writers.native_tensors(checkpoints[R2V.name], R2V), "Q8_0")
    toys.write(root, R2V)
    argv = ("--task_type", R2V.name, *BASE, *INPUTS[R2V.name], "--model_id", root, "--output")
    assert main(*argv, tmp_path / "a.mp4", "--transformer", file)[0] == 0
    (root / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert main(*argv, tmp_path / "b.mp4", "--transformer", file)[0] == 0
    assert main(*argv, tmp_path / "c.mp4")[0] == 2


def test_loras_and_fp8(make, main, checkpoints, tmp_path):
    """A LoRA needs weights that it can be added to; --quant quantizes only what is not quantized yet."""
    native, lora = writers.native_tensors(checkpoints[R2V.name], R2V), tmp_path / "lora.safetensors"
    torch.manual_seed(0)
    pair = {"A": torch.randn(4, 96) / 10, "B": torch.randn(96, 4) / 10}
    save_file({f"blocks.0.attn1.to_q.lora_{part}.weight": made for part, made in pair.items()}, lora)
    files = {name: tmp_path / name for name in ("cast.safetensors", "scale_weight.safetensors", "Q8_0.gguf")}
    for name, file in files.items():
        EIGHT_BITS[name](file, native)
    with_lora = make(R2V.name, "--lora", lora)
    assert psnr(with_lora, make(R2V.name)) < 60
    for flags in ((), ("--quant", "fp8")):
        assert psnr(make(R2V.name, "--transformer", files["cast.safetensors"], "--lora", lora, *flags), with_lora) > 30
    argv = ("--task_type", R2V.name, *BASE, *INPUTS[R2V.name], "--model_id", checkpoints[R2V.name])
    for name in ("scale_weight.safetensors", "Q8_0.gguf"):
        code, _, stderr = main(*argv, "--transformer", files[name], "--lora", lora)
        assert code == 2 and stderr.startswith("error: --lora: ") and "quantized already" in stderr
        assert psnr(make(R2V.name, "--transformer", files[name], "--quant", "fp8"), make(R2V.name)) > 30
    saved = tmp_path / "saved"
    code, _, stderr = main(*argv, "--transformer", files["Q8_0.gguf"], "--quant", "fp8", "--save_quantized", saved)
    assert code == 2 and stderr.startswith("error: --save_quantized: ")
    file = files["scale_weight.safetensors"]
    made = make(R2V.name, "--transformer", file, "--quant", "fp8", "--save_quantized", saved)
    assert psnr(make(R2V.name, "--model_id", saved), made) > 60


# Damaged and hostile files

TEXT, ARRAY = 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(*entries: bytes, settings: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    """A GGUF file with one kilobyte of data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(entries), len(settings)))) + b"".join(settings + entries)
    return header + bytes(-len(header) % 32) + bytes(1024)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends within its header"),
    "of another kind": (b"GGML" + bytes(100), "not GGUF of version 2 or 3"),
    "of another version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "not GGUF of version 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not GGUF of version 2 or 3"),
    "many tensors": (gguf_file(counts=(2**63, 0)), "a list of 9223372036854775808"),
    "many settings": (gguf_file(counts=(0, 2**63)), "a list of 9223372036854775808"),
    "more tensors than it has": (gguf_file(entry("a", (4,)), counts=(1000, 0)), "cannot be read as a GGUF file"),
    "a long name": (gguf_file(struct.pack("<Q", 2**40)), "ends within its header"),
    "a name that is no text": (gguf_file(struct.pack("<Q", 2) + b"\xff\xff" + bytes(24)), "can't decode"),
    "a huge tensor": (gguf_file(entry("a", (2**62,))), "a does not fit into it as F32"),
    "a product that overflows": (gguf_file(entry("a", (2**32, 2**32, 2**32))), "a does not fit into it as F32"),
    "a tensor beyond the end": (gguf_file(entry("a", (4,), offset=2**62)), "a does not fit into it as F32"),
    "one that begins just before it": (gguf_file(entry("a", (4,), offset=1024)), "a does not fit into it as F32"),
    "an offset between": (gguf_file(entry("a", (4,), offset=1)), "a does not fit into it as F32"),
    "an empty tensor": (gguf_file(entry("a", (4, 0))), "a is empty"),
    "many axes": (gguf_file(entry("a", (1,) * 9)), "9 axes"),
    "parts of blocks": (gguf_file(entry("a", (16, 2), kind=8)), "a does not fit into it as Q8_0"),
    "a name twice": (gguf_file(entry("a", (4,)), entry("a", (4,))), "a twice"),
    "a type that is not read": (gguf_file(entry("a", (256,), kind=10)), "holds weights in GGUF's Q2_K (a)"),
    "another type": (gguf_file(entry("a", (256,), kind=23)), "holds weights in GGUF's IQ4_XS (a)"),
    "a type that nobody knows": (gguf_file(entry("a", (256,), kind=4000)), "holds weights in GGUF's type 4000 (a)"),
    "no alignment": (
        gguf_file(entry("a", (4,)), settings=(text("general.alignment") + struct.pack("<II", 4, 0),)),
        "general.alignment = 0",
    ),
    "an odd alignment": (
        gguf_file(entry("a", (4,)), settings=(text("general.alignment") + struct.pack("<II", 4, 3),)),
        "general.alignment = 3",
    ),
    "a long list": (
        gguf_file(settings=(text("a") + struct.pack("<IIQ", ARRAY, 4, 2**50),)), "a list of 1125899906842624"
    ),
    "a list of lists": (gguf_file(settings=(text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1),)), "a list of lists"),
    "a setting of no type": (gguf_file(settings=(text("a") + struct.pack("<I", 77),)), "a value of type 77"),
    "another shape": (
        gguf_file(
            entry("a", (4,)),
            settings=(text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ2i", ARRAY, 5, 2, -2, -2),),
        ),
        "comfy.gguf.orig_shape.a = [-2, -2]",
    ),
    "a control character": (gguf_file(entry("a\x1b[31m\nb", (2**62,))), "does not fit into it as F32"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_files(refuse, name, tmp_path):
    content, says = HOSTILE[name]
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    argv = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", str(ASSETS / "fox.png")]
    line = refuse([*argv, "--transformer", str(file), "--dry_run"])
    assert line.startswith(f"error: --transformer: {file} ") and says in line


@pytest.mark.parametrize("name", ["Q8_0.gguf", "comfy_quant.safetensors"])
def test_truncated_files(refuse, checkpoints, name, tmp_path):
    file = tmp_path / name
    EIGHT_BITS[name](file, writers.native_tensors(checkpoints[R2V.name], R2V))
    content = file.read_bytes()
    argv = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", str(ASSETS / "fox.png")]
    for length in (len(content) - 1, len(content) // 2, 1000, 10, 3):
        file.write_bytes(content[:length])
        line = refuse([*argv, "--transformer", str(file)])
        assert line.startswith("error: --transformer: ") and "download it again" in line


LAYER = "blocks.0.self_attn.q"


def settings_of(**entries: object) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    content = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)
    return lambda tensors: tensors | {f"{LAYER}.comfy_quant": content}


# how a file with `comfy_quant` is changed, and what the error says
SETTINGS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "NVFP4": (settings_of(format="nvfp4"), f"holds weights in NVFP4 ({LAYER})"),
    "MXFP8": (settings_of(format="mxfp8"), f"holds weights in MXFP8 ({LAYER})"),
    "AWQ": (settings_of(format="awq_w4a16"), f"holds weights in AWQ ({LAYER})"),
    "one that nobody knows": (settings_of(format="int3"), f"holds weights in int3 ({LAYER})"),
    "a list": (settings_of(format=["nvfp4"]), f"holds weights in ['nvfp4'] ({LAYER})"),
    "no format": (settings_of(), f"holds weights in None ({LAYER})"),
    "rotated": (
        settings_of(format="int8_tensorwise", convrot=True, convrot_groupsize=256),
        f"holds weights in rotated INT8 (convrot) ({LAYER})",
    ),
    "an entry that is not read": (settings_of(format="float8_e4m3fn", zero=1), f"zero in the settings of {LAYER}"),
    "another type": (settings_of(format="int8_tensorwise"), f"the settings of {LAYER} belongs to no weight"),
    "no JSON": (
        lambda t: t | {f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, f"{LAYER}.comfy_quant is not JSON"
    ),
    "numbers": (lambda t: t | {f"{LAYER}.comfy_quant": torch.zeros(9)}, f"{LAYER}.comfy_quant is not JSON"),
    "without a matrix": (
        lambda t: t | {"blocks.9.comfy_quant": t[f"{LAYER}.comfy_quant"].clone()}, "the settings of blocks.9 belongs"
    ),
    "without a scale": (
        lambda t: {key: tensor for key, tensor in t.items() if key != f"{LAYER}.weight_scale"},
        f"the settings of {LAYER} belongs to no weight",
    ),
    "a scale that is not read": (
        lambda t: t | {f"{LAYER}.weight_zero_point": torch.ones(())}, f"unexpected keys {LAYER}.weight_zero_point"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_read(checkpoints, name, tmp_path):
    change, says = SETTINGS[name]
    folder, file = checkpoints[SINGLE.name], tmp_path / "a.safetensors"
    writers.write_newer(file, writers.native_tensors(folder, SINGLE), FLOAT8)
    save_file(change(load_file(file)), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(says)):
        load(folder, SINGLE, tmp_path / "b.safetensors", values=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("[", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no layers"),
        ('{"layers": {"blocks.0.self_attn.q": 3}}', "the settings of blocks.0.self_attn.q belongs to no weight"),
        ('{"layers": {"blocks.0.self_attn.q": {"format": "nvfp4"}}}', "holds weights in NVFP4"),
        ('{"layers": {"blocks.0.other": {"format": "float8_e4m3fn"}}}', "the settings of blocks.0.other belongs to no"),
    ],
)
def test_settings_in_the_header_that_are_not_read(checkpoints, settings, says, tmp_path):
    native = writers.native_tensors(checkpoints[SINGLE.name], SINGLE)
    save_file(native, tmp_path / "a.safetensors", metadata={"_quantization_metadata": settings})
    with pytest.raises(CheckpointError, match=re.escape(says)):
        load(checkpoints[SINGLE.name], SINGLE, tmp_path / "a.safetensors", values=False)


@pytest.mark.parametrize("name", ["owner/name", "owner/name/file.bin", "nothere.gguf", "", "nothere/"])
def test_what_is_no_file(refuse, name):
    argv = ["--task_type", "reference_to_video", "--prompt", "a", "--ref_imgs", str(ASSETS / "fox.png")]
    line = refuse([*argv, "--transformer", name])
    assert line.startswith("error: --transformer: ") and "OWNER/NAME/FILE.safetensors" in line


def test_another_tasks_transformer(refuse, checkpoints, tmp_path):
    """Video-extension weights for the avatar task are detected without reading them."""
    file = tmp_path / "a.gguf"
    writers.write_gguf(file, writers.native_tensors(checkpoints[SINGLE.name], SINGLE), "Q8_0")
    argv = ["--task_type", AVATAR.name, "--prompt", "a", "--input_image", str(ASSETS / "portrait.png")]
    argv += ["--input_audio", str(ASSETS / "speech.mp3"), "--model_id", str(checkpoints[AVATAR.name]), "--dry_run"]
    line = refuse([*argv, "--transformer", str(file)])
    assert line.startswith(f"error: --transformer: {file} ")


def test_quantized_layers_take_on_nothing_that_fp8_units_cannot_multiply():
    torch.manual_seed(0)
    data, scale = writers.scaled(torch.randn(32, 64), torch.int8)
    layer = QuantizedLinear(Packed(data, (32, 64), scale.expand(32)), None)
    quantize([torch.nn.Sequential(layer)], torch.device("cpu"), dynamic=True)
    assert not layer.dynamic
