"""What several processes that share one video say to each other, and what that leaves of their speed: a prediction.

Nothing is measured here. Bytes follow from the request alone: `tests/test_scaling.py` counts them again in real
processes. Seconds follow from them and from rates that are ASSUMPTIONS, the flags below.

Bytes are the payload that one process sends to others, padding included: (N - 1) / N of the tensor that it hands to an
exchange among N processes, N - 1 times its own tensor in a gathering, which is what goes round a ring, and twice
(N - 1) / N of it in a reduction. It receives as many. Messages' headers and what is sent again are not in them.

A step's seconds are its work at --tflops, plus what has to be waited for: the Ulysses exchanges, and of the ring and of
the gathered weights what is longer than the work beside them. Of a ring that is attention to the process's own part:
xDiT asks for all parts at once and waits before the second. With padding nothing is beside it, see parallel/usp.py.
Start-up times of the exchanges and kernels that are slower on fewer tokens are left out.

--processes takes numbers, divided as generate_video.py does, and GUIDANCExRINGxULYSSES. All flags that are not listed
are generate_video.py's, such as --resolution, --guidance_scale and --shard_weights.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --task_type talking_avatar --link_GBps 25
    python benchmarks/scaling.py --processes 8,1x8x1,1x2x4 --gpus_per_machine 4
    python benchmarks/scaling.py --vae
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, nothing installed

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import at_least, environment, parser_of
from skyreels_v3.cli import parse_request
from skyreels_v3.errors import UserError
from skyreels_v3.parallel.ranks import UNDIVIDED, Degrees, Ranks, choose_degrees
from skyreels_v3.plan import (
    BYTES,
    IMAGE_TOKENS,
    TEXT_TOKENS,
    Plan,
    Sizes,
    guidance_of,
    latent_frames_of_passes,
    plan,
    tokens_per_frame,
    transformer_sizes,
)
from skyreels_v3.tasks import (
    LATENT_CHANNELS,
    PATCH_SIZE,
    REFERENCE_SLOTS,
    TASK_NAMES,
    VAE_STRIDE,
    GenerationRequest,
    choose_size,
    task_spec,
)
from skyreels_v3.wan.vae import TiledStages, decoder_stages, encoder_stages, enough_tiles

LANDSCAPE = (720, 1280)
DTYPE = "bfloat16"
FLOAT32 = BYTES["float32"]
VAE_CHANNELS = 384  # at an eighth of the frame's size, where the others' tiles are joined
SECONDS_OF_SOUND = 10
# ASSUMPTIONS, none of them measured
LINK = 350  # GB/s that a GPU sends to the others of its machine: NVLink 4 is 450 on paper
NETWORK = 25  # GB/s that all GPUs of a machine together send to other machines: 200 Gbit/s
RATE = 500  # TFLOP/s of a forward: about half of an H100's peak in bfloat16
GPUS = 8  # of a machine

# Bytes


@dataclass(frozen=True)
class Work:
    """One pass of a request, as far as it says what goes between processes.

    Attributes:
        frames, new_frames: latent frames of the sequence, and those of them that are generated.
        frame_tokens: tokens of a frame.
        terms: of the guidance, 1 without.
        element: bytes of a number in the tokens.
        block: bytes of a block's weights where they are divided, else 0.
    """

    sizes: Sizes
    frames: int
    new_frames: int
    frame_tokens: int
    terms: int
    speakers: int
    element: int
    block: int

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def share(self, degrees: Degrees) -> int:
        """Tokens of a frame on each process, padding included."""
        return math.ceil(self.frame_tokens / degrees.sequence)

    def forwards(self, degrees: Degrees) -> int:
        """Forwards of each process in a step."""
        return math.ceil(self.terms / degrees.cfg)

    def padded(self, degrees: Degrees) -> bool:
        """Whether some processes have padding."""
        return self.share(degrees) * degrees.sequence > self.frame_tokens


@dataclass(frozen=True)
class Exchange:
    """Something that all processes of a group do together in every step.

    Attributes:
        name: what for, a column of the table.
        kind: one of `FACTORS`.
        along: the processes: those that differ in "ulysses", "ring", "sequence", "cfg", or all, "world".
        payload: bytes that a process hands in, all times of a step together.
    """

    name: str
    kind: str
    along: str
    payload: int

    def sent(self, members: int) -> float:
        """Bytes that a process sends to the other members of its group."""
        return FACTORS[self.kind](members) * self.payload


FACTORS: dict[str, Callable[[int], float]] = {
    "exchange": lambda members: (members - 1) / members,
    "gather": lambda members: members - 1,
    "reduce": lambda members: 2 * (members - 1) / members,
}


def work_of(request: GenerationRequest, dtype: str = DTYPE) -> Work:
    """The longest pass of a request whose size is known."""
    sizes = transformer_sizes(request, None)
    new, condition = max(latent_frames_of_passes(request), key=sum)
    return Work(
        sizes=sizes,
        frames=new + condition,
        new_frames=new,
        frame_tokens=tokens_per_frame(request),
        terms=len(guidance_of(request).terms),
        speakers=max(1, len(request.input_audio)),
        element=BYTES[request.dtype or dtype],
        block=sizes.block_bytes(request.dtype or dtype, request.quant is not None) if request.shard_weights else 0,
    )


def exchanges(work: Work, degrees: Degrees) -> Iterator[Exchange]:
    """All that a step of the denoising exchanges."""
    forwards, share, dim = work.forwards(degrees), work.share(degrees), work.sizes.dim
    layers = forwards * work.sizes.num_layers
    own = work.frames * share * dim * work.element  # one tensor of this process's tokens
    latents = math.prod(PATCH_SIZE) * LATENT_CHANNELS * FLOAT32  # of a token
    yield Exchange("Ulysses", "exchange", "ulysses", 4 * layers * own)  # queries, keys, values; and back
    yield Exchange("ring", "gather", "ring", 2 * layers * own)  # keys and values
    yield Exchange("velocities", "gather", "sequence", forwards * work.frames * share * latents)
    yield Exchange("guidance", "gather", "cfg", forwards * work.new_frames * work.frame_tokens * latents)
    if work.speakers > 1:
        yield Exchange("speakers", "gather", "sequence", layers * share * dim * work.element)  # first frame's keys
        yield Exchange("speakers", "reduce", "sequence", layers * 2 * 3 * FLOAT32)  # lowest and highest of 3 regions
    if work.block:
        yield Exchange("weights", "gather", "world", layers * block_part(work, degrees.world))


def block_part(work: Work, processes: int) -> int:
    """Bytes of a block's weights on each process: rows are divided, and rounded up, tensor by tensor."""
    dim, ffn_dim = work.sizes.dim, work.sizes.ffn_dim
    table = 6 * dim * FLOAT32  # one row of modulation, which cannot be divided
    wide = ffn_dim * (dim + 1) * work.element  # of the feed-forward layer; all else has `dim` rows
    rows = {dim: work.block - table - wide, ffn_dim: wide}
    return table + sum(math.ceil(count / processes) * size // count for count, size in rows.items())


def step_bytes(work: Work, degrees: Degrees) -> dict[str, float]:
    """Bytes that one process sends in a step, by what for."""
    sent: dict[str, float] = {}
    for exchange in exchanges(work, degrees):
        members = len(groups(degrees, exchange.along)[0])
        sent[exchange.name] = sent.get(exchange.name, 0.0) + exchange.sent(members)
    return sent


def groups(degrees: Degrees, along: str) -> list[list[int]]:
    """The ranks of each group of processes, see `Exchange.along`; numbered as `ranks.Degrees` says."""
    size, stride = {
        "ulysses": (degrees.ulysses, 1),
        "ring": (degrees.ring, degrees.ulysses),
        "sequence": (degrees.sequence, 1),
        "cfg": (degrees.cfg, degrees.sequence),
        "world": (degrees.world, 1),
    }[along]
    firsts = (rank for rank in range(degrees.world) if rank // stride % size == 0)
    return [[first + stride * member for member in range(size)] for first in firsts]


def vae_sent(request: GenerationRequest, processes: int, channels: int = VAE_CHANNELS) -> dict[str, int]:
    """Bytes that one process sends while a pass's frames are encoded, and decoded: its tiles, to all others."""
    assert request.height is not None and request.width is not None
    new, condition = max(latent_frames_of_passes(request), key=sum)
    encoded, decoded = condition, new
    if request.task.name == "reference_to_video":
        encoded = min(REFERENCE_SLOTS, len(request.ref_imgs))
    elif request.task.name == "talking_avatar":
        encoded = new  # what is known of the pass, on grey
    elif request.task.name == "single_shot_extension":
        decoded = new + condition
    inner = (request.height // VAE_STRIDE[1], request.width // VAE_STRIDE[2])
    values = {
        "encode": encoded * channels * tile_pixels(inner, processes),
        "decode": (VAE_STRIDE[0] * (decoded - 1) + 1) * 3 * tile_pixels((request.height, request.width), processes),
    }
    return {part: count * BYTES[request.vae_dtype] * (processes - 1) for part, count in values.items()}


def tile_pixels(size: tuple[int, int], processes: int) -> int:
    """Pixels of all tiles of one process, padded to the largest."""
    rows, columns = enough_tiles(size, (1, 1), processes)
    return math.ceil(size[0] / rows) * math.ceil(size[1] / columns) * (rows * columns // processes)


def told_once(request: GenerationRequest, work: Work) -> int:
    """Bytes at most that each of the others hears from the first process in a video: what it has encoded."""
    sizes = work.sizes
    texts = work.terms * TEXT_TOKENS * sizes.text_dim * work.element
    if sizes.audio_dim is None or sizes.image_dim is None:
        return texts
    pictures = len([*latent_frames_of_passes(request)]) * IMAGE_TOKENS * sizes.image_dim * work.element
    sounds = work.speakers * request.frames_out * sizes.audio_features * FLOAT32
    return 2 * texts + pictures + sounds  # the windows of a long video have a prompt of their own


# Seconds


@dataclass(frozen=True)
class Machines:
    """What the processes run on: FLOP/s of one, bytes/s within a machine (of each) and out of it (of all its GPUs)."""

    rate: float
    link: float
    network: float
    gpus: int


@dataclass(frozen=True)
class Step:
    """The seconds of a step on one process: its work, and what it waits for."""

    work: float
    waits: float

    @property
    def total(self) -> float:
        return self.work + self.waits


def step_flop(work: Work, degrees: Degrees) -> tuple[float, float]:
    """Operations of one process in a step, and those of them that are attention to the tokens it has without a ring."""
    part = work.forwards(degrees) * work.share(degrees) / work.frame_tokens
    attention = work.sizes.num_layers * 4 * work.tokens**2 * work.sizes.dim
    return part * work.sizes.forward_flop(work.tokens), part * attention / degrees.ring


def step_seconds(work: Work, degrees: Degrees, machines: Machines) -> Step:
    """The prediction, see the beginning of this file."""
    took: dict[str, float] = {}
    for exchange in exchanges(work, degrees):
        took[exchange.name] = took.get(exchange.name, 0.0) + exchange_seconds(exchange, degrees, machines)
    flop, beside_ring = step_flop(work, degrees)
    compute = flop / machines.rate
    hidden = 0.0 if work.padded(degrees) else min(took["ring"], beside_ring / machines.rate)
    took["ring"] -= hidden
    if "weights" in took:  # the next block's come while this one works; they share the links with the ring
        took["weights"] = max(0.0, took["weights"] - (compute - hidden))
    return Step(compute, sum(took.values()))


def exchange_seconds(exchange: Exchange, degrees: Degrees, machines: Machines) -> float:
    """The longer of what goes on within the machines and between them."""
    inside: Counter[int] = Counter()  # bytes that a process sends
    outside: Counter[int] = Counter()  # that a machine does
    for group in groups(degrees, exchange.along):
        for source, target, size in flows(exchange, group):
            machine = source // machines.gpus
            if machine == target // machines.gpus:
                inside[source] += size
            else:
                outside[machine] += size
    within, between = (max(sent.values(), default=0) for sent in (inside, outside))
    return max(within / machines.link, between / machines.network)


def flows(exchange: Exchange, group: Sequence[int]) -> Iterator[tuple[int, int, float]]:
    """Who sends how many bytes to whom: in an exchange each to all, else each to the next one."""
    sent = exchange.sent(len(group))
    for number, source in enumerate(group):
        others = group[number + 1 :] + group[:number]
        targets = others if exchange.kind == "exchange" else others[:1]
        yield from ((source, target, sent / len(targets)) for target in targets)


# The VAE's work


def vae_work(request: GenerationRequest, processes: Sequence[int]) -> list[tuple[int, str, float, float]]:
    """For each number of processes and part of the VAE: the work of one over that of all, and efficiency."""
    size = (request.height, request.width)
    inner = [side // stride for side, stride in zip(size, VAE_STRIDE[1:], strict=True)]
    with torch.device("meta"):
        module = AutoencoderKLWan().eval()
    made = []
    for part in ("encode", "decode"):
        if part == "encode":
            stages, cut = encoder_stages(module.encoder, shared=True)
            shared, alone = (stages[:cut], 3, VAE_STRIDE[0], size), (stages[cut:], VAE_CHANNELS, 1, inner)
        else:
            stages, cut = decoder_stages(module.decoder, shared=True)
            shared, alone = (stages[cut:], VAE_CHANNELS, 1, inner), (stages[:cut], LATENT_CHANNELS, 1, inner)
        out = inner if part == "encode" else size
        everyone = max(stages_flop(*alone, (1, 1)))
        whole = everyone + max(stages_flop(*shared, (1, 1)))
        for count in processes:
            one = everyone + max(stages_flop(*shared, enough_tiles(out, (1, 1), count)))
            made.append((count, part, one / whole, whole / (count * one)))
    return made


def stages_flop(
    stages: Sequence[nn.Module], channels: int, frames: int, size: Sequence[int], grid: tuple[int, int]
) -> list[int]:
    """Operations of each tile for a latent frame that is not the first; `frames` is how many that is at this end."""
    counted = []
    for tile in TiledStages(stages, size, grid).tiles:
        first, later = (torch.empty(1, channels, count, *size, device="meta") for count in (1, frames))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            tile(first)
            before = counter.get_total_flops()
            tile(later)
        counted.append(counter.get_total_flops() - before)
    return counted


# Telling


def main() -> None:
    """Work out, print."""
    args, request, divisions = parse_arguments()
    machines = Machines(args.tflops * 1e12, args.link_GBps * 1e9, args.network_GBps * 1e9, args.gpus_per_machine)
    title = f"{request.task.name}, {request.height} x {request.width}, {request.frames_out} frames"
    if args.vae:
        tell_vae(args, request, title, sorted({degrees.world for degrees in divisions}))
    else:
        tell(args, request, title, divisions, machines)


def parse_arguments() -> tuple[argparse.Namespace, GenerationRequest, list[Degrees]]:
    """The command line: the flags that are the benchmark's, the request that the others make, and its divisions."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--task_type", choices=TASK_NAMES, default="reference_to_video")
    parser.add_argument("--duration", type=at_least(1), help="seconds (default: the task's, or of sound 10)")
    parser.add_argument("--processes", default="1,2,4,8,16", metavar="N|CxRxU,...", help="how many (default: 1 to 16)")
    for name, default, unit in (
        ("tflops", RATE, "TFLOP/s of one GPU in a forward"),
        ("link_GBps", LINK, "GB/s that a GPU sends within its machine"),
        ("network_GBps", NETWORK, "GB/s that a machine sends to others, all its GPUs together"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{unit}, assumed (default: {default})")
    parser.add_argument("--gpus_per_machine", type=at_least(1), default=GPUS, help=f"default: {GPUS}")
    parser.add_argument("--vae", action="store_true", help="the VAE's work instead, counted")
    args, rest = parser.parse_known_args()
    try:
        request = request_of(args, rest)
        return args, request, [division_of(text, request) for text in args.processes.split(",")]
    except UserError as error:
        parser.error(str(error))


def positive(text: str) -> float:
    """A type for numbers above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def request_of(args: argparse.Namespace, rest: Sequence[str]) -> GenerationRequest:
    """The request; its inputs are not looked at, and are of the format 16:9 unless there is a size."""
    spec = task_spec(args.task_type)
    flags = ["--task_type", spec.name, "--prompt", "a", "--use_usp"]
    for name in spec.inputs:
        flags += [] if f"--{name}" in rest else [f"--{name}", name]
    sound = "input_audio" in spec.inputs
    if args.duration is not None and not sound:
        flags += ["--duration", str(args.duration)]
    request = parse_request([*flags, *rest])
    if sound:
        request = replace(request, audio_seconds=args.duration or SECONDS_OF_SOUND)
    if request.height is None:
        height, width = choose_size(spec, request.resolution, *LANDSCAPE)
        request = replace(request, height=height, width=width)
    return request


def division_of(text: str, request: GenerationRequest) -> Degrees:
    """How so many processes divide the work, or the degrees in a text such as 1x2x4, where the product takes them."""
    try:
        numbers = [int(number) for number in text.split("x")]
        if len(numbers) not in (1, 3) or min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise UserError("--processes", f"{text}: give numbers from 1 on, or GUIDANCExRINGxULYSSES") from None
    if len(numbers) == 3:
        cfg, ring, ulysses = numbers
        request = replace(request, cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)
    heads, terms = transformer_sizes(request, None).num_attention_heads, len(guidance_of(request).terms)
    return choose_degrees(request, math.prod(numbers), heads, terms)


def tell(
    args: argparse.Namespace, request: GenerationRequest, title: str, divisions: Sequence[Degrees], machines: Machines
) -> None:
    """A table for people, then one JSON line."""
    work = work_of(request)
    alone = step_seconds(work, UNDIVIDED, machines).total
    figures = [figure_of(request, work, degrees, machines, alone) for degrees in divisions]
    title += f", {work.tokens:,} tokens, {work.terms} term(s) of guidance, {request.dtype or DTYPE}: predicted"
    header = ("processes", "guidance x ring x Ulysses", "PFLOP", "Ulysses, GB", "ring, GB", "rest, GB", "weights, GB")
    header += ("s a step", "of it waits", "efficiency", "resident, GB", "offload, GB")
    notes = [
        "GB and PFLOP are those of one process in one step of the denoising; the last two columns are its memory.",
        f"ASSUMED: {args.tflops:g} TFLOP/s, {args.link_GBps:g} GB/s from a GPU within its machine of {machines.gpus}, "
        f"{args.network_GBps:g} GB/s from a machine to others.",
        f"Told once in a video, what the first process encodes: at most {told_once(request, work) / 1e6:.1f} MB.",
    ]
    line = {"task": request.task.name, "height": request.height, "width": request.width, "tokens": work.tokens}
    line |= {"tflops": args.tflops, "link_GBps": args.link_GBps, "network_GBps": args.network_GBps}
    line |= {"gpus_per_machine": machines.gpus, "predictions": figures}
    report(title, header, [row(figure) for figure in figures], notes, line, args.json)


def figure_of(
    request: GenerationRequest, work: Work, degrees: Degrees, machines: Machines, alone: float
) -> dict[str, Any]:
    """All that is said of a division; `alone` is the time of a step on one process."""
    step, planned = step_seconds(work, degrees, machines), planned_for(request, degrees, machines)
    return {
        "processes": degrees.world,
        "degrees": [degrees.cfg, degrees.ring, degrees.ulysses],
        "flop": step_flop(work, degrees)[0],
        "bytes": step_bytes(work, degrees),
        "seconds": step.total,
        "waits": step.waits,
        "efficiency": alone / (degrees.world * step.total),
        "peak_bytes": {mode: planned.peak(mode) for mode in ("resident", "offload")},
    }


def planned_for(request: GenerationRequest, degrees: Degrees, machines: Machines) -> Plan:
    """The product's plan for the first of the processes."""
    request = replace(request, cfg_degree=degrees.cfg, ring_degree=degrees.ring, ulysses_degree=degrees.ulysses)
    return plan(request, None, DTYPE, Ranks(0, degrees.world, 0, min(degrees.world, machines.gpus)))


def row(figure: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    sent = dict(figure["bytes"])
    sizes = [sent.pop("Ulysses"), sent.pop("ring"), sent.pop("weights", 0.0)]
    sizes.insert(2, sum(sent.values()))
    return (
        str(figure["processes"]),
        " x ".join(map(str, figure["degrees"])),
        f"{figure['flop'] / 1e15:.2f}",
        *(f"{size / 1e9:.2f}" if size else "-" for size in sizes),
        f"{figure['seconds']:.2f}",
        f"{figure['waits']:.2f}",
        f"{figure['efficiency']:.0%}",
        *(f"{size / 1e9:.0f}" for size in figure["peak_bytes"].values()),
    )


def tell_vae(args: argparse.Namespace, request: GenerationRequest, title: str, processes: Sequence[int]) -> None:
    """The same of the VAE."""
    made = vae_work(request, processes)
    sent = {count: vae_sent(request, count) for count in processes}
    rows = [
        (str(count), part, f"{one:.3f}", f"{efficiency:.0%}", f"{sent[count][part] / 1e9:.2f}")
        for count, part, one, efficiency in made
    ]
    header = ("processes", "part", "work of one", "efficiency", "GB sent in a pass")
    notes = ["Work of one process over that of a process alone, counted: convolutions and attention, exchanges not."]
    keys = ("processes", "part", "work", "efficiency")
    line = {"height": request.height, "width": request.width}
    line |= {"vae": [dict(zip(keys, each, strict=True)) for each in made]}
    report(f"{title}: the VAE", header, rows, notes, line, args.json)


def report(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    line: dict[str, Any],
    file: Path | None,
) -> None:
    """As `common.report`, in Markdown."""
    marks = ["---:"] * len(header)
    print(f"{title}\n", *(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)), "", *notes, sep="\n")
    line = environment("scaling", torch.device("cpu")) | line
    text = json.dumps({**line, "title": title, "table": [header, *rows], "notes": notes})
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
