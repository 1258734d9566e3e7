"""Plans of requests that nobody has checked."""

from __future__ import annotations

from pathlib import Path

from skyreels_v3.inputs import Inputs
from skyreels_v3.parallel.ranks import SINGLE, Ranks
from skyreels_v3.plan import Checked, Machine, Plan, plan
from skyreels_v3.request import GenerationRequest, ResolvedRequest

GB = 10**9
NONE = Inputs()


def planned(
    request: GenerationRequest,
    checkpoint: Path | None = None,
    dtype: str = "float32",
    ranks: Ranks = SINGLE,
    free: int | None = None,
    inputs: Inputs = NONE,
    free_host: int = 1000 * GB,
) -> Plan:
    """The plan of a request for a CPU, or with `free` bytes for a device with so much memory of its own."""
    resolved = ResolvedRequest.of(request, output=request.output or Path("made.mp4"))
    machine = Machine("cpu", request.dtype or dtype, free, free_host)
    return plan(Checked(resolved, inputs, checkpoint), machine, ranks)
