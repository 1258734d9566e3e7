"""The SkyReels diffusion transformer (DiT): one class for the reference, extension and avatar checkpoints."""

import skyreels_v3.vector_kernels  # noqa: F401  first of all
from skyreels_v3.wan.transformer.model import SkyReelsTransformer3DModel
from skyreels_v3.wan.transformer.rope import Segment

__all__ = ["Segment", "SkyReelsTransformer3DModel"]
