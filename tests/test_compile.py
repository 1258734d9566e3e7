"""Compiled blocks: the same results, and one set of graphs for any number of blocks."""

from __future__ import annotations

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from skyreels_v3.components import compile_blocks
from skyreels_v3.memory.quantize import Packed, QuantizedLinear, quantize
from skyreels_v3.memory.stream import BlockStream
from skyreels_v3.runtime import missing_to_compile
from skyreels_v3.wan import transformer as wan_transformer
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_to_compile("cpu")), reason="no C++ compiler"),
]

CPU = torch.device("cpu")
SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of compiled code for all tests, as a user has for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_compiler(cache, monkeypatch):
    """Discard what earlier tests compiled, and restore the compiler's settings."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit, suppress_errors=config.suppress_errors):
        yield
    torch._dynamo.reset()


def transformer(layers: int) -> SkyReelsTransformer3DModel:
    torch.manual_seed(0)
    return SkyReelsTransformer3DModel(**SMALL, num_layers=layers).eval().requires_grad_(False)


@torch.inference_mode()
def run(model: SkyReelsTransformer3DModel) -> torch.Tensor:
    """Two steps with a timestep per frame, with one clean frame."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 4, 6, generator=draw)
    context = torch.randn(1, 512, 16, generator=draw)
    segments = [Segment(latents[:, :, :1], clean=True), Segment(latents[:, :, 1:], 1)]
    steps = (torch.tensor([[0, time, time]]) for time in (900, 40))
    return torch.cat([part for timestep in steps for part in model(segments, timestep, context)], dim=2)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_the_same_results_and_no_more_graphs_for_more_blocks(cache):
    made = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        model = transformer(layers)
        expected = run(model)
        assert graphs() == 0
        compile_blocks(model)
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
        made.append(graphs())
    assert made == [2, 2]  # before and after attention
    assert any((cache / "compiled").iterdir())


def test_streamed(cache):
    """Blocks whose weights move between buffers; also in FP8, where weights have another type."""
    model = transformer(4)
    compile_blocks(model)
    for kinds in (1, 2):
        expected = run(model)
        for resident, pin in ((0, None), (1, lambda room: True)):
            for mode in (torch.inference_mode, contextlib.nullcontext):
                with mode(), BlockStream(model, model.blocks, CPU, resident, pin).active():
                    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
        assert graphs() == 2 * kinds  # not one per block or buffer
        quantize(model.blocks, CPU)


def test_a_few_tokens_at_a_time(cache, monkeypatch):
    """After pieces of two sizes, further sizes need no new graphs."""
    monkeypatch.setattr(wan_transformer, "TOKENS_AT_ONCE", 12)
    model = transformer(3)
    expected = run(model)
    compile_blocks(model)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    assert graphs() <= 4


def test_weights_of_gguf_files(cache):
    """Compiled blocks dequantize what is stored; streamed, too."""
    gguf = pytest.importorskip("gguf")
    model = transformer(2)
    for block in model.blocks:
        for path, layer in [*block.named_modules()]:
            if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0:
                stored = gguf.quants.quantize(layer.weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
                packed = Packed(torch.from_numpy(stored.view(np.uint8)), tuple(layer.weight.shape), kind="Q4_0")
                block.set_submodule(path, QuantizedLinear(packed, layer.bias))
    assert sum(isinstance(part, QuantizedLinear) for part in model.modules()) >= 2
    expected = run(model)
    compile_blocks(model)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    with BlockStream(model, model.blocks, CPU).active():
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("or_eager", [True, False])
def test_a_compiler_that_fails(monkeypatch, caplog, or_eager):
    def broken(graph, inputs):
        raise RuntimeError("a broken compiler")

    model = transformer(2)
    expected = run(model)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    compile_blocks(model, or_eager)
    if or_eager:
        assert torch.equal(run(model), expected)
        assert "a broken compiler" in caplog.text
    else:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a broken compiler"):
            run(model)


def test_nothing_is_compiled_for_a_short_run(cache):
    """Of a server whose transformer is set up for runs of any length."""
    model = transformer(2)
    expected = run(model)
    compile_blocks(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(run(model), expected)
    assert graphs() == 0
