"""Frames from the device: their memory layout, and the thread that prepares the next ones. Exact attention per step."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
import torch

from skyreels_v3 import Step, load
from skyreels_v3.attention import backends
from skyreels_v3.attention.kernels import KERNELS, Kernel
from skyreels_v3.stages import prefetch, video_to_frames


def test_frames_lie_as_they_are_written():
    frames = video_to_frames(torch.rand(1, 3, 4, 6, 8) * 2 - 1, True)
    assert frames.shape == (4, 6, 8, 3) and frames.flags.c_contiguous


class Source:
    """Yields numbers, and records which were consumed."""

    def __init__(self, fails_at: int = 9) -> None:
        self.fails_at = fails_at
        self.made = [threading.Event() for _ in range(4)]
        self.threads: set[int] = set()
        self.closed = False

    def items(self) -> Generator[int, None, None]:
        try:
            for number, event in enumerate(self.made):
                self.threads.add(threading.get_ident())
                if number == self.fails_at:
                    raise FloatingPointError("not finite")
                event.set()
                yield number
        finally:
            self.closed = True


def test_the_next_item_is_made_while_one_is_used():
    source, prepared = Source(), []
    items = prefetch(source.items(), lambda: prepared.append(threading.get_ident()))
    assert next(items) == 0
    assert source.made[1].wait(10) and not source.made[2].wait(0.1)  # only one ahead
    assert [*items] == [1, 2, 3]
    assert source.closed and source.threads == {*prepared} != {threading.get_ident()}


def test_an_error_comes_in_its_turn():
    source = Source(fails_at=2)
    items = prefetch(source.items())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(FloatingPointError, match="not finite"):
        next(items)
    assert source.closed


def test_left_in_the_middle():
    source = Source()
    items = prefetch(source.items())
    next(items)
    items.close()
    assert source.closed and not source.made[2].is_set()


@pytest.mark.parametrize(("exact", "rounded"), [(0, [1, 2, 3, 4, 5]), (1, [2, 3, 4]), (2, [3]), (3, [])])
def test_exact_attention_in_the_first_and_last_steps(exact, rounded, monkeypatch, caplog):
    """An 8-bit kernel that records its calls stands in for SageAttention, which needs a GPU."""
    calls = []

    def rounding(query, key, value):
        calls.append(query.shape)
        return backends.sdpa(query.bfloat16(), key.bfloat16(), value.bfloat16()).type_as(query)

    monkeypatch.setitem(KERNELS, "sage", Kernel("native", devices=("cpu",), half_only=False, exact=False))
    monkeypatch.setattr(backends, "dispatched", lambda backend: rounding)
    monkeypatch.setattr(backends, "MANY_TOKENS", 11)
    flags = {"prompt": "a fox", "attention": "sage", "num_inference_steps": 5}
    generator = load("t2v", model_id="tiny", device="cpu", height=32, width=48, num_frames=5)
    if exact == 2:  # models loaded for a video without exact steps are not reused
        assert [event.number for event in generator(**flags) if isinstance(event, Step)] == [1, 2, 3, 4, 5]
        calls.clear()
    events = generator(**flags, **({"exact_steps": exact} if exact else {}))
    found, before = [], 1
    for event in events:
        if isinstance(event, Step):
            found += [event.number] if len(calls) > before else []
            before = len(calls)
    assert calls[0] == (1, 256, 1, 128)  # the trial on the device
    assert found == rounded
    assert "with more than 11 tokens (here 12) that can show as noise; --exact_steps 2" in caplog.text
