"""The VAE against the official one and against diffusers' decode of everything at once."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from skyreels_v3.checkpoints.load import load_model, read_tensors
from skyreels_v3.parallel.groups import Group
from skyreels_v3.wan import vae
from skyreels_v3.wan.checkpoint import load_vae
from skyreels_v3.wan.vae import VideoVAE

ATOL = 5e-4


@pytest.fixture(scope="module")
def native(reference) -> VideoVAE:
    return load_vae(reference / "vae", torch.float32)


@pytest.fixture(scope="module")
def diffusers_vae(reference) -> VideoVAE:
    folder = reference / "vae" / "diffusers_vae"
    config = AutoencoderKLWan.load_config(folder)
    build = partial(AutoencoderKLWan.from_config, config)
    return VideoVAE(load_model(build, read_tensors(folder), folder, torch.float32))


@pytest.fixture
def random_vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(AutoencoderKLWan(base_dim=8).eval())


@pytest.fixture(scope="module")
def video(reference) -> torch.Tensor:
    stored = np.load(reference / "vae" / "video_uint8.npz")
    frames = torch.from_numpy(stored[stored.files[0]])
    return frames.permute(3, 0, 1, 2)[None] / 127.5 - 1


@pytest.mark.parametrize("frames", [1, 9, 25])
def test_native_encode(native, reference, video, frames):
    recorded = load_file(reference / "vae" / "cases.safetensors")[f"encode_{frames}.out"]
    torch.testing.assert_close(native.encode(video[:, :, :frames]), recorded, atol=ATOL, rtol=0)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_native_decode(native, reference, frames):
    recorded = load_file(reference / "vae" / "cases.safetensors")
    chunks = list(native.decode_stream(recorded[f"decode_{frames}.z"]))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (frames - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=2), recorded[f"decode_{frames}.out"], atol=ATOL, rtol=0)


def test_diffusers_encode(diffusers_vae, reference, video):
    """The mode, and mode + std * noise from the generator; the recorded latents are not normalized."""
    recorded = load_file(reference / "vae" / "diffusers_cases.safetensors")
    noise = torch.randn(recorded["encode_1.mode"].shape, generator=torch.Generator().manual_seed(5))
    sample = recorded["encode_1.mode"] + torch.exp(0.5 * recorded["encode_1.logvar"]) * noise
    generator = torch.Generator().manual_seed(5)
    cases = (1, None, recorded["encode_1.mode"]), (9, None, recorded["encode_9.mode"]), (1, generator, sample)
    for frames, given, expected in cases:
        latents = diffusers_vae.encode(video[:, :, :frames], given)
        torch.testing.assert_close(latents * diffusers_vae.std + diffusers_vae.mean, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("frames", [1, 3])
def test_diffusers_decode(diffusers_vae, reference, frames):
    recorded = load_file(reference / "vae" / "diffusers_cases.safetensors")
    z = (recorded[f"decode_{frames}.z"] - diffusers_vae.mean) / diffusers_vae.std
    video = torch.cat(list(diffusers_vae.decode_stream(z)), dim=2)
    torch.testing.assert_close(video, recorded[f"decode_{frames}.out"], atol=ATOL, rtol=0)


@torch.inference_mode()
def test_chunked_and_whole_decode_agree(native):
    """diffusers decodes all latent frames at once."""
    latents = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    whole = native.module.decode(latents * native.std + native.mean).sample
    chunked = torch.cat(list(native.decode_stream(latents)), dim=2)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


def test_streams_do_not_disturb_each_other(native):
    """Each stream has its own caches, so two of them can be read alternately."""
    first = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    second = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    alone = [torch.cat(list(native.decode_stream(latents)), dim=2) for latents in (first, second)]
    pairs = list(zip(native.decode_stream(first), native.decode_stream(second), strict=True))
    for number, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat([pair[number] for pair in pairs], dim=2), expected, atol=1e-6, rtol=0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def encode_and_decode(model: VideoVAE, tiles: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of 9 frames, and frames of 3 latent frames, both at 56 x 88."""
    model.tiles = tiles
    latents = model.encode(noise(1, 3, 9, 56, 88).clamp(-1, 1))
    video = torch.cat(list(model.decode_stream(noise(1, 16, 3, 7, 11))), dim=2)
    model.tiles = (1, 1)
    return latents, video


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(2, 3), (50, 1)])
@pytest.mark.parametrize("name", ["native", "random_vae"])
def test_tiles_do_not_show(name, tiles, request):
    """At sizes that do not divide evenly: the encoder's tiles are joined at 14 x 22, the decoder's at 56 x 88."""
    model = request.getfixturevalue(name)
    whole, tiled = encode_and_decode(model, (1, 1)), encode_and_decode(model, tiles)
    for part, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_tiles_in_float64(random_vae):
    """No seam is hidden by float32 rounding, even for tiles narrower than their halo."""
    random_vae.module.double()
    encoder, front = vae.encoder_stages(random_vae.module.encoder)
    decoder, back = vae.decoder_stages(random_vae.module.decoder)
    for stages, x in [(encoder[:front], noise(1, 3, 1, 40, 28)), (decoder[back:], noise(1, 32, 1, 10, 7))]:
        whole, tiled = (vae.TiledStages(stages, x.shape[-2:], tiles)(x.double()) for tiles in [(1, 1), (9, 5)])
        torch.testing.assert_close(tiled, whole, atol=1e-12, rtol=0)


