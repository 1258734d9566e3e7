"""Memory traffic and FLOPs of a forward at official sizes do not change; the counter is right on known cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import traffic
from benchmarks.models import official_case
from skyreels_v3.families import published_elements
from skyreels_v3.tasks import task_spec

CASE = official_case("reference_to_video", "720P")
WIDTH = 5120


def test_counting():
    """A matmul is no traffic; x + 1 and a broadcast sum are; views are free; syncs and peak memory are counted."""

    def work(x, row):
        y = x @ x
        z = (y.t() + row.expand(64, 64)).add_(1)
        del y
        return bool(z.sum() > 0)

    with FakeTensorMode():
        x, row = torch.randn(64, 64), torch.randn(64)
        made = traffic.count(lambda: work(x, row))
    square, small = 64 * 64 * 4, 64 * 4
    assert made.bytes == (2 * square + small) + 2 * square + (square + 4) + (4 + 1)
    assert made.operations == 5
    assert made.peak_bytes == 2 * square
    assert made.waits == 1


def test_a_norm_is_one_operation():
    with FakeTensorMode():
        norm, x = nn.RMSNorm(32), torch.randn(8, 32)
        made = traffic.count(lambda: norm(x))
    assert (made.operations, made.bytes) == (1, 2 * 8 * 32 * 4 + 32 * 4)


@pytest.mark.slow
def test_blocks():
    counts = dict(traffic.wan_counts(CASE))
    unit = CASE.tokens * WIDTH
    assert counts["compile"].bytes <= 68 * unit
    assert counts["exact"].bytes <= counts["diffusers"].bytes
    assert counts["exact"].peak_bytes <= 5.2e9 <= 0.5 * counts["diffusers"].peak_bytes
    fp8 = published_elements(task_spec("reference_to_video"))[1][0].fp8
    assert counts["fp8"].bytes <= counts["exact"].bytes + 7.01 * fp8  # each weight: read, converted, scaled
    counts = dict(traffic.hunyuan_counts())
    for kind in ("double", "single"):
        assert counts[f"exact, {kind}"].bytes <= 0.75 * counts[f"diffusers, {kind}"].bytes


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_vae(part):
    counts = dict(traffic.vae_counts(CASE))
    ours, theirs = counts[f"{part}, ours"], counts[f"{part}, diffusers"]
    assert ours.bytes <= 0.55 * theirs.bytes
    assert ours.operations <= 0.55 * theirs.operations
    assert ours.peak_bytes <= 0.95 * theirs.peak_bytes
    assert ours.waits <= 1
