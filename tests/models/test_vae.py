"""The VAE, against the official one and against diffusers' own whole decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.checkpoints.load import load_model, read_config, read_tensors
from skyreels_v3.checkpoints.published import load_vae
from skyreels_v3.models.vae import VideoVAE

ATOL = 5e-4


@pytest.fixture(scope="module")
def native(reference) -> VideoVAE:
    return load_vae(reference / "vae", "native", torch.float32)


@pytest.fixture(scope="module")
def diffusers_vae(reference) -> VideoVAE:
    from diffusers import AutoencoderKLWan

    folder = reference / "vae" / "diffusers_vae"
    config = read_config(folder / "config.json")
    return VideoVAE(load_model(lambda: AutoencoderKLWan(**config), read_tensors(folder), folder, torch.float32))


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


@pytest.mark.parametrize("frames", [1, 9])
def test_diffusers_encode(diffusers_vae, reference, video, frames):
    """The recorded mode is not normalised; ours is."""
    recorded = load_file(reference / "vae" / "diffusers_cases.safetensors")[f"encode_{frames}.mode"]
    latents = diffusers_vae.encode(video[:, :, :frames])
    torch.testing.assert_close(latents * diffusers_vae.std + diffusers_vae.mean, recorded, atol=ATOL, rtol=0)


def test_sampling_uses_the_generator(diffusers_vae, reference, video):
    """mode + std * noise, the noise drawn from the generator and from nothing else."""
    recorded = load_file(reference / "vae" / "diffusers_cases.safetensors")
    generator = torch.Generator().manual_seed(5)
    latents = diffusers_vae.encode(video[:, :, :1], generator) * diffusers_vae.std + diffusers_vae.mean
    noise = torch.randn(recorded["encode_1.mode"].shape, generator=torch.Generator().manual_seed(5))
    expected = recorded["encode_1.mode"] + torch.exp(0.5 * recorded["encode_1.logvar"]) * noise
    torch.testing.assert_close(latents, expected, atol=ATOL, rtol=0)
    again = recorded["encode_1.mode"] + torch.exp(0.5 * recorded["encode_1.logvar"]) * recorded["encode_1.sample_noise"]
    torch.testing.assert_close(again, recorded["encode_1.sample"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 3])
def test_diffusers_decode(diffusers_vae, reference, frames):
    recorded = load_file(reference / "vae" / "diffusers_cases.safetensors")
    z = (recorded[f"decode_{frames}.z"] - diffusers_vae.mean) / diffusers_vae.std
    video = torch.cat(list(diffusers_vae.decode_stream(z)), dim=2)
    torch.testing.assert_close(video, recorded[f"decode_{frames}.out"], atol=ATOL, rtol=0)


@torch.inference_mode()
def test_chunked_and_whole_decode_agree(native):
    """diffusers' decode takes all latent frames at once."""
    latents = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    whole = native.module.decode(latents * native.std + native.mean).sample
    chunked = torch.cat(list(native.decode_stream(latents)), dim=2)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


def test_streams_do_not_disturb_each_other(native):
    """A stream keeps its own caches: two of them can be read in turns."""
    first = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    second = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    alone = [torch.cat(list(native.decode_stream(latents)), dim=2) for latents in (first, second)]
    pairs = list(zip(native.decode_stream(first), native.decode_stream(second), strict=True))
    for number, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat([pair[number] for pair in pairs], dim=2), expected, atol=1e-6, rtol=0)
