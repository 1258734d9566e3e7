"""What is decided from needs and room: a table by hand, and the published models on cards of all sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyreels_v3 import plan as planner
from skyreels_v3.memory.policy import MARGIN, PINNED_SHARE, RESERVE, choose
from skyreels_v3.tasks import MEMORY_MODES, TASK_NAMES, GenerationRequest, task_spec

GB = 10**9
HOST = 256 * GB
SIZES = {"480P": (480, 832), "720P": (720, 1280)}


def request(task: str = "reference_to_video", resolution: str = "720P", **changes: object) -> GenerationRequest:
    height, width = SIZES[resolution]
    return GenerationRequest(
        task=task_spec(task), model_id="a/b", prompt="p", dtype="bfloat16", resolution=resolution,
        height=height, width=width, audio_seconds=8.0 if task == "talking_avatar" else None, **changes,
    )  # fmt: skip


def made_up(weights: float, activations: float, streamed: float, **changes: object) -> planner.Plan:
    """A plan of a transformer and a VAE that needs next to nothing, a text encoder of 10 GB; numbers in GB."""
    asked = request(**changes)
    small = replace(asked, height=16, width=16)
    stages = {
        "text encoder": planner.Stage(10 * GB, 1 * GB),
        "transformer": planner.Stage(int(weights * GB), int(streamed * GB), int(activations * GB)),
        "VAE encode": planner.Stage(1, 1),
        "VAE decode": planner.Stage(1, 1),
    }
    return planner.Plan(small, None, "bfloat16", (), 1, stages, int((weights - streamed) * GB))


def room_for(need: float) -> int:
    """Free bytes of a device that just has room for `need` GB."""
    return int(need * GB * MARGIN) + RESERVE + 100


@pytest.mark.parametrize(
    ("free", "mode"),
    [
        (room_for(45) + GB, "resident"),  # 10 + 30 of weights and 5 of activations
        (room_for(45) + 100, "resident"),
        (room_for(44.9), "offload"),
        (room_for(35) + 100, "offload"),  # 30 and 5
        (room_for(34.9), "stream"),
        (room_for(7) + 100, "stream"),
        (room_for(1), "stream"),  # nothing smaller is known
        (1, "stream"),
    ],
)
def test_the_fastest_that_fits(free, mode):
    plan = made_up(weights=30, activations=5, streamed=2)
    decided = choose(plan, free, HOST)
    assert decided.mode == mode
    assert ("too much" in decided.reason) == (free < room_for(6.9))


@pytest.mark.parametrize("wanted", MEMORY_MODES)
@pytest.mark.parametrize("free", [1, 20 * GB, 200 * GB, None])
def test_what_is_asked_for_wins(wanted, free):
    decided = choose(made_up(30, 5, 2, memory=wanted, stream_blocks=3), free, HOST)
    assert decided.mode == wanted and "asked for" in decided.reason
    assert decided.keep == 3


def test_a_device_without_memory_of_its_own():
    decided = choose(made_up(3000, 5, 2), None, 1)
    assert (decided.mode, decided.pinned, decided.tiles) == ("resident", False, (1, 1))


@pytest.mark.parametrize(("host", "pinned"), [(28 / PINNED_SHARE + 0.1, True), (28 / PINNED_SHARE - 0.1, False)])
def test_pinned_where_the_host_has_room(host, pinned):
    plan = made_up(weights=30, activations=5, streamed=2)
    assert choose(plan, 10 * GB, int(host * GB)).pinned is pinned
    assert not choose(plan, 40 * GB, HOST).pinned  # nothing is streamed


@pytest.mark.parametrize(
    ("resolution", "quant", "modes"),
    [
        ("720P", None, ["stream"] * 4 + ["offload", "resident"]),
        ("480P", None, ["stream"] * 4 + ["offload", "resident"]),
        ("720P", "fp8", ["stream"] * 4 + ["resident", "resident"]),
        ("480P", "fp8", ["stream"] * 4 + ["resident", "resident"]),
    ],
)
def test_the_published_model(resolution, quant, modes):
    """On cards of 8, 12, 16, 24, 48, 80 GB, of which 21 are for use on one of 24. The transformer is 29 GB, 19 in FP8,
    the text encoder 11 and 7; a forward takes 7 GB in 720P and 3 in 480P, the VAE in tiles 11 and 5."""
    plan = planner.plan(request("reference_to_video", resolution, quant=quant), None)
    assert [choose(plan, size * GB, HOST).mode for size in (8, 12, 16, 24, 48, 80)] == modes


@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize("resolution", SIZES)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_card(task, resolution, quant, vae_dtype):
    """What is decided fits, nothing faster does, and there are no fewer tiles that would."""
    plan = planner.plan(request(task, resolution, quant=quant, vae_dtype=vae_dtype), None)
    order, before = [*MEMORY_MODES], 0
    smallest = planner.TILINGS[-1]
    assert plan.peak("resident") > plan.peak("offload") > plan.peak("stream", smallest)
    for size in (80, 48, 24, 16, 12, 8, 4):
        usable = (size * GB - RESERVE) / MARGIN
        decided = choose(plan, size * GB, HOST)
        assert order.index(decided.mode) >= before  # never a faster one on a smaller card
        before = order.index(decided.mode)
        assert all(plan.peak(faster, smallest) > usable for faster in order[:before])
        fewer = planner.TILINGS[: planner.TILINGS.index(decided.tiles)]
        assert all(plan.peak(decided.mode, tiles) > usable for tiles in fewer)
        if decided.mode != "stream" or decided.tiles != smallest:
            assert plan.peak(decided.mode, decided.tiles) <= usable
        streamed = choose(replace(plan, request=replace(plan.request, memory="stream")), size * GB, HOST)
        assert size < 80 or decided.tiles == streamed.tiles == (1, 1)  # whatever is asked for, nothing is short there


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("resolution", SIZES)
def test_more_tiles_take_less(resolution, vae_dtype, part):
    asked = request(resolution=resolution, vae_dtype=vae_dtype)
    sizes = [planner.vae_bytes(asked, part, tiles) for tiles in planner.TILINGS]
    assert sizes == sorted(sizes, reverse=True)
