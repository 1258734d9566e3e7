"""Several ranks predict what one does, and send as many bytes as docs/scaling.md says."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.parallel.groups import Group, is_sharded, shard_weights
from skyreels_v3.parallel.usp import torch_usp
from skyreels_v3.wan import family
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from skyreels_v3.wan.vae import VideoVAE
from tests import toys
from tests.parallel.spawn import DEGREES, WORLD_SIZE, BytesSent, groups, spawn
from training.layouts import random_model

pytestmark = pytest.mark.slow

HEADS, HEAD_DIM, LAYERS = 12, 16, 2
DIM = HEADS * HEAD_DIM
SMALL = {
    **{"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": LAYERS, "ffn_dim": 2 * DIM},
    **{"text_dim": 16, "freq_dim": 32, "image_dim": 8},
    **{"audio_window": 5, "audio_features": 6, "audio_hidden_dim": 4, "audio_tokens": 3, "audio_dim": 8},
}
CASES = {  # height and width of the latents, and what else differs
    "nothing divides": (6, 10, ""),  # 15 tokens per frame
    "a timestep per frame": (8, 8, "clean"),
    "fewer tokens than ranks": (2, 4, "clean"),
    "two speakers": (6, 10, "speakers"),
    "two speakers, even": (6, 8, "speakers"),  # 12 tokens: no padding on 2, 3 and 4 ranks
}
FRAMES = 3


def transformer() -> SkyReelsTransformer3DModel:
    torch.manual_seed(0)
    return SkyReelsTransformer3DModel(**SMALL).eval().requires_grad_(False)


def predict(model: SkyReelsTransformer3DModel, height: int, width: int, kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, FRAMES, height, width, generator=draw)
    segments, timestep = [Segment(latents)], torch.tensor([700])
    if kind == "clean":
        segments = [Segment(latents[:, :, :1], clean=True), Segment(latents[:, :, 1:], 1)]
        timestep = torch.tensor([[0, 700, 700]])
    audio = masks = None
    if kind == "speakers":
        audio = torch.randn(1, 2, 4 * FRAMES - 3, 5, 2, 3, generator=draw)
        masks = torch.zeros(3, height, width)
        masks[0, :, : width // 2], masks[1, 2:, width // 2 :], masks[2, :2, width // 2 :] = 1, 1, 1
    text, image = torch.randn(1, 512, 16, generator=draw), torch.randn(1, 257, 8, generator=draw)
    return torch.cat(model(segments, timestep, text, image, audio, masks), dim=2)


def divided(own: dict[str, Group]) -> SkyReelsTransformer3DModel:
    model = transformer()
    family.divide_tokens(model, own["sequence"], torch_usp(sdpa, own["ulysses"], own["ring"]))
    return model


def compare() -> None:
    for ring, ulysses in DEGREES:
        if own := groups(ring, ulysses):
            model, alone = divided(own), transformer()
            for name, (height, width, kind) in CASES.items():
                with BytesSent() as bytes_sent:
                    made = predict(model, height, width, kind)
                expected = predict(alone, height, width, kind)
                torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
                size = ring * ulysses
                share = -(-height * width // 4 // size)  # of each frame's tokens
                tensor = FRAMES * share * DIM * 4
                gathered = 2 * LAYERS * tensor * (ring - 1) + 256 * FRAMES * share * (size - 1)
                if kind == "speakers":
                    gathered += LAYERS * share * DIM * 4 * (size - 1)
                    assert bytes_sent.sent.pop("all_reduce") == pytest.approx(48 * LAYERS * (size - 1) / size)
                assert bytes_sent.sent.pop("all_to_all", 0) == 4 * LAYERS * tensor * (ulysses - 1) / ulysses
                assert bytes_sent.sent == {"all_gather": gathered}, name


def compare_sharded() -> None:
    own = groups(1, WORLD_SIZE)
    model = divided(own)
    shard_weights(model, model.blocks, torch.device("cpu"))
    assert all(map(is_sharded, (model, *model.blocks)))
    for case in CASES.values():
        torch.testing.assert_close(predict(model, *case), predict(transformer(), *case), atol=1e-5, rtol=0)
    with BytesSent() as whole:
        predict(divided(own), 8, 8, "clean")
    with BytesSent() as bytes_sent:
        predict(model, 8, 8, "clean")
    weights = sum(parameter.nbytes for parameter in transformer().blocks.parameters()) * (WORLD_SIZE - 1) / WORLD_SIZE
    extra = bytes_sent.sent["all_gather"] - whole.sent["all_gather"]
    assert extra == pytest.approx(weights, rel=0.05)  # the modulation, a single row, is padded


def compare_vae() -> None:
    """With a quarter of the pixels on each rank, since all ranks have equally many tiles."""
    vae, alone = (VideoVAE(random_model(lambda: AutoencoderKLWan(**toys.VAE)).eval()) for _ in range(2))
    vae.group = groups(1, WORLD_SIZE)["sequence"]
    video = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with BytesSent() as encoding:
        latents = vae.encode(video)
    torch.testing.assert_close(latents, alone.encode(video), atol=1e-4, rtol=0)
    channels = 4 * alone.module.config.base_dim
    assert encoding.sent == {"all_gather": 3 * channels * 4 * 64 * 96 / 64 * 3 / 4}
    with BytesSent() as decoding:
        made = torch.cat(list(vae.decode_stream(latents)), dim=2)
    torch.testing.assert_close(made, torch.cat(list(alone.decode_stream(latents)), dim=2), atol=1e-4, rtol=0)
    assert decoding.sent == {"all_gather": 9 * 3 * 4 * 64 * 96 * 3 / 4}


def compare_all() -> None:
    compare()
    compare_sharded()
    compare_vae()


def test_several_ranks_predict_the_same(tmp_path):
    spawn(compare_all, tmp_path)
