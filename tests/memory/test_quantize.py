"""FP8 weights against a search over all float8 numbers in float64 and matmuls with the dequantized weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from skyreels_v3.memory import quantize as module
from skyreels_v3.memory.quantize import (
    FP8,
    SCALE,
    QuantizedLinear,
    cache_dequantized,
    quantize,
    quantized,
    round_rows,
)
from skyreels_v3.wan import transformer as block_module
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

CPU = torch.device("cpu")
SMALLEST_NORMAL = 2.0**-126
AVATAR = {
    **{"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64},
    **{"num_layers": 2, "image_dim": 8, "audio_dim": 16, "audio_hidden_dim": 4, "audio_tokens": 3},
}
MATRICES = {  # the matrices of one of the avatar's blocks, listed by hand
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj", "attn2.to_out.0"),
    *("attn_audio.to_q", "attn_audio.to_k", "attn_audio.to_v", "attn_audio.to_out.0"),
}


def float8_numbers() -> np.ndarray:
    """All finite e4m3 numbers, by the format's definition: bias 7, 3 mantissa bits, no infinity."""
    positive = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    positive += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    positive.pop()  # that code is NaN
    return np.array([*(-number for number in positive[:0:-1]), *positive])


def dequantized(layer: QuantizedLinear) -> torch.Tensor:
    return layer.weight.double() * layer.weight_scale.double()[:, None]


def random_layer(out: int = 48, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, out, bias=bias).to(dtype)


def odd_rows() -> torch.Tensor:
    """Ordinary, zero, huge and tiny rows, one with a spike, and rows at and just above float8's largest number."""
    torch.manual_seed(0)
    ordinary = torch.randn(8, 200) * torch.tensor([1e-6, 0.02, 0.02, 1.0, 3.0, 448.0, 1e4, 1e20])[:, None]
    spike = torch.randn(200) * 1e-3
    spike[7] = -100.0
    over = 448.0 * 2**10 * torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24])
    huge, tiny, denormal = torch.full((200,), 3e38), torch.randn(200) * 1e-30, torch.linspace(-1e-39, 1e-39, 200)
    at = [torch.linspace(-float(edge), float(edge), 200) for edge in over]
    return torch.stack((*ordinary, torch.zeros(200), huge, -huge, tiny, denormal, spike, *at))


def test_the_numbers_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    assert np.array_equal(np.unique(codes[codes.isfinite()].numpy()), float8_numbers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest_times_the_smallest_power_of_two(dtype):
    rows = odd_rows().to(dtype)
    weight, scale = round_rows(rows)
    assert weight.dtype == FP8 and scale.dtype == torch.float32
    numbers = float8_numbers()
    for row, rounded, factor in zip(rows.double().numpy(), weight.double().numpy(), scale.tolist(), strict=True):
        least = np.abs(numbers[:, None] - row / factor).min(axis=0)
        assert np.array_equal(np.abs(rounded - row / factor), least)
        largest = np.abs(row).max()
        assert math.frexp(factor)[0] == 0.5 and factor >= SMALLEST_NORMAL
        assert largest <= 448 * factor
        assert largest == 0 or largest > 448 * factor / 2 or factor == SMALLEST_NORMAL


def test_not_a_number_is_not_hidden():
    weight, scale = round_rows(torch.tensor([[1.0, math.nan], [1.0, math.inf]]))
    assert not (weight.float() * scale[:, None]).isfinite().all(dim=1).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_forward(dtype, tolerance, bias):
    layer = random_layer(dtype=dtype, bias=bias)
    made = quantized(layer, CPU, dynamic=False)
    x = torch.randn(2, 5, 64).to(dtype)
    exact = F.linear(x.double(), dequantized(made), layer.bias.double() if bias else None)
    assert made(x).dtype == dtype
    torch.testing.assert_close(made(x).double(), exact, atol=tolerance, rtol=tolerance)
    assert (dequantized(made) - layer.weight.double()).abs().max() > 0.1 * 2**-4 * layer.weight.abs().max()  # rounded


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "3-D": lambda x: x,
    "4-D": lambda x: x.unflatten(1, (2, 5)),
    "transposed": lambda x: x.transpose(0, 1),
    "columns first, 2-D": lambda x: x[0].t().contiguous().t(),
    "a slice": lambda x: x[:, 2:7],
    "every other": lambda x: torch.cat((x, x), dim=-1)[..., ::2],
    "no tokens": lambda x: x[:, :0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic(layout, dtype):
    """Against the same rounding in float64 for tokens (..., 64) of widely different sizes, some zero; and, within 4
    significant bits of each factor, against the layer itself."""
    layer = random_layer(dtype=dtype)
    made = quantized(layer, CPU, dynamic=True)
    torch.manual_seed(1)
    x = (torch.randn(3, 10, 64) * 10.0 ** torch.randint(-6, 6, (3, 10, 1))).to(dtype)
    x[1, 4:7] = 0
    x = LAYOUTS[layout](x)
    out = made(x)
    assert out.dtype == dtype and out.shape == (*x.shape[:-1], 48)
    scale = (x.double().abs().amax(dim=-1, keepdim=True) / 448).clamp(min=SMALLEST_NORMAL)
    rounded = (x.float() / scale.float()).to(FP8).double() * scale
    emulated = F.linear(rounded, dequantized(made), layer.bias.bfloat16().double())
    float32_sums = 64 * 2**-24 * F.linear(rounded.abs(), dequantized(made).abs(), layer.bias.double().abs())
    assert ((out.double() - emulated).abs() <= 2**-8 * emulated.abs() + float32_sums).all()  # the output is bfloat16
    if x.numel():
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0 < error < 0.05  # at most two roundings to 4 significant bits, 2 ** -4 / sqrt(3) each
    assert torch.equal(
        out[(x == 0).all(dim=-1)], layer.bias.bfloat16().to(dtype).expand((x == 0).all(dim=-1).sum(), -1)
    )


def layers_of(model: nn.Module, kind: type) -> set[str]:
    return {name for name, part in model.named_modules() if type(part) is kind}


def test_what_is_quantized_in_the_transformer():
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**AVATAR).eval()
    linear = layers_of(model, nn.Linear)
    names = {f"blocks.{index}.{name}" for index in range(2) for name in MATRICES}
    before = dict(model.named_parameters())
    weights = {name: (parameter, parameter.clone()) for name, parameter in before.items()}
    quantize(model.blocks, CPU)
    assert layers_of(model, QuantizedLinear) == names
    assert layers_of(model, nn.Linear) == linear - names
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == {f"{name}.{SCALE}" for name in names}
    assert before.keys() <= after.keys()
    for name, (parameter, value) in weights.items():
        assert torch.equal(parameter, value)  # the originals are untouched for other owners
        assert (after[name] is parameter) == (name.removesuffix(".weight") not in names)  # biases are shared


@torch.inference_mode()
def test_the_text_encoder():
    config = UMT5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = UMT5EncoderModel(config).eval()
    ids = torch.arange(20)[None]
    exact = model(ids).last_hidden_state
    quantize(model.bfloat16().encoder.block, CPU)
    parts = [*(f"0.SelfAttention.{name}" for name in "qkvo"), "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"]
    assert layers_of(model, QuantizedLinear) == {f"encoder.block.{i}.layer.{name}" for i in range(2) for name in parts}
    assert layers_of(model, nn.Linear) == {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)}
    out = model(ids).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert 0 < (out - exact).square().mean() < 0.1**2 * exact.square().mean()


