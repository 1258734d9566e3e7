"""Step caching: some denoising steps do without the transformer's blocks, for what these add changes little by little.

A block adds to its tokens; what all of them together have added is their residual. From one step to the next it often
hardly changes, and then the last one is added again instead of being computed. Three methods tell when that will do:

    fbcache   First-Block Cache: the first block is always computed; how much its residual has changed since the last
              computed step stands for all the others.
    teacache  TeaCache (arXiv:2411.19108): how much the first block's modulated input changes from step to step says,
              by a polynomial, how much the residual of all blocks does; the changes of skipped steps add up.
    magcache  MagCache (arXiv:2506.09045): the length of the residual changes from step to step by ratios that depend
              on the checkpoint alone; how far their product is from 1 is the error, and errors of skipped steps add up.

The polynomial and the ratios belong to a checkpoint. Where they are not known a run skips nothing and measures them,
for the runs after it. Each condition (with the prompt, without) goes its own way.

All is done from outside. While a model is `attached`, one module that holds all its blocks stands where its lists of
blocks were, and is called like a block. A block that is skipped is not called at all, so that what is hung on it, such
as the copying of its weights to the device, does not happen either.

diffusers has hooks for the first and the last method, which do not do here: they need blocks that leave their input
alone, and ours overwrite it; they call the module of every skipped block, whose weights would be copied for nothing;
and processes that share a video would each look at their own tokens, and decide differently.

Tensors as large as the video's tokens that are kept from step to step, for each condition: fbcache and teacache two,
magcache one. There is one more while fbcache's first block works, and while figures are measured. All are let go of
after the last step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from skyreels_v3.denoising.cache_methods import CacheSettings
from skyreels_v3.denoising.guidance import FULL
from skyreels_v3.wan.transformer.block import TOKENS_AT_ONCE, TransformerBlock, of_frames, token_spans
from skyreels_v3.wan.transformer.norms import layer_norm, modulate

if TYPE_CHECKING:
    from skyreels_v3.parallel.groups import Team

LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")  # a model's lists of blocks, in their order
TINY = 1e-30  # in the place of a size of zero
FEWEST_STEPS = 6  # that are worth measuring: five changes make a polynomial of degree 4
DEGREE = 4
FIRST_PART = 0.2  # of the steps, in which MagCache skips none
MOST_IN_A_ROW = 3  # steps that MagCache skips

Streams = tuple[Tensor, ...]  # what blocks pass on: the video's tokens (B, L, D), or these and the text's
Residuals = tuple[Tensor | None, ...]  # what blocks added to each stream; None: what they did to it is not repeated
Figures = Mapping[str, Tensor]
Total = Callable[[Iterable[Tensor]], list[float]]


class StepCache:
    """Decides for each step of one denoising loop, and each condition, whether its blocks are computed.

    For a model that works without gradients.

    Args:
        settings: the method and its threshold.
        steps: of the loop.
        figures: what was measured of the checkpoint with this method; None: measure, and skip nothing.
        team: processes among which the tokens are divided, and which therefore decide together; None: alone.

    Attributes:
        evaluated, skipped: blocks that were computed, and that were not, under all conditions.
    """

    def __init__(self, settings: CacheSettings, steps: int, figures: Figures | None, team: Team | None = None) -> None:
        self.settings = settings
        self.steps = steps
        self.figures = figures
        self.team = team
        self.evaluated = self.skipped = 0
        self._rules: dict[str, Rule] = {}  # of the conditions
        self._current: Rule | None = None
        self._measured: dict[str, Tensor] | None = None

    @property
    def measured(self) -> dict[str, Tensor] | None:
        """Figures of the checkpoint, under the condition "full" after its last step; None where none were measured."""
        return self._measured

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Have the blocks of `model` called through this for the length of a `with` block."""
        lists = {name: child for name, child in model.named_children() if name in LISTS}
        assert lists, f"{type(model).__name__} has no list of blocks"
        everything = nn.ModuleList(block for blocks in lists.values() for block in blocks)
        try:
            for name in lists:
                setattr(model, name, nn.ModuleList())
            getattr(model, next(iter(lists))).append(CachedBlocks(everything, self._through))
            yield
        finally:
            for name, blocks in lists.items():
                setattr(model, name, blocks)

    def under(self, name: str, predict: Callable[[str], Tensor]) -> Tensor:
        """`predict(name)`, the next step with the condition `name`."""
        rule = self._current = self._rules.get(name) or self._fresh()
        self._rules[name] = rule
        try:
            out = predict(name)
        finally:
            self._current = None
        rule.step += 1
        if rule.step == self.steps:
            self._end(name)
        return out

    def _fresh(self) -> Rule:
        return RULES[self.settings.method](self.settings.threshold, self.steps, self.figures, self._total)

    def _end(self, name: str) -> None:
        """Forget a condition; another loop would begin anew."""
        measured = self._rules.pop(name).measured
        if name == FULL and measured and self.steps >= FEWEST_STEPS:
            self._measured = {key: torch.tensor(numbers) for key, numbers in measured.items()}

    def _through(self, blocks: Sequence[nn.Module], arguments: Sequence[Any]) -> Streams:
        """All blocks, as the current condition has it."""
        computed = len(blocks)
        if self._current is None:
            streams = run(blocks, arguments)
        else:
            streams, computed = self._current.through(blocks, arguments)
        self.evaluated += computed
        self.skipped += len(blocks) - computed
        return streams

    def _total(self, sums: Iterable[Tensor]) -> list[float]:
        """Sums over this process's tokens, as sums over those of all: what is decided with them is decided by all."""
        own = torch.stack([*sums])
        return (own if self.team is None else self.team.all_gather(own).sum(0)).tolist()


