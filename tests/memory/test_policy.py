"""What is decided from needs and free memory: a table by hand, and the published models on cards of all sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skyreels_v3.memory.policy import MARGIN, PINNED_SHARE, RESERVE, TILINGS, Policy, choose_policy
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import MEMORY_MODES, TASK_NAMES, task_spec
from tests.planning import GB, planned

HOST = 256 * GB
SIZES = {"480P": (480, 832), "720P": (720, 1280)}


def request(task: str = "reference_to_video", resolution: str = "720P", **changes: object) -> GenerationRequest:
    height, width = SIZES[resolution]
    return GenerationRequest(
        task=task_spec(task), model_id="a/b", prompt="p", dtype="bfloat16", resolution=resolution,
        height=height, width=width, audio_seconds=8.0 if task == "talking_avatar" else None, **changes,
    )  # fmt: skip


def choose(free: int | None, wanted: str = "auto", host: int = HOST, blocks: int = 0) -> Policy:
    """For 45, 35 or 7 GB at the peak, and 28 GB that are streamed from the host."""
    peaks = {"resident": 45, "offload": 35, "stream": 7}
    return choose_policy(wanted, lambda mode, tiles: peaks[mode] * GB, 28 * GB, blocks, False, free, host)


def free_for(need: float) -> int:
    """Free bytes of a device that just has room for `need` GB."""
    return int(need * GB * MARGIN) + RESERVE + 100


@pytest.mark.parametrize(
    ("free", "mode"),
    [
        (free_for(46), "resident"),
        (free_for(45), "resident"),
        (free_for(44.9), "offload"),
        (free_for(35), "offload"),
        (free_for(34.9), "stream"),
        (free_for(7), "stream"),
        (free_for(1), "stream"),  # nothing smaller is known
        (1, "stream"),
    ],
)
def test_the_fastest_that_fits(free, mode):
    decided = choose(free)
    assert decided.mode == mode
    assert ("too much" in decided.reason) == (free < free_for(6.9))


@pytest.mark.parametrize("wanted", MEMORY_MODES)
@pytest.mark.parametrize("free", [1, 20 * GB, 200 * GB, None])
def test_what_is_asked_for_wins(wanted, free):
    decided = choose(free, wanted, blocks=3)
    assert decided.mode == wanted and "asked for" in decided.reason
    assert decided.resident_blocks == 3


def test_a_device_without_memory_of_its_own():
    decided = choose(None, host=1)
    assert (decided.mode, decided.pinned, decided.tiles) == ("resident", False, (1, 1))


@pytest.mark.parametrize(("host", "pinned"), [(28 / PINNED_SHARE + 0.1, True), (28 / PINNED_SHARE - 0.1, False)])
def test_pinned_where_the_host_has_room(host, pinned):
    assert choose(10 * GB, host=int(host * GB)).pinned is pinned
    assert not choose(40 * GB).pinned  # nothing is streamed


@pytest.mark.parametrize(("quant", "vae_dtype"), [(None, "float32"), ("fp8", "bfloat16")])
@pytest.mark.parametrize("resolution", SIZES)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_card(task, resolution, quant, vae_dtype):
    """What is decided fits, nothing faster does, and there are no fewer tiles that would."""
    asked = request(task, resolution, quant=quant, vae_dtype=vae_dtype)
    plan = planned(asked)
    order, before = [*MEMORY_MODES], 0
    smallest = TILINGS[-1]
    assert plan.peak("resident") > plan.peak("offload") > plan.peak("stream", smallest)
    for size in (80, 48, 24, 16, 12, 8, 4):
        usable = (size * GB - RESERVE) / MARGIN
        decided = planned(asked, free=size * GB).policy
        assert order.index(decided.mode) >= before  # never a faster one on a smaller card
        before = order.index(decided.mode)
        assert all(plan.peak(faster, smallest) > usable for faster in order[:before])
        fewer = TILINGS[: TILINGS.index(decided.tiles)]
        assert all(plan.peak(decided.mode, tiles) > usable for tiles in fewer)
        if decided.mode != "stream" or decided.tiles != smallest:
            assert plan.peak(decided.mode, decided.tiles) <= usable
        streamed = planned(replace(asked, memory="stream"), free=size * GB).policy
        assert size < 80 or decided.tiles == streamed.tiles == (1, 1)  # whatever is asked for, nothing is short there
