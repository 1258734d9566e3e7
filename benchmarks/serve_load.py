"""A server under load: many concurrent clients queue small videos while they list, poll and follow events.

`generate_video.py --serve` runs in its own process with the built-in model. Each client has its own API key, like
separate users. It queues its share of the jobs, and until the last has ended it lists its videos, polls one, waits for
as long as the server asks, and follows the events of one. Rate-limited requests are retried after Retry-After. At the
end each job must have completed once, with one file, and no process may be left.

Latencies are measured by the clients, which run in one process on the same machine. Memory and open files are those of
the server's process without its workers, sampled twice a second; the last tenth of the run is compared with the middle.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --clients 5 --jobs 6
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import httpx
import psutil
import torch

from benchmarks.common import at_least, environment, parser_of, report

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
LATENCY_LIMIT = 0.1  # seconds, 95 % of GETs
GROWTH_LIMIT = 1.1  # end of the run / its middle
SAMPLE_SECONDS = 0.5
STOP_SECONDS = 60
LISTED = 100  # videos in one answer, at most
GETS = ("list", "get")
FRAMES, SIDE = 5, 32


@dataclass(frozen=True)
class Sample:
    """The server's process at a point in time."""

    rss: int  # bytes
    files: int


@dataclass
class Record:
    """The measurements of the clients and the sampler.

    Attributes:
        seconds: latency of each request, by kind.
        refused: number of rate-limited requests.
        ended: for each job, the first answer with its final status.
        streams: for each followed job, the number of end events.
        processes: the server and all processes that it started.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"list": [], "get": [], "post": []})
    refused: int = 0
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    streams: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    processes: set[psutil.Process] = field(default_factory=set)


def main() -> int:
    """Load a server and print the result; 1 if anything is wrong with its jobs or processes."""
    args = parse_arguments()
    keys = [f"client-{number}" for number in range(args.clients)]
    record = Record()
    with tempfile.TemporaryDirectory(prefix="serve-benchmark-") as name:
        folder = Path(name)
        (folder / "keys").write_text("\n".join(keys), encoding="utf-8")
        with running_server(folder, args.workers) as (process, address):
            start = time.perf_counter()
            videos = asyncio.run(load(address, keys, args, record, psutil.Process(process.pid)))
            seconds = time.perf_counter() - start
        problems = problems_of(record, videos, folder / "server", args.jobs)
        if process.returncode != -signal.SIGINT and process.returncode != 128 + signal.SIGINT:
            problems.append(f"the server ended with code {process.returncode}")
        if problems:
            print((folder / "log").read_text(encoding="utf-8")[-4000:], file=sys.stderr)
    tell(record, seconds, problems, args)
    return bool(problems)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--clients", type=at_least(1), default=50)
    parser.add_argument("--jobs", type=at_least(1), default=300, help="of all clients; at least one for each")
    parser.add_argument("--workers", type=at_least(1), default=2)
    args = parser.parse_args()
    if not args.clients <= args.jobs <= LISTED * args.clients:
        parser.error(f"--jobs must be 1 to {LISTED} for each of --clients")
    return args


@contextmanager
def running_server(folder: Path, workers: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server; yields its process and address, and stops it as Ctrl-C would."""
    command = [sys.executable, str(ROOT / "generate_video.py"), "--serve", "--port", "0", "--model_id", "tiny"]
    command += ["--device", "cpu", "--workers", str(workers), "--outdir", str(folder / "server")]
    command += ["--api_key", str(folder / "keys")]
    environ = os.environ | {"SKYREELS_CACHE": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise SystemExit(f"no server: {(folder / 'log').read_text(encoding='utf-8')}")
            yield process, address
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            finally:
                process.kill()  # no effect if it has ended


# The clients


async def load(
    address: str, keys: Sequence[str], args: argparse.Namespace, record: Record, server: psutil.Process
) -> list[dict[str, Any]]:
    """Run all clients; returns the videos that the server lists at the end."""
    sampler = asyncio.create_task(sample(server, record))
    shares = [len(range(number, args.jobs, args.clients)) for number in range(args.clients)]
    clients = [Client(address, key, record) for key in keys]
    try:
        async with asyncio.TaskGroup() as group:
            for client, share in zip(clients, shares, strict=True):
                group.create_task(client.run(share))
        return [video for client in clients for video in (await client.list())["data"]]
    finally:
        sampler.cancel()
        for client in clients:
            await client.http.aclose()


async def sample(server: psutil.Process, record: Record) -> None:
    """Record memory, open files and processes periodically."""
    while True:
        record.samples.append(Sample(server.memory_info().rss, server.num_fds()))
        record.processes |= {server, *server.children(recursive=True)}
        await asyncio.sleep(SAMPLE_SECONDS)


class Client:
    """One user of the server."""

    def __init__(self, address: str, key: str, record: Record) -> None:
        self.record = record
        headers = {"Authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(base_url=address, headers=headers, timeout=60, trust_env=False)

    async def run(self, jobs: int) -> None:
        """Queue jobs and poll them until all have ended."""
        body = {"prompt": "a boat", "num_frames": FRAMES, "height": SIDE, "width": SIDE, "num_inference_steps": 1}
        waiting: list[str] = []
        async with asyncio.TaskGroup() as group:
            for seed in range(jobs):
                id = (await self.ask("post", "POST", "/v1/videos", json=body | {"seed": seed})).json()["id"]
                waiting.append(id)
                if not seed:
                    group.create_task(self.follow(id))
                await self.look(id)
            while waiting:
                for video in (await self.list())["data"]:
                    if video["status"] in ("completed", "failed") and video["id"] in waiting:
                        waiting.remove(video["id"])
                        self.record.ended[video["id"]] = video
                for id in waiting[:1]:
                    await asyncio.sleep(await self.look(id))

    async def list(self) -> dict[str, Any]:
        """All videos of this client."""
        return (await self.ask("list", "GET", f"/v1/videos?limit={LISTED}")).json()

    async def look(self, id: str) -> float:
        """Poll a job; returns the seconds to wait before the next time."""
        answer = await self.ask("get", "GET", f"/v1/videos/{id}")
        return int(answer.headers.get("openai-poll-after-ms", 0)) / 1000

    async def follow(self, id: str) -> None:
        """Follow the events of a job to the end of the stream."""
        async with self.http.stream("GET", f"/v1/videos/{id}/events", timeout=None) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                self.record.streams[id] += line == "event: end"

    async def ask(self, kind: str, method: str, path: str, **content: Any) -> httpx.Response:
        """Send a request, retry it while it is rate-limited, and record the latency of its answer."""
        while True:
            start = time.perf_counter()
            answer = await self.http.request(method, path, **content)
            if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
                answer.raise_for_status()
                self.record.seconds[kind].append(time.perf_counter() - start)
                return answer
            self.record.refused += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))


