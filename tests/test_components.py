"""What is done to models after loading."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn

from skyreels_v3.components import use_channels_last

SMALL = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
VAES = {
    "wan": lambda: AutoencoderKLWan(base_dim=8),
    "hunyuan": lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **SMALL),
}


@pytest.mark.parametrize("name", VAES)
@torch.inference_mode()
def test_channels_last_changes_the_layout_alone(name):
    """Both VAEs also have weights of other ranks, which keep their layout."""
    torch.manual_seed(0)
    plain = VAES[name]().eval()
    laid_out = copy.deepcopy(plain)
    use_channels_last(laid_out)
    convolutions = [part for part in laid_out.modules() if isinstance(part, nn.Conv3d)]
    assert all(part.weight.is_contiguous(memory_format=torch.channels_last_3d) for part in convolutions)
    latents = torch.randn(1, 16, 2, 4, 4)
    torch.testing.assert_close(laid_out.decode(latents).sample, plain.decode(latents).sample, atol=1e-5, rtol=0)
