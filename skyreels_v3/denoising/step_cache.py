"""First-Block Cache: a denoising step may reuse the residual that the transformer's blocks computed in an earlier step.

The first block always runs. If its residual has hardly changed since all blocks last ran, the others are skipped and
their residual of that time is added again. Each condition (with or without the prompt) is decided on its own.

diffusers' hooks of the same name do not fit: they need blocks that leave their input unchanged, and ours overwrite it;
they call skipped blocks, whose weights would be streamed in for nothing; and each rank decides by its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v3.parallel.groups import Group

CHUNK = 8192  # tokens compared at a time: float32 copies of all would be large
TINY = 1e-30

Streams = tuple[Tensor, ...]  # what blocks pass along: tokens (B, L, D) of the video, or of the video and the text


class StepCache(nn.Module):
    """Replaces a model's blocks during one denoising loop, without gradients.

    For each condition it keeps two tensors as large as the video's tokens.

    Args:
        threshold: relative change of the first block's residual up to which the other blocks are skipped.
        group: ranks that divide the tokens and must decide alike.

    Attributes:
        computed, skipped: number of blocks so far, over all conditions.
    """

    def __init__(self, threshold: float, group: Group | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.threshold = threshold
        self.group = group or Group()
        self.computed = self.skipped = 0
        self._kept: dict[str, Streams] = {}  # by condition: residual of the first block, and of the others per stream
        self._condition = ""

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Run the blocks of `model`, its `ModuleList` children, through the cache within a `with` block."""
        lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
        self.blocks = nn.ModuleList(block for blocks in lists.values() for block in blocks)
        try:
            for number, name in enumerate(lists):
                setattr(model, name, nn.ModuleList([] if number else [self]))
            yield
        finally:
            for name, blocks in lists.items():
                setattr(model, name, blocks)
            self._kept.clear()

    def under(self, condition: str, predict: Callable[[str], Tensor]) -> Tensor:
        """`predict(condition)`, reusing or storing residuals for that condition."""
        self._condition = condition
        return predict(condition)

    def forward(self, *arguments: Any) -> Tensor | Streams:
        """The last block's output for the first block's arguments, computed or from the cache."""
        first, *others = self.blocks
        before = arguments[0].clone()  # a block may overwrite its input
        streams = run([first], arguments)
        added = torch.sub(streams[0], before, out=before)
        kept = self._kept.pop(self._condition, None)
        if kept is not None and self._change(added, kept[0]) <= self.threshold:
            streams = tuple(stream + other for stream, other in zip(streams, kept[1:], strict=True))
            self.skipped += len(others)
        else:
            kept = None  # frees memory for the blocks
            halfway = [stream.clone() for stream in streams]
            streams = run(others, arguments, streams)
            kept = (added, *(torch.sub(end, start, out=start) for end, start in zip(streams, halfway, strict=True)))
            self.computed += len(others)
        self.computed += 1
        self._kept[self._condition] = kept
        return streams if len(streams) > 1 else streams[0]

    def _change(self, new: Tensor, old: Tensor) -> float:
        """Mean of |new - old| divided by the mean of |old|, over the tokens of all ranks."""
        parts = zip(new.split(CHUNK, dim=1), old.split(CHUNK, dim=1), strict=True)
        pairs = [((a.float() - b.float()).abs().sum(), b.float().abs().sum()) for a, b in parts]
        sums = torch.stack([torch.stack(pair) for pair in pairs]).sum(0)
        difference, size = self.group.all_gather(sums).sum(0).tolist()
        return difference / max(size, TINY)


def run(blocks: Iterable[nn.Module], arguments: Sequence[Any], streams: Streams = ()) -> Streams:
    """Run blocks, each with the previous one's output as its first arguments; returns the last one's output."""
    for block in blocks:
        out = block(*streams, *arguments[len(streams) :])
        streams = out if isinstance(out, tuple) else (out,)
    return streams
