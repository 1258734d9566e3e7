"""Groups of ranks in real processes, and their communication."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from skyreels_v3.parallel.groups import Group, Parallel, broadcast_weights, pad_end
from skyreels_v3.parallel.ranks import SINGLE, UNDIVIDED, ParallelConfig, Ranks
from tests.parallel.spawn import WORLD_SIZE, BytesSent, spawn

CPU = torch.device("cpu")


def ranks_gathered(group: Group) -> list[int]:
    """The global ranks in a group, in its order."""
    return group.all_gather(torch.tensor([dist.get_rank()])).flatten().tolist()


def communicate() -> None:
    rank = dist.get_rank()
    ranks = Ranks(rank, WORLD_SIZE, rank, WORLD_SIZE)
    # along each dimension of (guidance, ring, Ulysses), the last one varying fastest
    parallel = Parallel(ranks, ParallelConfig(2, 1, 2), CPU)
    assert ranks_gathered(parallel.group("ulysses")) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert ranks_gathered(parallel.group("cfg")) == [rank % 2, rank % 2 + 2]
    assert ranks_gathered(parallel.group("ring")) == [rank]
    assert ranks_gathered(parallel.group("sequence")) == ranks_gathered(parallel.group("ulysses"))
    assert parallel.group("cfg") is Parallel(ranks, ParallelConfig(2, 1, 2), CPU).group("cfg")  # groups are made once
    rings = Parallel(ranks, ParallelConfig(1, 2, 2), CPU)
    assert ranks_gathered(rings.group("ring")) == [rank % 2, rank % 2 + 2]
    assert ranks_gathered(rings.group("sequence")) == ranks_gathered(rings.group("world")) == [*range(WORLD_SIZE)]

    world = rings.group("world")
    tokens = torch.full((2, 3, 1), rank)
    assert world.all_gather_tokens(tokens)[1].flatten().tolist() == [number // 3 for number in range(3 * WORLD_SIZE)]
    assert world.all_to_all(10 * rank + torch.arange(WORLD_SIZE)).tolist() == [10 * n + rank for n in range(WORLD_SIZE)]
    assert world.all_reduce(torch.tensor([rank]), dist.ReduceOp.MAX).item() == WORLD_SIZE - 1

    called = []
    for names in (("full",), ("full", "no_text"), ("full", "no_text", "nothing")):
        with BytesSent() as bytes_sent:
            made = parallel.predictions(names, lambda name: called.append(name) or torch.full((1, 4), len(name)))
        assert {name: made[name].tolist() for name in names} == {name: [[len(name)] * 4] for name in names}
        assert list(made) == list(names)
        assert bytes_sent.sent == {"all_gather": -(-len(names) // 2) * 32}  # to one other rank
    assert called == [["full", "full", "full", "nothing"], ["full", "no_text", "no_text", "nothing"]][rank // 2]

    whole = torch.arange(24.0).view(2, 3, 4)
    given = {"a": whole[:, 1:], "b": torch.tensor([], dtype=torch.bfloat16)}
    made = parallel.broadcast_from_main(lambda: given if rank == 0 else pytest.fail("only the main process computes"))
    assert torch.equal(made["a"], whole[:, 1:]) and made["b"].dtype == torch.bfloat16

    with torch.device("meta" if rank else "cpu"):
        torch.manual_seed(rank)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    broadcast_weights(module, CPU)
    torch.manual_seed(0)
    assert torch.equal(module[0].weight, torch.nn.Linear(3, 4).weight)
    assert all(tensor.device == CPU for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.slow
def test_ranks_communicate(tmp_path):
    spawn(communicate, tmp_path)


def test_a_single_process_does_without():
    parallel = Parallel(SINGLE, UNDIVIDED, CPU)
    assert parallel.is_single and parallel.is_main
    x, group = torch.randn(2, 3), parallel.group("sequence")
    assert (group.rank, group.size) == (0, 1)
    assert group.all_to_all(x) is x and group.all_reduce(x, None) is x
    assert torch.equal(group.all_gather(x), x[None]) and torch.equal(group.all_gather_tokens(x), x)
    assert parallel.broadcast_from_main(lambda: {"x": x})["x"] is x
    assert torch.equal(parallel.predictions(("full",), lambda _: x)["full"], x)


def test_pad_end():
    x = torch.ones(2, 3, 4)
    for dim in (0, 1, 2, -1):
        size = x.shape[dim] + 2
        made = pad_end(x, dim, size)
        assert made.shape[dim] == size and made.sum() == x.sum()
        assert torch.equal(made.narrow(dim, 0, x.shape[dim]), x)
    assert pad_end(x, 1, 3) is x
