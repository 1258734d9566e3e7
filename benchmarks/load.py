"""Loading a transformer: memory and time beside the least that a read can take, and beside diffusers' `from_pretrained`.

A random checkpoint is written in both published layouts (the same tensors; Wan-native has its own names), then four ways
of getting at every weight take turns, each in a fresh process:

    plain      the native files memory-mapped, nothing built: the floor
    ours       our loader on the native files
    ours-diffusers    our loader on the diffusers files
    diffusers  `WanTransformer3DModel.from_pretrained` on the diffusers files

Each way ends with reading all bytes of all weights, or mapped weights would seem to cost nothing. The clock starts and
memory counts from after the imports. Memory is the peak resident size (VmHWM, reset after the imports): mapped pages
count as well as allocated ones. The files are in the page cache unless `--cold` drops them before every run. Linux only.

    python benchmarks/load.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, nothing installed

import accelerate  # noqa: F401  from_pretrained imports it; not part of what is timed
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import environment, spread, table
from skyreels_v3.checkpoints.key_maps import NATIVE_TRANSFORMER, translate
from skyreels_v3.checkpoints.published import load_transformer

GB = 1e9
MEMORY_LIMIT = 1.1  # peak growth / size of the weights
TIME_LIMIT = 1.3  # ours / plain
SHARDS = 3
SHARD_NAME = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

# Blocks of Wan 2.1 1.3B; as many as it takes. float32 throughout, so that neither loader has anything to convert.
DIM, HEADS, FFN_DIM, TEXT_DIM = 1536, 12, 8960, 4096
NATIVE_CONFIG = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": DIM,
    "num_heads": HEADS,
    "ffn_dim": FFN_DIM,
    "freq_dim": 256,
    "in_dim": 16,
    "out_dim": 16,
    "text_len": 512,
    "eps": 1e-6,
}
NATIVE_PARTS = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
NATIVE_PARTS += ("time_projection.1", "head.head")
NATIVE_BLOCK_PARTS = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    *("norm3", "ffn.0", "ffn.2"),
)
NATIVE_BLOCK_NORMS = ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k")


def main() -> None:
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args.measure, args.keep)))
        return
    with tempfile.TemporaryDirectory(prefix="load-benchmark-") as temporary:
        folder = args.keep or Path(temporary)
        if not (folder / "native" / INDEX_NAME).is_file():
            write_checkpoints(folder, args.size_gb * GB)
        runs = take_turns(folder, args.runs, args.cold)
        report(args, runs, weight_bytes(folder / "native"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.6, help="least size of the weights; twice that on disk")
    parser.add_argument("--runs", type=int, default=7, help="of each way; at least 2")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--keep", type=Path, help="folder to leave the checkpoints in, or to find them in")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)  # one run, in the process of its own
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("--runs must be at least 2")
    return args


# Making the checkpoints


def write_checkpoints(folder: Path, size: float) -> None:
    """The same random weights of at least `size` bytes in both layouts: `native` and `diffusers`."""
    layers = next(count for count in itertools.count(1) if model_bytes(meta_model(count)) >= size)
    model = meta_model(layers)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    natives = {translate(key, NATIVE_TRANSFORMER): key for key in native_keys(layers)}
    assert natives.keys() == shapes.keys(), natives.keys() ^ shapes.keys()
    for layout, names in (("native", natives), ("diffusers", {name: name for name in shapes})):
        (folder / layout).mkdir(parents=True)
        write_shards(folder / layout, {names[name]: shape for name, shape in shapes.items()})
    model.save_config(folder / "diffusers")
    config = json.dumps({**NATIVE_CONFIG, "num_layers": layers})
    (folder / "native" / "config.json").write_text(config, encoding="utf-8")
    os.sync()  # what is not on disk yet cannot be dropped from the cache, and would be written while the clock runs


def meta_model(layers: int) -> WanTransformer3DModel:
    """diffusers' model without weights."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=DIM // HEADS,
            text_dim=TEXT_DIM,
            ffn_dim=FFN_DIM,
            num_layers=layers,
        )


def model_bytes(model: torch.nn.Module) -> int:
    """Size of the weights in float32."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def native_keys(layers: int) -> Iterator[str]:
    """Names of all weights of the model in the Wan-native layout."""
    blocks = [f"blocks.{index}." for index in range(layers)]
    parts = [*NATIVE_PARTS, *(block + part for block in blocks for part in NATIVE_BLOCK_PARTS)]
    yield from (f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))
    yield from (f"{block}{norm}.weight" for block in blocks for norm in NATIVE_BLOCK_NORMS)
    yield from (f"{block}modulation" for block in blocks)
    yield "head.modulation"


def write_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Random float32 tensors in files of about equal size, and their index."""
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


