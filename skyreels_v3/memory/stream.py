"""Block streaming: a model's blocks are on the device only while they run, and the next one is prefetched meanwhile.

The device has two slots of one block each. While the block in one slot runs, the next is copied into the other on a
side stream. Nothing is copied back, since inference changes no weights. In pinned host memory a block is one buffer,
copied in one transfer at full bus speed; otherwise its tensors are copied from where they are, such as a mapped file.

Hooks on the blocks trigger the copies. Blocks may differ (only some may have adapters) and run in any order, but they
are prefetched in the order of the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.errors import counted
from skyreels_v3.memory.offload import on_device, replace_tensors
from skyreels_v3.memory.policy import STREAM_SLOTS, resident_blocks

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, tied ones once."""
    return [*module.parameters(), *module.buffers()]


def buffer_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of a buffer that holds `tensors`, each aligned."""
    return sum(math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT for tensor in tensors)


@torch.inference_mode(False)  # not inference tensors: compiled code is specialized on that
def views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive views of `buffer` (bytes) with the shapes and dtypes of `tensors`."""
    sizes = [buffer_bytes([tensor]) for tensor in tensors]
    parts = zip(buffer[: sum(sizes)].split(sizes), tensors, strict=True)
    made = [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]
    parameters = (isinstance(tensor, nn.Parameter) for tensor in tensors)
    return [
        nn.Parameter(view, requires_grad=False) if wrap else view for view, wrap in zip(made, parameters, strict=True)
    ]


def assign(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Replace the tensors of a module, given in the order of `tensors_of`."""
    new = {id(old): tensor for old, tensor in zip(tensors_of(module), tensors, strict=True)}
    replace_tensors(module, lambda tensor: new[id(tensor)])


@dataclass
class Slot:
    """Device memory for one block, and the index of the block in it."""

    buffer: Tensor  # bytes
    arrived: Any  # event: the block has been copied
    done: Any  # event: the block has run
    block: int | None = None


class BlockStream:
    """Streams `blocks` of `module` to `device`; all other weights are there while it is active.

    Args:
        resident: how many of the blocks stay on the device.
        pin: pins a buffer in host memory and returns whether that worked; None: use no pinned memory.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        resident: int = 0,
        pin: Callable[[Tensor], bool] | None = None,
    ) -> None:
        stay = resident_blocks(len(blocks), resident)
        self.module = module
        self.streamed = [block for index, block in enumerate(blocks) if index not in stay]
        self.device = device
        self.pin = pin
        self._backend = torch.get_device_module(device)
        self._side = self._backend.Stream(device)
        self._host: list[tuple[list[Tensor], Tensor | None]] = []  # each block's weights, and their buffer if pinned
        self._slots: list[Slot] = []  # while active
        self._prepared: Future[None] | None = None

    def begin(self) -> None:
        """Start `prepare` in the background."""
        pool = ThreadPoolExecutor(1)
        self._prepared = pool.submit(self.prepare)
        pool.shutdown(wait=False)

    def prepare(self) -> None:
        """Collect the blocks' weights, pinned if requested. Continues where an earlier call failed."""
        for block in self.streamed[len(self._host) :]:
            buffer = self._pack(block) if self.pin is not None else None
            self._host.append((tensors_of(block), buffer))

    def _pack(self, block: nn.Module) -> Tensor | None:
        """Move a block's weights into one pinned buffer; None once no more memory can be pinned."""
        assert self.pin is not None
        tensors = tensors_of(block)
        buffer = torch.empty(buffer_bytes(tensors), dtype=torch.uint8)
        packed = views(buffer, tensors)
        for view, tensor in zip(packed, tensors, strict=True):
            view.copy_(tensor.detach())  # before pinning: the copy uses several threads, which allocate the pages
        if not self.pin(buffer):
            left = len(self.streamed) - len(self._host)
            logger.warning(
                "no more host memory can be pinned; %s unpinned", counted(left, "block streams", "blocks stream")
            )
            self.pin = None
            return None
        assign(block, packed)
        return buffer

    @contextmanager
    def active(self) -> Iterator[None]:
        """Stream the blocks within a `with` block; nested use has no effect."""
        if self._slots:
            yield
            return
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.result()
        self.prepare()
        outside = self._tensors_outside()
        with ExitStack() as stack:
            stack.enter_context(on_device(self.module, self.device, lambda tensor: id(tensor) in outside))
            size = max((buffer_bytes(tensors) for tensors, _ in self._host), default=0)
            shape = (min(STREAM_SLOTS, len(self.streamed)), size)
            with torch.inference_mode(False):
                buffers = torch.empty(shape, dtype=torch.uint8, device=self.device)
                self._slots = [Slot(buffer, self._backend.Event(), self._backend.Event()) for buffer in buffers]
            stack.callback(self._end)
            self._side.wait_stream(self._backend.current_stream(self.device))  # which may still use the slots' memory
            for index, block in enumerate(self.streamed):
                before, after = (lambda *_, i=index: self._before(i)), (lambda *_, i=index: self._after(i))
                stack.callback(block.register_forward_pre_hook(before).remove)
                stack.callback(block.register_forward_hook(after).remove)
            for index, slot in enumerate(self._slots):
                self._fetch(index, slot)
            yield

    def _end(self) -> None:
        """Free the slots and give the blocks their host tensors back."""
        self._backend.current_stream(self.device).wait_stream(self._side)  # before the memory is reused
        for block, (tensors, _) in zip(self.streamed, self._host, strict=True):
            assign(block, tensors)
        self._slots = []

    def _tensors_outside(self) -> set[int]:
        """Ids of the tensors used outside the streamed blocks, including those that such a block shares."""
        inside = {part for block in self.streamed for part in block.modules()}
        outside = (module for module in self.module.modules() if module not in inside)
        own = ((*module.parameters(recurse=False), *module.buffers(recurse=False)) for module in outside)
        return {id(tensor) for tensors in own for tensor in tensors}

    def _before(self, index: int) -> None:
        """Before block `index` runs: make sure that it is on the device."""
        slot = self._slot_of(index) or self._fetch(index, self._slots[0])
        self._backend.current_stream(self.device).wait_event(slot.arrived)

    def _after(self, index: int) -> None:
        """After block `index` was launched: prefetch the next one into the other slot."""
        slot = self._slot_of(index)
        assert slot is not None
        slot.done.record(self._backend.current_stream(self.device))
        following = (index + 1) % len(self.streamed)
        if self._slot_of(following) is None:
            self._fetch(following, next(other for other in self._slots if other is not slot))

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _fetch(self, index: int, slot: Slot) -> Slot:
        """Copy block `index` into a slot as soon as the block there has run."""
        if slot.block is not None:
            assign(self.streamed[slot.block], self._host[slot.block][0])
        tensors, buffer = self._host[index]
        copies = views(slot.buffer, tensors)
        with self._backend.stream(self._side):
            self._side.wait_event(slot.done)
            if buffer is not None:
                slot.buffer[: len(buffer)].copy_(buffer, non_blocking=True)
            else:
                for copy, tensor in zip(copies, tensors, strict=True):
                    copy.copy_(tensor.detach(), non_blocking=True)
            slot.arrived.record(self._side)
        assign(self.streamed[index], copies)
        slot.block = index
        return slot
