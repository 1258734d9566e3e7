"""Counts the bytes moved and operations launched by a block besides matrix products and attention.

    python benchmarks/traffic.py

Runs anywhere in seconds: nothing is timed, and tensors of official sizes are torch's fake tensors, without memory. Our
block is counted in each mode, next to diffusers' with the same weights; the VAE next to diffusers' as well, for one
latent frame within a stream.

    bytes         read and written by all operations except products, attention and convolutions, each input and output
                  once; per token and channel, for the VAE per pixel of the decoded frames
    operations    of any kind; on a GPU each is one or more kernels
    peak          of the bytes that the forward pass itself allocates
    host waits    times that Python waits for a value from the device

RMSNorm and LayerNorm are one operation each, as on a GPU. `compile` is what Inductor plans to read and write, counted
at a small size.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, HunyuanVideoTransformer3DModel
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import environment, gigabytes, parser_of, report
from benchmarks.hunyuan import TOKENS, with_weights_of
from benchmarks.models import OFFICIAL, Case, config_of, diffusers_twin, official_case, random_model, random_transformer
from skyreels_v3.attention.backends import sdpa
from skyreels_v3.families import width_of
from skyreels_v3.hunyuan.key_maps import TEXT_TOKENS as HUNYUAN_TEXT_TOKENS
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.memory.quantize import cache_dequantized, quantize
from skyreels_v3.tasks import task_spec
from skyreels_v3.wan.key_maps import TEXT_TOKENS, TOKENS_AT_ONCE
from skyreels_v3.wan.transformer import Context, TransformerBlock
from skyreels_v3.wan.vae import VideoVAE

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
PRODUCTS = ("mm", "attention", "conv")  # in names of operations whose bytes are not counted
UNCOUNTED = ("empty", "detach", "dropout")  # no memory is read or written
VALUES = ("_local_scalar_dense", "is_nonzero", "item")  # Python reads a value
HUNYUAN_LATENTS = (25, 68, 120)  # of t2v's 97 frames at 544 x 960
COMPILED_TOKENS, COMPILED_HEADS = 512, 4


@dataclass(frozen=True)
class Count:
    """Counts of one forward pass."""

    bytes: int
    operations: int
    peak_bytes: int | None
    waits: int


class Counting(TorchDispatchMode):
    """Counts the operations within a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.live = self.peak = self.waits = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in VALUES:
            self.waits += 1
            return args[0].dtype == torch.bool or 1
        out = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out))
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in given:
                self.follow(tensor)
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)
        if not view and not name.startswith("prim") and not any(part in name for part in UNCOUNTED):
            self.add(name, *inputs, *outputs)
        return out

    def add(self, name: str, *tensors: Tensor) -> None:
        """One operation that reads or writes tensors."""
        self.operations[name] += 1
        self.bytes[name] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's memory as long as it is alive."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size

    def rms_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """RMS norm as one operation, as on a GPU; a CPU has no such kernel."""
        out = torch.empty_like(x)
        self.add("rms_norm", *(t for t in (x, weight, out) if t is not None))
        return out

    @property
    def count(self) -> Count:
        moved = sum(size for name, size in self.bytes.items() if not any(part in name for part in PRODUCTS))
        return Count(moved, sum(self.operations.values()), self.peak, self.waits)


def count(work: Callable[[], Any]) -> Count:
    """Counts of a call, to be made under fake tensors."""
    counting = Counting()
    with torch.no_grad(), mock.patch.object(F, "rms_norm", counting.rms_norm), counting:
        work()
    return counting.count


# Blocks


