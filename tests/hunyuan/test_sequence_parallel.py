"""Several processes predict what one does: real gloo processes, torch's exchanges, a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.hunyuan.riflex import riflex
from skyreels_v3.hunyuan.sequence_parallel import SequenceParallel, lay_out
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.parallel.groups import Group
from skyreels_v3.parallel.usp import torch_usp
from skyreels_v3.parallel.weights import is_sharded, shard_weights

SMALL = {
    **{"num_attention_heads": 12, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "mlp_ratio": 2.0},
    **{"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": (4, 2, 2)},
}
DEGREES = [(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]  # ring and Ulysses
PROCESSES = 4
CASES = {  # latents, and tokens of the text
    "nothing divides": ((3, 4, 6), 5),  # 23; of 4 processes the last one has the text, only that and all of it
    "even": ((2, 4, 6), 12),
    "a text of one token": ((3, 4, 6), 1),
    "more text than video": ((1, 2, 4), 9),
    "fewer tokens than processes": ((1, 2, 4), 1),  # 3
    "one of each": ((1, 2, 2), 1),
}


def transformer() -> HunyuanTransformer3DModel:
    torch.manual_seed(0)
    model = HunyuanTransformer3DModel(**SMALL).eval().requires_grad_(False)
    model.set_attention(sdpa)
    return model


def predict(model: HunyuanTransformer3DModel, sizes: tuple[int, ...], text: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(1, 16, *sizes, generator=draw),
            timestep=torch.tensor([700]),
            encoder_hidden_states=torch.randn(1, text, 24, generator=draw),
            encoder_attention_mask=torch.ones(1, text, dtype=torch.long),
            pooled_projections=torch.randn(1, 12, generator=draw),
            guidance=torch.tensor([6000.0]),
            return_dict=False,
        )[0]


def groups(ring: int, ulysses: int) -> dict[str, Group]:
    """This process's groups where the first ones of all divide the work; groups are made by all together."""
    ranks = torch.arange(ring * ulysses).view(ring, ulysses)
    own: dict[str, Group] = {}
    for name, members in (("ulysses", ranks), ("ring", ranks.T), ("sequence", ranks.view(1, -1))):
        for some in members.tolist():
            group = dist.new_group(some)
            if dist.get_rank() in some:
                own[name] = Group(group)
    return own


def compare(ring: int, ulysses: int) -> None:
    """All cases, one process against some."""
    own = groups(ring, ulysses)
    if not own:
        return
    model, parallel = (
        transformer(),
        SequenceParallel(own["sequence"], torch_usp(sdpa, own["ulysses"], own["ring"])),
    )
    parallel.attach(model)
    alone = transformer()
    worked: list[int] = []
    model.single_transformer_blocks[0].proj_mlp.register_forward_hook(lambda *given: worked.append(given[2].shape[1]))
    for name, (sizes, text) in CASES.items():
        for frames in (None, 60):
            with riflex(model, frames), riflex(alone, frames):
                made, expected = predict(model, sizes, text), predict(alone, sizes, text)
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=0, msg=lambda told, name=name: f"{name}: {told}")
        assert parallel.layout is not None
        assert worked.pop() <= parallel.layout.share + 2  # and stand-ins


def compare_with_divided_weights() -> None:
    """Each process has a quarter of the weights."""
    own, model = groups(1, PROCESSES), transformer()
    SequenceParallel(own["sequence"], torch_usp(sdpa, own["ulysses"], own["ring"])).attach(model)
    shard_weights(model, model.blocks, torch.device("cpu"))
    assert all(map(is_sharded, (model, *model.blocks)))
    for case in CASES.values():
        torch.testing.assert_close(predict(model, *case), predict(transformer(), *case), atol=1e-5, rtol=0)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    for ring, ulysses in DEGREES:
        compare(ring, ulysses)
    compare_with_divided_weights()
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_predict_the_same(tmp_path):
    mp.get_context("forkserver").set_forkserver_preload([__name__])  # imports once for all of them
    mp.start_processes(process, (tmp_path,), PROCESSES, start_method="forkserver")


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("video", "text"), [(18, 5), (24, 12), (18, 1), (2, 9), (1, 1)])
def test_every_token_is_somewhere_once(video, text, processes):
    made = [lay_out(video, text, rank, processes) for rank in range(processes)]
    assert [one for part in made for one in part.video] == [*range(video)]
    assert [one for part in made for one in part.text] == [*range(text)]
    assert all(part.tokens == video + text and part.own <= part.share for part in made)
    full = (video + text) // made[0].share
    assert all(part.own == part.share for part in made[:full])  # padding, if any, is at the end