@torch.inference_mode()
def test_the_model_stays_close():
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**AVATAR).eval()
    context = (torch.randn(1, 512, 16), torch.randn(1, 257, 8), torch.randn(1, 1, 5, 5, 12, 768))
    segments, timestep = [Segment(torch.randn(1, 16, 2, 4, 6))], torch.tensor([500])
    exact = model(segments, timestep, *context)[0]
    for dynamic in (False, True):
        quantize(model.blocks, CPU, dynamic=dynamic)
        out = model(segments, timestep, *context)[0]
        assert 0 < (out - exact).abs().mean() < 0.05 * exact.std()


@pytest.fixture
def pieces(monkeypatch) -> tuple[SkyReelsTransformer3DModel, Callable[[], torch.Tensor]]:
    """A model whose blocks process their tokens in 3 pieces, and a function that runs it."""
    monkeypatch.setattr(block_module, "TOKENS_AT_ONCE", 8)
    torch.manual_seed(0)
    sizes = AVATAR | {"attention_head_dim": 32, "audio_dim": None, "image_dim": None}
    model = SkyReelsTransformer3DModel(**sizes).eval()
    segments, text = [Segment(torch.randn(1, 16, 4, 4, 6))], torch.randn(1, 512, 16)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(segments, torch.tensor([500]), text)[0]

    return model, forward


def counted(monkeypatch, owner: object, name: str) -> list[torch.Tensor]:
    """Record the first argument of each call to a function or method from now on."""
    calls, plain = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda first, *others: calls.append(first) or plain(first, *others))
    return calls


def test_each_input_is_rounded_once(monkeypatch, pieces):
    """Per piece, six: that of queries, keys and values is one; attention's output; attention to the text has two; and
    both feed-forward inputs. The text is rounded once for all blocks."""
    model, forward = pieces
    quantize(model.blocks, CPU, dynamic=True)
    calls = counted(monkeypatch, module, "round_tokens")
    out = forward()
    assert len(calls) == 2 * 3 * 6 + 1
    monkeypatch.setattr(module, "rounded_once", module.round_tokens)
    assert torch.equal(forward(), out)
    assert len(calls) == 2 * 3 * 6 + 1 + 2 * (3 * 8 + 2)
    calls.clear()
    assert not module._ROUNDED  # a rounded input does not outlive the input


def test_an_input_that_has_changed_is_rounded_again():
    layer, x = quantized(random_layer(), CPU, dynamic=True), torch.randn(3, 64)
    before = layer(x)
    x.mul_(2)
    assert torch.equal(layer(x), layer(x.clone())) and not torch.equal(layer(x), before)


def test_weights_are_dequantized_once_a_block(monkeypatch, pieces):
    model, forward = pieces
    quantize(model.blocks, CPU)
    out = forward()
    calls = counted(monkeypatch, QuantizedLinear, "dequantized")
    forward()
    assert len(calls) == 2 * (3 * 8 + 2)
    cache_dequantized(model.blocks)
    for _ in range(2):
        calls.clear()
        assert torch.equal(forward(), out)
        assert len(calls) == len({id(layer) for layer in calls}) == 2 * 10
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    model.blocks[1].ffn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward()
    assert all(layer.cached is None for layer in layers)


def test_what_is_quantized_stays_so():
    """The layer b has sizes that are not multiples of 16, which FP8 units do not support."""
    block = nn.ModuleDict({"a": random_layer(), "b": random_layer(out=40)})
    quantize([block], CPU, dynamic=True)
    assert type(block["a"]) is QuantizedLinear and type(block["b"]) is nn.Linear
    quantize([block], CPU)
    layers = {name: (layer, layer.weight, layer.weight_scale) for name, layer in block.items()}
    for dynamic in (True, False):
        quantize([block], CPU, dynamic=dynamic)
        for name, (layer, weight, scale) in layers.items():
            assert block[name] is layer and layer.weight is weight and layer.weight_scale is scale
            assert layer.dynamic == (dynamic and name == "a")
