"""The planner's counts, against the real modules."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
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

from skyreels_v3 import plan as planner
from skyreels_v3.hunyuan import sizes as sizes_of_hunyuan
from skyreels_v3.hunyuan import vae as hunyuan_vae
from skyreels_v3.hunyuan.vae import HunyuanVAE
from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.memory.quantize import Fp8Linear, quantize
from skyreels_v3.memory.stream import STREAM_SLOTS, BlockStream
from skyreels_v3.parallel.ranks import ParallelConfig, Ranks
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.wan import sizes as sizes_of_wan
from skyreels_v3.wan import transformer as wan_transformer
from skyreels_v3.wan import vae
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from skyreels_v3.wan.vae import VideoVAE
from tests.planning import planned


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


def published(task: str = "reference_to_video") -> sizes_of_wan.WanSizes:
    return sizes_of_wan.WanSizes(**task_spec(task).transformer)


def small_model(dtype: torch.dtype, **changes: int) -> tuple[sizes_of_wan.WanSizes, SkyReelsTransformer3DModel]:
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
    assert sum(parameter.numel() for parameter in image_encoder.parameters()) == sizes_of_wan.IMAGE_ENCODER_PARAMETERS
    assert sum(parameter.numel() for parameter in audio_encoder.parameters()) == sizes_of_wan.AUDIO_ENCODER_PARAMETERS
    assert sum(parameter.numel() for parameter in vae.parameters()) == sizes_of_wan.VAE_PARAMETERS
    assert sum(parameter.numel() for parameter in text_encoder.parameters()) == sizes_of_wan.UMT5.parameters


@torch.inference_mode()
def test_work_of_a_forward():
    """torch's own counter sees the embeddings and the head as well, which are left out of the plan."""
    sizes, model = small_model(torch.float32)
    inputs = (
        [Segment(torch.randn(1, 16, 4, 32, 32))],
        torch.tensor([500]),
        torch.randn(1, 512, 64),
    )
    # the counter does not know every fused kernel, but the products of the plain one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    assert sizes.forward_flop(4 * 16 * 16) == pytest.approx(counter.get_total_flops(), rel=0.03)


def on_meta(sizes: sizes_of_wan.WanSizes, dtype: str) -> SkyReelsTransformer3DModel:
    """The real model without its numbers, in the dtypes that it is loaded in."""
    with torch.device("meta"):
        model = SkyReelsTransformer3DModel(**vars(sizes)).eval()
    for name, parameter in [*model.named_parameters()]:
        if not any(part in name for part in model._keep_in_fp32_modules):
            path, _, own = name.rpartition(".")
            cast = nn.Parameter(parameter.to(getattr(torch, dtype)), requires_grad=False)
            setattr(model.get_submodule(path), own, cast)
    return model


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("task", "frames", "height", "width"),
    [
        ("reference_to_video", 35, 90, 160),
        ("reference_to_video", 35, 60, 104),
        ("single_shot_extension", 40, 90, 160),
        ("talking_avatar", 21, 90, 160),
        ("talking_avatar", 21, 60, 104),
    ],
)
@torch.inference_mode()
def test_activations_of_a_forward(task, frames, height, width, dtype, speakers=1):
    """At the official sizes, without numbers."""
    sizes = replace(published(task), num_layers=1)
    model = on_meta(sizes, dtype)
    image = empty(1, 257, sizes.image_dim) if sizes.image_dim else None
    audio = empty(1, speakers, 4 * frames - 3, 5, 12, 768) if sizes.audio_dim else None
    conditions = empty(1, 512, 4096), image, audio, empty(3, height, width) if speakers > 1 else None
    latents = empty(1, sizes.in_channels, frames, height, width)
    segments, timestep = [Segment(latents)], torch.tensor([500])
    if task == "single_shot_extension":
        segments = [Segment(latents[:, :, :7], clean=True), Segment(latents[:, :, 7:], 7)]
        timestep = torch.tensor([[0] * 7 + [500] * (frames - 7)])
    with LiveBytes() as counter:
        model(segments, timestep, *conditions)
    planned = sizes.activation_bytes(frames * height * width // 4, dtype)
    planned += sizes.context_bytes(frames, speakers, dtype)
    assert planned == pytest.approx(counter.peak, rel=0.05)


@torch.inference_mode()
def test_activations_with_two_speakers():
    test_activations_of_a_forward("talking_avatar", 21, 90, 160, "bfloat16", speakers=2)


def test_numbers_that_the_plan_repeats():
    """It is made without torch, and knows these of the modules that do the work."""
    assert sizes_of_wan.TOKENS_AT_ONCE == wan_transformer.TOKENS_AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("height", "width"), [(720, 1280), (480, 832)])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3)])
