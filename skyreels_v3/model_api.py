"""The two transformers: V3's and V1's. What is done to either from outside takes this type.

Both have `blocks`, in the order in which they work, `set_attention`, and `compilable`.
"""

from __future__ import annotations

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

Transformer = SkyReelsTransformer3DModel | HunyuanTransformer3DModel
