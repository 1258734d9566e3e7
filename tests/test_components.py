"""What is done to models after loading."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn

from skyreels_v3.components import use_channels_last, use_onednn

SMALL = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
VAES = {
    "wan": lambda: AutoencoderKLWan(base_dim=8),
    "hunyuan": lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **SMALL),
}


@pytest.mark.parametrize("name", VAES)
@torch.inference_mode()
def test_layout_and_kernels_change_nothing(name):
    """Both VAEs also have weights of other ranks, which keep their layout. The reference is in float64."""
    torch.manual_seed(0)
    plain = VAES[name]().eval()
    changed = copy.deepcopy(plain)
    use_channels_last(changed)
    convolutions = [part for part in changed.modules() if isinstance(part, nn.Conv3d)]
    assert all(part.weight.is_contiguous(memory_format=torch.channels_last_3d) for part in convolutions)
    use_onednn(changed)
    latents = torch.randn(1, 16, 2, 4, 4)
    video = plain.double().decode(latents.double()).sample
    with torch.profiler.profile() as profile:
        made = changed.decode(latents).sample
    torch.testing.assert_close(made.double(), video, atol=1e-5, rtol=0)
    assert not any("slow_conv3d" in event.name for event in profile.events())
    moments = plain.encode(video).latent_dist.parameters
    torch.testing.assert_close(
        changed.encode(video.float()).latent_dist.parameters.double(), moments, atol=1e-5, rtol=0
    )
