"""What the package asks of a transformer besides being an `nn.Module` that takes PEFT adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import nn

    from skyreels_v3.attention.backends import AttentionFn
    from skyreels_v3.checkpoints.key_maps import KeyMap
    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn


class Transformer(Protocol):
    """A transformer that can be streamed, sharded, quantized, compiled, cached and adapted from outside.

    Attributes:
        chunks_tokens: blocks work on a part of their tokens at a time, so that an FP8 weight is used several times.
        native_names: from the names of the official code's weights, which LoRA files use as well.
    """

    chunks_tokens: ClassVar[bool]
    native_names: ClassVar[KeyMap]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks, in the order in which they run."""

    def set_attention(self, attention: AttentionFn) -> None:
        """Set the attention kernel of all blocks."""

    def compilable(self) -> Iterator[tuple[object, str]]:
        """Objects and names of their methods that are worth compiling."""

    def divide_tokens(self, group: Group, usp: UspFn) -> None:
        """Have the ranks of `group` divide the tokens of every forward, after `set_attention`.

        Args:
            usp: attention among the tokens of all ranks.
        """
