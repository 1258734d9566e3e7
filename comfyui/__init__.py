"""ComfyUI nodes for the SkyReels video models, in the V3 schema. See docs/comfyui.md for installation."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

if find_spec("skyreels_v3") is None:  # not installed: this folder is linked from a clone
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from . import nodes

WEB_DIRECTORY = "./web"


class SkyReels(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*nodes.NODES]


async def comfy_entrypoint() -> SkyReels:
    """ComfyUI's entry point."""
    return SkyReels()
