"""The model families, V3 (`wan`) and V1 (`hunyuan`), and the interfaces that the rest of the toolkit knows them by.

Each folder has a `family.py`, which answers for the family (`Family`): files of its checkpoints, how they are loaded,
what a forward takes; and a file per task with a `Pipeline`. `family_of(task)` and `pipeline_of(task)`
find them, and nothing else names a family. Importing a family imports no torch.
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
    """A published text encoder: parameters, blocks, parameters of a block, and how many of these are quantized."""

    parameters: int
    blocks: int
    block: int
    matrices: int


class Elements(NamedTuple):
    """Elements of some weights: always float32; those that --quant makes FP8, and their scales; all others."""

    float32: int
    fp8: int
    scales: int
    others: int

    def bytes(self, dtype: str, quant: str | None) -> int:
        """In a run of `dtype`, quantized or not."""
        width = BYTES[dtype]
        fp8 = width * self.fp8 if quant is None else self.fp8 + 4 * self.scales
        return 4 * self.float32 + fp8 + width * self.others


def published_elements(task: TaskSpec) -> tuple[Elements, list[Elements]]:
    """The elements of the published transformer's weights: outside of the blocks, and of each block."""
    made = task.transformer_elements
    return Elements(*made["outside"]), [Elements(*block) for count, *block in made["blocks"] for _ in range(count)]


def published_transformer_bytes(task: TaskSpec) -> int:
    """Bytes of the published transformer's files, about."""
    outside, blocks = published_elements(task)
    return sum(each.bytes("bfloat16", None) for each in (outside, *blocks))


class TextEncoder(Protocol):
    """A text encoder with its tokenizer."""

    module: nn.Module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, for streaming."""

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The states that the transformer is conditioned on, by name."""


class Family(Protocol):
    """The answers of a family; `config` is a transformer's, `dtype` "bfloat16" or "float32"."""

    TEXT_ENCODER: TextEncoderSizes
    CHUNKS_TOKENS: bool  # blocks work on a chunk of their tokens at a time, and so use an FP8 weight several times

    def repositories(self, task: TaskSpec) -> tuple[Repository, ...]:
        """What is needed of --model_id, and of --base_model_id if other components come from there."""

    def check_configs(self, task: TaskSpec, checkpoint: Path | None, base: Path | None) -> None:
        """Raise UserError for configs that cannot work, in the folders that are on this machine. No torch."""

    def transformer_sizes(self, checkpoint: Path, task: TaskSpec) -> dict[str, int]:
        """The sizes in the transformer's config.json, under the names of `TaskSpec.transformer`.

        Raises:
            CheckpointError: an entry is not a size.
        """

    def component_parameters(self, task: TaskSpec) -> dict[str, int]:
        """Parameters of the published components besides the transformer, by the names in `repositories`."""

    def published_bytes(self, task: TaskSpec) -> dict[str, int]:
        """Bytes of the published files of all components, about."""

    def forward_flop(self, config: Mapping[str, Any], tokens: int) -> int:
        """Floating-point operations of one forward on so many video tokens."""

    def activation_bytes(
        self, config: Mapping[str, Any], tokens: int, dtype: str, degrees: ParallelConfig = UNDIVIDED
    ) -> int:
        """Live bytes at the peak of a forward on one of the ranks that divide it, without weights."""

    def context_bytes(self, config: Mapping[str, Any], frames: int, speakers: int, dtype: str) -> int:
        """Bytes of the conditions' keys and values in one block."""

    def vae_bytes(self, size: tuple[int, int], dtype: str, part: str, tiles: Tiles) -> int:
        """Live bytes at the VAE's peak, "encode" or "decode", for frames of `size` (height, width) in so many tiles."""

    def build_transformer(self, sizes: dict[str, Any]) -> Any:
        """The transformer of these sizes on the default device, with meaningless weights."""

    def divide_tokens(self, transformer: Any, group: Group, usp: UspFn) -> None:
        """Have the ranks of `group` divide the tokens of every forward; called after `set_attention`.

        Args:
            usp: attention among the tokens of all ranks.
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
        """What loads each field of `Components`, by its name.

        Args:
            checkpoint: the folder of --model_id.
            base: that of the other components, the same for a family with one repository.
            values: read weights; otherwise everything but their values is checked, and they stay on meta.
            files: with the weights of some components, by the names that are returned, which are then not in a folder.
        """


def width_of(config: Mapping[str, Any]) -> int:
    """The width of a transformer."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def family_of(task: TaskSpec) -> Family:
    """The family of a task's model."""
    return family_named(task.family)


def family_named(name: str) -> Family:
    """The family in a folder of the package."""
    return cast(Family, import_module(f"skyreels_v3.{name}.family"))


def repositories_of(request: GenerationRequest) -> tuple[Repository, ...]:
    """What a request needs of --model_id, and of --base_model_id if other components come from there."""
    first, *others = family_of(request.task).repositories(request.task)
    for field in components_of(request):
        first = first.without(COMPONENTS[field].name)
    return (first, *others)


def component_files(request: GenerationRequest, folder: Path, name: str) -> list[Path]:
    """The files of a component's weights, which are on this machine: in the folder that it belongs to, or elsewhere."""
    own = {COMPONENTS[field].name: file for field, file in components_of(request).items()}
    if name in own:
        return [Path(os.path.expanduser(own[name]))]
    (repository,) = (one for one in repositories_of(request) if name in one.components)
    return repository.weights(folder, name)


class Pipeline:
    """The base of all tasks' pipelines."""

    def guidance(self, request: GenerationRequest) -> Guidance:
        """The guidance of every pass."""
        return text_guidance(request.guidance_scale)

    def check_inputs(self, request: ResolvedRequest, inputs: Inputs) -> None:
        """Raise UserError for inputs that do not go together; each has been checked on its own."""

    def passes(self, request: ResolvedRequest) -> Iterator[tuple[int, int]]:
        """New and condition latent frames of each pass of a request with its size and length of audio."""
        raise NotImplementedError

    def run(self, stages: Any) -> Iterator[Any]:
        """Make the video of `stages.request`: events (`stages.Event`) from `stages.Stages`."""
        raise NotImplementedError


def pipeline_of(task: TaskSpec) -> Pipeline:
    """The pipeline of a task: `PIPELINE` in its own file."""
    return cast(Pipeline, import_module(f"skyreels_v3.{task.family}.{task.name}").PIPELINE)


class Transformer(Protocol):
    """A transformer that can be streamed, sharded, quantized, compiled, cached and adapted from outside.

    Attributes:
        native_names: from the official code's names of weights, which LoRA files use as well.
    """

    native_names: ClassVar[KeyMap]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks, in the order in which they run."""

    def set_attention(self, attention: AttentionFn) -> None:
        """Set the attention function of all blocks."""

    def compilable(self) -> Iterator[tuple[object, str]]:
        """Objects, and the names of their methods that are worth compiling."""
