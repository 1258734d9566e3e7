"""What the transformer is called with, and what of its predictions is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from skyreels_v3.wan.conditioning import Conditioning, expand_timestep
from skyreels_v3.wan.rope import Segment


def latents(frames: int) -> Tensor:
    return torch.zeros(1, 16, frames, 4, 4)


def test_clean_segments_stand_at_timestep_zero():
    segments = (Segment(latents(2), clean=True), Segment(latents(3), 2))
    assert expand_timestep(torch.tensor(875), segments).tolist() == [[0, 0, 875, 875, 875]]
    assert expand_timestep(torch.tensor(875), segments[1:]).tolist() == [875]


def test_the_latents_own_prediction_is_taken():
    seen = []

    def model(segments, timestep, *conditions):
        seen.append(([segment.start_frame for segment in segments], timestep.tolist()))
        return tuple(segment.latents + number for number, segment in enumerate(segments))

    condition = Conditioning(torch.zeros(1, 1, 1), 2, (Segment(latents(2), clean=True),), (Segment(latents(1), 9),))
    assert torch.equal(condition.predict(model, latents(3), torch.tensor(7)), latents(3) + 1)
    assert seen == [([0, 2, 9], [[0, 0, 7, 7, 7, 7]])]


def test_channels_are_concatenated_to_the_latents():
    condition = Conditioning(torch.zeros(1, 1, 1), channels=torch.ones(1, 20, 3, 4, 4))
    out = condition.predict(lambda segments, *others: (segments[0].latents,), latents(3), torch.tensor(7))
    assert torch.equal(out, torch.cat((latents(3), condition.channels), dim=1))
