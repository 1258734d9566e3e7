"""The V1 model family; implements `skyreels_v3.families.Family`.

The transformer has its own repository. The other components are HunyuanVideo's: `text_encoder` and `tokenizer`
(Llama), `text_encoder_2` and `tokenizer_2` (CLIP), `vae`, and the scheduler's config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.files import Repository, read_json, read_sizes
from skyreels_v3.errors import CheckpointError, UserError
from skyreels_v3.families import TextEncoderSizes, published_transformer_bytes, width_of
from skyreels_v3.hunyuan.key_maps import TEXT_TOKENS
from skyreels_v3.memory.policy import BYTES, Tiles
from skyreels_v3.parallel.ranks import UNDIVIDED, ParallelConfig
from skyreels_v3.tasks import TaskSpec

if TYPE_CHECKING:
    import torch

    from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn

SCHEDULER = "scheduler/scheduler_config.json"
CHUNKS_TOKENS = False
MLP_RATIO = 4  # of the feed-forward layers, unless the config says otherwise

# The published components
TEXT_ENCODER = TextEncoderSizes(  # Llama and CLIP; the blocks are Llama's
    parameters=7_505_186_816 + 123_060_480,
    blocks=32,
    block=2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096,
    matrices=2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336,
)
VAE_PARAMETERS = 246_478_803

# Live bytes of a forward pass, per channel of the model's width and per token of video and text: at the peak, which is
# the output projection of single blocks (of attention and feed-forward outputs), and during attention (tokens, hidden
# states of the feed-forward layer, queries, keys, values and output).
PEAK_BYTES = {"bfloat16": 32.4, "float32": 64.4}
ATTENTION_BYTES = {"bfloat16": 22.4, "float32": 44.4}
# Tensors as large as a rank's tokens during an exchange: padded queries, keys and values, those received from other
# ranks, and the output that is sent back
EXCHANGE_TENSORS = 8

# Peak live bytes of the VAE: per pixel of a tile, and per pixel of a frame
TILE_SIDE = 256
VAE_ENCODE_TILE = {"float32": 3_620, "bfloat16": 1_820}
VAE_ENCODE = 20
VAE_DECODE_TILE = {"float32": 78_600, "bfloat16": 39_400}
VAE_DECODE = {"float32": 580, "bfloat16": 340}


def repositories(task: TaskSpec) -> tuple[Repository, ...]:
    """The transformer's repository and HunyuanVideo's."""
    transformer = {"transformer": (task.transformer_folder,)}
    others = {"text encoder": ("text_encoder", "text_encoder_2"), "VAE": ("vae",)}
    return (
        Repository("--model_id", f"{task.name} checkpoint", task.model_id, transformer, ()),
        Repository(
            "--base_model_id", "HunyuanVideo", task.base_model_id, others, ("tokenizer", "tokenizer_2"), (SCHEDULER,)
        ),
    )


def check_configs(task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
    """Raise UserError for another task's transformer, or for components that do not fit together."""
    if checkpoint is None:
        return
    sizes, wanted = transformer_sizes(checkpoint, task), task.transformer["in_channels"]
    if (channels := sizes.get("in_channels", wanted)) != wanted:
        reason = f"{checkpoint}/config.json: in_channels = {channels} is not {task.name}'s {wanted}"
        raise CheckpointError(f"{reason}; give a checkpoint of {task.model_id}")
    for name, folder in (("text_embed_dim", "text_encoder"), ("pooled_projection_dim", "text_encoder_2")):
        given = None if base is None else read_json(base / folder / "config.json").get("hidden_size")
        if given is not None and sizes.get(name, given) != given:
            reason = f"{base}/{folder} gives states of width {given}, the transformer takes {sizes[name]}"
            raise UserError("--base_model_id", f"{reason}; give HunyuanVideo's own, or leave it out")


def transformer_sizes(checkpoint: Path, task: TaskSpec) -> dict[str, int]:
    """The sizes in the transformer's config.json."""
    return read_sizes(checkpoint / task.transformer_folder, task.transformer)


def component_parameters(task: TaskSpec) -> dict[str, int]:
    """Parameters of the published components besides the transformer."""
    return {"text encoder": TEXT_ENCODER.parameters, "VAE": VAE_PARAMETERS}


def published_bytes(task: TaskSpec) -> dict[str, int]:
    """Approximate bytes of all components' published files: 16-bit weights, and a float32 VAE."""
    return {
        "transformer": published_transformer_bytes(task),
        "text encoder": 2 * TEXT_ENCODER.parameters,
        "VAE": 4 * VAE_PARAMETERS,
    }


def forward_flop(config: Mapping[str, Any], tokens: int, text_tokens: int = TEXT_TOKENS) -> int:
    """Floating-point operations of one forward pass on `tokens` video tokens and `text_tokens` text tokens."""
    both, dim = tokens + text_tokens, width_of(config)
    # the same in double and single blocks: double blocks have separate layers for the text, but do no more work
    block = 4 * both**2 * dim + 8 * both * dim**2 + 4 * both * dim * int(dim * config.get("mlp_ratio", MLP_RATIO))
    return (config["num_layers"] + config["num_single_layers"]) * block


def activation_bytes(config: Mapping[str, Any], tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED) -> int:
    """Peak live bytes of a forward pass on one rank, without weights."""
    dim = width_of(config)
    own = math.ceil((tokens + TEXT_TOKENS) / degrees.sequence)
    peak = PEAK_BYTES[dtype] * dim * own
    if degrees.sequence > 1:
        exchanged = EXCHANGE_TENSORS * own + (2 * tokens // degrees.ulysses if degrees.ring > 1 else 0)
        attention = ATTENTION_BYTES[dtype] * dim * own + BYTES[dtype] * dim * exchanged
        embedded = BYTES[dtype] * dim * (tokens + own)  # all tokens, before a rank keeps only its own
        peak = max(peak, attention, embedded)
    return int(peak)


def context_bytes(config: Mapping[str, Any], frames: int, speakers: int, dtype: str) -> int:
    """0: text tokens are counted with the video tokens."""
    return 0


def vae_bytes(size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
    """Peak live bytes of the VAE for frames of `size` (height, width), without weights; `tiles` has no effect."""
    pixels, of_tile = math.prod(size), math.prod(min(side, TILE_SIDE) for side in size)
    if part == "encode":
        return of_tile * VAE_ENCODE_TILE[dtype] + pixels * VAE_ENCODE
    return of_tile * VAE_DECODE_TILE[dtype] + pixels * VAE_DECODE[dtype]


def build_transformer(sizes: dict[str, Any]) -> HunyuanTransformer3DModel:
    """A transformer with these sizes."""
    from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

    return HunyuanTransformer3DModel(**sizes)


def divide_tokens(transformer: HunyuanTransformer3DModel, group: Group, usp: UspFn) -> None:
    """Divide the tokens of every forward pass among the ranks of `group`."""
    from skyreels_v3.hunyuan.sequence_parallel import SequenceParallel

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
    from skyreels_v3.hunyuan import checkpoint as load

    own = files or {}
    return {
        "vae": lambda: load.load_vae(base, vae_dtype, values),
        "transformer": lambda: load.load_transformer(
            checkpoint / task.transformer_folder, dtype, values, own.get("transformer")
        ),
        "text_encoder": lambda: load.load_text_encoder(base, dtype, values),
        "scheduler": lambda: read_json(base / SCHEDULER),
    }