def weight_bytes(folder: Path) -> int:
    """Size of all weights of a checkpoint."""
    return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["total_size"]


# One run, in its own process


def read_plain(folder: Path) -> list[Tensor]:
    tensors = []
    for file in sorted((folder / "native").glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors += [handle.get_tensor(key) for key in handle.keys()]  # noqa: SIM118  not a mapping
    return tensors


def load_ours(folder: Path) -> Iterable[Tensor]:
    return load_transformer(folder / "native", "native", torch.float32).parameters()


def load_ours_diffusers(folder: Path) -> Iterable[Tensor]:
    return load_transformer(folder / "diffusers", "diffusers", torch.float32).parameters()


def load_diffusers(folder: Path) -> Iterable[Tensor]:
    return WanTransformer3DModel.from_pretrained(folder / "diffusers").parameters()


WAYS: dict[str, Callable[[Path], Iterable[Tensor]]] = {
    "plain": read_plain,
    "ours": load_ours,
    "ours-diffusers": load_ours_diffusers,
    "diffusers": load_diffusers,
}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory growth in bytes of one way to have read every weight."""
    torch.set_grad_enabled(False)
    read_all([torch.ones(1 << 20)])  # starts torch's threads
    before = reset_peak_memory()
    start = time.perf_counter()
    read_all(WAYS[way](folder))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "growth": peak_memory() - before}


def read_all(tensors: Iterable[Tensor]) -> float:
    """Read every byte."""
    tensors = list(tensors)  # held until the last is read, as a model's weights are
    return sum(tensor.sum().item() for tensor in tensors)


def reset_peak_memory() -> int:
    """Bring the process's peak resident size down to its present one, and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def peak_memory() -> int:
    """Largest resident size so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


# All runs


def take_turns(folder: Path, count: int, cold: bool) -> list[dict[str, dict[str, float]]]:
    """Measure all ways `count` times, each time from the other end of their list; the first round is not counted."""
    rounds = []
    for index in range(count + 1):
        order = list(WAYS) if index % 2 else list(reversed(WAYS))
        taken = {way: run_fresh(way, folder, cold) for way in order}
        rounds.append(taken)
    return rounds[1:]


def run_fresh(way: str, folder: Path, cold: bool) -> dict[str, float]:
    """`measure` in a new process."""
    if cold:
        for file in folder.glob("*/*.safetensors"):
            drop_from_cache(file)
    command = [sys.executable, __file__, "--measure", way, "--keep", str(folder)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def drop_from_cache(file: Path) -> None:
    """Have the next read of `file` come from the disk."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(args: argparse.Namespace, runs: list[dict[str, dict[str, float]]], size: int) -> None:
    """A table for people, then one JSON line."""
    seconds = {way: statistics.median(run[way]["seconds"] for run in runs) for way in WAYS}
    memory = {way: max(run[way]["growth"] for run in runs) / size for way in WAYS}
    times = {way: spread([run[way]["seconds"] / run["plain"]["seconds"] for run in runs]) for way in WAYS}
    met = all(memory[way] <= MEMORY_LIMIT and times[way]["median"] <= TIME_LIMIT for way in ("ours", "ours-diffusers"))
    cache = "cold" if args.cold else "warm"
    print(f"a transformer of {size / GB:.2f} GB, float32, {SHARDS} shards, page cache {cache}, {len(runs)} runs of each")
    rows = [(way, f"{seconds[way]:.3f}", f"{times[way]['median']:.2f}", f"{memory[way]:.3f}") for way in WAYS]
    print(table(("", "median s", "time / plain", "peak growth / size"), rows))
    print(f"ours within {TIME_LIMIT} x plain and {MEMORY_LIMIT} x size: {'yes' if met else 'NO'}")
    figures = {
        "bytes": size,
        "shards": SHARDS,
        "page_cache": cache,
        "runs": len(runs),
        "seconds": {way: round(value, 4) for way, value in seconds.items()},
        "time_over_plain": times,
        "peak_growth_over_size": {way: round(value, 4) for way, value in memory.items()},
        "limits": {"time_over_plain": TIME_LIMIT, "peak_growth_over_size": MEMORY_LIMIT},
        "met": met,
    }
    print(json.dumps({**environment("load", torch.device("cpu")), **figures}))


if __name__ == "__main__":
    main()
