"""Inference for the SkyReels video models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skyreels_v3.version import __version__

if TYPE_CHECKING:
    from skyreels_v3.api import Done, Frame, load
    from skyreels_v3.errors import UserError
    from skyreels_v3.stages import Step
    from skyreels_v3.wan.rope import Segment
    from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

__all__ = ["Done", "Frame", "Segment", "SkyReelsTransformer3DModel", "Step", "UserError", "__version__", "load"]

_MODULES = {"Segment": "skyreels_v3.wan.rope", "SkyReelsTransformer3DModel": "skyreels_v3.wan.transformer"}
_MODULES |= dict.fromkeys(("Done", "Frame", "Step", "load"), "skyreels_v3.api") | {"UserError": "skyreels_v3.errors"}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that the command line works without importing torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
