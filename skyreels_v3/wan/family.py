"""The V3 family: what the rest of the toolkit asks of it, see `skyreels_v3.families.Family`.

Two layouts are published. `diffusers` (reference to video) has a folder for each component, with its sizes in a
config.json. `native` (extension and avatar) has the transformer under Wan's own names, and .pth files for the others,
whose sizes only their tensors tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.families import TextEncoderSizes
from skyreels_v3.tasks import CONFIG_DIR, TaskSpec, load_yaml
from skyreels_v3.wan.key_maps import (
    AUDIO_ENCODER,
    NATIVE_IMAGE_ENCODER_FILE,
    NATIVE_TEXT_ENCODER_FILE,
    NATIVE_TOKENIZER,
    NATIVE_VAE_FILE,
    config_sizes,
)
from skyreels_v3.wan.sizes import (
    AUDIO_ENCODER_PARAMETERS,
    IMAGE_ENCODER_PARAMETERS,
    UMT5,
    VAE_PARAMETERS,
    WanSizes,
    vae_bytes,
)

if TYPE_CHECKING:
    import torch

    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

__all__ = ["vae_bytes"]  # as it is


def repositories(task: TaskSpec) -> tuple[Repository, ...]:
    """One, with everything in it."""
    components = {"transformer": (task.transformer_folder,), "VAE": ("vae",), "text encoder": ("text_encoder",)}
    if task.layout == "native":
        components |= {"VAE": (NATIVE_VAE_FILE,), "text encoder": (NATIVE_TEXT_ENCODER_FILE,)}
    if "input_audio" in task.inputs:
        components |= {"image encoder": (NATIVE_IMAGE_ENCODER_FILE,), "audio encoder": (AUDIO_ENCODER,)}
    tokenizer = NATIVE_TOKENIZER if task.layout == "native" else "tokenizer"
    return (Repository("--model_id", f"{task.name} checkpoint", task.model_id, components, (tokenizer,)),)


def transformer_sizes(checkpoint: Path, task: TaskSpec) -> dict[str, int]:
    """The sizes in the transformer's config.json, by the names of the model's arguments."""
    return config_sizes(checkpoint / task.transformer_folder, task.transformer)


def sizes(values: dict[str, int]) -> WanSizes:
    """What a transformer of these sizes computes and needs."""
    return WanSizes(**values)


def text_encoder() -> TextEncoderSizes:
    """UMT5-XXL."""
    return UMT5


def component_parameters(task: TaskSpec) -> dict[str, int]:
    """Parameters of the published components besides the transformer."""
    parameters = {"text encoder": UMT5.parameters, "VAE": VAE_PARAMETERS}
    if "input_audio" in task.inputs:
        parameters |= {"image encoder": IMAGE_ENCODER_PARAMETERS, "audio encoder": AUDIO_ENCODER_PARAMETERS}
    return parameters


def check_configs(task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
    """Raise UserError for configs that cannot work."""
    if checkpoint is not None:
        transformer_sizes(checkpoint, task)


def build_transformer(sizes: dict[str, Any]) -> SkyReelsTransformer3DModel:
    """The transformer of these sizes, without weights worth having."""
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

    return SkyReelsTransformer3DModel(**sizes)


def divide_tokens(transformer: SkyReelsTransformer3DModel, group: Group, usp: UspFn) -> None:
    """Have the ranks of `group` divide the tokens of every forward."""
    from skyreels_v3.wan.sequence_parallel import SequenceParallel

    SequenceParallel(group, usp).attach(transformer)


def loaders(
    task: TaskSpec, checkpoint: Path, base: Path, dtype: torch.dtype, vae_dtype: torch.dtype, values: bool = True
) -> dict[str, Callable[[], Any]]:
    """What loads each component."""
    import torch

    from skyreels_v3.wan import checkpoint as load

    folder = checkpoint
    made: dict[str, Callable[[], Any]] = {
        "vae": lambda: load.load_vae(folder, vae_dtype, values),
        "transformer": lambda: load.load_transformer(folder / task.transformer_folder, dtype, values),
        "text_encoder": lambda: load.load_text_encoder(folder, dtype, values),
    }
    if "input_audio" in task.inputs:
        made["image_encoder"] = lambda: load.load_image_encoder(folder, dtype, values)
        made["audio_encoder"] = lambda: load.load_audio_encoder(folder, torch.float32, values)
    return made


def tiny_sizes(task: TaskSpec) -> dict[str, int]:
    """Sizes of the built-in toy's transformer."""
    tiny = load_yaml(CONFIG_DIR / "tiny.yaml")
    return tiny["transformer"] | (tiny["avatar_transformer"] if "input_audio" in task.inputs else {})


def write_tiny(root: Path, task: TaskSpec) -> None:
    """Write the built-in toy checkpoint of a task to an empty folder."""
    from skyreels_v3.wan.tiny import write

    write(root, task, tiny_sizes(task))
