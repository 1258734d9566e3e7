"""The plan of SkyReels V1's transformer, against the real modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.hunyuan import sizes as hunyuan_sizes
from skyreels_v3.hunyuan.sizes import HunyuanSizes
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.memory.stream import STREAM_SLOTS, BlockStream
from skyreels_v3.parallel.ranks import ParallelConfig
from tests.test_plan import LiveBytes, bytes_of

PUBLISHED = HunyuanSizes()
SMALL = HunyuanSizes(
    num_attention_heads=3, attention_head_dim=32, num_layers=2, num_single_layers=5, num_refiner_layers=1,
    mlp_ratio=2.7, text_embed_dim=40, pooled_projection_dim=24, in_channels=32, out_channels=8, guidance_embeds=False,
)  # fmt: skip


def model_of(sizes: HunyuanSizes, dtype: str = "float32", device: str = "meta") -> HunyuanTransformer3DModel:
    axes = (sizes.attention_head_dim - 8, 4, 4)
    with torch.device(device):
        model = HunyuanTransformer3DModel(**vars(sizes), rope_axes_dim=axes).eval().requires_grad_(False)
    model.set_attention(sdpa)
    return nn.Module.to(model, getattr(torch, dtype))


def predict(model: HunyuanTransformer3DModel, frames: int, height: int, width: int, text: int) -> Tensor:
    sizes, like = model.config, model.proj_out.weight
    with torch.inference_mode():
        return model(
            hidden_states=like.new_zeros(1, sizes.in_channels, frames, height, width),
            timestep=like.new_zeros(1),
            encoder_hidden_states=like.new_zeros(1, text, sizes.text_embed_dim),
            encoder_attention_mask=torch.ones(1, text, dtype=torch.long, device=like.device),
            pooled_projections=like.new_zeros(1, sizes.pooled_projection_dim),
            guidance=like.new_zeros(1),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("sizes", [PUBLISHED, replace(PUBLISHED, in_channels=32), SMALL])
def test_parameters(sizes):
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(**vars(sizes))
    assert sizes.parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_the_published_sizes_are_the_librarys():
    """12.8 billion parameters, as HunyuanVideo's are counted."""
    with torch.device("meta"):
        config = HunyuanVideoTransformer3DModel().config
    assert vars(PUBLISHED) == {name: config[name] for name in vars(PUBLISHED)}
    assert PUBLISHED.parameters() == pytest.approx(12.82e9, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [PUBLISHED, SMALL])
def test_bytes(sizes, dtype):
    """To the byte: whole, in FP8, and while blocks are streamed."""
    model = model_of(sizes, dtype)
    for quantized in (False, True):
        if quantized:
            quantize(model.blocks, torch.device("meta"))
        whole, each = bytes_of(model), [bytes_of(block) for block in model.blocks]
        assert sizes.blocks == len(each)
        assert sizes.weight_bytes(dtype, quantized) == whole
        assert sizes.block_bytes(dtype, quantized) == sum(each) // len(each)
        for keep in (0, 1, 4, 58, 59, 60, 99):
            streamed = [
                bytes_of(block) for block in BlockStream(model, model.blocks, torch.device("cpu"), keep).streamed
            ]
            room = min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)
            assert sizes.streamed_bytes(dtype, quantized, keep) == whole - sum(streamed) + room


def test_work_of_a_forward():
    """torch's own counter sees the embeddings, the modulation and the head as well, which are left out of the plan."""
    sizes = replace(SMALL, num_refiner_layers=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predict(model_of(sizes, device="cpu"), 4, 24, 32, 20)
    assert sizes.forward_flop(4 * 12 * 16, 20) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("frames", "height", "width"), [(25, 68, 120), (25, 90, 160), (97, 68, 120), (7, 48, 80)])
def test_activations_of_a_forward(frames, height, width, dtype):
    """At the official sizes, without numbers."""
    model = model_of(replace(PUBLISHED, num_layers=2, num_single_layers=2), dtype)
    with LiveBytes() as counter:
        predict(model, frames, height, width, hunyuan_sizes.TEXT_TOKENS)
    planned = PUBLISHED.activation_bytes(frames * height * width // 4, dtype)
    assert planned == pytest.approx(counter.peak, rel=0.05)
    assert PUBLISHED.context_bytes(frames, 0, dtype) == 0


def test_activations_of_one_of_several_processes():
    """More than its share, for what is exchanged; a ring needs all keys and values of some heads besides."""
    alone = PUBLISHED.activation_bytes(50_000, "bfloat16")
    for degrees in (ParallelConfig(1, 1, 2), ParallelConfig(2, 1, 8), ParallelConfig(1, 2, 4)):
        made = PUBLISHED.activation_bytes(50_000, "bfloat16", degrees)
        assert alone / degrees.sequence <= made < 1.5 * alone / degrees.sequence
    one = PUBLISHED.activation_bytes(50_000, "bfloat16", ParallelConfig(1, 1, 8))
    assert PUBLISHED.activation_bytes(50_000, "bfloat16", ParallelConfig(1, 4, 2)) > one
