"""t2v and i2v in float32 against diffusers' own pipelines with the toy's components."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig
from imageio_ffmpeg import read_frames
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.tasks import task_spec
from tests.conftest import ROOT

PROMPT = "FPS-24, A cat wearing sunglasses"
NEGATIVE = "blur, low quality"
HEIGHT, WIDTH, FRAMES, STEPS, SEED = 64, 96, 13, 4, 7
COMMAND = [
    *("--model_id", "tiny", "--device", "cpu", "--prompt", PROMPT, "--seed", SEED, "--no_cache"),
    *("--height", HEIGHT, "--width", WIDTH, "--num_inference_steps", STEPS, "--save_latents", "made.safetensors"),
]
TOLERANCE = 1e-5
FLAGS = {
    "plain": [],
    "one after the other": ["--sequence_batch"],
    "offload": ["--offload"],
    "streamed": ["--offload", "--parameters_level"],
    "streamed, pinned": ["--offload", "--parameters_level", "--high_cpu_memory"],
}


@pytest.fixture
def picture(tmp_path) -> Path:
    """An image with the output's aspect ratio, but larger."""
    image = Image.open(ROOT / "assets" / "fox.png").convert("RGB").resize((2 * WIDTH, 2 * HEIGHT))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def stock(cache, monkeypatch):
    """diffusers' pipeline with the toy's components, loaded by the libraries themselves."""
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))

    def load(task: str):
        root = make_tiny(task_spec(task))
        transformer = HunyuanVideoTransformer3DModel.from_pretrained(root)
        kind = {"t2v": HunyuanVideoPipeline, "i2v": HunyuanSkyreelsImageToVideoPipeline}[task]
        pipeline = kind(
            text_encoder=LlamaModel.from_pretrained(root / "text_encoder"),
            tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
            transformer=transformer,
            vae=AutoencoderKLHunyuanVideo.from_pretrained(root / "vae"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler"),
            text_encoder_2=CLIPTextModel.from_pretrained(root / "text_encoder_2"),
            tokenizer_2=AutoTokenizer.from_pretrained(root / "tokenizer_2"),
        )
        pipeline.vae.enable_tiling()  # as in the published code
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def expected(pipeline, guidance: float, output: str = "latent", **more):
    """What diffusers' pipeline returns."""
    return pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, true_cfg_scale=guidance, guidance_scale=1.0, output_type=output,
        generator=torch.Generator().manual_seed(SEED), **more,
    ).frames  # fmt: skip


def made(main, task: str, *flags: object) -> torch.Tensor:
    """The command's final latents."""
    code, _, stderr = main("--task_type", task, *COMMAND, *flags)
    assert code == 0, stderr
    return load_file("made.safetensors")["latents.0"]


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "way"), [(1.0, "plain"), *((6.0, way) for way in FLAGS)])
def test_text_to_video(main, stock, way, guidance):
    negative = ["--negative_prompt", NEGATIVE] if guidance > 1 else []
    flags = ["--guidance_scale", guidance, "--num_frames", FRAMES, *negative]
    torch.testing.assert_close(
        made(main, "t2v", *flags, *FLAGS[way]), expected(stock("t2v"), guidance), atol=TOLERANCE, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "streamed, pinned"])
def test_image_to_video(main, stock, picture, way):
    flags = ["--num_frames", FRAMES, "--image", picture, "--negative_prompt", NEGATIVE]
    latents = expected(stock("i2v"), 6.0, image=Image.open(picture))
    torch.testing.assert_close(made(main, "i2v", *flags, *FLAGS[way]), latents, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["offload", "streamed"])
