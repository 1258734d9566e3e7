"""The tables of names and shapes against the models that they are of."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from skyreels_v3.checkpoints.shapes import hunyuan_shapes, wan_shapes
from skyreels_v3.hunyuan.sizes import HunyuanSizes
from skyreels_v3.plan import Sizes
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

WAN = {
    **{"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 2, "ffn_dim": 7, "text_dim": 8, "freq_dim": 10},
    **{"in_channels": 9, "out_channels": 5},
}
AUDIO = {"audio_dim": 13, "audio_features": 6, "audio_hidden_dim": 11, "audio_tokens": 3, "audio_window": 7}
HUNYUAN = {
    **{"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "num_single_layers": 2},
    **{"num_refiner_layers": 2, "text_embed_dim": 7, "pooled_projection_dim": 9, "in_channels": 5, "out_channels": 3},
}


@pytest.mark.parametrize("more", [{}, {"image_dim": 8}, AUDIO, AUDIO | {"image_dim": 8}], ids=str)
def test_v3(more):
    with torch.device("meta"):
        model = SkyReelsTransformer3DModel(**WAN, **more)
    assert wan_shapes(Sizes(**WAN, **more)) == {name: tuple(w.shape) for name, w in model.named_parameters()}


@pytest.mark.parametrize("more", [{}, {"guidance_embeds": False, "mlp_ratio": 2.5}], ids=str)
def test_v1(more):
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(**HUNYUAN, **more, rope_axes_dim=(2, 2, 2))
    assert hunyuan_shapes(HunyuanSizes(**HUNYUAN, **more)) == {n: tuple(w.shape) for n, w in model.named_parameters()}
