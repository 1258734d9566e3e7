"""HunyuanVideo's VAE as a stream, against diffusers' decode of everything at once."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video import retrieve_latents

from skyreels_v3.hunyuan.vae import HunyuanVAE
from tests import toys
from tests.wan.test_vae import ThreadGroup


@pytest.fixture(scope="module")
def stock() -> AutoencoderKLHunyuanVideo:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoencoderKLHunyuanVideo(**toys.HUNYUAN_VAE).eval()
    module.enable_tiling()
    return module


@pytest.fixture(scope="module")
def ours(stock) -> HunyuanVAE:
    """A VAE from the module as loaded, without tiling."""
    module = copy.deepcopy(stock)
    module.disable_tiling()
    return HunyuanVAE(module)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded_at_once(stock: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> torch.Tensor:
    return stock.decode(latents / stock.config.scaling_factor).sample.clamp(-1, 1)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 6, 7, 11, 25])
def test_it_is_the_librarys_decode(ours, stock, frames):
    latents = noise(1, 16, frames, 3, 4)
    given = latents.clone()
    chunks = list(ours.decode_stream(latents))
    assert torch.equal(latents, given)
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (frames - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=2), decoded_at_once(stock, latents), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(33, 3), (3, 40)])
def test_tiles_are_the_librarys(ours, stock, size):
    """Latents larger than a 32 x 32 tile in one dimension; the planner's number of tiles has no effect."""
    latents = noise(1, 16, 5, *size)
    ours.tiles = (2, 3)
    video = torch.cat(list(ours.decode_stream(latents)), dim=2)
    torch.testing.assert_close(video, decoded_at_once(stock, latents), atol=1e-6, rtol=0)


def test_pieces_are_made_when_they_are_asked_for(ours, monkeypatch):
    """All frames of a piece are out before the next piece is decoded; those that overlap with it are held back."""
    made, decode = [], ours.module.decode
    monkeypatch.setattr(ours.module, "decode", lambda z: made.append(z.shape[2]) or decode(z))
    seen = [len(made) for _ in ours.decode_stream(noise(1, 16, 9, 2, 2))]
    assert seen == [1] * 4 + [2] * 3 + [3] * 2
    assert made == [5, 5, 3]


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_group_makes_the_same(ours, size, frames):
    """Pieces of unequal length, and fewer pieces than processes."""
    latents = noise(1, 16, frames, 2, 3)
    expected = torch.cat(list(ours.decode_stream(latents)), dim=2)
    barrier, pieces = Barrier(size), [None] * size

    def work(rank: int) -> torch.Tensor:
        one = HunyuanVAE(ours.module)
        one.group = ThreadGroup(rank, pieces, barrier)
        return torch.cat(list(one.decode_stream(latents)), dim=2)

    with ThreadPoolExecutor(size) as pool:
        for made in pool.map(work, range(size)):
            torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("size", "sample"),
    [((24, 272), False), ((256, 256), True), ((400, 16), True), ((272, 464), True)],
)
def test_encode_is_the_librarys(ours, stock, size, sample):
    """One tile, and several in one or both dimensions; the last ones are cut off, down to 16 pixels."""
    picture = noise(1, 3, 1, *size).clamp(-1, 1)
    generator, own = (torch.Generator().manual_seed(3) if sample else None for _ in range(2))
    expected = retrieve_latents(stock.encode(picture), generator, "sample" if sample else "argmax")
    latents = ours.encode(picture, own)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected * stock.config.scaling_factor, atol=1e-6, rtol=0)


def test_pieces_have_the_published_sizes(ours):
    """256 pixels with a stride of 192; 16 frames plus the preceding one, with a stride of 12."""
    module = ours.module
    assert (module.tile_sample_min_height, module.tile_sample_stride_height) == (256, 192)
    assert (module.tile_sample_min_width, module.tile_sample_stride_width) == (256, 192)
    assert (module.tile_sample_min_num_frames, module.tile_sample_stride_num_frames) == (16, 12)


@torch.inference_mode()
def test_bfloat16(ours, stock):
    """Inputs and outputs are float32; the sample's noise is drawn in the VAE's dtype, as in the published code."""
    half = HunyuanVAE(copy.deepcopy(ours.module).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    video, seed = noise(1, 3, 1, 16, 16).clamp(-1, 1), torch.Generator().manual_seed
    latents = half.encode(video, seed(3))
    expected = retrieve_latents(half.module.encode(video.bfloat16()), seed(3)).float() * stock.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)
    rounded = torch.cat(list(half.decode_stream(noise(1, 16, 5, 2, 3))), dim=2)
    assert latents.dtype == rounded.dtype == torch.float32
    assert (rounded - torch.cat(list(ours.decode_stream(noise(1, 16, 5, 2, 3))), dim=2)).abs().mean() < 0.02


def test_what_is_not_finite_is_refused(ours):
    latents = noise(1, 16, 6, 2, 2)
    latents[:, :, 5] = torch.nan
    stream = ours.decode_stream(latents)
    assert [next(stream).shape[2] for _ in range(4)] == [1, 4, 4, 4]
    with pytest.raises(FloatingPointError, match="in latent frame 4"):
        next(stream)
