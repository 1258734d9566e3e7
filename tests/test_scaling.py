"""The bytes that benchmarks/scaling.py works out are those that real processes exchange.

Processes on a CPU make small videos with the toy model and count what they hand to torch's collectives, step by step.
The sizes have 15 tokens a frame, which neither 2 nor 4 processes divide, or 16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from skyreels_v3.cli import parse_request
from skyreels_v3.parallel.ranks import Degrees
from skyreels_v3.plan import transformer_sizes
from skyreels_v3.tasks import GenerationRequest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
EXACT = 0.01
STEPS = 3
TOY_CHANNELS = 16  # of its VAE, at an eighth of the frame's size
PROMPT = ("--model_id", "tiny", "--device", "cpu", "--prompt", "a", "--no_cache", "--quiet", "--use_usp")
COMMON = (*PROMPT, "--num_inference_steps", str(STEPS))
PADDED, EVEN = ("--height", "48", "--width", "80"), ("--height", "64", "--width", "64")
PICTURE = ("--task_type", "reference_to_video", "--ref_imgs", str(ASSETS / "fox.png"), "--num_frames", "5")
CLIP = ("--task_type", "shot_switching_extension", "--input_video", str(ASSETS / "boat.mp4"), "--duration", "2")
SPEAKERS = ("--task_type", "talking_avatar", "--input_image", str(ASSETS / "portrait.png"))
SPEAKERS += ("--input_audio", "{sound},{sound}")
GUIDED = ("--guidance_scale", "3", "--image_guidance_scale", "2")  # three terms
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "Ulysses": (*PICTURE, *EVEN, "--ulysses_degree", "2"),
        "Ulysses, padded": (*PICTURE, *PADDED, "--ulysses_degree", "2"),
        "ring": (*PICTURE, *EVEN, "--ring_degree", "2"),
        "ring, padded": (*PICTURE, *PADDED, "--ring_degree", "2"),
        "guidance": (*PICTURE, *PADDED, *GUIDED, "--cfg_degree", "2"),
        "weights": (*PICTURE, *PADDED, "--shard_weights"),
        "weights in FP8": (*PICTURE, *PADDED, "--shard_weights", "--quant", "fp8"),
        "clip": (*CLIP, *PADDED),
        "speakers": (*SPEAKERS, *PADDED),
    },
    4: {
        "Ulysses": (*PICTURE, *EVEN, "--ulysses_degree", "4"),
        "Ulysses, padded": (*PICTURE, *PADDED, "--ulysses_degree", "4"),
        "ring, padded": (*PICTURE, *PADDED, "--ring_degree", "4"),
        "both": (*PICTURE, *PADDED, "--ulysses_degree", "2", "--ring_degree", "2"),
        "all three": (*PICTURE, *EVEN, "--guidance_scale", "3", "--cfg_degree", "2", "--shard_weights"),
    },
}
RUNS = [  # those of 4 processes are all made at once, and take longer
    pytest.param(processes, name, marks=pytest.mark.extended if processes > 2 else ())
    for processes, cases in CASES.items()
    for name in cases
]
# Every process makes the videos of all cases and writes what it sent: case -> "step 1", "encode" ... -> kind -> bytes.
DRIVER = """
import json
import os
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from skyreels_v3.parallel import processes
from skyreels_v3.wan.tiny import make_tiny
from skyreels_v3.cli import parse_request
from skyreels_v3.wan.vae import VideoVAE
from skyreels_v3 import stages as steps
from skyreels_v3.preflight import preflight
from skyreels_v3.parallel.ranks import ranks_of
from skyreels_v3.generate import load
from skyreels_v3.plan import plan
from skyreels_v3.runtime import find_machine

SENT = {  # of a tensor that is handed in, or of all that come back
    "alltoall_base_": ("exchange", 1, lambda size, members: size * (members - 1) / members),
    "_allgather_base_": ("gather", 0, lambda size, members: size * (members - 1) / members),
    "allreduce_": ("reduce", 0, lambda size, members: 2 * size * (members - 1) / members),
    "broadcast_": ("told", 0, lambda size, members: size),
}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.stage, self.sent = "else", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("c10d::")
        if function.namespace == "c10d" and name != "barrier":
            kind, place, share = SENT[name]
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            group = next(found for value in args if (found := group_of(value)) is not None)
            stage = self.sent.setdefault(self.stage, {})
            size = sum(share(tensor.nbytes, group.size()) for tensor in tensors)
            stage[kind] = stage.get(kind, 0) + size
        return function(*args, **(kwargs or {}))

    @contextmanager
    def at(self, stage):
        before, self.stage = self.stage, stage
        yield
        self.stage = before


