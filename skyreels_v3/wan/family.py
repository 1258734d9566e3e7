"""The V3 model family; implements `skyreels_v3.families.Family`.

Two layouts are published. `diffusers` (reference to video) has a folder with a config.json for each component. `native`
(extension and avatar) has the transformer under Wan's own names and .pth files for the other components, whose sizes
are only known from their tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.families import TextEncoderSizes, published_transformer_bytes, width_of
from skyreels_v3.memory.policy import BYTES, Tiles
from skyreels_v3.parallel.ranks import UNDIVIDED, ParallelConfig
from skyreels_v3.tasks import TaskSpec
from skyreels_v3.wan.key_maps import (
    AUDIO_ENCODER,
    NATIVE_IMAGE_ENCODER_FILE,
    NATIVE_TEXT_ENCODER_FILE,
    NATIVE_TOKENIZER,
    NATIVE_VAE_FILE,
    TEXT_TOKENS,
    TOKENS_AT_ONCE,
    config_sizes,
)

if TYPE_CHECKING:
    import torch

    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

CHUNKS_TOKENS = True
IMAGE_TOKENS = 257

# The published components
TEXT_ENCODER = TextEncoderSizes(  # UMT5-XXL
    parameters=5_680_910_336,
    blocks=24,
    block=4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64,
    matrices=4 * 4096**2 + 2 * 4096 * 10240,
)
VAE_PARAMETERS = 126_892_531
IMAGE_ENCODER_PARAMETERS = 630_766_080
IMAGE_ENCODER_FILE_BYTES = 4_770_000_000  # includes CLIP's text encoder
AUDIO_ENCODER_PARAMETERS = 94_371_712

# Live bytes of a forward pass, per channel of the model's width: per token during self-attention (tokens, queries,
# keys, values, output and rotary tables), per token while a chunk of them is processed, and per token of that chunk.
ATTENTION_BYTES = {"bfloat16": 10.12, "float32": 20.2}
WAITING_BYTES = {"bfloat16": 8.0, "float32": 16.0}
WORKING_BYTES = {"bfloat16": 12.8, "float32": 23.3}
EXCHANGE_TENSORS = 4  # tensors as large as a rank's tokens, while ranks exchange queries, keys and values

# Peak live bytes of the VAE: per pixel of an untiled frame; with tiles, per pixel of the frame and per pixel of a tile
VAE_WHOLE = {"encode": {"float32": 13_410, "bfloat16": 6_790}, "decode": {"float32": 17_390, "bfloat16": 9_880}}
VAE_SHARED = {"encode": {"float32": 6_250, "bfloat16": 3_150}, "decode": {"float32": 10_200, "bfloat16": 5_150}}
VAE_TILE = {"encode": {"float32": 8_000, "bfloat16": 4_500}, "decode": {"float32": 8_000, "bfloat16": 4_750}}
VAE_HALO = {"encode": 16, "decode": 8}  # pixels that a tile needs beyond its own, per side


def repositories(task: TaskSpec) -> tuple[Repository, ...]:
    """One repository with all components."""
    components = {"transformer": (task.transformer_folder,), "VAE": ("vae",), "text encoder": ("text_encoder",)}
    if task.layout == "native":
        components |= {"VAE": (NATIVE_VAE_FILE,), "text encoder": (NATIVE_TEXT_ENCODER_FILE,)}
    if "input_audio" in task.inputs:
        components |= {"image encoder": (NATIVE_IMAGE_ENCODER_FILE,), "audio encoder": (AUDIO_ENCODER,)}
    tokenizer = NATIVE_TOKENIZER if task.layout == "native" else "tokenizer"
    return (Repository("--model_id", f"{task.name} checkpoint", task.model_id, components, (tokenizer,)),)


def check_configs(task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
    """Raise UserError for configs that cannot be used."""
    if checkpoint is not None:
        transformer_sizes(checkpoint, task)


def transformer_sizes(checkpoint: Path, task: TaskSpec) -> dict[str, int]:
    """The sizes in the transformer's config.json, under the model's argument names."""
    return config_sizes(checkpoint / task.transformer_folder, task.transformer)


def component_parameters(task: TaskSpec) -> dict[str, int]:
    """Parameters of the published components besides the transformer."""
    parameters = {"text encoder": TEXT_ENCODER.parameters, "VAE": VAE_PARAMETERS}
    if "input_audio" in task.inputs:
        parameters |= {"image encoder": IMAGE_ENCODER_PARAMETERS, "audio encoder": AUDIO_ENCODER_PARAMETERS}
    return parameters


def published_bytes(task: TaskSpec) -> dict[str, int]:
    """Approximate bytes of all components' published files: bfloat16; VAE and audio encoder float32."""
    sizes = {
        "transformer": published_transformer_bytes(task),
        "text encoder": 2 * TEXT_ENCODER.parameters,
        "VAE": 4 * VAE_PARAMETERS,
    }
    return sizes | {"image encoder": IMAGE_ENCODER_FILE_BYTES, "audio encoder": 4 * AUDIO_ENCODER_PARAMETERS}


