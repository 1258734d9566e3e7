"""The wav2vec2 audio encoder, against the official one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.wan.checkpoint import load_audio_encoder

CLIPS = ["speech_16k_2s", "speech_22k_1p3s"]


@pytest.fixture(scope="module")
def recorded(reference):
    return load_file(reference / "wav2vec2" / "cases.safetensors")


@pytest.mark.parametrize("clip", CLIPS)
def test_small(reference, recorded, clip):
    encoder = load_audio_encoder(reference / "wav2vec2" / "small", torch.float32)
    out = encoder(recorded[f"{clip}.normalised"], fps=25)
    torch.testing.assert_close(out, recorded[f"{clip}.small.emb"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
def test_base(reference, recorded, clip):
    """The spelling of older files, .bin, full width; every 64th channel is stored."""
    encoder = load_audio_encoder(reference / "pipelines" / "checkpoints" / "talking_avatar", torch.float32)
    out = encoder(recorded[f"{clip}.normalised"], fps=25)
    torch.testing.assert_close(out[:, :, ::64], recorded[f"{clip}.base768.emb_every64th"], atol=1e-3, rtol=0)