def group_of(value):
    try:
        return ProcessGroup.unbox(value)
    except (TypeError, RuntimeError):
        return None


def watched_denoise(*given):
    with count.at("step 1"):
        for step, latents in denoise(*given):
            count.stage = f"step {step + 1}"
            yield step, latents


def watched_encode(vae, *given):
    with count.at("encode"):
        return encode(vae, *given)


def watched_decode(vae, latents):
    made = decode(vae, latents)
    # a mode counts in the thread that it was entered in; pieces are decoded in one of their own
    own = nullcontext() if threading.current_thread() is threading.main_thread() else count
    while True:
        with count.at("decode"), own:
            chunk = next(made, None)
        if chunk is None:
            return
        yield chunk


denoise, encode, decode = steps.denoise, VideoVAE.encode, VideoVAE.decode_stream
steps.denoise, VideoVAE.encode, VideoVAE.decode_stream = watched_denoise, watched_encode, watched_decode
folder, found = Path(sys.argv[1]), {}
ranks = ranks_of(os.environ)
processes.meet(ranks, "cpu")
for number, (name, argv) in enumerate(json.loads(sys.argv[2]).items()):
    request = parse_request([*argv, "--output", str(folder / f"{number}.mp4")])
    checked = preflight(request, folder, ranks)
    if ranks.main:
        make_tiny(request.task)
    dist.barrier()
    made = plan(replace(checked, checkpoint=make_tiny(request.task)), find_machine(request, ranks), ranks)
    generator = load(made)
    with Count() as count:
        generator.write(made)
    found[name] = count.sent
(folder / f"{ranks.rank}.json").write_text(json.dumps(found))
processes.part()
"""

Sent = Mapping[str, Mapping[str, float]]  # stage -> kind -> bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Half a second of a hum."""
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"".join((step % 100 * 100).to_bytes(2, "little") for step in range(8_000)))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory, cache, sound) -> Callable[[int, str], list[Sent]]:
    """What each of so many processes sent in a case; all cases of a number of processes are run at once."""
    known: dict[int, list[dict[str, Sent]]] = {}

    def run(processes: int) -> list[dict[str, Sent]]:
        folder = tmp_path_factory.mktemp(f"{processes}-processes")
        cases = {name: argv_of(processes, name, sound) for name in CASES[processes]}
        driver = folder / "driver.py"
        driver.write_text(DRIVER, encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {"SKYREELS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        made = subprocess.run(
            [*launcher, str(driver), str(folder), json.dumps(cases)],
            env=os.environ | environment, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    def measured(processes: int, name: str) -> list[Sent]:
        if processes not in known:
            known[processes] = run(processes)
        return [found[name] for found in known[processes]]

    return measured


def argv_of(processes: int, name: str, sound: Path) -> list[str]:
    return [argument.format(sound=sound) for argument in (*CASES[processes][name], *COMMON)]


def request_of(processes: int, name: str, sound: Path) -> tuple[GenerationRequest, Degrees]:
    """A case's request, and how the processes divide it."""
    request = parse_request(argv_of(processes, name, sound))
    if request.input_audio:
        request = replace(request, audio_seconds=0.5)
    return request, scaling.division_of(str(processes), request)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), RUNS)
def test_bytes_of_a_step(processes, name, measured, sound):
    request, degrees = request_of(processes, name, sound)
    work = scaling.work_of(request, "float32")
    assert work.padded(degrees) == (degrees.sequence > 1 and request.width == 80)
    expected: dict[str, float] = {}
    for exchange in scaling.exchanges(work, degrees):
        if size := exchange.sent(len(scaling.groups(degrees, exchange.along)[0])):
            expected[exchange.kind] = expected.get(exchange.kind, 0) + size
    assert sum(scaling.step_bytes(work, degrees).values()) == sum(expected.values()) > 0
    for found in measured(processes, name):
        for step in range(1, STEPS + 1):
            sent = dict(found[f"step {step}"])
            if step == 1 and request.shard_weights:  # what is not in the blocks, once for all
                sent["gather"] -= first_gathering(request, processes)
            assert sent == pytest.approx(expected, rel=EXACT)


