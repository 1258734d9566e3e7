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
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

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


def published(task: str = "reference_to_video") -> planner.Sizes:
    return planner.Sizes(**task_spec(task).transformer)


def small_model(dtype: torch.dtype, **changes: int) -> tuple[planner.Sizes, SkyReelsTransformer3DModel]:
    small = {"num_attention_heads": 4, "num_layers": 2, "ffn_dim": 1382, "text_dim": 64, "freq_dim": 32}
    sizes = replace(published(), **small, **changes)
    model = SkyReelsTransformer3DModel(**vars(sizes)).eval()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return sizes, model


@pytest.mark.parametrize("task", ["reference_to_video", "single_shot_extension", "talking_avatar"])
def test_parameters_of_the_published_transformer(task):
    sizes = published(task)
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
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
            )
        )
        audio_encoder = Wav2Vec2Model(Wav2Vec2Config())
    assert sum(parameter.numel() for parameter in image_encoder.parameters()) == planner.IMAGE_ENCODER_PARAMETERS
    assert sum(parameter.numel() for parameter in audio_encoder.parameters()) == planner.AUDIO_ENCODER_PARAMETERS
    assert sum(parameter.numel() for parameter in vae.parameters()) == planner.VAE_PARAMETERS
    assert sum(parameter.numel() for parameter in text_encoder.parameters()) == planner.TEXT_ENCODER_PARAMETERS


@torch.inference_mode()
def test_work_of_a_forward():
    """torch's own counter sees the embeddings and the head as well, which are left out of the plan."""
    sizes, model = small_model(torch.float32)
    inputs = (
        [Segment(torch.randn(1, 16, 4, 32, 32))],
        torch.tensor([500]),
        model.embed_context(torch.randn(1, 512, 64)),
    )
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
    inputs = ([Segment(torch.randn(1, 16, 4, 32, 32))], timestep, model.embed_context(torch.randn(1, 8, 64)))
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


def test_the_published_avatar():
    """Windows at 720 x 1280; 8 s are the key-frame pass and three windows."""
    spec = task_spec("talking_avatar")
    request = GenerationRequest(
        task=spec, model_id="a/b", prompt="p", height=720, width=1280, audio_seconds=8.0, num_inference_steps=4
    )
    plan = planner.plan(request, None)
    assert [made.tokens for made in plan.passes] == [75_600] * 4


@torch.inference_mode()
def test_work_of_an_avatar_forward():
    """With image and audio attention; the embeddings and the audio projection are left out of the plan."""
    sizes, model = small_model(torch.float32, in_channels=36, image_dim=64, audio_dim=48, audio_hidden_dim=8)
    image, audio = torch.randn(1, 257, 64), torch.randn(1, 1, 13, 5, 12, 768)
    text = torch.randn(1, 512, 64)
    segments, timestep = [Segment(torch.randn(1, 36, 4, 32, 32))], torch.tensor([500])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(segments, timestep, model.embed_context(text, image, audio))
    assert sizes.forward_flop(4 * 16 * 16) == pytest.approx(counter.get_total_flops(), rel=0.03)