class CachedBlocks(nn.Module):
    """All blocks of a model, called like one of them.

    They are its children, so that whoever goes through the model's modules finds them.
    """

    def __init__(self, blocks: nn.ModuleList, through: Callable[[Sequence[nn.Module], Sequence[Any]], Streams]) -> None:
        super().__init__()
        self.blocks = blocks
        self.through = through

    def forward(self, *arguments: Any) -> Tensor | Streams:
        """What the last block would return."""
        streams = self.through([*self.blocks], arguments)
        return streams if len(streams) > 1 else streams[0]


# The methods


class Rule(ABC):
    """When one condition's steps are skipped, and what takes the blocks' place.

    Args:
        threshold, steps, figures: as in `StepCache`.
        total: makes sums over all tokens of sums over those of this process.

    Attributes:
        step: the one that goes on, from 0.
        kept: what the blocks added when they were last computed.
        measured: figures so far.
    """

    def __init__(self, threshold: float, steps: int, figures: Figures | None, total: Total) -> None:
        self.threshold = threshold
        self.steps = steps
        self.figures = figures
        self.total = total
        self.step = 0
        self.kept: Residuals | None = None
        self.measured: dict[str, list[float]] = {}

    @abstractmethod
    def through(self, blocks: Sequence[nn.Module], arguments: Sequence[Any]) -> tuple[Streams, int]:
        """What the last block would return, and how many were computed for that."""

    def change(self, new: Tensor, old: Tensor) -> float:
        """Mean of |new - old| over that of |old|."""
        difference, size = self.total((distance(new, old), distance(old)))
        return difference / max(size, TINY)


