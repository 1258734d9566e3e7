"""Key maps: every key of the published files maps to a parameter, and the inverse map returns the same key."""

from __future__ import annotations

import pytest
import torch

from skyreels_v3.checkpoints.key_maps import invert, translate
from skyreels_v3.checkpoints.load import read_tensors, rename
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.checkpoint import load_transformer

FILES = [
    ("extension_dit/diffusion_pytorch_model.safetensors", key_maps.NATIVE_TRANSFORMER),
    ("pipelines/checkpoints/talking_avatar", key_maps.NATIVE_TRANSFORMER),
    ("umt5/models_t5_umt5-xxl-enc-bf16.pth", key_maps.NATIVE_TEXT_ENCODER),
    ("vae/Wan2.1_VAE.pth", key_maps.NATIVE_VAE),
]


@pytest.mark.parametrize(("file", "key_map"), FILES, ids=[file for file, _ in FILES])
def test_every_key_has_its_own_place(reference, file, key_map):
    keys = read_tensors(reference / file).keys()
    places = [translate(key, key_map) for key in keys]
    flat = [name for place in places for name in (place if isinstance(place, tuple) else (place,))]
    assert len(set(flat)) == len(flat) >= len(keys)
    inverse = invert(key_map)
    for key, place in zip(keys, places, strict=True):
        if isinstance(place, str):
            assert translate(place, inverse) == key


def test_stacked_weights_are_split_in_order(reference):
    folder = reference / "pipelines" / "checkpoints" / "talking_avatar"
    tensors = read_tensors(folder)
    parameters = dict(load_transformer(folder, torch.float32).named_parameters())
    renamed = rename(tensors, key_maps.NATIVE_TRANSFORMER, folder, parameters)
    stacked = tensors["blocks.1.audio_cross_attn.kv_linear.weight"]
    parts = [renamed[f"blocks.1.attn_audio.to_{part}.weight"] for part in "kv"]
    assert torch.equal(torch.cat(parts), stacked)


def test_an_unknown_key_is_an_error():
    with pytest.raises(KeyError):
        translate("blocks.0.self_attn.q.weight.extra.", key_maps.NATIVE_TEXT_ENCODER)
