"""SkyReels V1's transformer against diffusers' own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.components import compile_blocks
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.memory.quantize import QuantizedLinear, quantize
from skyreels_v3.memory.stream import BlockStream

SMALL = {
    **{"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 3},
    **{"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": (4, 6, 6)},
}
TEXT, PADDING = 5, 4
CPU = torch.device("cpu")
MATRICES = (  # the matrices of both kinds of block, listed by hand
    {
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
    },
    {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"},
)


def made(kind: type[HunyuanVideoTransformer3DModel], **changes: object) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    model = kind(**(SMALL | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():  # freshly initialized norms and biases have no effect
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if isinstance(model, HunyuanTransformer3DModel):
        model.set_attention(sdpa)
    return model


def inputs(channels: int = 16, text: int = TEXT, padding: int = 0) -> dict[str, Tensor]:
    """Arguments of a forward; padding does not change the text's real tokens."""
    draw = torch.Generator().manual_seed(1)
    latents, states = torch.randn(1, channels, 3, 4, 6, generator=draw), torch.randn(1, 64, 24, generator=draw)
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": states[:, : text + padding],
        "encoder_attention_mask": (torch.arange(text + padding) < text).long()[None],
        "pooled_projections": torch.randn(1, 12, generator=draw),
        "guidance": torch.tensor([6000.0]),
    }


def predict(model: HunyuanVideoTransformer3DModel, arguments: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("channels", [16, 32])
def test_the_forward_is_the_librarys(channels):
    ours, theirs = (
        made(HunyuanTransformer3DModel, in_channels=channels),
        made(HunyuanVideoTransformer3DModel, in_channels=channels),
    )
    out = predict(ours, inputs(channels))
    assert out.shape == (1, 16, 3, 4, 6) and out.std() > 0.1
    torch.testing.assert_close(out, predict(theirs, inputs(channels)), atol=1e-6, rtol=0)
    padded = predict(theirs, inputs(channels, padding=PADDING))
    torch.testing.assert_close(out, padded, atol=1e-5, rtol=0)


def test_attention_is_set_from_outside():
    """All blocks call it, in order, with the whole sequence."""
    model = made(HunyuanTransformer3DModel)
    order, seen = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda block, *_: order.append(block))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query.shape, key.shape, value.shape))
        return sdpa(query, key, value)

    model.set_attention(attention)
    predict(model, inputs())
    assert seen == [((1, 3 * 2 * 3 + TEXT, 4, 16),) * 3] * 5
    assert order == model.blocks


def test_either_class_loads_what_the_other_saves(tmp_path):
    ours, theirs = made(HunyuanTransformer3DModel), made(HunyuanVideoTransformer3DModel)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1]
    assert configs[0]["_class_name"] == "HunyuanVideoTransformer3DModel"
    for kind, name in ((HunyuanVideoTransformer3DModel, "ours"), (HunyuanTransformer3DModel, "theirs")):
        model = kind.from_pretrained(tmp_path / name).eval()
        assert type(model) is kind
        if isinstance(model, HunyuanTransformer3DModel):
            model.set_attention(sdpa)
        torch.testing.assert_close(predict(model, inputs()), predict(ours, inputs()), atol=1e-6, rtol=0)


def test_what_is_quantized():
    """Attention and feed-forward layers are quantized; modulation, embeddings and the head are not."""
    model = made(HunyuanTransformer3DModel)
    linear = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    quantize(model.blocks, CPU)
    names = {f"transformer_blocks.{index}.{name}" for index in range(2) for name in MATRICES[0]}
    names |= {f"single_transformer_blocks.{index}.{name}" for index in range(3) for name in MATRICES[1]}
    assert {name for name, part in model.named_modules() if type(part) is QuantizedLinear} == names
    left = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    assert left == linear - names
    assert {"transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1_context.linear"} < left
    assert "single_transformer_blocks.2.norm.linear" in left


def plain_fp8() -> Tensor:
    """The FP8 prediction of a model that is not compiled."""
    model = made(HunyuanTransformer3DModel)
    quantize(model.blocks, CPU)
    return predict(model, inputs())


@pytest.fixture
def traced_only(monkeypatch) -> Iterator[None]:
    """Trace graphs but run them eagerly: the number of graphs does not depend on the backend."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_and_streamed(traced_only):
    """One graph per kind of block, and none for further steps or for weights that move."""
    model = made(HunyuanTransformer3DModel)
    expected = predict(model, inputs())
    compile_blocks(model)
    for kinds in (2, 4):
        for mode in (torch.inference_mode, contextlib.nullcontext):
            with mode():
                torch.testing.assert_close(predict(model, inputs()), expected, atol=1e-5, rtol=0)
                for resident, pin in ((0, None), (1, lambda room: True)):
                    with BlockStream(model, model.blocks, CPU, resident, pin).active():
                        torch.testing.assert_close(predict(model, inputs()), expected, atol=1e-5, rtol=0)
        assert counters["stats"]["unique_graphs"] == kinds
        quantize(model.blocks, CPU)
        expected = plain_fp8()


@pytest.mark.slow
def test_compiled_for_prompts_of_any_length(traced_only):
    """The second length compiles a graph that serves all later ones."""
    model, plain = made(HunyuanTransformer3DModel), made(HunyuanTransformer3DModel)
    compile_blocks(model)
    for text in (5, 9, 17, 33):
        torch.testing.assert_close(
            predict(model, inputs(text=text)), predict(plain, inputs(text=text)), atol=1e-5, rtol=0
        )
    assert counters["stats"]["unique_graphs"] == 4
