"""Interfaces of the model families, V3 (`wan`) and V1 (`hunyuan`), to the rest of the toolkit.

Each family's folder has a `family.py` that implements `Family` (checkpoint files, loading, cost of a forward) and a
file per task with a `Pipeline`. `family_of(task)` and `pipeline_of(task)` find them; nothing else names a family.
Importing a family does not import torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.checkpoints.hub import COMPONENTS, components_of
from skyreels_v3.denoising.guidance import Guidance, text_guidance
from skyreels_v3.inputs import Inputs
from skyreels_v3.memory.policy import BYTES, Tiles
from skyreels_v3.parallel.ranks import UNDIVIDED, ParallelConfig
from skyreels_v3.request import GenerationRequest, ResolvedRequest
from skyreels_v3.tasks import TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from skyreels_v3.attention.backends import AttentionFn
    from skyreels_v3.checkpoints.key_maps import KeyMap
    from skyreels_v3.parallel.groups import Group
    from skyreels_v3.parallel.usp import UspFn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoderSizes:
    """Sizes of a published text encoder: parameters, blocks, parameters per block, and quantizable ones of these."""

    parameters: int
    blocks: int
    block: int
    matrices: int


class Elements(NamedTuple):
    """Element counts of weights: always float32; quantized to FP8 by --quant, and their scales; all others."""

    float32: int
    fp8: int
    scales: int
    others: int

    def bytes(self, dtype: str, quant: str | None) -> int:
        """The size of the weights in a run with `dtype` and `quant`."""
        width = BYTES[dtype]
        fp8 = width * self.fp8 if quant is None else self.fp8 + 4 * self.scales
        return 4 * self.float32 + fp8 + width * self.others


def published_elements(task: TaskSpec) -> tuple[Elements, list[Elements]]:
    """Element counts of the published transformer's weights: outside the blocks, and of each block."""
    made = task.transformer_elements
    return Elements(*made["outside"]), [Elements(*block) for count, *block in made["blocks"] for _ in range(count)]


def published_transformer_bytes(task: TaskSpec) -> int:
    """Approximate bytes of the published transformer's files."""
    outside, blocks = published_elements(task)
    return sum(each.bytes("bfloat16", None) for each in (outside, *blocks))


class TextEncoder(Protocol):
    """A text encoder with its tokenizer."""

    module: nn.Module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, for streaming."""

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Encode a prompt; returns the hidden states that condition the transformer, by name."""


class Family(Protocol):
    """What a model family implements; `config` is the transformer's, `dtype` is "bfloat16" or "float32"."""

    TEXT_ENCODER: TextEncoderSizes
    CHUNKS_TOKENS: bool  # whether blocks process tokens in chunks, and so use each FP8 weight several times

    def repositories(self, task: TaskSpec) -> tuple[Repository, ...]:
        """What a task needs of --model_id, and of --base_model_id if other components come from there."""

    def check_configs(self, task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
        """Raise UserError for unusable configs in the folders that are on this machine. No torch."""

    def transformer_sizes(self, checkpoint: Path, task: TaskSpec) -> dict[str, int]:
        """Read the sizes in the transformer's config.json, named as in `TaskSpec.transformer`.

        Raises:
            CheckpointError: an entry is not a size.
        """

    def component_parameters(self, task: TaskSpec) -> dict[str, int]:
        """Parameter counts of the published components but the transformer, by their names in `repositories`."""

    def published_bytes(self, task: TaskSpec) -> dict[str, int]:
        """Approximate bytes of the published files of each component."""

    def forward_flop(self, config: Mapping[str, Any], tokens: int) -> int:
        """Floating-point operations of one forward on `tokens` video tokens."""

    def activation_bytes(
        self, config: Mapping[str, Any], tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED
    ) -> int:
        """Peak live bytes of a forward on one of the ranks that divide it, without weights."""

    def context_bytes(self, config: Mapping[str, Any], frames: int, speakers: int, dtype: str) -> int:
        """Bytes of the conditions' keys and values in one block."""

    def vae_bytes(self, size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
        """Peak live bytes of the VAE's `part` ("encode" or "decode") for frames of `size` (height, width), tiled."""

    def build_transformer(self, sizes: dict[str, Any]) -> Any:
        """Build a transformer of these sizes on the default device, with arbitrary weights."""

    def divide_tokens(self, transformer: Any, group: Group, usp: UspFn) -> None:
        """Divide the tokens of every forward among the ranks of `group`; called after `set_attention`.

        Args:
            usp: attention over the tokens of all ranks.
        """

    def loaders(
        self,
        task: TaskSpec,
        checkpoint: Path,
        base: Path,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        values: bool = True,
        files: Mapping[str, Path] | None = None,
    ) -> dict[str, Callable[[], Any]]:
        """A function to load each field of `Components`, by name.

        Args:
            checkpoint: the folder of --model_id.
            base: the folder of the other components, the same for a family with one repository.
            values: whether to read weights; otherwise all but their values is checked, and they stay on meta.
            files: weights of components that are not taken from a folder, by the names that are returned.
        """


def width_of(config: Mapping[str, Any]) -> int:
    """The hidden size of a transformer."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def family_of(task: TaskSpec) -> Family:
    """The family of a task's model."""
    return family_named(task.family)


def family_named(name: str) -> Family:
    """The family in a folder of this package."""
    return cast(Family, import_module(f"skyreels_v3.{name}.family"))


def repositories_of(request: GenerationRequest) -> tuple[Repository, ...]:
    """The files that a request needs of --model_id, and of --base_model_id if other components come from there."""
    first, *others = family_of(request.task).repositories(request.task)
    for field in components_of(request):
        first = first.without(COMPONENTS[field].name)
    return (first, *others)


def component_files(request: GenerationRequest, folder: Path, name: str) -> list[Path]:
    """The weight files of a component that is on this machine: in its repository's folder, or a file of its own."""
    own = {COMPONENTS[field].name: file for field, file in components_of(request).items()}
    if name in own:
        return [Path(os.path.expanduser(own[name]))]
    (repository,) = (one for one in repositories_of(request) if name in one.components)
    return repository.weights(folder, name)


class Pipeline:
    """Base class of all tasks' pipelines."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        """The guidance used in every pass."""
        return text_guidance(request.guidance_scale)

    def check_inputs(self, request: ResolvedRequest, inputs: Inputs) -> None:
        """Raise UserError for inputs that do not fit together; each has been checked on its own."""

    def passes(self, request: ResolvedRequest) -> Iterator[tuple[int, int]]:
        """New and condition latent frames of each pass of a request."""
        raise NotImplementedError

    def run(self, stages: Any) -> Iterator[Any]:
        """Make the video of `stages`, a `stages.Stages`; yields `stages.Event`s."""
        raise NotImplementedError


def pipeline_of(task: TaskSpec) -> Pipeline:
    """The pipeline of a task: `PIPELINE` in the task's file."""
    return cast(Pipeline, import_module(f"skyreels_v3.{task.family}.{task.name}").PIPELINE)


class Transformer(Protocol):
    """What a transformer offers to streaming, sharding, quantization, compilation, the step cache and LoRAs.

    Attributes:
        native_names: the key map from the official code's weight names, which LoRA files may use as well.
    """

    native_names: ClassVar[KeyMap]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks, in execution order."""

    def set_attention(self, attention: AttentionFn) -> None:
        """Set the attention function of all blocks."""

    def compilable(self) -> Iterator[tuple[object, str]]:
        """Yield objects and the names of their methods that are worth compiling."""
