"""The planner's counts, against the real modules."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from skyreels_v3.memory import planner
from skyreels_v3.models.transformer import Segment, SkyReelsTransformer3DModel
from skyreels_v3.models.vae import VideoVAE
from skyreels_v3.tasks import GenerationRequest, task_spec


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self.live.values()))
        return out


def published() -> planner.Sizes:
    return planner.Sizes(**task_spec("reference_to_video").transformer)


def small_model(dtype: torch.dtype, **changes: int) -> tuple[planner.Sizes, SkyReelsTransformer3DModel]:
    sizes = replace(published(), num_attention_heads=4, num_layers=2, ffn_dim=1382, text_dim=64, freq_dim=32, **changes)
    model = SkyReelsTransformer3DModel(**vars(sizes)).eval()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return sizes, model


def test_parameters_of_the_published_transformer():
    sizes = published()
    with torch.device("meta"):
        model = SkyReelsTransformer3DModel(**vars(sizes))
    float32 = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(part in name for part in model._keep_in_fp32_modules)
    )
    assert sizes.parameters() == (sum(parameter.numel() for parameter in model.parameters()), float32)


def test_parameters_of_the_other_components():
    with torch.device("meta"):
        vae = AutoencoderKLWan()
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    assert sum(parameter.numel() for parameter in vae.parameters()) == planner.VAE_PARAMETERS
    assert sum(parameter.numel() for parameter in text_encoder.parameters()) == planner.TEXT_ENCODER_PARAMETERS


@torch.inference_mode()
def test_work_of_a_forward():
    """torch's own counter sees the embeddings and the head as well, which are left out of the plan."""
    sizes, model = small_model(torch.float32)
    inputs = ([Segment(torch.randn(1, 16, 4, 32, 32))], torch.tensor([500]), torch.randn(1, 512, 64))
    # the counter does not know every fused kernel, but the products of the plain one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    assert sizes.forward_flop(4 * 16 * 16) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_frame", [False, True])
@torch.inference_mode()
def test_activations_of_a_forward(dtype, per_frame):
    sizes, model = small_model(getattr(torch, dtype))
    timestep = torch.full((1, 4), 500) if per_frame else torch.tensor([500])
    inputs = ([Segment(torch.randn(1, 16, 4, 32, 32))], timestep, torch.randn(1, 8, 64))
    with LiveBytes() as counter:
        model(*inputs)
    assert sizes.activation_bytes(4 * 16 * 16, dtype) == pytest.approx(counter.peak, rel=0.05)


@torch.inference_mode()
def test_activations_of_the_vae():
    vae = VideoVAE(AutoencoderKLWan().eval())
    with LiveBytes() as encoding:
        vae.encode(torch.randn(1, 3, 9, 32, 32))
    with LiveBytes() as decoding:
        for _ in vae.decode_stream(torch.randn(1, 16, 3, 4, 4)):
            pass
    assert encoding.peak / 32**2 == pytest.approx(planner.VAE_ENCODE_PEAK, rel=0.05)
    assert decoding.peak / 32**2 == pytest.approx(planner.VAE_DECODE_PEAK, rel=0.05)


@pytest.mark.parametrize(
    ("task", "tokens", "petaflop"), [("reference_to_video", 126_000, 16.1), ("single_shot_extension", 144_000, 20.5)]
)
def test_the_published_sizes(task, tokens, petaflop):
    """5 s in 720 x 1280, worked out by hand elsewhere."""
    request = GenerationRequest(task=task_spec(task), model_id="a/b", prompt="p", height=720, width=1280)
    (made,) = planner.plan(request, None).passes
    assert made.tokens == tokens
    assert made.flop / 8 == pytest.approx(petaflop * 1e15, rel=0.005)