def test_reach_of_the_tiles():
    """By hand. Decoder, from the output back: conv_out takes 1 and three blocks 6, 7 in all at full size; with 1 for
    the upsampling 8, or 4 at half size; three blocks take 6 and the other upsampling 1, 11 in all, or 6 at a quarter.
    Encoder: two blocks take 4 at half size, which is 8 at full size, where two more blocks and conv_in take 4 + 1; at
    the end of a tile each downsampling takes one row more, which is 2 and 1 at full size."""
    with torch.device("meta"):
        module = AutoencoderKLWan(base_dim=8)
    stages, cut = vae.decoder_stages(module.decoder)
    assert vae.crops_along(stages[cut:], 180, (360, 480))[0] == slice(90 - 6, 120 + 6)
    stages, cut = vae.encoder_stages(module.encoder)
    assert vae.crops_along(stages[:cut], 720, (60, 120))[0] == slice(240 - 13, 480 + 16)


def test_bfloat16(native):
    """The allowed error of bfloat16 is 35 dB; 45 dB or better were measured."""
    half = VideoVAE(copy.deepcopy(native.module).to(torch.bfloat16))
    for part, expected in zip(encode_and_decode(half, (2, 2)), encode_and_decode(native, (1, 1)), strict=True):
        assert part.dtype == torch.float32
        assert psnr(part, expected) > 35


def psnr(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, where the peak is the reference's range."""
    span = reference.max() - reference.min()
    return float(10 * torch.log10(span**2 / (x - reference).square().mean()))


class ThreadGroup(Group):
    """Threads that stand in for processes."""

    def __init__(self, rank: int, pieces: list, barrier: Barrier) -> None:
        self.rank, self.size = rank, len(pieces)
        self.pieces, self.barrier = pieces, barrier

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.pieces[self.rank] = x
        self.barrier.wait()
        made = torch.stack(self.pieces)
        self.barrier.wait()
        return made


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(1, 1), (2, 1)])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_a_group_makes_the_same(random_vae, size, tiles):
    """Also with more processes than tiles."""
    video, latents = torch.randn(1, 3, 5, 32, 56).clamp(-1, 1), torch.randn(1, 16, 2, 3, 5)
    expected = random_vae.encode(video), torch.cat([*random_vae.decode_stream(latents)], dim=2)
    barrier, pieces = Barrier(size), [None] * size

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        one = VideoVAE(random_vae.module)
        one.tiles = tiles
        one.group = ThreadGroup(rank, pieces, barrier)
        return one.encode(video), torch.cat([*one.decode_stream(latents)], dim=2)

    with ThreadPoolExecutor(size) as pool:
        for made in pool.map(work, range(size)):
            torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "tiles", "processes", "grid"),
    [
        ((90, 160), (1, 1), 2, (1, 2)),
        ((160, 90), (1, 1), 2, (2, 1)),
        ((90, 160), (1, 1), 8, (2, 4)),
        ((90, 160), (2, 3), 2, (2, 3)),
        ((90, 160), (2, 3), 4, (2, 4)),
        ((90, 160), (1, 1), 7, (1, 7)),
    ],
)
def test_there_are_enough_tiles(size, tiles, processes, grid):
    assert vae.shared_grid(size, tiles, processes) == grid