# The result


def problems_of(record: Record, videos: Sequence[dict[str, Any]], folder: Path, jobs: int) -> list[str]:
    """Messages about what is wrong with the jobs, their files and the processes."""
    problems = []
    last = {video["id"]: video for video in videos}
    if len(last) != jobs or len(videos) != jobs:
        problems.append(f"{len(videos)} videos instead of {jobs}")
    for id, video in last.items():
        if video["status"] != "completed":
            problems.append(f"{id} is {video['status']}: {video['error']}")
        if video != record.ended[id]:
            problems.append(f"{id} has changed after its end")
    if wrong := [id for id, ends in record.streams.items() if ends != 1]:
        problems.append(f"not one end of the events of {', '.join(wrong)}")
    files = Counter(path.parent.name for path in (folder / "jobs").glob("*/*.mp4"))
    if files != Counter(last.keys()):
        problems.append(f"{files.total()} files of {len(files)} jobs instead of one for each")
    if left := [process.pid for process in record.processes if is_alive(process)]:
        problems.append(f"processes are left: {left}")
    return problems


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is running; zombies are not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and maximum, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in found.items()}


def middle_and_end(values: Sequence[int]) -> dict[str, float]:
    """The first value, the medians of the middle and last tenths, the maximum, and the medians' ratio."""
    size = max(1, len(values) // 10)
    start = (len(values) - size) // 2
    middle, end = statistics.median(values[start : start + size]), statistics.median(values[-size:])
    return {"start": values[0], "middle": middle, "end": end, "max": max(values), "ratio": round(end / middle, 4)}


def tell(record: Record, seconds: float, problems: Sequence[str], args: argparse.Namespace) -> None:
    """Print a table, then one JSON line."""
    gets = list(itertools.chain.from_iterable(record.seconds[kind] for kind in GETS))
    kinds = {"GET a video": record.seconds["get"], "GET the list": record.seconds["list"], "all GETs": gets}
    kinds["POST a video"] = record.seconds["post"]
    latency = {name: {"requests": len(taken), **percentiles(taken)} for name, taken in kinds.items()}
    rss = middle_and_end([sample.rss for sample in record.samples])
    files = middle_and_end([sample.files for sample in record.samples])
    met = not problems and latency["all GETs"]["p95"] <= 1000 * LATENCY_LIMIT
    met = met and max(rss["ratio"], files["ratio"]) <= GROWTH_LIMIT
    title = f"{args.jobs} jobs of {args.clients} clients, {args.workers} workers, {FRAMES} frames of {SIDE} x {SIDE}"
    rows = [(name, *(f"{figure:g}" for figure in figures.values())) for name, figures in latency.items()]
    notes = [
        f"{seconds:.0f} s: {60 * args.jobs / seconds:.1f} jobs a minute, {len(gets) / seconds:.1f} GETs a second, "
        f"{record.refused} requests sent again after a 429",
        f"resident memory: {rss['middle'] / MB:.1f} MB in the middle, {rss['end'] / MB:.1f} MB at the end",
        f"open files: {files['start']:g} at the start, {files['middle']:g} in the middle, {files['end']:g} at the end",
        f"each job completed once, no process left: {'; '.join(problems[:10]) or 'yes'}",
        f"p95 of GETs within {1000 * LATENCY_LIMIT:g} ms, no growth beyond {GROWTH_LIMIT}: {'yes' if met else 'NO'}",
    ]
    sizes = {"clients": args.clients, "jobs": args.jobs, "workers": args.workers, "frames": FRAMES, "side": SIDE}
    figures = {
        **{"seconds": round(seconds, 1), "jobs_per_minute": round(60 * args.jobs / seconds, 2)},
        **{"latency_ms": latency, "refused": record.refused, "rss_bytes": rss, "open_files": files},
    }
    limits = {"get_p95_ms": 1000 * LATENCY_LIMIT, "growth": GROWTH_LIMIT}
    line = {**environment("serve_load", torch.device("cpu")), **sizes, **figures, "problems": problems}
    header = ("", "requests", "p50, ms", "p95", "p99", "max")
    report(title, header, rows, notes, line | {"limits": limits, "met": met}, args.json)


if __name__ == "__main__":
    sys.exit(main())
