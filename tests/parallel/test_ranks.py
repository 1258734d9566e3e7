"""How processes divide the work: every number of processes, heads and guidance terms, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.parallel.ranks import SINGLE, ParallelConfig, Ranks, check_ranks, choose_degrees, ranks_of

REQUEST = parse_request(
    ["--task_type", "reference_to_video", "--ref_imgs", "a.png", "--prompt", "a", "--use_usp"]
)  # fmt: skip
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
LAUNCHED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS}


def test_what_a_launcher_says():
    assert ranks_of({}) == ranks_of({"RANK": "0"}) == SINGLE
    assert ranks_of(LAUNCHED) == Ranks(5, 8, 1, 4)
    assert ranks_of({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}) == Ranks(1, 2, 1, 2)
    ranks = ranks_of(LAUNCHED)
    assert (ranks.node, ranks.is_main, ranks.is_local_main) == (1, False, False)
    assert (SINGLE.node, SINGLE.is_main, SINGLE.is_local_main) == (0, True, True)
    assert ranks_of(LAUNCHED | {"RANK": "4", "LOCAL_RANK": "0"}).is_local_main


@pytest.mark.parametrize(
    "wrong", [{"RANK": "x"}, {"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}]
)
def test_a_launcher_that_contradicts_itself(wrong):
    with pytest.raises(UserError, match=r"^--use_usp: .* wrong .*start with torchrun"):
        ranks_of(LAUNCHED | wrong)


@pytest.mark.parametrize("missing", ADDRESS)
def test_a_launcher_that_says_no_address(missing):
    with pytest.raises(
        UserError, match=rf"^--use_usp: RANK and WORLD_SIZE are set, but not {missing}; start with torchrun"
    ):
        ranks_of({name: value for name, value in LAUNCHED.items() if name != missing})
    assert ranks_of({"RANK": "0", "WORLD_SIZE": "1"}) == SINGLE


def test_several_processes_must_be_told_what_to_do():
    check_ranks(REQUEST, Ranks(0, 2, 0, 2))
    check_ranks(replace(REQUEST, use_usp=False), SINGLE)
    with pytest.raises(UserError, match=r"^--use_usp: missing; 2 processes were started; add it .* or --jobs"):
        check_ranks(replace(REQUEST, use_usp=False), Ranks(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("world", "heads", "terms", "degrees"),
    [
        (1, 40, 1, (1, 1, 1)),
        (2, 40, 1, (1, 1, 2)),
        (3, 40, 1, (1, 3, 1)),
        (6, 40, 1, (1, 3, 2)),
        (7, 40, 1, (1, 7, 1)),
        (8, 40, 1, (1, 1, 8)),
        (16, 40, 1, (1, 2, 8)),
        (4, 40, 2, (2, 1, 2)),
        (3, 40, 2, (1, 3, 1)),
        (6, 40, 3, (3, 1, 2)),
        (4, 40, 3, (1, 1, 4)),
        (1, 40, 3, (1, 1, 1)),
    ],
)
def test_division_by_default(world, heads, terms, degrees):
    assert choose_degrees(REQUEST, world, heads, terms) == ParallelConfig(*degrees)


def test_all_processes_have_work():
    for world in range(1, 65):
        for heads in (4, 12, 24, 40):
            for terms in (1, 2, 3):
                degrees = choose_degrees(REQUEST, world, heads, terms)
                assert degrees.world_size == world and heads % degrees.ulysses == 0 and degrees.cfg in (1, terms)


@pytest.mark.parametrize(
    ("flags", "world", "terms", "degrees"),
    [
        ({"ring_degree": 2}, 4, 1, (1, 2, 2)),
        ({"ulysses_degree": 2}, 8, 1, (1, 4, 2)),
        ({"ulysses_degree": 4, "ring_degree": 2}, 8, 1, (1, 2, 4)),
        ({"cfg_degree": 1}, 4, 2, (1, 1, 4)),
        ({"cfg_degree": 2}, 4, 3, (2, 1, 2)),
    ],
)
def test_division_as_asked_for(flags, world, terms, degrees):
    assert choose_degrees(replace(REQUEST, **flags), world, 40, terms) == ParallelConfig(*degrees)


@pytest.mark.parametrize(
    ("flags", "world", "terms", "message"),
    [
        ({"cfg_degree": 2}, 4, 1, r"^--cfg_degree: 2: the guidance has only 1 term; .* turn guidance on"),
        ({"cfg_degree": 3}, 6, 2, r"^--cfg_degree: 3: the guidance has only 2 terms; give 2 at most"),
        ({"cfg_degree": 2}, 3, 2, r"^--cfg_degree: 2: does not divide 3 processes"),
        ({"ulysses_degree": 3}, 4, 1, r"^--ulysses_degree: 3: ring x Ulysses must be 4"),
        ({"ring_degree": 8}, 4, 1, r"^--ring_degree: 8: ring x Ulysses must be 4"),
        ({"ulysses_degree": 2, "ring_degree": 1}, 4, 1, r"^--ulysses_degree: 2: ring x Ulysses must be 4"),
        ({"ulysses_degree": 3}, 6, 1, r"^--ulysses_degree: 3: .* 40 .* by 3; give --ulysses_degree 2 --ring_degree 3"),
        ({"ring_degree": 2}, 6, 1, r"^--ring_degree: 2: .* by 3; give --ulysses_degree 2 --ring_degree 3"),
    ],
)
def test_divisions_that_do_not_work(flags, world, terms, message):
    with pytest.raises(UserError, match=message):
        choose_degrees(replace(REQUEST, **flags), world, 40, terms)
