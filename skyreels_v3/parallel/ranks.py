"""The ranks of a run: reading them from the launcher's environment, and how they divide the work. No torch.

`torchrun` starts one process per GPU and gives each its rank in environment variables. All run the same program on the
same request. Only rank 0, the main process, logs and writes, and reads what has to be read once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skyreels_v3.errors import UserError
from skyreels_v3.request import GenerationRequest

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # of the main process


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of this process in the run and, local, on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process downloads what its machine needs."""
        return self.local_rank == 0

    @property
    def node(self) -> int:
        """Index of this process's machine; all machines have equally many processes."""
        return self.rank // self.local_world_size


SINGLE = Ranks()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Read the ranks from the environment variables of a launcher such as torchrun; without them, a single process.

    Raises:
        UserError: the variables are not numbers, contradict each other, or lack the main process's address.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return SINGLE
    local = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
    try:
        numbers = [int(environment.get(name) or local[name]) for name in VARIABLES]
    except (ValueError, KeyError) as error:
        raise UserError(
            "--use_usp", f"RANK, WORLD_SIZE and related variables are wrong ({error}); start with torchrun"
        ) from error
    ranks = Ranks(*numbers)
    if not (0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size):
        raise UserError("--use_usp", f"RANK, WORLD_SIZE and related variables are wrong ({ranks}); start with torchrun")
    missing = [name for name in ADDRESS if not environment.get(name)]
    if ranks.world_size > 1 and missing:
        reason = f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}"
        raise UserError("--use_usp", f"{reason}; start with torchrun, or set where the main process listens")
    return ranks


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism: `cfg` ranks divide the guidance terms, `ring` and `ulysses` the video's tokens.

    Ranks are numbered with `ulysses` changing fastest and `cfg` slowest: those that communicate most are neighbors.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Number of ranks that divide the tokens."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        return self.cfg * self.sequence

    def __str__(self) -> str:
        return f"guidance {self.cfg} x ring {self.ring} x Ulysses {self.ulysses}"


UNDIVIDED = ParallelConfig()


def check_ranks(request: GenerationRequest, ranks: Ranks) -> None:
    """Raise UserError for several processes without a flag that says how to use them."""
    if ranks.world_size > 1 and not request.use_usp:
        reason = f"missing; {ranks.world_size} processes were started"
        raise UserError("--use_usp", f"{reason}; add it to share one video, or --jobs to make several")


def choose_degrees(request: GenerationRequest, world_size: int, heads: int, terms: int) -> ParallelConfig:
    """Choose how `world_size` ranks divide the work on `request`.

    The guidance is divided first, since its terms are independent, unless that leaves ranks idle. Then comes Ulysses,
    which communicates less than a ring but needs a whole number of attention heads per rank.

    Args:
        heads: number of the transformer's attention heads.
        terms: number of guidance terms, 1 without guidance.

    Raises:
        UserError: the degrees asked for do not fit the world size, the heads or the guidance.
    """
    cfg = request.cfg_degree or (terms if terms > 1 and world_size % terms == 0 else 1)
    if cfg > terms:
        reason = f"{cfg}: the guidance has only {terms} term{'s' if terms > 1 else ''}"
        raise UserError("--cfg_degree", f"{reason}; give {terms} at most, or turn guidance on")
    if world_size % cfg:
        raise UserError("--cfg_degree", f"{cfg}: does not divide {world_size} processes; give a degree that does")
    size = world_size // cfg  # of the group that divides the tokens
    given = {"--ulysses_degree": request.ulysses_degree, "--ring_degree": request.ring_degree}
    product = math.prod(degree or 1 for degree in given.values())
    for flag, degree in given.items():
        if degree is not None and (size % product or (None not in given.values() and product != size)):
            reason = f"{degree}: ring x Ulysses must be {size}, the number of processes that divide the tokens"
            raise UserError(flag, f"{reason}; give degrees that make that, or leave them out")
    best = math.gcd(size, heads)
    ulysses = request.ulysses_degree or (best if request.ring_degree is None else size // request.ring_degree)
    if heads % ulysses:
        flag = "--ring_degree" if request.ulysses_degree is None else "--ulysses_degree"
        reason = f"{given[flag]}: the model's {heads} attention heads cannot be divided by {ulysses}"
        raise UserError(flag, f"{reason}; give --ulysses_degree {best} --ring_degree {size // best}")
    return ParallelConfig(cfg, size // ulysses, ulysses)