def test_a_picture_of_another_shape_and_more_than_a_tile(main, stock, tmp_path, way):
    """Cropped to the video's aspect ratio, then resized, and encoded in diffusers' tiles: two rows of three."""
    fox = Image.open(ROOT / "assets" / "fox.png").convert("RGB").resize((300, 403))
    fox.save(tmp_path / "fox.png")
    height, width = 272, 400
    cut = fox.crop((0, 100, 300, 304))  # 204 rows
    pipeline = stock("i2v")
    latents = pipeline(
        cut.resize((width, height), Image.Resampling.LANCZOS), PROMPT, negative_prompt=NEGATIVE, num_frames=1,
        height=height, width=width, num_inference_steps=2, true_cfg_scale=6.0, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(SEED),
    ).frames  # fmt: skip
    size = ["--height", height, "--width", width, "--num_frames", 1, "--num_inference_steps", 2]
    flags = [*size, "--image", "fox.png", "--negative_prompt", NEGATIVE, *FLAGS[way]]
    # diffusers' pipeline uses torch's slow convolutions, which round differently, and this small VAE amplifies that
    torch.testing.assert_close(made(main, "i2v", *flags), latents, atol=3 * TOLERANCE, rtol=0)


@pytest.mark.slow
def test_the_embedded_guidance_is_told(main, stock, monkeypatch):
    """V1 without classifier-free guidance: one forward per step."""
    pipeline = stock("t2v")
    latents = pipeline(
        prompt=PROMPT, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=6.0,
        output_type="latent", generator=torch.Generator().manual_seed(SEED),
    ).frames  # fmt: skip
    forward = MagicMock(side_effect=HunyuanVideoTransformer3DModel.forward)
    monkeypatch.setattr(HunyuanVideoTransformer3DModel, "forward", lambda *args, **more: forward(*args, **more))
    flags = ["--guidance_scale", 1, "--embedded_guidance_scale", 6, "--num_frames", FRAMES]
    torch.testing.assert_close(made(main, "t2v", *flags), latents, atol=TOLERANCE, rtol=0)
    assert forward.call_count == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_fp8(main, stock, picture, task):
    """At least 24 dB SNR in the latents, the worst case when rounding changes weights by up to 1 in 16."""
    more = {"image": Image.open(picture)} if task == "i2v" else {}
    latents = expected(stock(task), 6.0, **more)
    flags = ["--num_frames", FRAMES, "--negative_prompt", NEGATIVE, "--quant"]
    flags += ["--image", picture] if task == "i2v" else []
    error = (made(main, task, *flags) - latents).pow(2).mean().sqrt()
    assert 0 < error
    assert 20 * math.log10(latents.pow(2).mean().sqrt() / error) > 24


@pytest.mark.slow
def test_frames(main, stock, tmp_path):
    """The decoded video, after H.264."""
    code, _, _ = main("--task_type", "t2v", *COMMAND, "--num_frames", FRAMES, "--negative_prompt", NEGATIVE,
                        "--output", "frames/")  # fmt: skip
    assert code == 0
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").glob("*.png"))]
    wanted = expected(stock("t2v"), 6.0, output="np")[0]  # [F, H, W, 3] in [0, 1]
    assert len(frames) == FRAMES
    assert np.abs(np.stack(frames) - (wanted * 255).round()).max() <= 1


def test_frames_a_second(main):
    code, _, _ = main("--task_type", "t2v", *COMMAND, "--num_frames", 5, "--fps", 30, "--output", "a.mp4")
    assert code == 0
    assert next(read_frames("a.mp4"))["fps"] == 30


@pytest.mark.slow
def test_a_long_video_is_made_with_riflex(main):
    """With 201 frames RIFLEx changes the video; shorter videos are the same without it."""
    small = ["--height", 32, "--width", 32, "--num_inference_steps", 1, "--guidance_scale", 1]
    long = made(main, "t2v", *small, "--num_frames", 201)
    assert long.shape == (1, 16, 51, 4, 4)
    without = made(main, "t2v", *small, "--num_frames", 201, "--no_riflex", "--save_latents", "b.safetensors")
    assert (load_file("b.safetensors")["latents.0"] - long).abs().max() > 1e-3
    assert torch.equal(without, long)  # the first file is unchanged
    short = made(main, "t2v", *small, "--num_frames", 189, "--save_latents", "c.safetensors")
    made(main, "t2v", *small, "--num_frames", 189, "--no_riflex", "--save_latents", "d.safetensors")
    assert torch.equal(load_file("c.safetensors")["latents.0"], load_file("d.safetensors")["latents.0"])
    assert short.shape == long.shape


