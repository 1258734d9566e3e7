"""The processes of a run: what their launcher says of them, and how they divide the work. No torch.

`torchrun` starts as many processes as there are GPUs and tells each its number, its rank. They all run the same
program on the same request; rank 0 alone reads what only needs reading once, speaks and writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skyreels_v3.errors import UserError
from skyreels_v3.tasks import GenerationRequest

VARIABLES = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where the processes meet


@dataclass(frozen=True)
class Ranks:
    """A process among the others: its number among all and on its machine, and how many there are of both."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this process fetches what its machine needs once."""
        return self.local_rank == 0

    @property
    def machine(self) -> int:
        """The number of the machine that this process is on, where all have as many processes."""
        return self.rank // self.local_world


ALONE = Ranks()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """What a launcher such as torchrun says in its environment variables; one process where it says nothing.

    Raises:
        UserError: the variables are not numbers, contradict each other, or lack the address where the processes meet.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ALONE
    defaults = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
    try:
        numbers = {name: int(environment.get(key) or defaults[key]) for name, key in VARIABLES.items()}
    except ValueError as error:
        raise UserError(
            "--use_usp", f"RANK, WORLD_SIZE and related variables are wrong ({error}); start with torchrun"
        ) from error
    ranks = Ranks(**numbers)
    if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
        raise UserError("--use_usp", f"RANK, WORLD_SIZE and related variables are wrong ({ranks}); start with torchrun")
    missing = [name for name in ADDRESS if not environment.get(name)]
    if ranks.world > 1 and missing:
        reason = f"RANK and WORLD_SIZE are set, {' and '.join(missing)} not"
        raise UserError("--use_usp", f"{reason}; start with torchrun, or set where the first process listens")
    return ranks


@dataclass(frozen=True)
class Degrees:
    """How many processes share what: the terms of the guidance, and by ring and by Ulysses the tokens of the video.

    Processes are numbered with `ulysses` changing fastest and `cfg` slowest: those that exchange most are neighbours.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Processes that a video's tokens are divided among."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.cfg * self.sequence

    def __str__(self) -> str:
        return f"guidance {self.cfg} x ring {self.ring} x Ulysses {self.ulysses}"


UNDIVIDED = Degrees()


def check_ranks(request: GenerationRequest, ranks: Ranks) -> None:
    """Raise UserError for several processes that were not told what to do together."""
    if ranks.world > 1 and not request.use_usp:
        reason = f"missing; {ranks.world} processes were started"
        raise UserError("--use_usp", f"{reason}; add it to share one video, or --jobs to make several")


def choose_degrees(request: GenerationRequest, world: int, heads: int, terms: int) -> Degrees:
    """How `world` processes divide the work on `request`.

    Guidance is divided first where that is free of waiting: its terms need nothing of each other. Then Ulysses, which
    exchanges less than a ring but needs a whole number of attention heads for each process.

    Args:
        heads: of the transformer's attention.
        terms: of the guidance, 1 without guidance.

    Raises:
        UserError: the degrees asked for do not fit the number of processes, the heads or the guidance.
    """
    cfg = request.cfg_degree or (terms if terms > 1 and world % terms == 0 else 1)
    if cfg > terms:
        reason = f"{cfg}: the guidance has only {terms} term{'s' if terms > 1 else ''}"
        raise UserError("--cfg_degree", f"{reason}; give {terms} at most, or turn guidance on")
    if world % cfg:
        raise UserError(
            "--cfg_degree", f"{cfg}: {world} processes cannot be divided by it; give a degree that divides them"
        )
    return Degrees(cfg, *divide_sequence(request, world // cfg, heads))


def divide_sequence(request: GenerationRequest, processes: int, heads: int) -> tuple[int, int]:
    """Ring and Ulysses degree for so many processes."""
    given = {"--ulysses_degree": request.ulysses_degree, "--ring_degree": request.ring_degree}
    product = math.prod(degree or 1 for degree in given.values())
    for flag, degree in given.items():
        if degree is not None and (processes % product or (None not in given.values() and product != processes)):
            many = f"{processes} process{'es' if processes > 1 else ''}"
            reason = (
                f"{degree}: ring x Ulysses must be {processes}, as {many} share{'' if processes > 1 else 's'} a video"
            )
            raise UserError(flag, f"{reason}; give degrees that make that, or leave them out")
    best = math.gcd(processes, heads)
    ulysses = request.ulysses_degree or (best if request.ring_degree is None else processes // request.ring_degree)
    if heads % ulysses:
        flag = "--ring_degree" if request.ulysses_degree is None else "--ulysses_degree"
        reason = f"{given[flag]}: the model's {heads} attention heads cannot be divided by {ulysses}"
        raise UserError(flag, f"{reason}; give --ulysses_degree {best} --ring_degree {processes // best}")
    return processes // ulysses, ulysses