def condition_tokens(config: Mapping[str, Any]) -> int:
    """Number of text and image tokens in cross-attention."""
    return TEXT_TOKENS + (IMAGE_TOKENS if config.get("image_dim") is not None else 0)


def forward_flop(config: Mapping[str, Any], tokens: int) -> int:
    """Floating-point operations of one forward pass on `tokens` video tokens."""
    dim = width_of(config)
    context = condition_tokens(config)
    attention = 4 * tokens**2 * dim + 8 * tokens * dim**2
    cross = 4 * tokens * dim**2 + 4 * context * dim**2 + 4 * tokens * context * dim
    if config.get("audio_dim") is not None:
        cross += 4 * tokens * dim**2 + 4 * tokens * config["audio_tokens"] * dim
    return config["num_layers"] * (attention + cross + 4 * tokens * dim * config["ffn_dim"])


def activation_bytes(config: Mapping[str, Any], tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED) -> int:
    """Peak live bytes of a forward pass on one rank, without weights."""
    dim = width_of(config)
    own = math.ceil(tokens / degrees.sequence)
    chunk = min(own, TOKENS_AT_ONCE) * max(WORKING_BYTES[dtype] * dim, BYTES[dtype] * (dim + 2 * config["ffn_dim"]))
    peak = int(max(ATTENTION_BYTES[dtype] * dim * own, WAITING_BYTES[dtype] * dim * own + chunk))
    if degrees.sequence > 1:
        exchanged = EXCHANGE_TENSORS * own + (2 * tokens // degrees.ulysses if degrees.ring > 1 else 0)
        peak += BYTES[dtype] * dim * exchanged
    return peak


def context_bytes(config: Mapping[str, Any], frames: int, speakers: int, dtype: str) -> int:
    """Bytes of the conditions' keys and values in one block."""
    audio_tokens = config["audio_tokens"] * speakers * frames if config.get("audio_dim") is not None else 0
    dim = width_of(config)
    return 2 * (condition_tokens(config) + audio_tokens) * dim * BYTES[dtype]


def vae_bytes(size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
    """Peak live bytes of the VAE for frames of `size` (height, width), without weights."""
    pixels = math.prod(size)
    if tiles == (1, 1):
        return pixels * VAE_WHOLE[part][dtype]
    sides = (
        min(side, math.ceil(side / count) + VAE_HALO[part] * min(count - 1, 2))
        for side, count in zip(size, tiles, strict=True)
    )
    return pixels * VAE_SHARED[part][dtype] + math.prod(sides) * VAE_TILE[part][dtype]


def build_transformer(sizes: dict[str, Any]) -> SkyReelsTransformer3DModel:
    """A transformer with these sizes."""
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

    return SkyReelsTransformer3DModel(**sizes)


def divide_tokens(transformer: SkyReelsTransformer3DModel, group: Group, usp: UspFn) -> None:
    """Divide the tokens of every forward pass among the ranks of `group`."""
    from skyreels_v3.wan.sequence_parallel import SequenceParallel

    SequenceParallel(group, usp).attach(transformer)


def loaders(
    task: TaskSpec,
    checkpoint: Path,
    base: Path,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    values: bool = True,
    files: Mapping[str, Path] | None = None,
) -> dict[str, Callable[[], Any]]:
    """A function that loads each component, by component name."""
    import torch

    from skyreels_v3.wan import checkpoint as load

    folder, own = checkpoint, files or {}
    made: dict[str, Callable[[], Any]] = {
        "vae": lambda: load.load_vae(folder, vae_dtype, values, own.get("vae")),
        "transformer": lambda: load.load_transformer(
            folder / task.transformer_folder, dtype, values, own.get("transformer")
        ),
        "text_encoder": lambda: load.load_text_encoder(folder, dtype, values, own.get("text_encoder")),
    }
    if "input_audio" in task.inputs:
        made["image_encoder"] = lambda: load.load_image_encoder(folder, dtype, values)
        made["audio_encoder"] = lambda: load.load_audio_encoder(folder, torch.float32, values)
    return made
