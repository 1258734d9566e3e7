"""The state of a run on disk, from which an interrupted run is resumed.

Latents and the noise generator's state are saved beside the output after each pass of the denoising loop and, with the
scheduler's state, at intervals within a pass. A resumed run loads them instead of denoising again and repeats the rest,
so it makes the same video. The folder is removed when the run completes; unfinished outputs are written into it too, so
that not even a kill leaves them elsewhere.

These are safety copies: a run continues if one cannot be written, or turns out to be damaged.

torch is imported only to save and load passes, not to find out whether a run can be resumed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.media.files import lock, reason_of, replace_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

REQUEST_FILE = "request.json"
AUTO = "auto"  # of --device
MAX_RECORD = 1 << 20  # characters; longer files are not records
PASS_FILES = "pass-*.safetensors"
STEPS_FILES = "steps-*.safetensors"
# what parsing a file that is not a record raises; RecursionError: thousands of brackets
NO_RECORD = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
STATE_FOLDER = re.compile(r"(.+)\.state(-\d+)?")


@dataclass(frozen=True)
class RunRecord:
    """The record that identifies a run.

    Attributes:
        flags: the flags that make the same video again.
        inputs: flag, source as given, and SHA-256 of the content of each input.
        save_quantized: the folder of a quantized checkpoint that the run also saves.
        seed_drawn: the seed was drawn at random; a resumed run uses that of the interrupted one.
        resume_if_same: the same command resumes without --resume.
        given: flags that the prompt was made from, if it differs from the user's.
        to_enhance: the prompt is still to be rewritten; a resumed run uses that of the interrupted one.
        device: the device chosen by --device; "" before torch is imported.
    """

    output: Path
    flags: Mapping[str, Any]
    inputs: Sequence[tuple[str, str, str]] = ()
    save_quantized: Path | None = None
    frame_folder: bool = False
    seed_drawn: bool = False
    resume_if_same: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    to_enhance: bool = False
    device: str = ""

    def to_json(self) -> str:
        output = f"{self.output}/" if self.frame_folder else str(self.output)
        quantized = None if self.save_quantized is None else str(self.save_quantized)
        return json.dumps({"output": output, **self.made_by(), "save_quantized": quantized})

    def made_by(self) -> dict[str, Any]:
        """How the video was made, in JSON types."""
        given = {"given": dict(self.given)} if self.given else {}
        device = {"device": self.device} if self.device else {}
        return {"flags": dict(self.flags), **given, "inputs": self.digests, **device}

    @property
    def digests(self) -> list[list[str]]:
        """Flag and SHA-256 of each input, in JSON types."""
        return [[flag, digest] for flag, _, digest in self.inputs]

    def check_same(self, left: Mapping[str, Any]) -> None:
        """Raise UserError unless a record (see `to_json`) has the same flags and inputs."""
        before, now = left["flags"], json.loads(json.dumps(dict(self.flags)))
        now.setdefault("dtype", before.get("dtype"))  # not known before torch is imported
        if self.seed_drawn:
            now["seed"] = before.get("seed")
        if self.to_enhance:  # the final prompt is unknown: compare what it is made from
            before, now = {**before, **left.get("given", {})}, {**now, **self.given}
        asked, there = now.get("device", AUTO), left.get("device", before.get("device", AUTO))
        here = self.device or asked
        if AUTO not in (here, there):  # otherwise one of them is still unknown
            before, now = {**before, "device": there}, {**now, "device": here}
        else:
            before, now = ({**flags, "device": None} for flags in (before, now))
        different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if different:
            changes = ", ".join(
                f"{key} {format_value(before.get(key))} -> {format_value(now.get(key))}" for key in different
            )
            raise UserError("--resume", f"the interrupted run had other flags ({changes}); repeat its command")
        for (flag, source, digest), read_before in zip(self.inputs, left["inputs"], strict=True):
            if [flag, digest] != read_before:
                reason = f"{format_value(source)} has changed since the interrupted run"
                raise UserError(f"--{flag}", f"{reason}; restore the old file, or leave out --resume to start over")


class RunState:
    """The folder of one run with its saved passes and unfinished files, locked against other runs.

    Args:
        request: the file with the run's record, open and locked.
        resumed: the folder was left by an interrupted run.
        made: parent folders created by this run, innermost first; removed if it saves nothing.
    """

    def __init__(
        self, folder: Path, request: IO[str], record: RunRecord, resumed: bool = False, made: tuple[Path, ...] = ()
    ) -> None:
        self.folder = folder
        self.resumed = resumed
        self.passes = 0
        self.failed = False  # whether a safety copy could not be written
        self._record = record
        self._request = request
        self._made = made

    def recall(self) -> dict[str, Tensor]:
        """Load the `latents` of the next pass and the `generator` state after it; empty if they were not saved.

        From an unfinished pass there are further tensors, as given to `save_step`.
        """
        if saved := self._load(self._pass_file()):
            self.passes += 1
            logger.info("pass %d was already finished", self.passes)
        return saved or self._load(self._steps_file())

    def save(self, latents: Tensor, generator: torch.Generator) -> None:
        """Save the latents of a finished pass."""
        self._store(self._pass_file(), {"latents": latents, "generator": generator.get_state()})
        with suppress(OSError):
            self._steps_file().unlink(missing_ok=True)
        self.passes += 1

    def save_step(self, latents: Tensor, generator: torch.Generator, more: Mapping[str, Tensor]) -> None:
        """Save latents and `more` state within a pass, replacing the previous copy."""
        self._store(self._steps_file(), {"latents": latents, "generator": generator.get_state(), **more})

    def close(self, completed: bool) -> None:
        """Remove the folder, unless the run is incomplete and can be resumed from it."""
        if completed or not self._has_something():
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_empty(self._made)
        elif self.folder.is_dir():
            remove_unfinished(self.folder)
            record = self._record
            output = f"{record.output}/" if record.frame_folder else record.output
            flags = f" with --resume, --output {output} and --seed {record.flags.get('seed')}"
            way_on = f"repeat the command{'' if record.resume_if_same else flags}"
            logger.warning("%s holds the finished passes; to resume, %s", self.folder, way_on)
        self._request.close()

    def _has_something(self) -> bool:
        quantized = self._record.save_quantized
        return bool(kept_in(self.folder)) or (quantized is not None and quantized.exists())

    def _pass_file(self) -> Path:
        return self.folder / f"pass-{self.passes:03d}.safetensors"

    def _steps_file(self) -> Path:
        return self.folder / f"steps-{self.passes:03d}.safetensors"

    def _load(self, file: Path) -> dict[str, Tensor]:
        """Load the tensors of a file; empty if it is missing or damaged."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not file.is_file():
            return {}
        try:
            saved = load_file(file)
            saved["latents"], torch.Generator().set_state(saved["generator"])
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
            logger.warning("%s is damaged (%s); that pass is made again", file, format_value(error))
            return {}
        return saved

    def _store(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a safety copy, or warn that it cannot be written."""
        from safetensors.torch import save

        try:
            if not self.folder.is_dir():  # removed in the meantime
                self.folder.mkdir(parents=True)
                self._request.close()
                self._request = begin_request(self.folder, self._record)
            replace_file(file, save({name: cpu_copy(tensor) for name, tensor in tensors.items()}))
        except OSError as error:
            if not self.failed:
                reason = reason_of(error, self.folder)
                logger.warning(
                    "%s cannot be written (%s); if this run is interrupted, that progress is lost", file, reason
                )
            self.failed = True


def open_state(record: RunRecord, resume: bool = False, strict: bool = True) -> RunState:
    """Open the state of a new run or, with `resume`, of an interrupted run with the same record, if any.

    Args:
        strict: see `find_left`.
    """
    if resume and (left := find_left(record, strict)) is not None:
        folder, request, _ = left
        remove_unfinished(folder)
        return RunState(folder, request, record, resumed=True)
    made = tuple(parent for parent in record.output.parents if not parent.exists())
    for number in count(1):
        folder = state_folder(record.output, number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # belongs to another run
            continue
        return RunState(folder, begin_request(folder, record), record, made=made)
    raise AssertionError("unreachable")


def begin_request(folder: Path, record: RunRecord) -> IO[str]:
    """Write a run's record file in a new folder; returns it open and locked."""
    request = (folder / f"{REQUEST_FILE}.new").open("x", encoding="utf-8")
    lock(request)
    request.write(record.to_json())
    request.flush()
    os.rename(request.name, folder / REQUEST_FILE)  # so that no process sees it unlocked
    return request


Left = tuple[Path, IO[str], dict[str, Any]]  # of an interrupted run: folder, record file (locked), record


def find_left(record: RunRecord, strict: bool = True, anywhere: bool = False) -> Left | None:
    """Find an interrupted run with the same record; returns None if there is none.

    Args:
        strict: raise UserError if runs for that output exist but cannot be resumed.
        anywhere: search the runs of all outputs in that folder, newest first.

    Raises:
        UserError: a run had other flags or inputs, or is still active.
    """
    problems = []
    for folder in sorted(state_folders(record.output, anywhere), reverse=anywhere):
        try:
            return claim(folder, record)
        except UserError as error:
            problems.append(error)
        except (OSError, *NO_RECORD) as error:
            logger.debug("%s holds no interrupted run: %s", folder, error)
    if problems and strict and not anywhere:
        raise problems[0]
    return None


def state_folders(output: Path, anywhere: bool = False) -> Iterator[Path]:
    """The state folders of runs for an output, or for any output in its folder."""
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        name = STATE_FOLDER.fullmatch(path.name)
        if name is not None and (anywhere or name[1] == output.stem) and path.is_dir():
            yield path


def claim(folder: Path, record: RunRecord) -> Left:
    """Lock and return the interrupted run in a folder if it has the same record.

    Raises:
        UserError: the run has another record or is still active.
        OSError, or one of NO_RECORD: there is no run in the folder.
    """
    request = (folder / REQUEST_FILE).open("r+", encoding="utf-8", errors="replace")
    try:
        lock(request)
        left = json.loads(request.read(MAX_RECORD))
        if left["output"].endswith("/") != record.frame_folder or not isinstance(left["save_quantized"], str | None):
            raise ValueError("a run for another kind of output")
        record.check_same(left)
        if record.seed_drawn and not isinstance(left["flags"]["seed"], int):
            raise ValueError("no seed")
        if record.to_enhance and not isinstance(left["flags"]["prompt"], str):
            raise ValueError("no prompt")
    except BlockingIOError as error:
        request.close()
        reason = f"{format_value(folder)} is in use by a run that has not ended"
        raise UserError("--resume", f"{reason}; wait for it, or stop it first") from error
    except BaseException:
        request.close()
        raise
    return folder, request, left


def state_folder(output: Path, number: int = 1) -> Path:
    """The state folder number `number` for `output`."""
    suffix = "" if number == 1 else f"-{number}"
    return output.with_name(f"{output.stem}.state{suffix}")


def passes_in(folder: Path) -> list[Path]:
    """The files of a run's finished passes, in order."""
    return sorted(folder.glob(PASS_FILES))


def kept_in(folder: Path) -> list[Path]:
    """All safety copies in a folder."""
    return [*passes_in(folder), *folder.glob(STEPS_FILES)]


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares memory with no other tensor, as safetensors requires."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def remove_unfinished(folder: Path) -> None:
    """Remove everything but safety copies and the record."""
    kept = {folder / REQUEST_FILE, *kept_in(folder)}
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove empty folders, innermost first, up to the first that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