def wan_counts(case: Case) -> Iterator[tuple[str, Count]]:
    """A block of V3's transformer in each mode."""
    width, tokens = width_of(case.sizes), case.tokens
    one = config_of({**case.sizes, "num_layers": 1})

    def fakes() -> tuple[Any, ...]:
        image = None if one.image_dim is None else torch.randn(1, 257, width, dtype=DTYPE)
        context = Context(torch.randn(1, TEXT_TOKENS, width, dtype=DTYPE), image, None, None)
        return torch.randn(1, tokens, width, dtype=DTYPE), context, torch.randn(1, 1, 6, width)

    for mode in ("diffusers", "exact", "fp8", "fp8_dynamic"):
        with FakeTensorMode():
            model = random_transformer(one, DTYPE, CPU)
            x, context, modulation = fakes()
            head = one.attention_head_dim
            if mode == "diffusers":
                block: Any = diffusers_twin(model).blocks[0]
                tables = torch.randn(1, tokens, 1, head), torch.randn(1, tokens, 1, head)
                yield mode, count(lambda: block(x, context.text, modulation[:, 0], tables))  # noqa: B023
                continue
            if mode != "exact":
                quantize(model.blocks, CPU, dynamic=mode == "fp8_dynamic")
                cache_dequantized(model.blocks)
            block, rotary = model.blocks[0], torch.randn(tokens, 1, head // 2, 2)
            yield mode, count(lambda: block(x, context, modulation, rotary))  # noqa: B023
    yield "compile", compiled_count(case)


def compiled_count(case: Case) -> Count:
    """Counts of our compiled block: what Inductor moves, scaled to the case's size."""
    tokens, heads = COMPILED_TOKENS, COMPILED_HEADS
    ratio = case.sizes.ffn_dim / width_of(case.sizes)
    width = heads * case.sizes.attention_head_dim
    sizes = {**case.sizes, "num_layers": 1, "num_attention_heads": heads, "ffn_dim": round(ratio * width)}
    block: TransformerBlock = random_transformer(config_of(sizes), DTYPE, CPU).blocks[0]
    x, modulation = torch.randn(1, tokens, width, dtype=DTYPE), torch.randn(1, 1, 6, width)
    attended = torch.randn(1, tokens, heads, width // heads, dtype=DTYPE)
    rotary = torch.randn(tokens, 1, width // heads // 2, 2)
    moved = operations = 0
    with torch.no_grad():
        text = block.attn2.keys_values(torch.randn(1, TEXT_TOKENS, width, dtype=DTYPE), None)
        for method, arguments in (
            (block.project, (x, modulation, rotary, [torch.empty_like(attended) for _ in range(3)])),
            (block.finish, (x, attended, modulation, text, None, None)),
        ):
            kernels = planned_kernels(method, arguments)
            moved += sum(size for is_product, size in kernels if not is_product)
            operations += len(kernels)
    moved, operations = moved + 2 * x.nbytes, operations + 1  # the result is copied into that of all tokens
    scale = case.tokens * width_of(case.sizes) / (tokens * width)
    return Count(round(moved * scale), operations * math.ceil(case.tokens / TOKENS_AT_ONCE) + 1, None, 0)


class Planned(Exception):
    """Stops Inductor once its plan is known, before it generates code."""


def planned_kernels(function: Callable[..., Any], arguments: Sequence[Any]) -> list[tuple[bool, int]]:
    """For each kernel, whether it is a library's (a product), and the bytes that it moves."""
    kernels: list[tuple[bool, int]] = []

    def read(graph: GraphLowering) -> None:
        graph._update_scheduler()
        kernels.extend((node.is_extern(), node.get_read_write_buffers_sizes()) for node in graph.scheduler.nodes)
        raise Planned

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "codegen", read):
        try:
            torch.compile(function)(*arguments)
        except Exception as error:
            if not kernels:
                raise error
    return kernels


def hunyuan_counts() -> Iterator[tuple[str, Count]]:
    """A double and a single block of V1's transformer."""
    sizes = dict(task_spec("t2v").transformer) | {"num_layers": 1, "num_single_layers": 1}
    frames, rows, columns = HUNYUAN_LATENTS
    tokens, width = frames * rows * columns // 4, width_of(sizes)
    for name in ("diffusers", "exact"):
        with FakeTensorMode():
            model = random_model(lambda: HunyuanTransformer3DModel(**sizes), DTYPE, CPU)
            words, mask = TOKENS[0], None
            if name == "diffusers":
                model = with_weights_of(model, HunyuanVideoTransformer3DModel)
                words = HUNYUAN_TEXT_TOKENS
                mask = torch.ones(1, 1, 1, tokens + words, dtype=torch.bool)
            else:
                model.set_attention(sdpa)
            x, text = (torch.randn(1, length, width, dtype=DTYPE) for length in (tokens, words))
            time, head = torch.randn(1, width, dtype=DTYPE), sizes["attention_head_dim"]
            tables = torch.randn(tokens, head), torch.randn(tokens, head)
            for kind, blocks in (("double", model.transformer_blocks), ("single", model.single_transformer_blocks)):
                yield f"{name}, {kind}", count(lambda: blocks[0](x, text, time, mask, tables))  # noqa: B023


# VAEs


def vae_counts(case: Case) -> Iterator[tuple[str, Count]]:
    """A latent frame of V3's VAE within a stream, float32."""
    rows, columns = case.latents[1:]
    for part in ("decode", "encode"):
        for name in ("diffusers", "ours"):
            first, second = (vae_count(part, name == "ours", frames, rows, columns) for frames in (2, 3))
            moved, operations = second.bytes - first.bytes, second.operations - first.operations
            yield f"{part}, {name}", Count(moved, operations, second.peak_bytes, second.waits - first.waits)


def vae_count(part: str, ours: bool, frames: int, rows: int, columns: int) -> Count:
    with FakeTensorMode():
        module = random_model(AutoencoderKLWan, torch.float32, CPU)
        if part == "decode":
            latents = torch.randn(1, 16, frames, rows, columns)
            if ours:
                return count(lambda: [None for _ in VideoVAE(module).decode_stream(latents)])
            return count(lambda: module.decode(latents))
        video = torch.randn(1, 3, 4 * frames - 3, 8 * rows, 8 * columns)
        return count(lambda: VideoVAE(module).encode(video) if ours else module.encode(video))


# Results


def main() -> None:
    """Count and print."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--official", choices=OFFICIAL, default="r2v-720p", help="sizes of a published model and video")
    args = parser.parse_args()
    case = official_case(*OFFICIAL[args.official])
    hunyuan_size = HUNYUAN_LATENTS[0] * HUNYUAN_LATENTS[1] * HUNYUAN_LATENTS[2] // 4
    hunyuan_width = width_of(task_spec("t2v").transformer)
    pixels = 4 * 64 * case.latents[1] * case.latents[2]
    parts = (
        ("V3", case.tokens * width_of(case.sizes), wan_counts(case)),
        ("V1", hunyuan_size * hunyuan_width, hunyuan_counts()),
        ("VAE", pixels, vae_counts(case)),
    )
    rows, figures = [], {}
    for part, unit, counts in parts:
        for name, made in counts:
            figures[f"{part}, {name}"] = vars(made) | {"unit": unit}
            each = f"{made.bytes / unit:.0f}", str(made.operations), gigabytes(made.peak_bytes), str(made.waits)
            rows.append([f"{part}, {name}", *each])
    title = (
        f"Besides products: a block at {case.tokens} tokens ({args.official}), V1's at {hunyuan_size}; a latent frame"
    )
    header = ["", "bytes", "operations", "peak, GB", "host waits"]
    report(title, header, rows, [], environment("traffic", CPU) | {"counts": figures}, args.json)


if __name__ == "__main__":
    main()
