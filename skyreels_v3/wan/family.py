"""The V3 family: what the rest of the toolkit asks of it, see `skyreels_v3.families.Family`.

Two layouts are published. `diffusers` (reference to video) has a folder for each component, with its sizes in a
config.json. `native` (extension and avatar) has the transformer under Wan's own names, and .pth files for the others,
whose sizes only their tensors tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyreels_v3.checkpoints.files import Repository, read_sizes
from skyreels_v3.errors import CheckpointError
from skyreels_v3.families import TextEncoderSizes
from skyreels_v3.tasks import CONFIG_DIR, TaskSpec, load_yaml
from skyreels_v3.wan.key_maps import NATIVE_SIZES
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

    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

__all__ = ["vae_bytes"]  # as it is

NATIVE_VAE = "Wan2.1_VAE.pth"
NATIVE_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
AUDIO_ENCODER = "chinese-wav2vec2-base"


def repositories(task: TaskSpec) -> tuple[Repository, ...]:
    """One, with everything in it."""
    components = {"transformer": (task.transformer_folder,), "VAE": ("vae",), "text encoder": ("text_encoder",)}
    if task.layout == "native":
        components |= {"VAE": (NATIVE_VAE,), "text encoder": (NATIVE_TEXT_ENCODER,)}
    if "input_audio" in task.inputs:
        components |= {"image encoder": (NATIVE_IMAGE_ENCODER,), "audio encoder": (AUDIO_ENCODER,)}
    tokenizer = NATIVE_TOKENIZER if task.layout == "native" else "tokenizer"
    return (Repository("--model_id", f"{task.name} checkpoint", task.model_id, components, (tokenizer,)),)


def transformer_sizes(checkpoint: Path, task: TaskSpec) -> dict[str, int]:
    """The sizes in the transformer's config.json, by the names of the model's arguments."""
    return config_sizes(checkpoint / task.transformer_folder, task.transformer)


def config_sizes(folder: Path, names: Collection[str] = ()) -> dict[str, int]:
    """The sizes in a config.json that are in `names` or Wan-native, by the names of the model's arguments."""
    sizes = {NATIVE_SIZES.get(name, name): size for name, size in read_sizes(folder, {*names, *NATIVE_SIZES}).items()}
    if "dim" in sizes:
        if "num_attention_heads" not in sizes:
            raise CheckpointError(f"{folder}/config.json lacks num_heads; download it again")
        sizes["attention_head_dim"] = sizes.pop("dim") // sizes["num_attention_heads"]
    return sizes


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

    write(root, task)
