"""What a run has finished, on disk, so that an interrupted one can go on.

After each pass of the denoising loop its latents and the state of the noise generator are saved beside the output. A
resumed run takes them instead of denoising again and does everything else as before: it decodes the same latents and
draws the same noise, so it ends in the same video. The folder goes away with the run that completes; the files that a
run writes before they get their names are in it as well, so that not even a kill leaves them behind for ever.

torch is imported when passes are saved and recalled: whether a run can be resumed is checked without it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import temporary_name

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run from a folder in use
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

REQUEST_FILE = "request.json"
PASS_FILES = "pass-*.safetensors"


class RunState:
    """Saved passes, and room for unfinished files, in a folder of one run; nobody else resumes it meanwhile.

    Args:
        request: the folder's file of the run's flags, open; it is locked as long as it is.
        made: folders above that are this run's, innermost first; they go away with an empty-handed run.
    """

    def __init__(self, folder: Path, request: IO[str], made: tuple[Path, ...] = ()) -> None:
        self.folder = folder
        self.passes = 0
        self._request = request
        self._made = made

    def recall(self) -> dict[str, Tensor]:
        """The `latents` of the pass that comes next and the state of its `generator` after it, if they were saved."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._pass_file()
        if not file.is_file():
            return {}
        try:
            saved = load_file(file)
            saved["latents"], torch.Generator().set_state(saved["generator"])
        except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
            reason = f"{shown(file)} is damaged ({shown(error)})"
            raise UserError("--resume", f"{reason}; delete it, and the pass is made again") from error
        self.passes += 1
        logger.info("pass %d was finished before", self.passes)
        return saved

    def save(self, latents: Tensor, generator: torch.Generator) -> None:
        """Keep the latents of a pass that has just been made."""
        from safetensors.torch import save_file

        file = self._pass_file()
        temporary = temporary_name(file)
        save_file({"latents": latents.cpu().contiguous(), "generator": generator.get_state()}, temporary)
        os.replace(temporary, file)
        self.passes += 1

    def close(self, completed: bool) -> None:
        """Remove the folder, unless there is something in it that an interrupted run could go on from."""
        if completed or not any(self.folder.glob(PASS_FILES)):
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_empty(self._made)
        else:
            remove_unfinished(self.folder)
            logger.warning("%s keeps what is finished; to go on, repeat the command with %s", *self._way_on())
        self._request.close()

    def _pass_file(self) -> Path:
        return self.folder / f"pass-{self.passes:03d}.safetensors"

    def _way_on(self) -> tuple[Path, str]:
        """The folder, and the flags that an interrupted command may have left to chance."""
        left = json.loads((self.folder / REQUEST_FILE).read_text(encoding="utf-8"))
        return self.folder, f"--resume, --output {left['output']} and --seed {left['flags'].get('seed')}"


def open_state(output: Path, flags: Mapping[str, Any], resume: bool, frame_folder: bool = False) -> RunState:
    """A new run's state, or the one that an interrupted run for `output` has left.

    Raises:
        UserError: there is none to resume, or it belongs to a run with other flags.
    """
    if resume:
        folder, request = find_left(output, flags)
        remove_unfinished(folder)
        return RunState(folder, request)
    made = tuple(parent for parent in output.parents if not parent.exists())
    for number in count(1):
        folder = state_folder(output, number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run's, which may still want it
            continue
        request = (folder / REQUEST_FILE).open("x", encoding="utf-8")
        lock(request)
        json.dump({"output": f"{output}/" if frame_folder else str(output), "flags": dict(flags)}, request)
        request.flush()
        return RunState(folder, request, made)
    raise AssertionError("unreachable")


def check_left(output: Path, flags: Mapping[str, Any]) -> None:
    """Raise UserError unless a run with `flags` for `output` was interrupted and can go on."""
    find_left(output, flags)[1].close()


def find_left(output: Path, flags: Mapping[str, Any]) -> tuple[Path, IO[str]]:
    """The folder that an interrupted run with `flags` for `output` has left, and its request file, locked."""
    pattern = re.compile(re.escape(output.stem) + r"\.state(-\d+)?")
    there = output.parent.iterdir() if output.parent.is_dir() else ()
    folders = sorted(path for path in there if pattern.fullmatch(path.name) and path.is_dir())
    problems = []
    for folder in folders or [state_folder(output)]:
        try:
            return folder, claim(folder, flags)
        except UserError as error:
            problems.append(error)
    raise problems[0]


def claim(folder: Path, flags: Mapping[str, Any]) -> IO[str]:
    """The request file of an interrupted run with `flags`, locked."""
    try:
        request = (folder / REQUEST_FILE).open("r+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise nothing_left(folder, error.strerror) from error
    try:
        lock(request)
        check_same_run(folder, request.read(), flags)
    except BlockingIOError as error:
        request.close()
        reason = f"{shown(folder)} is in use by a run that has not ended"
        raise UserError("--resume", f"{reason}; wait for it, or stop it first") from error
    except UserError:
        request.close()
        raise
    return request


def check_same_run(folder: Path, content: str, flags: Mapping[str, Any]) -> None:
    """Raise UserError unless a request file's content is that of a run with the same flags."""
    try:
        left = dict(json.loads(content)["flags"])
    except (ValueError, KeyError, TypeError) as error:
        raise nothing_left(folder, str(error)) from error
    now = json.loads(json.dumps(dict(flags)))
    now.setdefault("dtype", left.get("dtype"))  # until torch has been asked
    different = sorted(key for key in left.keys() | now.keys() if left.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key} {shown(left.get(key))} -> {shown(now.get(key))}" for key in different)
        raise UserError("--resume", f"the interrupted run had other flags ({changes}); repeat its command")


def nothing_left(folder: Path, reason: str | None) -> UserError:
    remedy = "give the --output of an interrupted run, or leave --resume out"
    return UserError("--resume", f"{shown(folder)} holds no interrupted run ({reason}); {remedy}")


def lock(request: IO[str]) -> None:
    """Lock an open file for this process; raises BlockingIOError if another one has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(request, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        logger.debug("%s: this file system has no locks (%s)", request.name, error)


def state_folder(output: Path, number: int = 1) -> Path:
    """Where the state of a run for `output` is."""
    suffix = "" if number == 1 else f"-{number}"
    return output.with_name(f"{output.stem}.state{suffix}")


def remove_unfinished(folder: Path) -> None:
    """Remove all that is neither a finished pass nor the request."""
    kept = {folder / REQUEST_FILE, *folder.glob(PASS_FILES)}
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_empty(folders: tuple[Path, ...]) -> None:
    """Remove folders as far as they are empty, innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
