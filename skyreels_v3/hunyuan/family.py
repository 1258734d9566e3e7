"""The V1 family: what the rest of the toolkit asks of it, see `skyreels_v3.families.Family`.

The transformer has a repository of its own. The other components are HunyuanVideo's: `text_encoder` and `tokenizer`
(Llama), `text_encoder_2` and `tokenizer_2` (CLIP), `vae`, and the scheduler's config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.files import Repository, read_json, read_sizes
from skyreels_v3.errors import CheckpointError, UserError
from skyreels_v3.families import TextEncoderSizes
from skyreels_v3.hunyuan.sizes import LLAMA_AND_CLIP, VAE_PARAMETERS, HunyuanSizes
from skyreels_v3.hunyuan.sizes import vae_bytes as fixed_vae_bytes
from skyreels_v3.memory.policy import Tiles
from skyreels_v3.tasks import CONFIG_DIR, TaskSpec, load_yaml

if TYPE_CHECKING:
    import torch

    from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn

SCHEDULER = "scheduler/scheduler_config.json"


def repositories(task: TaskSpec) -> tuple[Repository, ...]:
    """That of the transformer, and HunyuanVideo's."""
    transformer = {"transformer": (task.transformer_folder,)}
    others = {"text encoder": ("text_encoder", "text_encoder_2"), "VAE": ("vae",)}
    return (
        Repository("--model_id", f"{task.name} checkpoint", task.model_id, transformer, ()),
        Repository(
            "--base_model_id", "HunyuanVideo", task.base_model_id, others, ("tokenizer", "tokenizer_2"), (SCHEDULER,)
        ),
    )


def transformer_sizes(checkpoint: Path, task: TaskSpec) -> dict[str, int]:
    """The sizes in the transformer's config.json."""
    return read_sizes(checkpoint / task.transformer_folder, task.transformer)


def sizes(values: dict[str, Any]) -> HunyuanSizes:
    """What a transformer of these sizes computes and needs."""
    return HunyuanSizes(**values)


def text_encoder() -> TextEncoderSizes:
    """Llama and CLIP."""
    return LLAMA_AND_CLIP


def component_parameters(task: TaskSpec) -> dict[str, int]:
    """Parameters of the published components besides the transformer."""
    return {"text encoder": LLAMA_AND_CLIP.parameters, "VAE": VAE_PARAMETERS}


def vae_bytes(size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
    """Live bytes at the VAE's peak; its tiles are always the same."""
    return fixed_vae_bytes(size, dtype, part)


def check_configs(task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
    """Raise UserError for configs that cannot work: another task's, or parts that do not fit each other."""
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


def build_transformer(sizes: dict[str, Any]) -> HunyuanTransformer3DModel:
    """The transformer of these sizes, without weights worth having."""
    from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

    return HunyuanTransformer3DModel(**sizes)


def divide_tokens(transformer: HunyuanTransformer3DModel, group: Group, usp: UspFn) -> None:
    """Have the ranks of `group` divide the tokens of every forward."""
    from skyreels_v3.hunyuan.sequence_parallel import SequenceParallel

    SequenceParallel(group, usp).attach(transformer)


def loaders(
    task: TaskSpec, checkpoint: Path, base: Path, dtype: torch.dtype, vae_dtype: torch.dtype, values: bool = True
) -> dict[str, Callable[[], Any]]:
    """What loads each component."""
    from skyreels_v3.hunyuan import checkpoint as load

    return {
        "vae": lambda: load.load_vae(base, vae_dtype, values),
        "transformer": lambda: load.load_transformer(checkpoint / task.transformer_folder, dtype, values),
        "text_encoder": lambda: load.load_text_encoder(base, dtype, values),
        "scheduler": lambda: read_json(base / SCHEDULER),
    }


def tiny_sizes(task: TaskSpec) -> dict[str, int]:
    """Sizes of the built-in toy's transformer."""
    sizes = load_yaml(CONFIG_DIR / "tiny.yaml")["hunyuan"]["transformer"]
    return {name: task.transformer[name] if name == "in_channels" else sizes[name] for name in task.transformer}


def write_tiny(root: Path, task: TaskSpec) -> None:
    """Write the built-in toy checkpoint of a task to an empty folder, HunyuanVideo's parts in it too."""
    from skyreels_v3.hunyuan.tiny import write

    write(root, task)
