"""Small random networks and their files: what the writers of the built-in toy model share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.tasks import CONFIG_DIR, load_yaml

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = load_yaml(CONFIG_DIR / "tiny.yaml")


def toy(build: Callable[[], nn.Module]) -> Any:
    """A network with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SIZES["seed"])
        return build()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, tied ones once."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=list) + "\n", encoding="utf-8")
