"""The transformer with gradients: the same predictions, and gradients that finite differences agree with."""

from __future__ import annotations

import pytest
import torch

from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip
AVATAR = {"image_dim": 16, "audio_features": 12, "audio_hidden_dim": 8, "audio_tokens": 2, "audio_dim": 8}


@pytest.mark.parametrize("sizes", [{}, AVATAR], ids=["plain", "avatar"])
def test_gradients(sizes):
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**SMALL, **sizes)
    segments = [Segment(torch.randn(1, 16, 2, 4, 4)), Segment(torch.randn(1, 16, 1, 4, 4), 1024, clean=True)]
    conditions = [torch.randn(1, 512, 16)]
    if sizes:
        segments = [Segment(torch.randn(1, 16, 3, 4, 4))]
        conditions += [torch.randn(1, 257, 16), torch.randn(1, 1, 9, 5, 3, 4)]
    timestep = torch.tensor([500.0])

    def loss() -> torch.Tensor:
        return sum(part.square().sum() for part in model(segments, timestep, *conditions))

    with torch.no_grad():
        expected = loss()
    made = loss()
    torch.testing.assert_close(made, expected)
    made.backward()
    step = 1e-3
    for weight in (model.blocks[0].ffn.net[0].proj.weight, model.blocks[1].attn2.to_v.weight, model.proj_out.weight):
        direction = weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight.add_(step * direction)
            above = loss()
            weight.sub_(2 * step * direction)
            below = loss()
            weight.add_(step * direction)
        torch.testing.assert_close((above - below) / (2 * step), weight.grad.norm(), rtol=1e-2, atol=0)
