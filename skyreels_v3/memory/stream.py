"""Block streaming: a model's blocks are on the device only while they work, the next one on its way meanwhile.

The device has room for two blocks. While one computes, the next is copied beside it, on a stream of its own; a block is
never copied back, since inference changes no weight. In pinned host memory a block is one piece, so that it travels in
one transfer at the bus's full speed; else its tensors are copied from where they are, which may be a mapped file.

Blocks are told when to come by hooks around them. They need not all be alike (adapters may be on some only), nor run in
order, but in order they come in time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.memory.offload import on_device
from skyreels_v3.memory.units import kept_blocks
from skyreels_v3.tensors import replace_tensors

logger = logging.getLogger(__name__)

SLOTS = 2  # the block that works and the next one
ALIGNMENT = 256  # bytes

Pin = Callable[[Tensor], bool]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, tied ones once."""
    return [*module.parameters(), *module.buffers()]


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes that `tensors` take as one piece."""
    return sum(map(aligned_bytes, tensors))


def aligned_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a piece, so that the next one is aligned."""
    return math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT


@torch.inference_mode(False)  # always of one kind, or compiled code would not be that for the others
def laid_out(room: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `tensors` one after the other in `room`, bytes."""
    places, start = [], 0
    for tensor in tensors:
        place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        places.append(nn.Parameter(place, requires_grad=False) if isinstance(tensor, nn.Parameter) else place)
        start += aligned_bytes(tensor)
    return places


def give(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Put `tensors` in the place of those of `tensors_of`, in that order."""
    new = {id(old): tensor for old, tensor in zip(tensors_of(module), tensors, strict=True)}
    replace_tensors(module, lambda tensor: new[id(tensor)])


@dataclass
class Slot:
    """Room for one block on the device."""

    room: Tensor  # bytes
    arrived: Any  # event: the block is there
    done: Any  # event: the block has worked
    block: int | None = None


class BlockStream:
    """Streams `blocks` of `module` to `device`; the rest of it is there whole.

    Args:
        keep: how many of the blocks stay on the device, spread evenly among the others, which gives those more time.
        pin: makes bytes in host memory known to the device as pinned and says whether it could; None: do not try.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        keep: int = 0,
        pin: Pin | None = None,
    ) -> None:
        kept = kept_blocks(len(blocks), keep)
        self.module = module
        self.streamed = [block for index, block in enumerate(blocks) if index not in kept]
        self.device = device
        self.pin = pin
        self._backend = torch.get_device_module(device)
        self._side = self._backend.Stream(device)
        self._host: list[list[Tensor]] = []  # the weights of each streamed block
        self._packed: list[Tensor | None] = []  # the same in one piece, where it is pinned
        self._slots: list[Slot] = []
        self._stays = 0
        self._beginning: Future[None] | None = None

    def begin(self) -> None:
        """Prepare while something else works."""
        pool = ThreadPoolExecutor(1)
        self._beginning = pool.submit(self.prepare)
        pool.shutdown(wait=False)

    def prepare(self) -> None:
        """Bring the blocks into the form that they are copied from; if pinned, a pass over all weights."""
        for block in self.streamed[len(self._host) :]:
            packed = self._pack(block) if self.pin is not None else None
            self._packed.append(packed)
            self._host.append(tensors_of(block))

    def _pack(self, block: nn.Module) -> Tensor | None:
        """Move a block's weights into one piece of pinned memory; None once there is no more of that."""
        assert self.pin is not None
        tensors = tensors_of(block)
        room = torch.empty(size_of(tensors), dtype=torch.uint8)
        places = laid_out(room, tensors)
        for place, tensor in zip(places, tensors, strict=True):  # by all threads, and so the system makes the room
            place.copy_(tensor.detach())
        if not self.pin(room):
            left = len(self.streamed) - len(self._packed)
            logger.warning("host memory cannot be pinned any more; %d blocks stream unpinned", left)
            self.pin = None
            return None
        give(block, places)
        return room

    @contextmanager
    def active(self) -> Iterator[None]:
        """Stream for the length of a `with` block. A stay within a stay is part of it."""
        self._stays += 1
        try:
            if self._stays > 1:
                yield
                return
            if self._beginning is not None:
                beginning, self._beginning = self._beginning, None
                beginning.result()
            self.prepare()
            with self._on_the_way():
                yield
        finally:
            self._stays -= 1

    @contextmanager
    def _on_the_way(self) -> Iterator[None]:
        staying = self._staying()
        size = max((size_of(tensors) for tensors in self._host), default=0)
        with on_device(self.module, self.device, lambda tensor: id(tensor) in staying):
            self._slots = [self._slot(size) for _ in range(min(SLOTS, len(self.streamed)))]
            self._side.wait_stream(self._backend.current_stream(self.device))  # which may still use what room was
            hooks = [hook for index, block in enumerate(self.streamed) for hook in self._hooks(index, block)]
            for index, slot in enumerate(self._slots):
                self._fetch(index, slot)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                self._backend.current_stream(self.device).wait_stream(self._side)  # before its room is given away
                for block, tensors in zip(self.streamed, self._host, strict=True):
                    give(block, tensors)
                self._slots = []

    @torch.inference_mode(False)
    def _slot(self, size: int) -> Slot:
        room = torch.empty(size, dtype=torch.uint8, device=self.device)
        return Slot(room, self._backend.Event(), self._backend.Event())

    def _staying(self) -> set[int]:
        """The tensors that stand elsewhere than in the streamed blocks, tied to one in there or not."""
        streamed = {part for block in self.streamed for part in block.modules()}
        others = (module for module in self.module.modules() if module not in streamed)
        return {
            id(tensor)
            for module in others
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }

    def _hooks(self, index: int, block: nn.Module) -> Iterator[Any]:
        yield block.register_forward_pre_hook(lambda *_: self._before(index))
        yield block.register_forward_hook(lambda *_: self._after(index))

    def _before(self, index: int) -> None:
        """Have block `index` on the device."""
        slot = self._holding(index)
        if slot is None:
            slot = self._slots[0]
            self._fetch(index, slot)
        self._backend.current_stream(self.device).wait_event(slot.arrived)

    def _after(self, index: int) -> None:
        """Block `index` has been started: what is beside it has ended, and makes room for the next one."""
        slot = self._holding(index)
        assert slot is not None
        slot.done.record(self._backend.current_stream(self.device))
        following = (index + 1) % len(self.streamed)
        if self._holding(following) is None:
            other = next(other for other in self._slots if other is not slot)
            self._fetch(following, other)

    def _holding(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _fetch(self, index: int, slot: Slot) -> None:
        """Copy block `index` into a slot, in the place of the block there, once that has worked."""
        if slot.block is not None:
            give(self.streamed[slot.block], self._host[slot.block])
        places = laid_out(slot.room, self._host[index])
        with self._backend.stream(self._side):
            self._side.wait_event(slot.done)
            if (packed := self._packed[index]) is not None:
                slot.room[: len(packed)].copy_(packed, non_blocking=True)
            else:
                for place, tensor in zip(places, self._host[index], strict=True):
                    place.copy_(tensor.detach(), non_blocking=True)
            slot.arrived.record(self._side)
        give(self.streamed[index], places)
        slot.block = index