def test_activations_of_the_vae(monkeypatch, dtype, height, width, tiles):
    """At the official sizes, without numbers. Three latent frames: no more is alive at one time in a longer video."""
    monkeypatch.setattr(vae, "displayable", lambda chunk, index: chunk)  # it looks at values
    with torch.device("meta"):
        model = VideoVAE(AutoencoderKLWan().eval())
    replace_tensors(model.module, lambda tensor: nn.Parameter(tensor.detach().to(getattr(torch, dtype))))
    model.tiles = tiles
    with LiveBytes() as encoding:
        model.mean, model.std = model.mean.to("meta"), model.std.to("meta")
        model.encode(empty(1, 3, 9, height, width))
    with LiveBytes() as decoding:
        for _ in model.decode_stream(empty(1, 16, 3, height // 8, width // 8)):
            pass
    request = GenerationRequest(
        task=task_spec("reference_to_video"), model_id="a/b", prompt="p", height=height, width=width, vae_dtype=dtype
    )
    request = planned(request).request
    assert planner.vae_bytes(request, "encode", tiles) == pytest.approx(encoding.peak, rel=0.05)
    assert planner.vae_bytes(request, "decode", tiles) == pytest.approx(decoding.peak, rel=0.05)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "dtype"), [(544, 960, "bfloat16"), (720, 720, "float32")])
