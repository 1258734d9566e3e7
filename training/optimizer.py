"""A training step: Muon for matrices, AdamW for the rest, a moving average; on a GPU as a CUDA graph per input shape.

The models are small: launching their kernels one by one takes longer than running them. So on a GPU a step, including
the optimizer, is recorded once per input shape, and replayed.

Muon: https://kellerjordan.github.io/posts/muon (Jordan et al. 2024), with the update scaled as in Liu et al.,
arXiv:2502.16982, so that one learning rate serves both optimizers. torch's own does not support convolutions, and its
learning rate would be a constant in a graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from skyreels_v3.hunyuan.conditioning import HunyuanConditioning
from skyreels_v3.wan.conditioning import Conditioning

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # about that of AdamW's updates
DECAY = 0.01
AVERAGED = 0.999  # decay of the moving average
AHEAD = 2  # steps that may be launched before the first of them has finished

for _conditioning in (Conditioning, HunyuanConditioning):
    pytree.register_dataclass(_conditioning)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with singular values near 1, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Trainer:
    """Trains float32 parameters; those in `low` become bfloat16, with float32 master copies in the optimizer.

    Attributes:
        loss: sum of the losses since it was last reset to zero.
        steps: number of steps so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], low: Iterable[nn.Parameter] = ()) -> None:
        self.parameters, self.low = list(parameters), list(low)
        self.device = self.parameters[0].device
        self.copies = {id(parameter): parameter.detach().clone() for parameter in self.low}
        self.masters: list[Tensor] = [self.copies.get(id(parameter), parameter) for parameter in self.parameters]
        for parameter in self.low:
            parameter.data = parameter.data.bfloat16()
        self.average = [master.detach().clone() for master in self.masters]
        others = []
        self.by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for master in self.masters:
            shape = (len(master), master[0].numel()) if master.ndim > 1 else (0, 0)
            if min(shape) < 4:
                others.append(master)
            else:
                self.by_shape.setdefault(shape, []).append((master, torch.zeros_like(master)))
        cuda = self.device.type == "cuda"
        self.rate, self.fade, self.loss = (torch.zeros((), device=self.device) for _ in range(3))
        self.adam = torch.optim.AdamW(
            others, lr=self.rate if cuda else 1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        self.steps = 0
        self.seen: dict[Any, int] = {}
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle() if cuda else None
        self.running: deque[torch.cuda.Event] = deque()

    def step(self, loss_of: Callable[[Any], Tensor], inputs: Any, learning_rate: float) -> None:
        """Run one step on the gradient of `loss_of(inputs)`; the inputs are any nested structure of tensors."""
        self.steps += 1
        self.rate.fill_(learning_rate)
        self.fade.fill_(1 - min(AVERAGED, self.steps / (self.steps + 9)))
        if self.device.type != "cuda":
            self.adam.param_groups[0]["lr"] = learning_rate
            self.update(loss_of(inputs))
            return
        leaves, structure = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (loss_of, structure, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        if key in self.graphs:
            graph, fixed = self.graphs[key]
            torch._foreach_copy_(fixed, tensors)
            graph.replay()
        elif self.seen.get(key, 0) < 2:  # libraries choose kernels and allocate in the first calls
            self.seen[key] = self.seen.get(key, 0) + 1
            self.update(loss_of(inputs))
        else:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                self.update(loss_of(pytree.tree_unflatten(leaves, structure)))
            self.graphs[key] = graph, [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            graph.replay()
        self.running.append(torch.cuda.current_stream().record_event())
        if len(self.running) > AHEAD:
            self.running.popleft().synchronize()

    def update(self, loss: Tensor) -> None:
        """Update all parameters, without synchronizing with the device."""
        self.loss += loss.detach()
        loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        with torch.no_grad():
            for (rows, columns), group in self.by_shape.items():
                trained = [(master, velocity) for master, velocity in group if master.grad is not None]
                if not trained:
                    continue
                gradients = [master.grad for master, _ in trained]
                velocities = [velocity for _, velocity in trained]
                torch._foreach_mul_(velocities, MOMENTUM)
                torch._foreach_add_(velocities, gradients)
                ahead = torch._foreach_add(gradients, velocities, alpha=MOMENTUM)
                stacked = torch.stack([value.reshape(rows, columns) for value in ahead])
                moves = orthogonalized(stacked) * (self.rate * (UPDATE_RMS * max(rows, columns) ** 0.5))
                masters = [master for master, _ in trained]
                torch._foreach_mul_(masters, 1 - self.rate * DECAY)
                torch._foreach_sub_(masters, [move.view_as(m) for m, move in zip(masters, moves, strict=True)])
        self.adam.step()
        for master in self.masters:
            master.grad = None
        with torch.no_grad():
            if self.low:
                torch._foreach_copy_(self.low, [self.copies[id(parameter)] for parameter in self.low])
            difference = torch._foreach_sub([master.detach() for master in self.masters], self.average)
            torch._foreach_mul_(difference, self.fade)
            torch._foreach_add_(self.average, difference)

    @torch.no_grad()
    def take_average(self) -> None:
        """Set the parameters to the moving average."""
        torch._foreach_copy_([master.detach() for master in self.masters], self.average)
        torch._foreach_copy_([parameter.detach() for parameter in self.parameters], self.average)

    @torch.no_grad()
    def average_into(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the moving average to the parameters of another module."""
        for parameter, value in zip(parameters, self.average, strict=True):
            parameter.copy_(value)
