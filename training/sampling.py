"""Samples from a transformer in training, with the pipelines' schedulers, denoising loop and conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyreels_v3.denoising.guidance import FULL, NO_TEXT, Guidance, one_condition
from skyreels_v3.denoising.loop import denoise, euler, euler_of, unipc
from skyreels_v3.hunyuan.conditioning import HunyuanConditioning
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.key_maps import TEXT_TOKENS
from training import networks
from training.layouts import SCHEDULER
from training.tasks import Avatar, Hunyuan, Sample, Task, Video

GUIDANCE, HUNYUAN_STEPS = 3.0, 12  # for V1's samples, which should take only a few seconds


def sample(task: Task, model: Any, kind: str, chosen: Sample) -> tuple[Tensor, Tensor]:
    """Latents (B, 16, F, h, w) sampled under the conditions of encoded samples, and the true latents.

    For a single-shot extension both begin with the condition frames.
    """
    truth = chosen["video"]
    if isinstance(task, Hunyuan):
        # samples have texts of several lengths: one by one
        made = [sample_hunyuan(task, model, {k: v[i : i + 1] for k, v in chosen.items()}) for i in range(len(truth))]
        return torch.cat(made), truth
    if isinstance(task, Video):
        spec = task_spec("reference_to_video" if kind == "references" else "single_shot_extension")
        truth = truth[:, :, :13] if kind == "references" else truth
        condition = task.condition(kind, chosen, truth.shape[2], drop=False)
    else:
        assert isinstance(task, Avatar)
        spec = task_spec("talking_avatar")
        condition = task.condition(chosen, drop=False)
    make = euler if isinstance(task, Avatar) else unipc
    scheduler: Any = make(spec.num_inference_steps, spec.shift or 1.0)
    prefix, truth = truth[:, :, : condition.start_frame], truth[:, :, condition.start_frame :]
    text = F.pad(condition.text, (0, 0, 0, TEXT_TOKENS - condition.text.shape[1]))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)).to(truth.device)
    conditions = {FULL: replace(condition, text=text)}
    made = last(denoise(model, scheduler, noise, conditions, Guidance(((FULL, 1.0),))))
    return torch.cat((prefix, made), dim=2), torch.cat((prefix, truth), dim=2)


def sample_hunyuan(task: Hunyuan, model: Any, chosen: Sample) -> Tensor:
    full = task.condition(chosen, chosen["video"].shape[2], int(chosen["length"]))
    conditions = {
        FULL: full,
        NO_TEXT: HunyuanConditioning(task.negative["context"], task.negative["pooled"], 1.0, full.channels),
    }
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **SCHEDULER}
    scheduler = euler_of(config, HUNYUAN_STEPS, None)
    noise = torch.randn(chosen["video"].shape, generator=torch.Generator().manual_seed(0)).to(chosen["video"].device)
    return last(denoise(model, scheduler, noise, conditions, one_condition(GUIDANCE, NO_TEXT)))


def last(steps: Iterator[tuple[int, Tensor]]) -> Tensor:
    """The latents after the last step."""
    *_, (_, latents) = steps
    return latents


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode normalized latents; V1's in the same pieces as in the pipeline."""
    from skyreels_v3.hunyuan.vae import HunyuanVAE

    if hasattr(vae, "tile_sample_stride_num_frames"):
        return torch.cat([*HunyuanVAE(vae).decode_stream(latents)], dim=2)
    return networks.decoded(vae, networks.denormalized(vae, latents))