class FirstBlock(Rule):
    """First-Block Cache."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.first: Tensor | None = None  # the first block's residual when all were last computed

    def through(self, blocks: Sequence[nn.Module], arguments: Sequence[Any]) -> tuple[Streams, int]:
        before = arguments[0].clone()  # since a block may overwrite its input
        streams = run(blocks[:1], arguments)
        first = torch.sub(streams[0], before, out=before)
        if self.kept is not None and self.change(first, self.first) <= self.threshold:
            return add(streams, self.kept), 1
        self.first = self.kept = None  # makes room for what the blocks need
        halfway = [stream.clone() for stream in streams]
        streams = run(blocks[1:], arguments, streams)
        self.kept = tuple(torch.sub(end, start, out=start) for end, start in zip(streams, halfway, strict=True))
        self.first = first
        return streams, len(blocks)


class WholeSteps(Rule):
    """What is skipped are all blocks, and the text's tokens stay as they come."""

    def through(self, blocks: Sequence[nn.Module], arguments: Sequence[Any]) -> tuple[Streams, int]:
        if self.skips(blocks[0], arguments):
            assert self.kept is not None
            return add(arguments, self.kept), 0
        earlier = self.kept[0] if self.kept is not None and self.figures is None else None
        self.kept = None  # makes room for what the blocks need
        before = arguments[0].clone()  # since a block may overwrite its input
        streams = run(blocks, arguments)
        residual = torch.sub(streams[0], before, out=before)
        if self.figures is None:
            self.measure(residual, earlier)
        self.kept = (residual, *(None for _ in streams[1:]))
        return streams, len(blocks)

    @abstractmethod
    def skips(self, block: nn.Module, arguments: Sequence[Any]) -> bool:
        """Whether this step does without blocks; `block` is the first, called with `arguments`."""

    @abstractmethod
    def measure(self, residual: Tensor, earlier: Tensor | None) -> None:
        """Note how all blocks' residual differs from that of the step before; at the first step there is none."""


class Magnitudes(WholeSteps):
    """MagCache. Its figures: `ratios` (steps,), the mean length of a token's residual over that of the step before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ratios = [] if self.figures is None else nearest(self.figures["ratios"], self.steps).tolist()
        self.may_skip_from = int(FIRST_PART * self.steps + 0.5)
        self.begin_anew()

    def begin_anew(self) -> None:
        """No steps are skipped as yet."""
        self.in_a_row, self.ratio, self.error = 0, 1.0, 0.0

    def skips(self, block: nn.Module, arguments: Sequence[Any]) -> bool:
        if self.figures is None or self.step < self.may_skip_from:
            return False
        self.in_a_row += 1
        self.ratio *= self.ratios[self.step]
        self.error += abs(1.0 - self.ratio)
        if self.kept is not None and self.error <= self.threshold and self.in_a_row <= MOST_IN_A_ROW:
            return True
        self.begin_anew()
        return False

    def measure(self, residual: Tensor, earlier: Tensor | None) -> None:
        ratio = 1.0
        if earlier is not None:
            count = torch.full_like(earlier[0, 0, 0], residual[..., 0].numel(), dtype=torch.float32)
            ratios, tokens = self.total((length_ratios(residual, earlier), count))
            ratio = ratios / tokens
        self.measured.setdefault("ratios", []).append(ratio)


class Signal(WholeSteps):
    """TeaCache. Its figures: `signal` and `residual` (steps - 1,), how much the one and the other changed each time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.expected = None if self.figures is None else fitted(self.figures["signal"], self.figures["residual"])
        self.signal: Tensor | None = None  # of the step before
        self.gathered = 0.0  # what the residual has changed since it was computed, as expected

    def skips(self, block: nn.Module, arguments: Sequence[Any]) -> bool:
        new, old = signal_of(block, arguments), self.signal
        self.signal = new
        if old is None:
            return False
        change = self.change(new, old)
        if self.expected is None:
            self.measured.setdefault("signal", []).append(change)
            return False
        self.gathered += self.expected(change)
        if self.kept is not None and self.gathered < self.threshold and self.step < self.steps - 1:
            return True
        self.gathered = 0.0
        return False

    def measure(self, residual: Tensor, earlier: Tensor | None) -> None:
        if earlier is not None:
            self.measured.setdefault("residual", []).append(self.change(residual, earlier))


RULES: dict[str, type[Rule]] = {"fbcache": FirstBlock, "teacache": Signal, "magcache": Magnitudes}


# Blocks


