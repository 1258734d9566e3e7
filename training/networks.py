"""The small networks: sizes, initialization, and the VAEs' forward passes in training.

The pipelines run the Wan VAE one latent frame at a time, with caches. Here a whole clip goes through at once, with the
same result and a third of the kernel launches: its convolutions are causal, and `resampled` handles the first frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)
from torch import Tensor, nn

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.wan import transformer as wan_transformer
from skyreels_v3.wan.key_maps import TEXT_TOKENS
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel
from training.encoders import WIDTH
from training.layouts import AUDIO_ENCODER, CLIP, IMAGE_ENCODER

VAE = {"base_dim": 8, "decoder_base_dim": 12}  # training encodes far more than it decodes
HUNYUAN_VAE = {"block_out_channels": [16, 32, 40, 40], "norm_num_groups": 8, "layers_per_block": 1}
TRANSFORMER = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 5,
    "ffn_dim": 768,
    "text_dim": WIDTH,
    "freq_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
}
AVATAR = TRANSFORMER | {
    "num_attention_heads": 2,
    "ffn_dim": 384,
    "in_channels": 36,
    "image_dim": IMAGE_ENCODER["hidden_size"],
    "audio_features": AUDIO_ENCODER["num_hidden_layers"] * AUDIO_ENCODER["hidden_size"],
    "audio_hidden_dim": 32,
    "audio_tokens": 4,
    "audio_dim": 48,
}
HUNYUAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "rope_axes_dim": [8, 12, 12],
    "num_layers": 1,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": CLIP["hidden_size"],
    "guidance_embeds": True,
    "out_channels": 16,
    "mlp_ratio": 2.5,
}
SCALING = 0.476986  # the config's own default for HunyuanVideo's VAE
LATENTS = 16
TEXT_ROWS = 48  # per caption, at most
LOGITS = 2**18  # of attention on a CPU, at a time


# Transformers


def build_transformer(name: str) -> SkyReelsTransformer3DModel | HunyuanTransformer3DModel:
    """A transformer that predicts zeros."""
    if name in ("t2v", "i2v"):
        made: Any = HunyuanTransformer3DModel(**HUNYUAN, in_channels=LATENTS * (2 if name == "i2v" else 1))
        made.set_attention(attention)
    else:
        made = SkyReelsTransformer3DModel(**(AVATAR if name == "talking_avatar" else TRANSFORMER))
        made.set_attention(attention, cross_attention=padded_attention)
    with torch.no_grad():
        made.proj_out.weight.zero_()
        made.proj_out.bias.zero_()
    return made


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention (B, L, N, D); `bias` (keys,) is added to the logits.

    On a CPU, training with torch's own kernel takes twice as long as with plain matmuls on a few samples at a time,
    whose logits stay in the cache.
    """
    if query.is_cuda:
        mask = None if bias is None else bias.expand(query.shape[1], -1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    query, key, value = (part.transpose(1, 2) for part in (query * query.shape[-1] ** -0.5, key, value))
    some = max(1, LOGITS // (query.shape[1] * query.shape[2] * key.shape[2]))
    made = []
    for q, k, v in zip(query.split(some), key.split(some), value.split(some), strict=True):
        logits = q @ k.mT
        made.append((logits if bias is None else logits + bias).softmax(dim=-1) @ v)
    return torch.cat(made).transpose(1, 2)


def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention (B, L, N, D) to the conditions; the last of `TEXT_ROWS` + 1 text rows stands for all padding."""
    if key.shape[1] != TEXT_ROWS + 1:
        return attention(query, key, value)
    copies = key.new_zeros(TEXT_ROWS + 1)
    copies[-1] = math.log(TEXT_TOKENS - TEXT_ROWS)  # n equal keys act as one whose logit is higher by log(n)
    return attention(query, key, value, copies)


@contextmanager
def quick_tables() -> Iterator[None]:
    """Embed timesteps and cache rotary tables on the model's device, so that training steps wait for no copy."""
    tables: dict[tuple[Any, ...], Tensor] = {}
    rotary, sinusoid = wan_transformer.rotary_tables, wan_transformer.sinusoid

    def kept(segments: Any, patch_size: Any, head_dim: int) -> Tensor:
        places = [
            (s.start_frame, tuple(s.latents.shape[2:]), s.latents.device) for s in cast("list[Segment]", segments)
        ]
        key = (*places, head_dim)
        if key not in tables:
            tables[key] = rotary(segments, patch_size, head_dim)
        return tables[key]

    def sinusoid_on_device(timestep: Tensor, channels: int) -> Tensor:
        half = channels // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angles = timestep.detach().double()[..., None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()

    wan_transformer.rotary_tables, wan_transformer.sinusoid = kept, sinusoid_on_device
    try:
        yield
    finally:
        wan_transformer.rotary_tables, wan_transformer.sinusoid = rotary, sinusoid


# VAEs


def build_vae(kind: str) -> AutoencoderKLWan | AutoencoderKLHunyuanVideo:
    """A nearly linear VAE: the last convolution of each residual block is zero, so that the block is the identity.

    With diffusers' initialization it does not learn. V3's does not look at the past at first, so what it learns from
    pictures holds for clips.
    """
    made = AutoencoderKLWan(**VAE) if kind == "wan" else AutoencoderKLHunyuanVideo(**HUNYUAN_VAE)
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                past = part.kernel_size[0] - 1 if isinstance(part, WanCausalConv3d) else 0
                part.weight.normal_(std=math.sqrt((past + 1) / part.weight[0].numel()))
                part.bias.zero_()
        for part in made.modules():
            last = last_layer(part)
            if last is not None:
                last.weight.zero_()
                last.bias.zero_()
    ignore_the_past(made)
    return made


@torch.no_grad()
def ignore_the_past(vae: nn.Module) -> None:
    """Let V3's VAE encode the last of each four frames as a picture, and decode it four times."""
    for part in vae.modules():
        if isinstance(part, WanCausalConv3d):
            part.weight[:, :, :-1] = 0
        if isinstance(part, WanResample) and hasattr(part, "time_conv"):
            kernel = part.time_conv.weight  # (C or 2 C, C, 3, 1, 1)
            kernel[:, :, -1, 0, 0] = torch.eye(kernel.shape[1]).repeat(kernel.shape[0] // kernel.shape[1], 1)
            part.time_conv.bias.zero_()


def to_channels_last(module: nn.Module) -> None:
    """Convert convolution weights to the channels-last memory format, in which bfloat16 is fast."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(part, nn.Conv2d) else torch.channels_last_3d
            part.weight.data = part.weight.data.contiguous(memory_format=layout)


def last_layer(part: nn.Module) -> Any:
    if isinstance(part, WanResidualBlock):
        return part.conv2
    if isinstance(part, HunyuanVideoResnetBlockCausal3D):
        return part.conv2.conv
    if isinstance(part, WanAttentionBlock):
        return part.proj
    return part.to_out[0] if isinstance(part, Attention) else None


def resampled(layer: WanResample, x: Tensor) -> Tensor:
    """Run a whole clip through a resampling layer: the first frame bypasses the temporal resampling."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
        x = torch.cat((x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), dim=2)
    batch, _, frames = x.shape[:3]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
    return x


def through(stages: Any, x: Tensor) -> Tensor:
    for stage in stages:
        x = resampled(stage, x) if isinstance(stage, WanResample) else stage(x)
    return x


def moments_of(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, 16, F, h, w) of a video's raw latents."""
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        made = vae.quant_conv(vae.encoder(video))
    else:
        encoder = vae.encoder
        x = through(encoder.down_blocks, encoder.conv_in(video))
        x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
        made = vae.quant_conv(x)
    mean, variance = made.float().chunk(2, dim=1)
    return mean, variance.clamp(-30, 20)


def decoded(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Decode raw latents to a video, not clamped to [-1, 1], where gradients would vanish."""
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        return vae.decoder(vae.post_quant_conv(latents)).float()
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        x = through([*block.resnets, *(block.upsamplers or ())], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))).float()


def published_normalization(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (16,) by which raw latents are normalized, from the config's constants."""
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        return torch.zeros(LATENTS), torch.full((LATENTS,), 1 / SCALING)
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


@torch.no_grad()
def fold_normalization(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, mean: Tensor, std: Tensor) -> None:
    """Change raw latents of measured mean and standard deviation (16,) to the published ones, in encoder and decoder.

    Layouts without a VAE config have no place for other constants, so they are folded into its 1 x 1 x 1 convolutions.
    """
    wanted_mean, wanted_std = (value.to(mean) for value in published_normalization(vae))
    factor = wanted_std / std  # out' = (out - mean) * factor + wanted_mean
    out, back = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat((factor, torch.ones_like(factor)))
    shift = torch.cat((wanted_mean - mean * factor, 2 * factor.log()))
    out.weight.mul_(scale.view(-1, 1, 1, 1, 1))
    out.bias.copy_(out.bias * scale + shift)
    back.bias.sub_(back.weight[:, :, 0, 0, 0] @ ((wanted_mean - mean * factor) / factor))
    back.weight.mul_((1 / factor).view(1, -1, 1, 1, 1))


def normalized(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, raw: Tensor) -> Tensor:
    mean, std = (value.to(raw).view(1, -1, 1, 1, 1) for value in published_normalization(vae))
    return (raw - mean) / std


def denormalized(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    mean, std = (value.to(latents).view(1, -1, 1, 1, 1) for value in published_normalization(vae))
    return latents * std + mean


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