def first_gathering(request: GenerationRequest, processes: int) -> float:
    """Bytes that a process sends of the weights outside of the blocks."""
    sizes = transformer_sizes(request, None)
    outside = sizes.weight_bytes("float32") - sizes.num_layers * sizes.block_bytes("float32")
    return outside * (processes - 1) / processes


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), RUNS)
def test_bytes_of_the_vae(processes, name, measured, sound):
    request, _ = request_of(processes, name, sound)
    expected = scaling.vae_sent(request, processes, TOY_CHANNELS)
    if request.input_audio:  # it ends with the sound, within the window
        frames = -(-(request.frames_out - 1) // 4)
        expected["decode"] = expected["decode"] * (4 * frames + 1) // 81
    for found in measured(processes, name):
        assert {part: found[part]["gather"] for part in expected} == pytest.approx(expected, rel=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), RUNS)
def test_bytes_told_once(processes, name, measured, sound):
    """A prompt of fewer tokens is told in fewer bytes; what the tensors are called takes some."""
    request, _ = request_of(processes, name, sound)
    most = scaling.told_once(request, scaling.work_of(request, "float32"))
    for found in measured(processes, name):
        assert 0 < found["else"]["told"] < most + 1000


@pytest.mark.parametrize("degrees", [Degrees(1, 1, 8), Degrees(1, 8, 1), Degrees(3, 2, 4)], ids=str)
def test_groups(degrees):
    """Each process is in one group, and the groups' neighbours are those that `Degrees` says."""
    for along, size in (("ulysses", degrees.ulysses), ("ring", degrees.ring), ("cfg", degrees.cfg)):
        found = scaling.groups(degrees, along)
        assert sorted(rank for group in found for rank in group) == [*range(degrees.world)]
        assert all(len(group) == size for group in found)
    assert scaling.groups(degrees, "ulysses")[0] == [*range(degrees.ulysses)]
    assert scaling.groups(degrees, "sequence")[0] == [*range(degrees.sequence)]


def machines(**other: float) -> scaling.Machines:
    return replace(scaling.Machines(rate=1e12, link=1e9, network=1e9, gpus=8), **other)


def test_free_exchanges_are_perfect():
    request, _ = request_of(2, "Ulysses", Path("sound.wav"))
    work = scaling.work_of(request)
    free = machines(link=1e30, network=1e30)
    alone, divided = (scaling.step_seconds(work, Degrees(1, 2, count), free).total for count in (1, 4))
    assert alone == pytest.approx(4 * divided)


def test_between_machines_all_share_the_network():
    """Two machines of 4: rings of 2 across them send on 4 x their part from each, within one they do not touch it."""
    exchange = scaling.Exchange("ring", "gather", "ring", payload=1000)
    across, within = Degrees(1, 2, 4), Degrees(1, 4, 2)
    of_four = machines(gpus=4, network=1e6)
    assert scaling.exchange_seconds(exchange, across, of_four) == pytest.approx(4 * 1000 / 1e6)
    assert scaling.exchange_seconds(exchange, within, machines()) == pytest.approx(3 * 1000 / 1e9)
    whole = scaling.Exchange("Ulysses", "exchange", "ulysses", payload=1000)  # half of it to the other machine
    assert scaling.exchange_seconds(whole, Degrees(1, 1, 8), of_four) == pytest.approx(4 * 1000 / 2 / 1e6)


def printed(monkeypatch, capsys, *flags: str) -> tuple[list[str], dict[str, Any]]:
    """What people read, and the last line."""
    monkeypatch.setattr(sys, "argv", ["scaling", *flags])
    scaling.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_it_prints_a_table(monkeypatch, capsys, tmp_path):
    file = tmp_path / "line.json"
    lines, line = printed(monkeypatch, capsys, "--processes", "1,1x2x4", "--json", str(file))
    assert json.loads(file.read_text(encoding="utf-8")) == line
    assert lines[2].count("|") == len(line["table"][0]) + 1
    assert [prod(figure["degrees"]) for figure in line["predictions"]] == [1, 8]


def test_the_vae_has_a_halo(monkeypatch, capsys):
    """More processes do less each, but more in all; of one there is none."""
    _, line = printed(monkeypatch, capsys, "--vae", "--processes", "1,2")
    work = {(each["processes"], each["part"]): each["work"] for each in line["vae"]}
    assert work.keys() == {(1, "encode"), (1, "decode"), (2, "encode"), (2, "decode")}
    for part in ("encode", "decode"):
        assert work[1, part] == 1
        assert 0.5 < work[2, part] < 0.6


@pytest.mark.parametrize("processes", ["0", "two", "1x2", "1x1x3", "2x1x1"])
def test_nonsense_is_a_usage_error(processes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--processes", processes])
    with pytest.raises(SystemExit) as stop:
        scaling.parse_arguments()
    assert stop.value.code == 2
    assert "scaling: error: --" in capsys.readouterr().err
