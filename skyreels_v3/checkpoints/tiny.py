"""The built-in toy models: small random checkpoints in the published layouts, for demos and tests.

Made once, in seconds, into the user's cache folder. They go through the same files, key maps and loaders as the
published ones, so what works with them is the toolkit; what they paint is noise.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skyreels_v3.cache import cache_folder
from skyreels_v3.media.files import follow_umask
from skyreels_v3.tasks import CONFIG_DIR, load_yaml

VERSION = 2  # a new number where the files change, so that an older cache is not taken for them
SIZES = load_yaml(CONFIG_DIR / "tiny.yaml")


def make(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of a toy in the cache; `write` fills an empty one if it is not there yet."""
    folder = cache_folder() / f"tiny-{VERSION}" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        write(temporary)
        follow_umask(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run has made it meanwhile: the same files
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def random_model(build: Callable[[], nn.Module]) -> Any:
    """A network with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SIZES["seed"])
        return build()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, tied ones once."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def save(model: Any, folder: Path) -> None:
    """Write one of transformers' models to a new folder; its own method would show a progress bar."""
    model.config.save_pretrained(folder)
    save_file(weights(model), folder / "model.safetensors", metadata={"format": "pt"})
