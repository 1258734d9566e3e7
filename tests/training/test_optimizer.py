"""Muon and AdamW in one optimizer; on a GPU, recorded steps equal plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from training.optimizer import Trainer, orthogonalized


def test_singular_values_are_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        made = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert made.min() > 0.5 and made.max() < 1.3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def batches(count: int) -> list[dict[str, Tensor]]:
    """Pictures, and a linear function of them as targets."""
    random = torch.Generator().manual_seed(1)
    wanted = torch.randn(192, 4, generator=random) / 14
    pictures = torch.randn(count, 32, 3, 8, 8, generator=random)
    return [{"x": x, "y": x.flatten(1) @ wanted} for x in pictures]


def test_it_learns_and_averages():
    model = network()
    trainer = Trainer(model.parameters())

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    losses = []
    for batch in batches(150):
        trainer.loss.zero_()
        trainer.step(loss_of, batch, 5e-3)
        losses.append(float(trainer.loss))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    averaged = network()
    trainer.average_into(averaged.parameters())
    held = batches(151)[-1]
    assert (averaged(held["x"]) - held["y"]).square().mean() < 0.3 * sum(losses[:10]) / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("low", [False, True])
def test_recorded_steps_are_the_steps(low):
    """With a new loss function at every step, nothing is ever recorded."""
    weights = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for recorded in (True, False):
            model = network().cuda()
            trainer = Trainer(model.parameters(), [model[3].weight] if low else ())

            def loss_of(batch, model=model):
                with torch.autocast("cuda", torch.bfloat16):
                    return (model(batch["x"]) - batch["y"]).square().mean()

            for batch in batches(8):
                there = {key: value.cuda() for key, value in batch.items()}
                trainer.step(loss_of if recorded else (lambda inputs, known=loss_of: known(inputs)), there, 2e-3)
            assert bool(trainer.graphs) == recorded
            weights.append([parameter.detach().float().cpu() for parameter in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
