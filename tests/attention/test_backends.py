"""Attention kernels against plain float64 arithmetic, and how a kernel is chosen."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from skyreels_v3.attention import backends
from skyreels_v3.attention import kernels as available
from skyreels_v3.attention.backends import (
    attention_map,
    choose_attention,
    cudnn,
    dispatched,
    flash3_fp8,
    preferred,
    sdpa,
)
from skyreels_v3.attention.kernels import KERNELS, Kernel
from skyreels_v3.errors import UserError

CPU = torch.device("cpu")
HOPPER, BLACKWELL, RTX_4090, RTX_5090, A100 = (9, 0), (10, 0), (8, 9), (12, 0), (8, 0)
EVERYTHING = tuple(KERNELS)
HALF = (torch.bfloat16, torch.float16)


def exact(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output (B, Lq, N, D) and weights (B, N, Lq, Lk), computed term by term in float64."""
    scores = torch.einsum("bqnd,bknd->bnqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bnqk,bknd->bqnd", weights, value.double()), weights


def inputs(batch: int, queries: int, keys: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return tuple(torch.randn(batch, length, heads, size, generator=generator) for length in (queries, keys, keys))


@pytest.fixture
def plain(monkeypatch):
    """A kernel that every machine has: torch's own attention, called through diffusers' dispatcher."""
    monkeypatch.setitem(KERNELS, "plain", Kernel("native", devices=("cpu",), half_only=False))
    return "plain"


# self-, text and image attention; a batch of frames with their audio
SHAPES = [(1, 60, 60, 3, 128), (2, 70, 33, 2, 16), (1, 65, 257, 2, 64), (5, 12, 32, 2, 128)]


@pytest.mark.parametrize("shape", [*SHAPES, "joint"])
@pytest.mark.parametrize("attention", [sdpa, dispatched("native")], ids=["sdpa", "dispatched"])
def test_attention_is_softmax(attention, shape):
    """For separate tensors, and for slices of one tensor as a joint projection returns them."""
    joint = torch.randn(2, 40, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    tensors = joint.unbind(2) if shape == "joint" else inputs(*shape)
    torch.testing.assert_close(attention(*tensors).double(), exact(*tensors)[0], rtol=0, atol=2e-6)


@pytest.fixture
def flash_attention_3(monkeypatch):
    """The package's interface as documented, with its arithmetic in float64: float8 inputs, scales (B, N)."""

    def flash_attn_func(q, k, v, q_descale, k_descale, v_descale):
        parts = ((q, q_descale), (k, k_descale), (v, v_descale))
        assert all(part.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 for part, scale in parts)
        assert all(scale.shape == (part.shape[0], part.shape[2]) for part, scale in parts)
        wide = (part.double() * scale.double()[:, None, :, None] for part, scale in parts)
        return exact(*wide)[0].bfloat16()

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_float8_attention_with_a_scale_for_each_head(flash_attention_3, shape, dtype):
    """Heads of very different sizes lose no more than e4m3's 4 significant bits."""
    tensors = [part.to(dtype) for part in inputs(*shape)]
    sizes = 2.0 ** (4 * torch.arange(shape[3]))[:, None]
    query, key, value = tensors[0] / sizes, tensors[1] * sizes, tensors[2] * sizes
    made = flash3_fp8(*(part.to(dtype) for part in (query, key, value)))
    assert made.dtype == dtype and made.isfinite().all()
    wanted = exact(query, key, value)[0]
    error = (made - wanted).square().mean(dim=(0, 1, 3)) / wanted.square().mean(dim=(0, 1, 3))
    assert (error.sqrt() < 2**-4).all()


def test_attention_map_is_the_mean_of_the_heads():
    query, key, value = inputs(2, 20, 9, 3, 16)
    expected = exact(query, key, value)[1].mean(1)
    torch.testing.assert_close(attention_map(query, key).double(), expected, rtol=0, atol=1e-6)


def test_cudnn_and_no_other():
    """It raises rather than silently falling back to another kernel."""
    with pytest.raises(RuntimeError):
        cudnn(*inputs(1, 8, 8, 1, 8))


def test_the_dispatcher_knows_our_names_and_checks_packages():
    """The dispatcher says what to install or build, and our error message quotes it."""
    names = {kernel.backend for kernel in KERNELS.values() if kernel.backend}
    assert names <= {member.value for member in AttentionBackendName}
    for name, kernel in KERNELS.items():
        if kernel.backend and not available.is_installed(name):
            with pytest.raises(RuntimeError, match=r"install|build"):
                dispatched(kernel.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_sdpa_on_a_cpu(name, dtype, caplog):
    with caplog.at_level(logging.INFO):
        assert choose_attention(name, CPU, dtype) == ("sdpa", sdpa)
    assert [record.message.split(",")[0] for record in caplog.records] == ["attention sdpa"]


def test_a_choice_through_the_dispatcher(plain, caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        _, attention = choose_attention(plain, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert "attention plain" in caplog.text
    tensors = inputs(1, 20, 9, 2, 16)
    assert torch.equal(attention(*tensors), sdpa(*tensors))


def test_unknown_to_the_dispatcher(monkeypatch):
    monkeypatch.setitem(KERNELS, "new", Kernel("not_yet", devices=("cpu",)))
    with pytest.raises(UserError, match=r"--attention: new: does not work here \('not_yet' .*; use --attention auto"):
        choose_attention("new", CPU, torch.bfloat16)


def fails(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no kernel image for this GPU\n  in a long " + "story " * 1000)


def silent(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise AssertionError


BROKEN = {
    "raises": (fails, r"\(no kernel image for this GPU in a long story .* \[\.\.\.\]\)"),
    "says nothing": (silent, r"\(AssertionError\)"),
    "zeros": (lambda query, key, value: torch.zeros_like(query), r"\(its values are off by up to 0\.\d+\)"),
    "not a number": (lambda query, key, value: query / 0 * 0, r"\(its values are off by up to nan\)"),
    "another layout": (lambda q, k, v: sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), "does not work"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_kernel_that_does_not_work(case, plain, monkeypatch, caplog):
    """An explicitly chosen kernel is refused; auto falls back to another one."""
    attention, reason = BROKEN[case]
    monkeypatch.setattr(backends, "dispatched", lambda backend: attention)
    with pytest.raises(UserError, match=reason) as caught:
        choose_attention(plain, CPU, torch.float32)
    assert str(caught.value).startswith("--attention: plain: ")
    assert str(caught.value).endswith("; use --attention auto")
    assert len(str(caught.value)) < 500
    monkeypatch.setattr(backends, "preferred", lambda *facts: plain)
    with caplog.at_level(logging.INFO):
        assert choose_attention("auto", CPU, torch.float32) == ("sdpa", sdpa)
    assert "plain attention is preferred here, but unusable: " in caplog.text


def test_auto_takes_what_is_preferred(plain, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(backends, "gpu_facts", lambda device: (HOPPER, 92000))
    monkeypatch.setattr(backends, "preferred", lambda *facts: seen.append(facts) or plain)
    with caplog.at_level(logging.INFO):
        choose_attention("auto", CPU, torch.bfloat16)
    assert seen[0][:2] == (HOPPER, 92000)
    assert {"sdpa", "cudnn"} <= set(seen[0][2])
    assert "attention plain" in caplog.text


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "capability, cudnn_version, installed, expected",
    [
        (None, 0, (), "sdpa"),
        (None, 92000, EVERYTHING, "sdpa"),
        (HOPPER, 92000, EVERYTHING, "cudnn"),
        (HOPPER, 91501, (), "cudnn"),
        (HOPPER, 91500, (), "sdpa"),
        (HOPPER, 91002, ("sdpa", "cudnn", "flash", "flash3"), "flash3"),
        (HOPPER, 0, EVERYTHING, "flash3"),
        (HOPPER, 8907, ("sdpa", "cudnn", "flash", "sage"), "sdpa"),
        (BLACKWELL, 91900, EVERYTHING, "cudnn"),
        ((10, 3), 91900, (), "cudnn"),
        (BLACKWELL, 91002, EVERYTHING, "sdpa"),
        (RTX_5090, 92000, EVERYTHING, "sdpa"),
        (RTX_4090, 92000, EVERYTHING, "sdpa"),
        (A100, 92000, EVERYTHING, "sdpa"),
    ],
)
def test_preferred(capability, cudnn_version, installed, expected, dtype):
    assert preferred(capability, cudnn_version, installed, dtype) == expected
    assert preferred(capability, cudnn_version, installed, torch.float32) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["auto", *KERNELS])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(name, shape):
    """Every kernel available on this GPU is correct at the models' shapes, the 8-bit ones within their precision."""
    device = torch.device("cuda", 0)
    try:
        _, attention = choose_attention(name, device, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    tensors = [tensor.to(device, torch.bfloat16) for tensor in inputs(*shape)]
    tolerance = 0.01 if name == "auto" or KERNELS[name].exact else 0.1
    torch.testing.assert_close(attention(*tensors).double(), exact(*tensors)[0], rtol=0, atol=tolerance)
