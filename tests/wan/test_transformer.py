"""The transformer against outputs of the official one in float32, and against diffusers' Wan transformer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.wan import transformer as wan_transformer
from skyreels_v3.wan.checkpoint import load_transformer
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

ATOL = 1e-4
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}


def padded(context: torch.Tensor) -> torch.Tensor:
    """Zero-pad the context to 512 rows."""
    return torch.nn.functional.pad(context, (0, 0, 0, 512 - context.shape[1]))


@pytest.mark.parametrize("case", ["plain_square", "plain_oddgrid", "plain_batch2", "list_prefix", "list_prefix_long"])
@torch.inference_mode()
def test_extension(reference, case):
    folder = reference / "extension_dit"
    model = load_transformer(folder, torch.float32)
    cases = load_file(folder / "cases.safetensors")
    recorded = {key.removeprefix(f"{case}."): value for key, value in cases.items() if key.startswith(f"{case}.")}
    segments = [Segment(recorded["x"])]
    if "prefix" in recorded:
        segments.append(Segment(recorded["prefix"], 1024, clean=True))
    out = model(segments, recorded["t"], recorded["context"])
    torch.testing.assert_close(out[0], recorded["out"], atol=ATOL, rtol=0)
    assert [part.shape for part in out] == [segment.latents.shape for segment in segments]


@pytest.mark.parametrize("case", ["ref4", "ref4_oddgrid"])
@torch.inference_mode()
def test_reference(reference, case):
    folder = reference / "reference_dit"
    model = load_transformer(folder, torch.float32)
    recorded = load_file(folder / "cases.safetensors")
    latents = recorded[f"{case}.latents"]
    segments = [Segment(latents), Segment(recorded[f"{case}.reference"], latents.shape[2])]
    out = torch.cat(model(segments, recorded[f"{case}.t"], recorded[f"{case}.context"]), dim=2)
    torch.testing.assert_close(out, recorded[f"{case}.out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["one_person", "two_people"])
@torch.inference_mode()
def test_avatar(reference, case):
    folder = reference / "avatar_dit"
    model = load_transformer(reference / "pipelines" / "checkpoints" / "talking_avatar", torch.float32)
    scales = json.loads((folder / "cases.json").read_text())
    recorded = load_file(folder / "cases.safetensors")
    features = torch.from_numpy(np.load(folder / f"audio_{case}_int8.npz")["emb"]) * scales["audio_scale"]
    frames = torch.arange(features.shape[1])
    window = (frames[:, None] + torch.arange(-2, 3)).clamp(0, len(frames) - 1)
    image = torch.from_numpy(np.load(folder / "clip_fea_int8.npz")["clip_fea"]) * scales["clip_fea_scale"]
    conditions = (
        padded(recorded[f"{case}.context_int8"][None] * scales["context_scale"]),
        image,
        features[:, window][None],
        recorded[f"{case}.ref_target_masks"] if case == "two_people" else None,
    )
    segment = Segment(torch.cat((recorded[f"{case}.x"][None], recorded[f"{case}.y"]), dim=1))
    (out,) = model([segment], recorded[f"{case}.t"], *conditions)
    torch.testing.assert_close(out, recorded[f"{case}.out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("at_once", [30, 1])
@torch.inference_mode()
def test_a_few_tokens_at_a_time(monkeypatch, reference, at_once):
    """The recordings of all three models again, processing the tokens of one or a few frames at a time."""
    monkeypatch.setattr(wan_transformer, "TOKENS_AT_ONCE", at_once)
    test_extension(reference, "list_prefix")
    test_reference(reference, "ref4")
    test_avatar(reference, "one_person")
    test_avatar(reference, "two_people")


@torch.inference_mode()
def test_attention_is_handed_in():
    """Every attention calls the function that was set, with (B, L, N, D) tensors."""
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**SMALL).eval()
    shapes = []

    def counting(query, key, value):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return sdpa(query, key, value)

    model.set_attention(counting, cross_attention=sdpa)
    model([Segment(torch.randn(1, 16, 2, 4, 6))], torch.tensor([5]), torch.randn(1, 512, 16))
    assert shapes == [((1, 12, 2, 24), (1, 12, 2, 24))] * 2


def test_saves_and_loads_like_any_diffusers_model(tmp_path):
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**SMALL, image_dim=8, audio_dim=12, audio_hidden_dim=4, audio_tokens=3)
    model.save_pretrained(tmp_path)
    for again in (
        load_transformer(tmp_path, torch.float32),
        SkyReelsTransformer3DModel.from_pretrained(tmp_path),
    ):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), name
