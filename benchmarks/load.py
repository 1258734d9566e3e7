"""Loading a transformer: memory and time against a plain memory-mapped read and diffusers' `from_pretrained`.

A random checkpoint is written in both published layouts (same shapes; Wan-native has its own key names). Three loads
take turns, each in a fresh process:

    ours, native       our loader on the Wan-native files
    ours, diffusers    our loader on the diffusers files
    diffusers          `WanTransformer3DModel.from_pretrained` on the diffusers files

The same process also does a plain read of the same files: mapped, nothing built, the minimum for a load. Reads and
loads alternate as A B B A or B A A B: other load on the machine affects both alike, and the ratio within a process says
more than two medians.

Loads and plain reads include reading every byte of every weight; otherwise mapped weights would seem free. Time and
memory are measured from after the imports. Memory is the peak resident size (VmHWM, reset before each), mapped and
allocated pages alike. The files are brought into the page cache before each read, or dropped from it with `--cold`.
Linux only.

    python benchmarks/load.py
    python benchmarks/load.py --blocks 1.3B
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import accelerate  # noqa: F401  from_pretrained imports it, and that is not timed
import diffusers
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import at_least, environment, parser_of, quartiles, report, spread
from skyreels_v3.checkpoints.key_maps import IDENTITY, invert, translate
from skyreels_v3.wan.checkpoint import load_transformer
from skyreels_v3.wan.key_maps import NATIVE_TRANSFORMER

GB = 1e9
MEMORY_LIMIT = 1.1  # peak growth / size of the weights
TIME_LIMIT = 1.3  # ours / plain
SHARDS = 3
SHARD_NAME = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

TEXT_DIM = 4096


@dataclass(frozen=True)
class Blocks:
    """Sizes of a transformer's blocks."""

    dim: int
    heads: int
    ffn_dim: int


# Of Wan 2.1; the checkpoints have the larger ones. The cost of a load besides reading grows with the number of tensors.
BLOCKS = {"14B": Blocks(5120, 40, 13824), "1.3B": Blocks(1536, 12, 8960)}


def main() -> None:
    """Write the files, run all loads in turns, print."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="load-benchmark-") as temporary:
        folder = args.keep or Path(temporary)
        if not (folder / "native" / INDEX_NAME).is_file():
            write_checkpoints(folder, args.size_gb * GB, BLOCKS[args.blocks])
        runs = take_turns(folder, args.runs, args.cold)
        tell(runs, describe(folder / "native", args), args.json)


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--size-gb", type=float, default=1.6, help="minimum size of the weights; twice that on disk")
    parser.add_argument(
        "--blocks", default="14B", choices=BLOCKS, help="block sizes; as many blocks as --size-gb needs"
    )
    parser.add_argument("--runs", type=at_least(2), default=10, help="processes for each load; at least 2")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each read")
    parser.add_argument("--keep", type=Path, help="folder to keep the checkpoints in, or to reuse them from")
    args = parser.parse_args()
    if not 0 < args.size_gb < math.inf:
        parser.error("--size-gb must be above 0")
    return args


# Writing the checkpoints


def write_checkpoints(folder: Path, size: float, blocks: Blocks) -> None:
    """Random weights of at least `size` bytes in both layouts: `native` and `diffusers`."""
    layers = next(count for count in itertools.count(1) if model_bytes(meta_model(count, blocks)) >= size)
    model = meta_model(layers, blocks)
    to_native = invert(NATIVE_TRANSFORMER)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for layout, key_map in (("native", to_native), ("diffusers", IDENTITY)):
        (folder / layout).mkdir(parents=True)
        write_shards(folder / layout, {str(translate(name, key_map)): shape for name, shape in shapes.items()})
    model.save_config(folder / "diffusers")
    (folder / "native" / "config.json").write_text(json.dumps(native_config(layers, blocks)), encoding="utf-8")
    os.sync()  # unwritten pages cannot be dropped from the cache, and would be written while the clock runs


def meta_model(layers: int, blocks: Blocks) -> WanTransformer3DModel:
    """diffusers' model without weights."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=blocks.heads,
            attention_head_dim=blocks.dim // blocks.heads,
            text_dim=TEXT_DIM,
            ffn_dim=blocks.ffn_dim,
            num_layers=layers,
        )


