"""Several ranks predict what one does, and send as many bytes as docs/scaling.md says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.hunyuan import family
from skyreels_v3.hunyuan.riflex import riflex
from skyreels_v3.hunyuan.sequence_parallel import lay_out
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.parallel.groups import Group, is_sharded, shard_weights
from skyreels_v3.parallel.usp import torch_usp
from tests.parallel.spawn import DEGREES, WORLD_SIZE, BytesSent, groups, spawn

SMALL = {
    **{"num_attention_heads": 12, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "mlp_ratio": 2.0},
    **{"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": (4, 2, 2)},
}
BLOCKS, DIM = 4, 96
CASES = {  # latents, and number of text tokens
    "nothing divides": ((3, 4, 6), 5),  # 23 tokens; of 4 ranks the last one has exactly the text
    "even": ((2, 4, 6), 12),
    "a text of one token": ((3, 4, 6), 1),
    "more text than video": ((1, 2, 4), 9),
    "fewer tokens than ranks": ((1, 2, 4), 1),  # 3 tokens
    "one of each": ((1, 2, 2), 1),
}


def transformer() -> HunyuanTransformer3DModel:
    torch.manual_seed(0)
    model = HunyuanTransformer3DModel(**SMALL).eval().requires_grad_(False)
    model.set_attention(sdpa)
    return model


def predict(model: HunyuanTransformer3DModel, sizes: tuple[int, ...], text: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, *sizes, generator=draw),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, text, 24, generator=draw),
        encoder_attention_mask=torch.ones(1, text, dtype=torch.long),
        pooled_projections=torch.randn(1, 12, generator=draw),
        guidance=torch.tensor([6000.0]),
        return_dict=False,
    )[0]


def divided(own: dict[str, Group]) -> HunyuanTransformer3DModel:
    model = transformer()
    family.divide_tokens(model, own["sequence"], torch_usp(sdpa, own["ulysses"], own["ring"]))
    return model


def compare() -> None:
    for ring, ulysses in DEGREES:
        if own := groups(ring, ulysses):
            model, alone = divided(own), transformer()
            for name, (sizes, text) in CASES.items():
                for frames in (None, 60):
                    with riflex(model, frames), BytesSent() as bytes_sent:
                        made = predict(model, sizes, text)
                    with riflex(alone, frames):
                        torch.testing.assert_close(made, predict(alone, sizes, text), atol=1e-5, rtol=0)
                    video, size = made[0, 0].numel() // 4, ring * ulysses
                    share = -(-(video + text) // size)
                    tensor = share * DIM * 4
                    gathered = 2 * BLOCKS * tensor * (ring - 1) + min(share, video) * 64 * 4 * (size - 1)
                    assert bytes_sent.sent.pop("all_to_all", 0) == 4 * BLOCKS * tensor * (ulysses - 1) / ulysses, name
                    assert bytes_sent.sent == {"all_gather": gathered}, name
    own = groups(1, WORLD_SIZE)
    model = divided(own)
    shard_weights(model, model.blocks, torch.device("cpu"))
    assert all(map(is_sharded, (model, *model.blocks)))
    for case in CASES.values():
        torch.testing.assert_close(predict(model, *case), predict(transformer(), *case), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_several_ranks_predict_the_same(tmp_path):
    spawn(compare, tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("video", "text"), [(18, 5), (24, 12), (18, 1), (2, 9), (1, 1)])
def test_every_token_is_on_one_rank(video, text, size):
    made = [lay_out(video, text, rank, size) for rank in range(size)]
    assert [token for part in made for token in part.video] == [*range(video)]
    assert [token for part in made for token in part.text] == [*range(text)]
    assert all(part.tokens == video + text and part.own <= part.share for part in made)
    full = (video + text) // made[0].share
    assert all(part.own == part.share for part in made[:full])  # any padding is at the end
