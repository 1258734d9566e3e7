"""The files in a checkpoint's folder: which there are, whether they are whole, what their headers say. No torch."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from skyreels_v3.errors import CheckpointError, UserError, format_value
from skyreels_v3.memory.policy import SCALE

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in the library that reads it
MAIN_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
PICKLE = "pytorch_model.bin"  # transformers' older format, read where there is no safetensors file
OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt")
FLAT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # new and old style, one of them is needed


@dataclass(frozen=True)
class Repository:
    """What a task needs of a repository on a hub, or of a folder with the same files.

    Attributes:
        flag: names the repository or the folder.
        kind: what a folder is called in error messages.
        model_id: of the published one.
        components: the weights of each component: folders with a config.json and weights, `.` for the repository's own,
            and .pth files.
        tokenizers: folders with a tokenizer.
        files: others that are needed.
    """

    flag: str
    kind: str
    model_id: str
    components: Mapping[str, tuple[str, ...]]
    tokenizers: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def folders(self) -> list[str]:
        """Those with a config.json and weights."""
        return [path for path in chain(*self.components.values()) if not path.endswith(".pth")]

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of all files."""
        files = [path for path in chain(*self.components.values()) if path.endswith(".pth")]
        folders = [f"{folder}/*" for folder in (*self.folders, *self.tokenizers) if folder != "."]
        return [*(FLAT_PATTERNS if "." in self.folders else ()), *folders, *files, *self.files]

    def weights(self, folder: Path, component: str) -> list[Path]:
        """The files of a component in a folder that has been checked."""
        return [file for path in self.components[component] for file in weight_files(folder / path)]

    def check(self, folder: Path, flag: str) -> None:
        """Raise UserError about `flag` when a file is missing from `folder`, cut off or not what its name says."""
        with errors_about(flag):
            folders = [folder / name for name in self.folders]
            files = [*(path / "config.json" for path in folders)]
            files += [
                folder / name for name in chain(*self.components.values(), self.files) if name not in self.folders
            ]
            missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
            for path in folders:
                missing += missing_weights(path, folder)
            missing += [
                f"{name}/{TOKENIZERS[0][0]}"
                for name in self.tokenizers
                if not any(all((folder / name / file).is_file() for file in files) for files in TOKENIZERS)
            ]
            if missing:
                reason = f"{folder} is no complete {self.kind}: missing {', '.join(missing)}"
                raise CheckpointError(f"{reason}; download these files of {self.model_id}")
            for file in chain(files, *map(weight_files, folders)):
                check_file(file)


def missing_weights(path: Path, folder: Path) -> list[str]:
    """The pattern of a component's weights if there are none; raises CheckpointError for those in another format."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / PICKLE).is_file():
        return []
    for other in sorted(path.iterdir()):
        if other.suffix in OTHER_FORMATS:
            raise CheckpointError(f"{other} is no .safetensors file; other formats are not read, give that one")
    return [str((path / "*.safetensors").relative_to(folder))]


@contextmanager
def errors_about(flag: str) -> Iterator[None]:
    """Have errors about a checkpoint's files name `flag`."""
    try:
        yield
    except CheckpointError as error:
        raise UserError(flag, error.message) from error
    except OSError as error:
        raise UserError(flag, f"{error.filename} cannot be read ({error.strerror})") from error


def weight_files(path: Path) -> list[Path]:
    """The weights of a component: a .pth file, or a folder's shards that its index names, or the one file there."""
    if path.is_file():
        return [path]
    for index in sorted(path.glob("*.safetensors.index*.json"), key=lambda index: (len(index.name), index.name)):
        return indexed_files(index)  # the shortest name: one of a variant is taken where there is no other
    found = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()] or [*path.glob(PICKLE)]
    files = [file for file in found if file.name in MAIN_FILES] or found
    if len(files) != 1:
        reason = f"{path} holds {len(files)} safetensors files and no index"
        raise CheckpointError(f"{reason}; download {MAIN_FILES[0]}.index.json as well, or leave one file there")
    return files


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; raises CheckpointError when one is missing."""
    try:
        files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards; download it again") from error
    if missing := [str(file) for file in files if file.parent != index.parent or not file.is_file()]:
        raise CheckpointError(f"missing shards {', '.join(missing)}; download them again")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object; download it again")
    return content


def read_sizes(folder: Path, names: Collection[str]) -> dict[str, int]:
    """The entries of config.json that are in `names`: sizes, each a positive whole number."""
    sizes = {key: value for key, value in read_json(folder / "config.json").items() if key in names}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{folder}/config.json: {key} = {format_value(value)} is no size; download it again")
    return sizes


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where in the file its tensors begin; not yet checked."""
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(min(size, MAX_HEADER_BYTES))), 8 + size


def check_file(file: Path) -> None:
    """Raise CheckpointError when a file is cut off, or not what its name says."""
    if file.suffix == ".json":
        read_json(file)
    elif file.suffix in (".pth", ".bin"):
        if not zipfile.is_zipfile(file):  # what torch writes
            raise CheckpointError(f"{file} is truncated or no {file.suffix} checkpoint; download it again")
    else:
        size = os.path.getsize(file)
        try:
            tensors, begin = read_header(file)
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
            expected = begin + max(ends, default=0)
        except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file; download it again") from error
        if size != expected:
            reason = f"{file} is truncated or damaged ({size} bytes instead of {expected})"
            raise CheckpointError(f"{reason}; download it again")


def is_quantized(transformer: Path) -> bool:
    """Whether a transformer's folder that has been checked holds FP8 weights, see memory/quantize.py."""
    headers = (read_header(file)[0] for file in weight_files(transformer) if file.suffix == ".safetensors")
    return any(name.endswith(f".{SCALE}") for header in headers for name in header)
