"""The SkyReels diffusion transformer (DiT): one class for the reference, extension and avatar checkpoints."""

from skyreels_v3.wan.transformer.model import SkyReelsTransformer3DModel
from skyreels_v3.wan.transformer.rope import Segment

__all__ = ["Segment", "SkyReelsTransformer3DModel"]
