"""What diffusers does to models, applied to ours and to `WanTransformer3DModel` with the same weights.

Each test is a row of the table in docs/python_api.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig

from skyreels_v3 import Segment, SkyReelsTransformer3DModel
from skyreels_v3.wan import transformer as block

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
}
LATENTS = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(2))
TIMESTEP = torch.tensor([731])
LORA = LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False)

Model = SkyReelsTransformer3DModel | WanTransformer3DModel


def wan(layers: int = SIZES["num_layers"]) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES | {"num_layers": layers}).eval()


def ours(layers: int = SIZES["num_layers"]) -> SkyReelsTransformer3DModel:
    model = SkyReelsTransformer3DModel(**SIZES | {"num_layers": layers}).eval()
    model.load_state_dict(wan(layers).state_dict())
    return model


def predict(model: Model) -> torch.Tensor:
    if isinstance(model, SkyReelsTransformer3DModel):
        return model([Segment(LATENTS)], TIMESTEP, TEXT)[0]
    dtype = model.patch_embedding.weight.dtype
    return model(LATENTS.to(dtype), TIMESTEP, TEXT.to(dtype), return_dict=False)[0].float()


def test_the_same_numbers():
    """A plain video and one timestep per sample, which diffusers' model supports too."""
    with torch.no_grad():
        latents, timestep, text = LATENTS.repeat(2, 1, 1, 1, 1), torch.tensor([731, 3]), TEXT.repeat(2, 1, 1)
        (out,) = ours()([Segment(latents)], timestep, text)
        torch.testing.assert_close(out, wan()(latents, timestep, text).sample, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """Restore the process-wide attention backend, which diffusers' `set_attention_backend` changes as well."""
    with attention_backend(AttentionBackendName.NATIVE):
        yield


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    with torch.no_grad():
        return predict(wan())


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The RMS difference relative to the RMS of `exact`."""
    return float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def reloaded(model: Model, folder) -> Model:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)


def layerwise(model: Model, folder) -> Model:
    model = reloaded(model, folder)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


LOW_PRECISION = {
    "from_pretrained": (reloaded, 0.01),
    "to": (lambda model, _: model.to(torch.bfloat16), 0.03),
    "half": (lambda model, _: model.half(), 0.01),
    "layerwise_casting": (layerwise, 0.06),
}


@pytest.mark.parametrize("feature", LOW_PRECISION)
@torch.no_grad()
def test_low_precision(feature, exact, tmp_path):
    """Rounded weights and products: at least as close to float32 as diffusers' model."""
    apply, tolerance = LOW_PRECISION[feature]
    own, theirs = (error(predict(apply(model, tmp_path / type(model).__name__)), exact) for model in (ours(), wan()))
    assert 0 < own < tolerance
    assert own < 1.2 * theirs


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that offloaded weights that were not reloaded are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}]
)
@pytest.mark.parametrize("build", [ours, wan])
@torch.no_grad()
def test_group_offloading(build, kind, disk, exact, tmp_path, empty_is_nan):
    model, cpu = build(), torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_to_disk_path=str(tmp_path) if disk else None, **kind)
    if disk:
        assert model.blocks[0].norm2.weight.isnan().all()
    for _ in range(2):
        torch.testing.assert_close(predict(model), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [ours, wan])
@torch.no_grad()
def test_accelerate_cpu_offload(build, exact):
    model = build()
    cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    torch.testing.assert_close(predict(model), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", [ours, wan])
@pytest.mark.parametrize("backend", [None, "native"])
@torch.no_grad()
def test_one_graph_for_all_blocks(build, backend):
    model = build(layers=12)
    expected = predict(model)
    if backend:
        model.set_attention_backend(backend)
    torch._dynamo.reset()
    graphs: list[object] = []
    model.compile_repeated_blocks(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@torch.no_grad()
def test_attention_backends(monkeypatch, exact):
    called = []
    plain = torch.nn.functional.scaled_dot_product_attention
    kernels = torch.nn.attention._cur_sdpa_kernel_backends

    def spy(*arguments, **named):
        called.append(kernels())
        return plain(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    seen = []
    for build in (ours, wan):
        model = build()
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(predict(model), exact, atol=1e-5, rtol=1e-5)
        seen.append([*called])
        called.clear()
        for name, kind in (("unheard_of", ValueError), ("flash", (RuntimeError, ImportError))):
            with pytest.raises(kind):
                model.set_attention_backend(name)
        model.reset_attention_backend()
        torch.testing.assert_close(predict(model), exact, atol=1e-5, rtol=1e-5)
        called.clear()
    assert seen[0] == seen[1] == [[torch.nn.attention.SDPBackend.MATH]] * 6


def adapted() -> tuple[SkyReelsTransformer3DModel, WanTransformer3DModel]:
    """Both models with the same LoRA."""
    theirs, own = wan(), ours()
    theirs.add_adapter(LORA)
    own.add_adapter(LORA)
    own.load_state_dict(theirs.state_dict())
    return own, theirs


@torch.no_grad()
def test_lora(exact):
    """Live, at another scale, disabled, and fused: each change affects the next forward."""
    own, theirs = adapted()
    outs = []
    for change in (
        lambda model: None,
        lambda model: model.set_adapters("default", 0.5),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.fuse_lora(),
    ):
        change(own)
        change(theirs)
        outs.append(predict(own))
        torch.testing.assert_close(outs[-1], predict(theirs), atol=1e-5, rtol=1e-5)
    live, half, off, again, fused = outs
    assert min(error(live, exact), error(half, exact), error(half, live)) > 1e-3
    torch.testing.assert_close(off, exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, half)
    torch.testing.assert_close(fused, half, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [8192, 30])
def test_gradients_of_a_lora(monkeypatch, checkpointing, at_once):
    monkeypatch.setattr(block, "TOKENS_AT_ONCE", at_once)
    grads = []
    for model in adapted():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        if checkpointing:
            model.enable_gradient_checkpointing()
        predict(model.train()).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    own, theirs = grads
    assert own.keys() == theirs.keys()
    assert all(grad.abs().sum() > 0 for grad in own.values())
    for name, grad in own.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-6, rtol=1e-4)


def test_gradients_with_all_conditions():
    """Predictions equal those computed without gradients, and gradients agree with finite differences."""
    torch.manual_seed(0)
    sizes = {"image_dim": 16, "audio_features": 12, "audio_hidden_dim": 8, "audio_tokens": 2, "audio_dim": 8}
    model = SkyReelsTransformer3DModel(**SIZES | sizes)
    masks = torch.eye(3)[:, :, None].repeat(1, 3, 12)[:, :8]
    conditions = (TEXT, torch.randn(1, 257, 16), torch.randn(1, 2, 9, 5, 3, 4), masks)

    def loss() -> torch.Tensor:
        return model([Segment(LATENTS)], TIMESTEP, *conditions)[0].square().sum()

    with torch.no_grad():
        expected = loss()
    made = loss()
    torch.testing.assert_close(made, expected)
    made.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
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


def test_what_is_refused():
    model = ours()
    with pytest.raises(NotImplementedError, match="StepCache"):
        model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(NotImplementedError, match="load_transformer"):
        SkyReelsTransformer3DModel.from_single_file("model.safetensors")
    assert model._cp_plan is None  # `enable_parallelism` raises ValueError
