"""Write quantized transformers as others do: safetensors by the formats' descriptions, GGUF by its own package."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyreels_v3.tasks import TaskSpec
from skyreels_v3.wan import key_maps as wan
from training import layouts

Tensors = dict[str, Tensor]
FLOAT8 = torch.float8_e4m3fn
HIGH_PRECISION = re.compile(  # as in the older files
    r"norm|bias|time_in|time_|patch_embedding|img_emb|modulation|text_embedding|adapter|add|ref_conv|audio_proj"
)


def native_tensors(folder: Path, task: TaskSpec) -> Tensors:
    """A checkpoint's transformer under the original model's native names."""
    tensors: Tensors = {}
    for file in sorted((folder / task.transformer_folder).glob("*.safetensors")):
        tensors |= load_file(file)
    if task.family == "hunyuan":
        return native_hunyuan(tensors)
    return tensors if "head.modulation" in tensors else layouts.native(tensors, wan.NATIVE_TRANSFORMER)


# diffusers' names of V1's layers in order of replacement, and HunyuanVideo's
HUNYUAN_NAMES = {
    r"context_embedder\.token_refiner\.refiner_blocks": "txt_in.individual_token_refiner.blocks",
    r"context_embedder\.proj_in": "txt_in.input_embedder",
    r"context_embedder\.time_text_embed\.timestep_embedder\.linear_([12])": lambda m: (
        f"txt_in.t_embedder.mlp.{2 * int(m[1]) - 2}"
    ),
    r"context_embedder\.time_text_embed\.text_embedder": "txt_in.c_embedder",
    r"time_text_embed\.timestep_embedder\.linear_([12])": lambda m: f"time_in.mlp.{2 * int(m[1]) - 2}",
    r"time_text_embed\.guidance_embedder\.linear_([12])": lambda m: f"guidance_in.mlp.{2 * int(m[1]) - 2}",
    **{
        rf"time_text_embed\.text_embedder\.linear_{n}": f"vector_in.{name}_layer" for n, name in ((1, "in"), (2, "out"))
    },
    r"x_embedder": "img_in",
    r"(?<!_)(blocks\.\d+)\.attn\.to_out\.0": r"\1.self_attn_proj",
    r"(?<!_)(blocks\.\d+)\.norm_out\.linear": r"\1.adaLN_modulation.1",
    r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"^proj_out": "final_layer.linear",
    r"single_transformer_blocks": "single_blocks",
    r"(single_blocks\.\d+)\.proj_out": r"\1.linear2",
    r"(single_blocks\.\d+)\.norm\.linear": r"\1.modulation.linear",
    r"(single_blocks\.\d+)\.attn\.norm_([qk])": r"\1.\2_norm",
    r"transformer_blocks": "double_blocks",
    r"norm1\.linear": "img_mod.linear",
    r"norm1_context\.linear": "txt_mod.linear",
    r"attn\.norm_added_([qk])": r"txt_attn_\1_norm",
    r"attn\.norm_([qk])": r"img_attn_\1_norm",
    r"attn\.to_out\.0": "img_attn_proj",
    r"attn\.to_add_out": "txt_attn_proj",
    r"(refiner\.blocks\.\d+)\.ff\.": r"\1.mlp.",
    r"\.ff\.": ".img_mlp.",
    r"\.ff_context\.": ".txt_mlp.",
    **{r"mlp\.net\.0\.proj": "mlp.fc1", r"mlp\.net\.2": "mlp.fc2"},
}


def native_hunyuan(tensors: Tensors) -> Tensors:
    """The transformer under HunyuanVideo's native names, the inverse of diffusers' conversion."""
    made: Tensors = {}
    stacks: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        stacked = re.fullmatch(r"(.+)\.(?:attn\.(to|add)_([qkv])(?:_proj)?|(proj_mlp))\.(weight|bias)", key)
        if stacked:
            block, _, letter, _, parameter = stacked.groups()
            name = "linear1" if "single" in block else "self_attn_qkv" if "refiner" in block else "img_attn_qkv"
            name = "txt_attn_qkv" if stacked[2] == "add" else name
            place = 3 if letter is None else "qkv".index(letter)
            stacks.setdefault(f"{block}.{name}.{parameter}", []).append((place, tensor))
        elif key.startswith("norm_out."):
            made[key] = torch.cat(tensor.chunk(2)[::-1])
        else:
            made[key] = tensor
    made |= {
        key: torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0])]) for key, parts in stacks.items()
    }
    return {hunyuan_name(key): tensor for key, tensor in made.items()}


def hunyuan_name(key: str) -> str:
    for pattern, name in HUNYUAN_NAMES.items():
        key = re.sub(pattern, name, key)
    return key


def is_matrix(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2 and not HIGH_PRECISION.search(key)


def scaled(weight: Tensor, dtype: torch.dtype, by_rows: bool = False) -> tuple[Tensor, Tensor]:
    """A matrix divided by one scale, or one per row, so that it fills the range of `dtype`; and the scale."""
    largest = weight.float().abs().amax(dim=1, keepdim=True) if by_rows else weight.float().abs().amax()
    whole = dtype is torch.int8
    scale = largest / (127 if whole else torch.finfo(dtype).max)
    divided = weight.float() / scale
    return (divided.round() if whole else divided).to(dtype), scale


def write_older(file: Path, tensors: Tensors, prefix: str = "") -> None:
    """Write FP8 weights with `scale_weight` tensors and the `scaled_fp8` marker."""
    made: Tensors = {"scaled_fp8": torch.zeros(2, dtype=FLOAT8)}
    for key, tensor in tensors.items():
        made[key] = tensor
        if is_matrix(key, tensor):
            made[key], made[key.replace(".weight", ".scale_weight")] = scaled(tensor, FLOAT8)
            made[key.replace(".weight", ".scale_input")] = torch.ones(())
    save_file({prefix + key: tensor for key, tensor in made.items()}, file)


def write_newer(
    file: Path, tensors: Tensors, dtype: torch.dtype, by_rows: bool = False, header: bool = False, prefix: str = ""
) -> None:
    """Write FP8 or INT8 with `weight_scale`, with settings in one tensor per layer or all in the header."""
    names = {FLOAT8: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}
    settings, made = {"format": names[dtype]}, {}
    layers: dict[str, object] = {}
    for key, tensor in tensors.items():
        made[key] = tensor
        if is_matrix(key, tensor):
            layer = key.removesuffix(".weight")
            made[key], made[f"{layer}.weight_scale"] = scaled(tensor, dtype, by_rows)
            if header:
                layers[layer] = settings
            else:
                content = json.dumps({**settings, "full_precision_matrix_mult": True}).encode()
                made[f"{layer}.comfy_quant"] = torch.tensor(list(content), dtype=torch.uint8)
    written = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if header else None
    save_file({prefix + key: tensor.contiguous() for key, tensor in made.items()}, file, metadata=written)


def write_cast(file: Path, tensors: Tensors, dtype: torch.dtype = FLOAT8) -> None:
    """Write FP8 weights without scales."""
    save_file({key: tensor.to(dtype) if is_matrix(key, tensor) else tensor for key, tensor in tensors.items()}, file)


def write_gguf(file: Path, tensors: Tensors, kind: str, architecture: str = "wan", prefix: str = "") -> None:
    """Write a GGUF file with all matrices in type `kind` and the rest in F32, as published files have it."""
    import gguf

    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(file), architecture)
    for key, tensor in tensors.items():
        values = tensor.float().numpy()
        if tensor.ndim > 4:  # more dimensions than GGUF supports
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{key}", [*values.shape])
            values = values.reshape(values.shape[0], -1)
        made = (
            types[kind]
            if is_matrix(key, tensor) and values.shape[1] % gguf.GGML_QUANT_SIZES[types[kind]][0] == 0
            else types.F32
        )
        writer.add_tensor(prefix + key, gguf.quants.quantize(np.ascontiguousarray(values), made), raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hollow_gguf(file: Path, tensors: Tensors, kind: str) -> None:
    """Write a file with the header of `write_gguf` and holes in place of the data."""
    import gguf

    types, size = gguf.GGMLQuantizationType, 0
    writer = gguf.GGUFWriter(str(file), "wan")
    for key, tensor in tensors.items():
        made, shape = types[kind] if is_matrix(key, tensor) else types.F32, [*tensor.shape]
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", shape)
            shape = [shape[0], tensor.numel() // shape[0]]
        elements, block = gguf.GGML_QUANT_SIZES[made]
        nbytes = tensor.numel() // elements * block
        writer.add_tensor_info(key, shape, np.dtype(np.float32), nbytes, made)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as handle:
        handle.truncate(-(-file.stat().st_size // 32) * 32 + size)


def write_hollow_safetensors(file: Path, tensors: Tensors, kind: str) -> None:
    """Write a file with the header of `write_older` and holes in place of the data."""
    header: dict[str, object] = {}
    end = 0

    def add(key: str, dtype: str, shape: list[int], nbytes: int) -> None:
        nonlocal end
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes

    for key, tensor in tensors.items():
        matrix = is_matrix(key, tensor)
        add(key, kind if matrix else "BF16", [*tensor.shape], tensor.numel() * (1 if matrix else 2))
        if matrix:
            add(key.replace(".weight", ".scale_weight"), "F32", [], 4)
    add("scaled_fp8", kind, [2], 2)
    content = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(content)) + content)
        handle.truncate(8 + len(content) + end)
