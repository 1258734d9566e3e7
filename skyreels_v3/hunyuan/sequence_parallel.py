"""Sequence parallelism: divides the tokens of a HunyuanVideo forward pass among ranks.

Video and text are one sequence, video first, cut into equal parts: most ranks have video tokens only, the last ones
the rest of the video and the text. Only attention needs the tokens of the other ranks (see parallel/usp.py).

The model itself is unchanged: hooks keep this rank's part of the blocks' inputs and gather the head's outputs. The
patch embedding and the small text refiner run on every rank for all tokens.

diffusers' blocks need video and text. A rank without one of them gets a dummy token of zeros, which the other ranks
never see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.parallel.groups import Group, pad_end
from skyreels_v3.parallel.usp import UspFn


@dataclass(frozen=True)
class Layout:
    """How the tokens of a forward pass are divided.

    Attributes:
        video_tokens, text_tokens: on all ranks.
        share: tokens per rank; the last ranks may have fewer.
        video, text: indices of this rank's tokens among all video and all text tokens.
    """

    video_tokens: int
    text_tokens: int
    share: int
    video: range
    text: range

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def own(self) -> int:
        return len(self.video) + len(self.text)


def lay_out(video: int, text: int, rank: int, size: int) -> Layout:
    """The layout for one rank of a group of `size`."""
    share = -(-(video + text) // size)
    first, last = (min(number * share, video + text) for number in (rank, rank + 1))
    own_video = range(min(first, video), min(last, video))
    return Layout(video, text, share, own_video, range(max(first - video, 0), max(last - video, 0)))


class SequenceParallel:
    """Divides the tokens of every forward pass among the ranks of a group; call the model with keywords only.

    Args:
        usp: attention among the tokens of all ranks.
    """

    def __init__(self, group: Group, usp: UspFn) -> None:
        self.group = group
        self.usp = usp
        self.layout = lay_out(0, 0, 0, 1)  # of the current forward pass

    def attach(self, model: HunyuanTransformer3DModel) -> None:
        """Divide every forward pass of `model`."""
        patch = (model.config["patch_size_t"], model.config["patch_size"], model.config["patch_size"])
        model.set_attention(self.attention)
        model.register_forward_pre_hook(lambda _, __, given: self.begin(given, patch), with_kwargs=True)
        model.rope.register_forward_hook(
            lambda _, __, tables: tuple(own_part(table, 0, self.layout.video) for table in tables)
        )
        model.x_embedder.register_forward_hook(lambda _, __, tokens: own_part(tokens, 1, self.layout.video))
        model.context_embedder.register_forward_hook(lambda _, __, tokens: own_part(tokens, 1, self.layout.text))
        model.proj_out.register_forward_hook(lambda _, __, tokens: self.gather(tokens))

    def begin(self, given: Mapping[str, Any], patch: tuple[int, int, int]) -> None:
        """Set the layout of a forward pass from its arguments."""
        video = math.prod(size // step for size, step in zip(given["hidden_states"].shape[2:], patch, strict=True))
        self.layout = lay_out(video, given["encoder_hidden_states"].shape[1], self.group.rank, self.group.size)

    def gather(self, tokens: Tensor) -> Tensor:
        """All-gather the video tokens (B, Lv, D) of all ranks."""
        layout = self.layout
        own = pad_end(tokens[:, : len(layout.video)], 1, min(layout.share, layout.video_tokens))
        return self.group.all_gather_tokens(own)[:, : layout.video_tokens]

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's tokens (B, L, N, D) to those of all ranks, without dummies."""
        layout = self.layout
        dummies = (int(not layout.video), int(not layout.text))  # before and after this rank's tokens
        query, key, value = (
            pad_end(part.narrow(1, dummies[0], layout.own), 1, layout.share) for part in (query, key, value)
        )
        out = self.usp(query, key, value, layout.tokens)[:, : layout.own]
        return F.pad(out, (0, 0, 0, 0, *dummies)) if any(dummies) else out


def own_part(x: Tensor, dim: int, part: range) -> Tensor:
    """A part of `x` along a dimension, or one dummy token of zeros if the part is empty."""
    own = x.narrow(dim, part.start, len(part)).clone()  # a copy, so that the whole can be freed
    return pad_end(own, dim, max(1, len(part)))