@pytest.mark.slow
def test_several_videos(main, tmp_path):
    """Seeds are consecutive, each video is that of its seed, and the models are loaded once."""
    small = ["--task_type", "t2v", *COMMAND[:-2], "--num_frames", 5, "--outdir", "films"]
    code, out, stderr = main(*small, "--video_num", 2)
    assert code == 0
    names = [Path(line) for line in out.splitlines()]
    assert names == [Path(f"results/films/{PROMPT}_{SEED}_0.mp4"), Path(f"results/films/{PROMPT}_{SEED + 1}_1.mp4")]
    assert stderr.count("loading:   0%") == 1
    code, out, _ = main(*small, "--seed", SEED + 1)
    assert code == 0
    frames = [[*read_frames(str(path))][1:] for path in (names[1], Path(out.strip()))]
    assert frames[0] == frames[1]

    names[0].unlink()  # as if the run had been killed there
    made_at = names[1].stat().st_mtime_ns
    names.append(Path(f"results/films/{PROMPT}_{SEED + 2}_2.mp4"))
    code, out, stderr = main(*small, "--video_num", 3, "--resume")
    assert (code, out.splitlines()) == (0, [str(name) for name in names]), stderr
    assert names[1].stat().st_mtime_ns == made_at and len([*names[0].parent.iterdir()]) == 4


def test_a_quantized_checkpoint_stands_alone(main, tmp_path):
    """It includes the components that V1 takes from elsewhere, and makes the same video."""
    flags = ["--num_frames", 5, "--quant"]
    first = made(main, "t2v", *flags, "--save_quantized", "saved")
    code, _, stderr = main("--task_type", "t2v", *COMMAND, *flags[:2], "--model_id", "saved",
                           "--save_latents", "again.safetensors")  # fmt: skip
    assert code == 0, stderr
    # the alignment of weights in memory changes the order of summation
    torch.testing.assert_close(load_file("again.safetensors")["latents.0"], first, atol=1e-4, rtol=0)
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"text_encoder", "vae", "scheduler", "config.json"}


CACHED_STEPS = ["--num_frames", FRAMES, "--negative_prompt", NEGATIVE, "--num_inference_steps", 16]


def blocks_of(caplog) -> tuple[int, int]:
    """The numbers of computed blocks and of all blocks, from the last run's log."""
    found = re.findall(r"computed (\d+) of (\d+) blocks", caplog.text)
    return int(found[-1][0]), int(found[-1][1])


@pytest.mark.slow
def test_first_block_cache_is_that_of_diffusers(main, stock, caplog):
    caplog.set_level(logging.INFO)
    pipeline = stock("t2v")
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    latents = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=16, true_cfg_scale=6.0, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
    ).frames  # fmt: skip
    cached = made(main, "t2v", *CACHED_STEPS, "--cache", "fbcache:0.5")
    torch.testing.assert_close(cached, latents, atol=10 * TOLERANCE, rtol=0)
    computed, total = blocks_of(caplog)
    assert total == 2 * 16 * 4 and computed < 0.9 * total  # conditions, steps, blocks
    plain = made(main, "t2v", *CACHED_STEPS, "--save_latents", "plain.safetensors")
    assert torch.equal(plain, cached)  # the first file is unchanged
    assert (load_file("plain.safetensors")["latents.0"] - cached).abs().max() > 1e-3


def test_a_cache_for_a_task_of_v3(main, caplog):
    caplog.set_level(logging.INFO)
    code, _, stderr = main(
        "--task_type", "reference_to_video", "--model_id", "tiny", "--device", "cpu", "--prompt", "a fox",
        "--ref_imgs", ROOT / "assets" / "fox.png", "--num_frames", 5, "--height", 64, "--width", 64,
        "--num_inference_steps", 20, "--cache", "fbcache:0.2",
    )  # fmt: skip
    assert code == 0, stderr
    computed, total = blocks_of(caplog)
    assert total == 20 * 2 and computed < total
