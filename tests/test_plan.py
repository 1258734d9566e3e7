"""The planner's figures against the real modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from skyreels_v3.families import family_of, published_elements, published_transformer_bytes
from skyreels_v3.hunyuan import vae as hunyuan_vae
from skyreels_v3.hunyuan.vae import HunyuanVAE
from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.memory.stream import STREAM_SLOTS, BlockStream
from skyreels_v3.parallel.ranks import ParallelConfig, Ranks
from skyreels_v3.plan import Plan, build_on_meta, count_elements, weights_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.wan import vae as wan_vae
from skyreels_v3.wan.vae import VideoVAE
from tests.planning import LiveBytes, bytes_of, planned

CPU, META = torch.device("cpu"), torch.device("meta")


def plan_of(task: str = "reference_to_video", checkpoint: None = None, **values: Any) -> Plan:
    values = {"height": 720, "width": 1280, "dtype": "bfloat16"} | values
    ranks = values.pop("ranks", Ranks())
    return planned(GenerationRequest(task=task_spec(task), model_id="a/b", prompt="p", **values), ranks=ranks)


# Weights


def umt5() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def clip_vision() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    )
    return CLIPVisionModel(config)


def llama_and_clip() -> nn.Module:
    """Llama 3 8B with HunyuanVideo's vocabulary and no head, and CLIP ViT-L/14's text encoder."""
    llama = LlamaConfig(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return nn.ModuleList([LlamaModel(llama), CLIPTextModel(clip)]).eval()


COMPONENTS = {
    ("talking_avatar", "text encoder"): umt5,
    ("talking_avatar", "VAE"): AutoencoderKLWan,
    ("talking_avatar", "image encoder"): clip_vision,
    ("talking_avatar", "audio encoder"): lambda: Wav2Vec2Model(Wav2Vec2Config()),
    ("t2v", "text encoder"): llama_and_clip,
    ("t2v", "VAE"): AutoencoderKLHunyuanVideo,
}


@pytest.mark.parametrize(("task", "component"), COMPONENTS)
def test_parameters_of_the_components(task, component):
    with META:
        model = COMPONENTS[task, component]()
    spec = task_spec(task)
    assert family_of(spec).component_parameters(spec)[component] == sum(part.numel() for part in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_of_the_transformers(task, dtype):
    """Exact to the byte: whole, in FP8, and while blocks are streamed."""
    spec = task_spec(task)
    assert published_elements(spec) == count_elements(spec.family, tuple(spec.transformer.items()), False)
    model = build_on_meta(spec.family, spec.transformer)
    kept = model._keep_in_fp32_modules or ()
    for name, parameter in [*model.named_parameters()]:
        if not any(part in name for part in kept):  # cast as on loading
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, nn.Parameter(parameter.to(getattr(torch, dtype))))
    for quant in (None, "fp8"):
        if quant:
            quantize(model.blocks, META)
        counted = weights_of(spec, spec.transformer, dtype, quant)
        whole = bytes_of(model)
        assert whole == published_transformer_bytes(spec) or (dtype, quant) != ("bfloat16", None)
        assert (counted.total, counted.blocks) == (whole, tuple(map(bytes_of, model.blocks)))
        for resident in (0, 1, 5, 38, 40, 59, 99):
            streamed = [bytes_of(block) for block in BlockStream(model, model.blocks, CPU, resident).streamed]
            assert counted.streamed(resident) == streamed
            room = min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)
            assert counted.on_device(resident) == whole - sum(streamed) + room


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize(("task", "build"), [("reference_to_video", umt5), ("t2v", llama_and_clip)])
def test_bytes_of_the_text_encoder(task, build, dtype, quant):
    with META:
        model = build().to(getattr(torch, dtype))
    blocks = model[0].layers if task == "t2v" else model.encoder.block
    if quant:
        quantize(blocks, META)
    stage = plan_of(task, dtype=dtype, quant=quant).components["text encoder"]
    assert stage.weights == pytest.approx(bytes_of(model), rel=0.02)
    assert stage.streamed == pytest.approx(bytes_of(model) - sum(map(bytes_of, blocks[STREAM_SLOTS:])), rel=0.02)


@pytest.mark.parametrize("resident", [0, 5, 40, 99])
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_what_is_streamed_from_the_host(resident, quant):
    made = plan_of("talking_avatar", quant=quant, stream_blocks=resident, memory="stream", audio_seconds=8.0)
    weights = weights_of(made.request.task, made.request.task.transformer, "bfloat16", quant)
    assert made.streamed_from_host == max(0, 40 - resident) * weights.blocks[0]
    assert made.components["transformer"].streamed == weights.on_device(resident)


# Activations of the VAEs; those of the transformers are tested with their families


def activations_of_a_vae(model: Any, frames: int, latent_frames: int, height: int, width: int) -> tuple[int, int]:
    """Peak bytes of encoding and of decoding, on the meta device."""
    with LiveBytes() as encoding:
        model.encode(torch.empty(1, 3, frames, height, width, device=META))
    with LiveBytes() as decoding:
        for _ in model.decode_stream(torch.empty(1, 16, latent_frames, height // 8, width // 8, device=META)):
            pass
    return encoding.peak, decoding.peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("height", "width"), [(720, 1280), (480, 832)])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3)])
def test_activations_of_the_vae(monkeypatch, dtype, height, width, tiles):
    """At the official sizes, on the meta device. Three latent frames suffice: longer videos have the same peak."""
    monkeypatch.setattr(wan_vae, "displayable", lambda chunk, index: chunk)  # it needs values
    with META:
        model = VideoVAE(AutoencoderKLWan().eval())
    replace_tensors(model.module, lambda tensor: nn.Parameter(tensor.detach().to(getattr(torch, dtype))))
    model.tiles, model.mean, model.std = tiles, model.mean.to(META), model.std.to(META)
    planned_bytes = [
        family_of(task_spec("talking_avatar")).vae_bytes((height, width), dtype, part, tiles)
        for part in ("encode", "decode")
    ]
    assert planned_bytes == pytest.approx(activations_of_a_vae(model, 9, 3, height, width), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "dtype"), [(544, 960, "bfloat16"), (720, 720, "float32")])
def test_activations_of_the_hunyuan_vae(monkeypatch, dtype, height, width):
    """Encoding an image, and decoding two pieces in time; longer videos have the same peak."""
    monkeypatch.setattr(hunyuan_vae, "displayable", lambda chunk, index: chunk.float())  # it needs values
    with META:
        model = HunyuanVAE(AutoencoderKLHunyuanVideo().eval())
    replace_tensors(model.module, lambda tensor: nn.Parameter(tensor.detach().to(getattr(torch, dtype))))
    stages = plan_of("i2v", height=height, width=width, vae_dtype=dtype).components
    planned_bytes = [stages[f"VAE {part}"].activations for part in ("encode", "decode")]
    assert planned_bytes == pytest.approx(activations_of_a_vae(model, 1, 8, height, width), rel=0.05)


# Whole plans


@pytest.mark.parametrize(
    ("frames", "size", "tokens", "petaflop"), [(97, (544, 960), 51_000, 2.6), (289, (720, 720), 147_825, 18.2)]
)
def test_the_plan_of_v1(frames, size, tokens, petaflop):
    height, width = size
    values = {
        "height": height, "width": width, "num_frames": frames, "guidance_scale": 6.0, "num_inference_steps": 30,
        "quant": "fp8", "memory": "stream",
    }  # fmt: skip
    made = plan_of("t2v", **values)
    (only,) = made.passes
    assert only.latents == (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8) and only.tokens == tokens
    assert made.forwards == 60
    assert only.flop / made.forwards == pytest.approx(petaflop * 1e15, rel=0.02)
    assert list(made.components) == ["text encoder", "transformer", "VAE decode"]
    assert made.peak("stream") < 18.5e9 < made.peak("resident")  # the published peak of V1, streamed
    cached = plan_of("t2v", **values, cache=0.1)
    assert (
        cached.components["transformer"].activations - made.components["transformer"].activations
        == 5 * tokens * 3072 * 2
    )


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize(("frames", "tokens"), [(97, 25 * 45 * 80), (289, 73 * 45 * 80)])
def test_v1_at_720p_with_embedded_guidance(task, frames, tokens):
    """One forward per step, not two as with --guidance_scale; text tokens are not counted."""
    flags = {"num_frames": frames, "embedded_guidance_scale": 6.0, "num_inference_steps": 30, "memory": "stream"}
    made, guided = (plan_of(task, **flags, guidance_scale=scale) for scale in (1.0, 6.0))
    (only,) = made.passes
    assert only.latents == (1, 16, (frames - 1) // 4 + 1, 90, 160) and only.tokens == tokens
    assert (made.forwards, guided.forwards) == (30, 60)
    assert made.peak("stream") < made.peak("resident")


@pytest.mark.parametrize(
    ("task", "tokens", "petaflop"), [("reference_to_video", 126_000, 16.1), ("single_shot_extension", 144_000, 20.5)]
)
def test_the_published_sizes(task, tokens, petaflop):
    """5 s at 720 x 1280, worked out by hand."""
    (made,) = plan_of(task).passes
    assert made.tokens == tokens
    assert made.flop / 8 == pytest.approx(petaflop * 1e15, rel=0.005)


def test_the_published_avatar():
    """Windows at 720 x 1280; 8 s take the key-frame pass and three windows."""
    made = plan_of("talking_avatar", audio_seconds=8.0, num_inference_steps=4)
    assert [part.tokens for part in made.passes] == [75_600] * 4


def test_long_runs_on_a_gpu_are_compiled():
    """That depends on nothing that may not change a video: the number of ranks, the memory mode, the GPU."""

    def compiles(device: str = "cuda:0", **values: Any) -> bool:
        return replace(plan_of(**values), device=device).compiles

    small = {"height": 480, "width": 848}
    for ways in ({}, {"memory": "stream"}, {"use_usp": True, "ranks": Ranks(3, 8, 3, 8)}):
        assert compiles(**ways)
        assert not compiles(**ways, **small)
    assert not compiles("cpu")
    assert compiles("cpu", compile="on", **small)
    assert not compiles(compile="off")


def test_one_of_several_processes():
    """Its share of the tokens and, if sharded, of the weights; shards stay on the device during other stages."""
    alone, eight = plan_of(use_usp=True), plan_of(use_usp=True, ranks=Ranks(3, 8, 3, 8))
    assert eight.degrees == ParallelConfig(1, 1, 8)
    transformer = eight.components["transformer"]
    assert transformer.weights == alone.components["transformer"].weights
    assert 1 / 8 < transformer.activations / alone.components["transformer"].activations < 1 / 2
    sharded = plan_of(use_usp=True, shard_weights=True, ranks=Ranks(3, 8, 3, 8))
    weights = weights_of(alone.request.task, alone.request.task.transformer, "bfloat16", None)
    held = sharded.components["transformer"].weights
    assert held == pytest.approx(weights.outside * 9 / 8 + (40 / 8 + 2) * weights.blocks[0], rel=1e-6)
    assert sharded.peak("offload") == sharded.components["VAE decode"].weights + held + max(
        stage.activations for name, stage in sharded.components.items() if name.startswith("VAE")
    )
    assert (
        plan_of(use_usp=True, shard_weights=True).components == alone.components
    )  # a single process has nobody to shard with