def test_activations_of_the_hunyuan_vae(monkeypatch, dtype, height, width):
    """A picture's encoding, and the decoding of two pieces in time; a longer video has no more at one time."""
    monkeypatch.setattr(hunyuan_vae, "displayable", lambda chunk, index: chunk.float())  # it looks at values
    with torch.device("meta"):
        model = HunyuanVAE(AutoencoderKLHunyuanVideo().eval())
    replace_tensors(model.module, lambda tensor: nn.Parameter(tensor.detach().to(getattr(torch, dtype))))
    assert sum(parameter.numel() for parameter in model.module.parameters()) == sizes_of_hunyuan.VAE_PARAMETERS
    with LiveBytes() as encoding:
        model.encode(empty(1, 3, 1, height, width))
    with LiveBytes() as decoding:
        for _ in model.decode_stream(empty(1, 16, 8, height // 8, width // 8)):
            pass
    request = GenerationRequest(
        task=task_spec("i2v"), model_id="a/b", prompt="p", height=height, width=width, vae_dtype=dtype
    )
    request = planned(request).request
    assert planner.vae_bytes(request, "encode", (1, 1)) == pytest.approx(encoding.peak, rel=0.05)
    assert planner.vae_bytes(request, "decode", (1, 1)) == pytest.approx(decoding.peak, rel=0.05)


def test_the_text_encoders_of_v1():
    """Llama 3 of 8 billion with HunyuanVideo's words, without its head, and CLIP ViT-L/14's text tower."""
    llama = LlamaConfig(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        encoder, summary = LlamaModel(llama), CLIPTextModel(clip)
    known, (block, *_) = sizes_of_hunyuan.LLAMA_AND_CLIP, encoder.layers
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (encoder, summary, block)]
    assert (known.parameters, known.blocks, known.block) == (counts[0] + counts[1], len(encoder.layers), counts[2])
    quantize([block], torch.device("meta"))
    layers = (layer for layer in block.modules() if isinstance(layer, Fp8Linear))
    assert known.matrices == sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize(
    ("frames", "size", "tokens", "petaflop"), [(97, (544, 960), 51_000, 2.6), (289, (720, 720), 147_825, 18.2)]
)
def test_the_plan_of_v1(frames, size, tokens, petaflop):
    height, width = size
    request = GenerationRequest(
        task=task_spec("t2v"), model_id="a/b", prompt="p", height=height, width=width, num_frames=frames,
        guidance_scale=6.0, num_inference_steps=30, dtype="bfloat16", quant="fp8", memory="stream",
    )  # fmt: skip
    made = planned(request)
    (only,) = made.passes
    assert only.latents == (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8) and only.tokens == tokens
    assert made.forwards == 60
    assert only.flop / made.forwards == pytest.approx(petaflop * 1e15, rel=0.02)
    assert list(made.stages) == ["text encoder", "transformer", "VAE decode"]
    assert made.peak("stream") < 18.5e9 < made.peak("resident")  # the peak that was published for V1, streamed
    cached = planned(replace(request, cache=0.1))
    kept = cached.stages["transformer"].activations - made.stages["transformer"].activations
    assert kept == 5 * tokens * 3072 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("task", [name for name in TASK_NAMES if task_spec(name).family == "wan"])
def test_bytes_of_the_published_transformers(task, dtype):
    """To the byte: whole, in FP8, and while blocks are streamed."""
    sizes = published(task)
    model = on_meta(sizes, dtype)
    for quantized in (False, True):
        if quantized:
            quantize(model.blocks, torch.device("meta"))
        whole, one = bytes_of(model), bytes_of(model.blocks[0])
        assert sizes.weight_bytes(dtype, quantized) == whole
        assert sizes.block_bytes(dtype, quantized) == one
        for keep in (0, 1, 38, 39, 40, 99):
            held = BlockStream(model, model.blocks, torch.device("cpu"), keep)
            away = len(held.streamed) - min(STREAM_SLOTS, len(held.streamed))
            assert sizes.streamed_bytes(dtype, quantized, keep) == whole - away * one


def umt5() -> UMT5EncoderModel:
    """The published text encoder, on meta."""
    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    with torch.device("meta"):
        return UMT5EncoderModel(config).eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_bytes_of_the_text_encoder(dtype, quant):
    request = GenerationRequest(
        task=task_spec("reference_to_video"), model_id="a/b", prompt="p", height=720, width=1280, dtype=dtype,
        quant=quant,
    )  # fmt: skip
    model = umt5().to(getattr(torch, dtype))
    if quant:
        quantize(model.encoder.block, torch.device("meta"))
    stage = planned(request).stages["text encoder"]
    away = sum(map(bytes_of, model.encoder.block[STREAM_SLOTS:]))
    assert stage.weights == pytest.approx(bytes_of(model), rel=0.02)
    assert stage.streamed == pytest.approx(bytes_of(model) - away, rel=0.02)


@pytest.mark.parametrize("keep", [0, 5, 40, 99])
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_what_is_streamed_from_the_host(keep, quant):
    request = GenerationRequest(
        task=task_spec("talking_avatar"), model_id="a/b", prompt="p", height=720, width=1280, dtype="bfloat16",
        quant=quant, stream_blocks=keep, memory="stream", audio_seconds=8.0,
    )  # fmt: skip
    made = planned(request)
    sizes = published("talking_avatar")
    assert made.streamed_from_host == max(0, 40 - keep) * sizes.block_bytes("bfloat16", quant is not None)
    assert made.stages["transformer"].streamed == sizes.streamed_bytes("bfloat16", quant is not None, keep)


@pytest.mark.parametrize(
    ("task", "tokens", "petaflop"), [("reference_to_video", 126_000, 16.1), ("single_shot_extension", 144_000, 20.5)]
)
def test_the_published_sizes(task, tokens, petaflop):
    """5 s in 720 x 1280, worked out by hand elsewhere."""
    request = GenerationRequest(task=task_spec(task), model_id="a/b", prompt="p", height=720, width=1280)
    (made,) = planned(request).passes
    assert made.tokens == tokens
    assert made.flop / 8 == pytest.approx(petaflop * 1e15, rel=0.005)


def test_the_published_avatar():
    """Windows at 720 x 1280; 8 s are the key-frame pass and three windows."""
    spec = task_spec("talking_avatar")
    request = GenerationRequest(
        task=spec, model_id="a/b", prompt="p", height=720, width=1280, audio_seconds=8.0, num_inference_steps=4
    )
    assert [made.tokens for made in planned(request).passes] == [75_600] * 4


@torch.inference_mode()
def test_work_of_an_avatar_forward():
    """With image and audio attention; the embeddings and the audio projection are left out of the plan."""
    sizes, model = small_model(torch.float32, in_channels=36, image_dim=64, audio_dim=48, audio_hidden_dim=8)
    image, audio = torch.randn(1, 257, 64), torch.randn(1, 1, 13, 5, 12, 768)
    text = torch.randn(1, 512, 64)
    segments, timestep = [Segment(torch.randn(1, 36, 4, 32, 32))], torch.tensor([500])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(segments, timestep, text, image, audio)
    assert sizes.forward_flop(4 * 16 * 16) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_one_of_several_processes():
    """Its share of the tokens and, if they are divided, of the weights; what is divided stays when others work."""
    request = GenerationRequest(
        task=task_spec("reference_to_video"), model_id="a/b", prompt="p", height=720, width=1280, dtype="bfloat16",
        use_usp=True,
    )  # fmt: skip
    alone = planned(request)
    eight = planned(request, ranks=Ranks(3, 8, 3, 8))
    assert eight.degrees == ParallelConfig(1, 1, 8)
    transformer = eight.stages["transformer"]
    assert transformer.weights == alone.stages["transformer"].weights
    assert 1 / 8 < transformer.activations / alone.stages["transformer"].activations < 1 / 2
    divided = planned(replace(request, shard_weights=True), ranks=Ranks(3, 8, 3, 8))
    sizes = published()
    blocks = sizes.block_bytes("bfloat16")
    outside = sizes.weight_bytes("bfloat16") - 40 * blocks
    held = divided.stages["transformer"].weights
    assert held == pytest.approx(outside + (40 / 8 + 2) * blocks + outside / 8, rel=1e-6)
    assert divided.peak("offload") == divided.stages["VAE decode"].weights + held + max(
        stage.activations for name, stage in divided.stages.items() if name.startswith("VAE")
    )
    assert planned(replace(request, shard_weights=True)).stages == alone.stages  # with nobody to divide with
