"""The cost of a forward of V3's transformers, measured on the real ones at the published sizes on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skyreels_v3.parallel.ranks import ParallelConfig
from skyreels_v3.plan import build_on_meta
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.wan import family
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from tests.planning import LiveBytes

SMALL = {"num_attention_heads": 4, "num_layers": 2, "ffn_dim": 1382, "text_dim": 64, "freq_dim": 32}
AVATAR = {"in_channels": 36, "image_dim": 64, "audio_dim": 48, "audio_hidden_dim": 8}


@pytest.mark.parametrize("more", [{}, AVATAR])
@torch.inference_mode()
def test_work_of_a_forward(more):
    """torch's counter includes embeddings, audio projection and head, which the plan leaves out."""
    model = SkyReelsTransformer3DModel(**SMALL | more).eval()
    segments = [Segment(torch.randn(1, model.config.in_channels, 4, 32, 32))]
    conditions = (torch.randn(1, 257, 64), torch.randn(1, 1, 13, 5, 12, 768)) if more else ()
    # FlopCounterMode does not support every fused kernel, but does count plain matmuls
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(segments, torch.tensor([500]), torch.randn(1, 512, 64), *conditions)
    assert family.forward_flop(model.config, 4 * 16 * 16) == pytest.approx(counter.get_total_flops(), rel=0.03)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("task", "frames", "height", "width", "dtype", "speakers"),
    [
        ("reference_to_video", 35, 90, 160, "bfloat16", 1),
        ("reference_to_video", 35, 60, 104, "float32", 1),
        ("single_shot_extension", 40, 90, 160, "bfloat16", 1),
        ("single_shot_extension", 40, 90, 160, "float32", 1),
        ("talking_avatar", 21, 90, 160, "float32", 1),
        ("talking_avatar", 21, 60, 104, "bfloat16", 1),
        ("talking_avatar", 21, 90, 160, "bfloat16", 2),
    ],
)
@torch.inference_mode()
def test_activations_of_a_forward(task, frames, height, width, dtype, speakers):
    sizes = task_spec(task).transformer
    model = build_on_meta("wan", {**sizes, "num_layers": 1}).eval()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    image = empty(1, 257, sizes["image_dim"]) if "image_dim" in sizes else None
    audio = empty(1, speakers, 4 * frames - 3, 5, 12, 768) if "audio_dim" in sizes else None
    conditions = empty(1, 512, 4096), image, audio, empty(3, height, width) if speakers > 1 else None
    latents = empty(1, sizes["in_channels"], frames, height, width)
    segments, timestep = [Segment(latents)], torch.tensor([500])
    if task == "single_shot_extension":
        segments = [Segment(latents[:, :, :7], clean=True), Segment(latents[:, :, 7:], 7)]
        timestep = torch.tensor([[0] * 7 + [500] * (frames - 7)])
    with LiveBytes() as counter:
        model(segments, timestep, *conditions)
    planned = family.activation_bytes(model.config, frames * height * width // 4, dtype)
    planned += family.context_bytes(model.config, frames, speakers, dtype)
    assert planned == pytest.approx(counter.peak, rel=0.05)


def test_activations_of_one_of_several_ranks():
    """More than 1 / n, because of communication buffers; a ring also needs all keys and values of some heads."""
    config = build_on_meta("wan", task_spec("reference_to_video").transformer).config
    alone = family.activation_bytes(config, 126_000, "bfloat16")
    ulysses, ring = (
        family.activation_bytes(config, 126_000, "bfloat16", ParallelConfig(1, *pair)) for pair in ((1, 8), (4, 2))
    )
    assert alone / 8 < ulysses < alone / 2
    assert ulysses < ring


@pytest.mark.parametrize("task", [name for name in TASK_NAMES if task_spec(name).family == "wan"])
def test_every_component_has_published_bytes(task):
    spec = task_spec(task)
    (repository,) = family.repositories(spec)
    assert repository.components.keys() <= family.published_bytes(spec).keys()
    assert repository.components.keys() == {"transformer", *family.component_parameters(spec)}


def test_the_published_avatar():
    """In GB: transformer 38.1, UMT5 11.4, VAE 0.5, wav2vec2 0.4, CLIP 4.8 (its file includes the text encoder)."""
    assert sum(family.published_bytes(task_spec("talking_avatar")).values()) == pytest.approx(55.2e9, abs=0.1e9)
