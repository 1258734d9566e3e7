"""What processes do together with tensors, under torch's names of now and before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skyreels_v3.tensors import replace_tensors

# the name has changed in torch 2.13, and the old one warns
_gather = cast(
    Callable[..., object], getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
)


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensors (N, ...) of all N processes of a group, each of the same shape (...)."""
    size = dist.get_world_size(group)
    if size == 1:
        return x[None]
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    _gather(out, x.contiguous(), group)
    return out.unflatten(0, (size, -1))


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part p of x (P, ...) goes to process p of a group of P; returns what they all sent here, in their order."""
    if dist.get_world_size(group) == 1:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def broadcast_text(text: str) -> str:
    """A text of the first process, on all of them."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def broadcast_tensors(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors, on the CPU of all of them; the others give none."""
    made = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
    header = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in made.items()]
    for name, dtype, shape in json.loads(broadcast_text(json.dumps(header))):
        if name not in made:
            made[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if made[name].numel():
            dist.broadcast(made[name].view(-1).view(torch.uint8), 0)
    return made


def broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Give `module` the first process's weights, on `device`; what the others have may be on meta."""

    def received(tensor: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            there = tensor.detach().to(device).contiguous()
        else:
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(there.view(-1).view(torch.uint8), 0)
        return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there

    replace_tensors(module, received)
