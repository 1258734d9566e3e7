"""What a run has finished, on disk, so that an interrupted one can go on.

After each pass of the denoising loop its latents and the state of the noise generator are saved beside the output. A
resumed run takes them instead of denoising again and does everything else as before: it decodes the same latents and
draws the same noise, so it ends in the same video. The folder goes away with the run that completes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import temporary_name

logger = logging.getLogger(__name__)

REQUEST_FILE = "request.json"


class RunState:
    """Saved passes in a folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.passes = 0

    def recall(self, generator: torch.Generator) -> Tensor | None:
        """The latents of the pass that comes next, if they were saved; `generator` is then as it was after it."""
        file = self.folder / f"pass-{self.passes:03d}.safetensors"
        if not file.is_file():
            return None
        try:
            saved = load_file(file)
        except SafetensorError as error:
            raise UserError(
                "--resume", f"{shown(file)} is damaged ({error}); delete it, the pass is made again"
            ) from error
        generator.set_state(saved["generator"])
        self.passes += 1
        logger.info("pass %d was finished before", self.passes)
        return saved["latents"]

    def save(self, latents: Tensor, generator: torch.Generator) -> None:
        """Keep the latents of a pass that has just been made."""
        file = self.folder / f"pass-{self.passes:03d}.safetensors"
        temporary = temporary_name(file)
        save_file({"latents": latents.cpu().contiguous(), "generator": generator.get_state()}, temporary)
        os.replace(temporary, file)
        self.passes += 1

    def close(self, completed: bool) -> None:
        """Remove the folder, unless there is something in it that an interrupted run could go on from."""
        if completed or not any(self.folder.glob("pass-*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            logger.warning("to go on, repeat the command with --resume (and the same --output); see %s", self.folder)


def state_folder(output: Path, number: int = 1) -> Path:
    """Where the state of the run for `output` is."""
    suffix = "" if number == 1 else f"-{number}"
    return output.with_name(f"{output.stem}.state{suffix}")


def open_state(output: Path, flags: Mapping[str, Any], resume: bool) -> RunState:
    """A new run's state, or the one that an interrupted run for `output` has left.

    Raises:
        UserError: there is none to resume, or it belongs to a run with other flags.
    """
    if resume:
        folder = state_folder(output)
        check_same_run(folder, flags)
        return RunState(folder)
    for number in count(1):
        folder = state_folder(output, number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run's, which may still want it
            continue
        (folder / REQUEST_FILE).write_text(json.dumps(dict(flags)), encoding="utf-8")
        return RunState(folder)
    raise AssertionError("unreachable")


def check_same_run(folder: Path, flags: Mapping[str, Any]) -> None:
    """Raise UserError unless `folder` was left by a run with the same flags."""
    try:
        left = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"{shown(folder)} holds no interrupted run ({error})"
        raise UserError("--resume", f"{reason}; give its --output, or leave --resume out") from error
    now = json.loads(json.dumps(dict(flags)))
    different = sorted(key for key in left.keys() | now.keys() if left.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key} {shown(left.get(key))} -> {shown(now.get(key))}" for key in different)
        raise UserError("--resume", f"the interrupted run had other flags ({changes}); repeat its command")
