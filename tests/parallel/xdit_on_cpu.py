"""generate_video.py with xDiT's own USP on CPU processes: xDiT is made to see an accelerator while it is imported.

A program for `torchrun`, not a test: `test_distributed.py` starts it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import AutoencoderKL, DiffusionPipeline  # noqa: F401  before the pretence, which is for xDiT alone

import skyreels_v3.main
from skyreels_v3.parallel import usp
from skyreels_v3.parallel.ranks import ParallelConfig

PROBES = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "get_device_capability": lambda *_: (8, 0),
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: SimpleNamespace(gcnArchName="", major=8, minor=0, name="cpu"),
}


def import_xdit() -> None:
    """Import the parts of xDiT that the package imports."""
    os.environ["LOG_LEVEL"] = "error"  # as in usp.xdit_usp, before the import
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
        for name, probe in PROBES.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, probe))
        import xfuser.core.distributed.runtime_state
        import xfuser.model_executor.layers.usp  # noqa: F401


def main() -> int:
    import_xdit()
    xdit_usp = usp.xdit_usp
    from xfuser.core.distributed import runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    def on_cpu(kernel: str, degrees: ParallelConfig) -> usp.UspFn:
        with (
            mock.patch.object(torch.backends.mps, "is_available", lambda: True),
            mock.patch.object(
                runtime_state.RuntimeState, "_select_attention_backend", lambda *_: AttentionBackendType.SDPA
            ),
        ):
            attention = xdit_usp(kernel, degrees, backend="gloo")

        def noted(*tensors: object) -> torch.Tensor:
            with open("xdit-calls", "a") as calls:
                calls.write(".")
            return attention(*tensors)

        return noted

    with (
        mock.patch.object(usp, "has_xdit", lambda *_: True),
        mock.patch.object(usp, "xdit_usp", on_cpu),
    ):
        return skyreels_v3.main.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
