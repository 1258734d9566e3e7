"""Rotary position embeddings against float64 complex rotations computed token by token."""

from __future__ import annotations

import cmath

import pytest
import torch

from skyreels_v3.wan.rope import Segment, apply_rotary, rotary_tables

HEAD_DIM = 16  # 8 channels for time, 4 each for height and width
PATCH = (1, 2, 2)


def rotations(frame: int, row: int, column: int) -> list[complex]:
    """The rotation of each of a token's channel pairs, by definition."""
    pairs = []
    for position, channels in ((frame, HEAD_DIM - 8), (row, 4), (column, 4)):
        pairs += [cmath.exp(1j * position * 10000.0 ** (-2 * i / channels)) for i in range(channels // 2)]
    return pairs


def test_tables_follow_the_segments():
    segments = [Segment(torch.zeros(1, 16, 2, 4, 6)), Segment(torch.zeros(1, 16, 3, 4, 6), 1024)]
    table = rotary_tables(segments, PATCH, HEAD_DIM)
    places = [
        (start + f, h, w) for start, n in ((0, 2), (1024, 3)) for f in range(n) for h in range(2) for w in range(3)
    ]
    expected = torch.tensor([rotations(*place) for place in places], dtype=torch.complex128)
    torch.testing.assert_close(torch.view_as_complex(table[:, 0].double()), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("compiling", [False, True])
def test_adjacent_channels_turn_together(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    segment = Segment(torch.zeros(1, 16, 2, 4, 4), 7)
    x = torch.randn(2, 8, 3, HEAD_DIM)
    turned = apply_rotary(x, rotary_tables([segment], PATCH, HEAD_DIM))
    factors = torch.tensor([rotations(7 + f, h, w) for f in range(2) for h in range(2) for w in range(2)])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * factors[None, :, None]).flatten(-2)
    torch.testing.assert_close(turned.double(), expected, atol=1e-6, rtol=0)