def native_config(layers: int, blocks: Blocks) -> dict[str, Any]:
    """The Wan-native config.json of the same model."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": blocks.dim,
        "num_heads": blocks.heads,
        "num_layers": layers,
        "ffn_dim": blocks.ffn_dim,
        "freq_dim": 256,
        "in_dim": 16,
        "out_dim": 16,
        "text_len": 512,
        "eps": 1e-6,
    }


def model_bytes(model: torch.nn.Module) -> int:
    """Size of the weights in float32."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def write_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Write random float32 tensors to files of about equal size, and their index."""
    total = sum(4 * shape.numel() for shape in shapes.values())
    shards: list[dict[str, torch.Size]] = [{} for _ in range(SHARDS)]
    written = 0
    for key, shape in shapes.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][key] = shape
        written += 4 * shape.numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SHARD_NAME.format(number, SHARDS)
        save_file({key: torch.rand(shape) for key, shape in shard.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def describe(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What was loaded, read from the files, which may be from an earlier run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    return {
        "bytes": index["metadata"]["total_size"],
        "dtype": "float32",
        "dim": config["dim"],
        "layers": config["num_layers"],
        "shards": SHARDS,
        "page_cache": "cold" if args.cold else "warm",
        "runs": args.runs,
    }


# One comparison, in its own process


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of peak memory growth, until every weight has been read."""

    seconds: float
    growth: int


@dataclass(frozen=True)
class Comparison:
    """Two loads and two plain reads of the same files, in one process."""

    loads: tuple[Cost, Cost]
    plains: tuple[Cost, Cost]

    @property
    def ratio(self) -> float:
        """Time of the loads over time of the plain reads."""
        return sum(cost.seconds for cost in self.loads) / sum(cost.seconds for cost in self.plains)


def read_plain(folder: Path) -> list[Tensor]:
    """All tensors, memory-mapped."""
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors += [handle.get_tensor(key) for key in handle.keys()]  # noqa: SIM118  not a mapping
    return tensors


def load_ours(folder: Path) -> Iterable[Tensor]:
    """Weights of our model."""
    return load_transformer(folder, torch.float32).parameters()


def load_diffusers(folder: Path) -> Iterable[Tensor]:
    """Weights of diffusers' model."""
    return WanTransformer3DModel.from_pretrained(folder).parameters()


Read = Callable[[Path], Iterable[Tensor]]
LOADS: dict[str, tuple[Read, str]] = {  # loader and layout
    "ours, native": (load_ours, "native"),
    "ours, diffusers": (load_ours, "diffusers"),
    "diffusers": (load_diffusers, "diffusers"),
}


def compare(name: str, folder: Path, plain_first: bool, cold: bool) -> Comparison:
    """Measure a loader and plain reads of its files, as A B B A."""
    torch.set_grad_enabled(False)
    diffusers.utils.logging.disable_progress_bar()
    read_all([torch.ones(1 << 20)])  # starts torch's threads
    load, layout = LOADS[name]
    first, second = (read_plain, load) if plain_first else (load, read_plain)
    costs = [measure(read, folder / layout, cold) for read in (first, second, second, first)]
    outer, inner = (costs[0], costs[3]), (costs[1], costs[2])
    return Comparison(loads=inner, plains=outer) if plain_first else Comparison(loads=outer, plains=inner)


def measure(read: Read, folder: Path, cold: bool) -> Cost:
    """Measure one read; its result is freed on return."""
    for file in folder.glob("*.safetensors"):
        drop_from_cache(file) if cold else bring_into_cache(file)
    before = reset_peak_memory()
    start = time.perf_counter()
    read_all(read(folder))
    seconds = time.perf_counter() - start
    growth = peak_memory() - before
    gc.collect()  # models have reference cycles
    return Cost(seconds, growth)


def read_all(tensors: Iterable[Tensor]) -> float:
    """Read every byte."""
    tensors = list(tensors)  # held until the last is read, like a model's weights
    return sum(tensor.sum().item() for tensor in tensors)


def drop_from_cache(file: Path) -> None:
    """Make the next read of `file` come from disk."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_cache(file: Path) -> None:
    """Make the next read of `file` come from memory, without mapping it here."""
    buffer = bytearray(1 << 20)
    with file.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass


def reset_peak_memory() -> int:
    """Reset the process's peak resident size to the current size, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def peak_memory() -> int:
    """Largest resident size so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


# All comparisons


def take_turns(folder: Path, count: int, cold: bool) -> dict[str, list[Comparison]]:
    """`count` comparisons of each loader, round-robin."""
    runs: dict[str, list[Comparison]] = {name: [] for name in LOADS}
    for index in range(count):
        for name in LOADS:
            runs[name].append(run_fresh(name, folder, plain_first=index % 2 == 0, cold=cold))
    return runs


def run_fresh(name: str, folder: Path, plain_first: bool, cold: bool) -> Comparison:
    """Run `compare` in a new process, which takes a while to import everything."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as fresh:
        return fresh.submit(compare, name, folder, plain_first, cold).result()


def tell(runs: dict[str, list[Comparison]], sizes: dict[str, Any], file: Path | None) -> None:
    """Print a table, then one JSON line."""
    figures = {name: summarize(taken, sizes["bytes"]) for name, taken in runs.items()}
    met = all(
        figure["time_over_plain"]["median"] <= TIME_LIMIT and figure["peak_growth_over_size"] <= MEMORY_LIMIT
        for name, figure in figures.items()
        if LOADS[name][0] is load_ours
    )
    model = f"{sizes['bytes'] / GB:.2f} GB, {sizes['layers']} block(s) of width {sizes['dim']}, {sizes['dtype']}"
    title = f"{model}, {sizes['shards']} shards, page cache {sizes['page_cache']}, {sizes['runs']} runs of each"
    header = ("", "median s", "plain s", "time / plain", "quartiles", "peak growth / size")
    notes = [f"ours within {TIME_LIMIT} x plain and {MEMORY_LIMIT} x size: {'yes' if met else 'NO'}"]
    limits = {"time_over_plain": TIME_LIMIT, "peak_growth_over_size": MEMORY_LIMIT}
    line = {**environment("load", torch.device("cpu")), **sizes, "loads": figures, "limits": limits, "met": met}
    report(title, header, [row(name, figure) for name, figure in figures.items()], notes, line, file)


def row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ratio = figure["time_over_plain"]
    return (
        name,
        f"{figure['seconds']:.3f}",
        f"{figure['plain_seconds']:.3f}",
        f"{ratio['median']:.2f}",
        quartiles(ratio),
        f"{figure['peak_growth_over_size']:.3f}",
    )


def summarize(runs: Sequence[Comparison], size: int) -> dict[str, Any]:
    """Median times, median ratios within a process, and the largest memory."""
    loads = [cost for run in runs for cost in run.loads]
    plains = [cost for run in runs for cost in run.plains]
    return {
        "seconds": round(statistics.median(cost.seconds for cost in loads), 4),
        "plain_seconds": round(statistics.median(cost.seconds for cost in plains), 4),
        "time_over_plain": spread([run.ratio for run in runs]),
        "peak_growth_over_size": round(max(cost.growth for cost in loads) / size, 4),
        "plain_peak_growth_over_size": round(max(cost.growth for cost in plains) / size, 4),
    }


if __name__ == "__main__":
    main()