def run(blocks: Iterable[nn.Module], arguments: Sequence[Any], streams: Streams = ()) -> Streams:
    """What the last block returns; each gets what the one before it returned, in the place of its first arguments."""
    for block in blocks:
        out = block(*streams, *arguments[len(streams) :])
        streams = out if isinstance(out, tuple) else (out,)
    return streams


def add(streams: Sequence[Any], residuals: Residuals) -> Streams:
    """The streams with what blocks would add to them; the first of a block's arguments are its streams."""
    pairs = zip(streams, residuals, strict=False)
    return tuple(stream if residual is None else stream + residual for stream, residual in pairs)


class Seen(Exception):
    """Leaves a block with its signal, before it works."""

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.signal = signal


def signal_of(block: nn.Module, arguments: Sequence[Any]) -> Tensor:
    """The input of a block's self-attention (B, L, D): normed tokens, modulated by the timestep.

    The weights for that may be there only while the block is called. So it is called, and left by the last of the hooks
    that come before its forward.
    """
    signal = wan_signal if isinstance(block, TransformerBlock) else hunyuan_signal

    def look(module: Any, given: tuple[Any, ...]) -> None:
        raise Seen(signal(module, *given))

    handle = block.register_forward_pre_hook(look)
    try:
        block(*arguments)
    except Seen as seen:
        return seen.signal
    finally:
        handle.remove()
    raise AssertionError("hooks are called")


def wan_signal(block: TransformerBlock, x: Tensor, context: Any, modulation: Tensor, rotary: Any) -> Tensor:
    """As `TransformerBlock.project` makes it on its way."""
    modulation = block.scale_shift_table.unsqueeze(1) + modulation
    pieces = []
    for tokens, frames in token_spans(x.shape[1], modulation.shape[1]):
        shift, scale = of_frames(modulation, frames)[:, :, :2].unbind(2)
        pieces.append(modulate(layer_norm(x[:, tokens], block.norm1), shift, scale).type_as(x))
    return torch.cat(pieces, dim=1)


def hunyuan_signal(block: Any, hidden: Tensor, encoder_hidden: Tensor, embedding: Tensor, *_: Any) -> Tensor:
    """What diffusers' first norm of a HunyuanVideo block makes of the video's tokens."""
    return block.norm1(hidden, emb=embedding)[0]


# Figures


def distance(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Sum of |x - y|, or of |x|, float32; (B, L, D), a few thousand tokens at a time since float32 takes room."""
    parts = x.split(TOKENS_AT_ONCE, dim=1)
    others = [None] * len(parts) if y is None else y.split(TOKENS_AT_ONCE, dim=1)
    sums = [
        (part.float() if other is None else part.float() - other.float()).abs().sum()
        for part, other in zip(parts, others, strict=True)
    ]
    return torch.stack(sums).sum()


def length_ratios(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the tokens of their lengths in x (B, L, D) over those in y, float32."""
    pairs = zip(x.split(TOKENS_AT_ONCE, dim=1), y.split(TOKENS_AT_ONCE, dim=1), strict=True)
    sums = [(part.float().norm(dim=-1) / other.float().norm(dim=-1).clamp_min(TINY)).sum() for part, other in pairs]
    return torch.stack(sums).sum()


def nearest(numbers: Tensor, count: int) -> Tensor:
    """`count` of the numbers (N,), spread evenly from the first to the last; some are left out, or taken twice."""
    return numbers[torch.linspace(0, len(numbers) - 1, count).round().long()]


def fitted(signal: Tensor, residual: Tensor) -> Callable[[float], float]:
    """The polynomial through measured changes (N,): what one of the signal says about the residual's.

    It means nothing outside of what was measured, where a run with other steps may get. There the last ratio holds on.
    """
    polynomial = np.polynomial.Polynomial.fit(signal.double().numpy(), residual.double().numpy(), DEGREE)
    low, high = signal.min().item(), signal.max().item()

    def expected(change: float) -> float:
        known = min(max(change, low), high)
        return max(0.0, float(polynomial(known))) * (change / known if known else 1.0)

    return expected
