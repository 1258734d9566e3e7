"""The tokens of a HunyuanVideo forward on several processes.

Video and text attend to each other as one sequence, video first. It is cut into equal parts, one for each process: most
have video tokens only, the last ones the rest of them and the text. So nothing is computed twice, and all have as much
to do. Attention alone needs the others' tokens (see parallel/usp.py).

The model does not know. Hooks keep this process's part of what goes into the blocks and join what comes out of the
head, so that all processes have the whole prediction. What runs before the blocks on all of the tokens, the patches and
the small text refiner, does so on every process.

The library's blocks tell video from text by counting from the end, and cannot have none of either. A process that has
none gets one of zeros, a stand-in: the others never see it, and nobody uses what becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.parallel.groups import Team, pad_end
from skyreels_v3.parallel.usp import UspFn


@dataclass(frozen=True)
class JointLayout:
    """How the tokens of a forward lie on the processes.

    Attributes:
        video, text: how many of each there are in all.
        share: tokens of a process; the last ones may have fewer.
        first, last: this process's place in the sequence; it has `first`, and `last` is the next one's.
    """

    video: int
    text: int
    share: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """Tokens on all processes together."""
        return self.video + self.text

    @property
    def own(self) -> int:
        return self.last - self.first

    @property
    def own_video(self) -> slice:
        """This process's among the video tokens; may be empty."""
        return slice(min(self.first, self.video), min(self.last, self.video))

    @property
    def own_text(self) -> slice:
        """This process's among the text tokens; may be empty."""
        return slice(max(self.first - self.video, 0), max(self.last - self.video, 0))

    @property
    def before(self) -> int:
        """Stand-ins before this process's tokens: one without video."""
        return int(size_of(self.own_video) == 0)

    @property
    def after(self) -> int:
        """Stand-ins after this process's tokens: one without text."""
        return int(size_of(self.own_text) == 0)


def lay_out(video: int, text: int, rank: int, processes: int) -> JointLayout:
    """The part of process `rank` of so many."""
    tokens = video + text
    share = -(-tokens // processes)
    return JointLayout(video, text, share, min(rank * share, tokens), min((rank + 1) * share, tokens))


def size_of(part: slice) -> int:
    return part.stop - part.start


class JointSequenceParallel:
    """Video and text tokens on several processes.

    Args:
        team: those processes, in the order of their parts.
        usp: attention among the tokens of all of them.
    """

    def __init__(self, team: Team, usp: UspFn) -> None:
        self.team = team
        self.usp = usp
        self.layout: JointLayout | None = None  # of the forward that is going on

    def attach(self, model: HunyuanTransformer3DModel) -> None:
        """Have every forward of `model` computed by all processes; it is to be called with names."""
        patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        model.set_attention(self.attention)
        model.register_forward_pre_hook(lambda _, __, named: self.begin(named, patch), with_kwargs=True)
        model.rope.register_forward_hook(lambda _, __, tables: tuple(map(self.table_part, tables)))
        model.x_embedder.register_forward_hook(lambda _, __, tokens: self.video_part(tokens))
        model.context_embedder.register_forward_hook(lambda _, __, tokens: self.text_part(tokens))
        model.proj_out.register_forward_hook(lambda _, __, tokens: self.gather(tokens))

    def begin(self, named: Mapping[str, Any], patch: tuple[int, int, int]) -> None:
        """Lay out a forward from its arguments: parts are taken before the text's tokens are made."""
        sizes = named["hidden_states"].shape[2:]
        video = math.prod(size // step for size, step in zip(sizes, patch, strict=True))
        self.layout = lay_out(video, named["encoder_hidden_states"].shape[1], self.team.rank, self.team.size)

    def table_part(self, table: Tensor) -> Tensor:
        """Own rows of a rotary table (Lv, D)."""
        return own_part(table, 0, self.now.own_video)

    def video_part(self, tokens: Tensor) -> Tensor:
        """Own ones of the video tokens (B, Lv, D)."""
        return own_part(tokens, 1, self.now.own_video)

    def text_part(self, tokens: Tensor) -> Tensor:
        """Own ones of the text tokens (B, Lt, D)."""
        return own_part(tokens, 1, self.now.own_text)

    def gather(self, tokens: Tensor) -> Tensor:
        """All video tokens (B, Lv, D) from each process's own."""
        layout = self.now
        own = tokens[:, : size_of(layout.own_video)]
        parts = self.team.all_gather(pad_end(own, 1, min(layout.share, layout.video)))
        return parts.movedim(0, 1).flatten(1, 2)[:, : layout.video]

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this process's tokens (B, L, N, D) to those of all; stand-ins are neither asked nor seen."""
        layout = self.now
        # padding, where the last processes have less, to the end of the sequence
        own = (pad_end(part.narrow(1, layout.before, layout.own), 1, layout.share) for part in (query, key, value))
        out = self.usp(*own, layout.tokens)[:, : layout.own]
        return F.pad(out, (0, 0, 0, 0, layout.before, layout.after)) if layout.before or layout.after else out

    @property
    def now(self) -> JointLayout:
        assert self.layout is not None
        return self.layout


def own_part(x: Tensor, dim: int, part: slice) -> Tensor:
    """A part of `x` on an axis, or one stand-in of zeros if that is empty."""
    # a copy: the whole can go
    own = x.narrow(dim, part.start, size_of(part)).clone()
    return pad_end(own, dim, max(1, size_of(part)))
