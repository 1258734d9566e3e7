"""The files of a checkpoint: which ones a folder must have, and whether they are complete. No torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from skyreels_v3.checkpoints.gguf import read_gguf
from skyreels_v3.errors import CheckpointError, UserError, format_value

MAIN_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
PICKLE = "pytorch_model.bin"  # transformers' older format, read if there is no safetensors file
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt")
FLAT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either is enough


@dataclass(frozen=True)
class Repository:
    """What a task needs from a repository on a hub, or from a folder with the same files.

    Attributes:
        flag: the flag that names the repository or the folder.
        kind: what error messages call such a folder.
        model_id: of the published one.
        components: where the weights of each component are: folders with a config.json and weights (`.` for the
            repository's root), and .pth files.
        tokenizers: folders with a tokenizer.
        files: other files that are needed.
        extras: patterns of optional files, fetched if they exist.
    """

    flag: str
    kind: str
    model_id: str
    components: Mapping[str, tuple[str, ...]]
    tokenizers: tuple[str, ...]
    files: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def folders(self) -> list[str]:
        """The folders with a config.json and weights."""
        return [path for path in chain(*self.components.values()) if not path.endswith(".pth")]

    @property
    def single_files(self) -> list[str]:
        """The files needed besides those in `folders` and `tokenizers`."""
        return [*(path for path in chain(*self.components.values()) if path.endswith(".pth")), *self.files]

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of all files to fetch."""
        folders = [f"{folder}/*" for folder in (*self.folders, *self.tokenizers) if folder != "."]
        return [*(FLAT_PATTERNS if "." in self.folders else ()), *folders, *self.single_files, *self.extras]

    def without(self, component: str) -> Repository:
        """The same without a component's weights, which come from elsewhere; the configs of its folders stay."""
        others = {name: paths for name, paths in self.components.items() if name != component}
        folders = (path for path in self.components[component] if path in self.folders)
        configs = (Path(path, "config.json").as_posix() for path in folders)
        return replace(self, components=others, files=(*self.files, *configs))

    def weights(self, folder: Path, component: str) -> list[Path]:
        """The weight files of a component in `folder`, which has been checked."""
        return [file for path in self.components[component] for file in weight_files(folder / path)]

    def check(self, folder: Path, flag: str) -> None:
        """Raise UserError about `flag` if a file in `folder` is missing, truncated or damaged."""
        with errors_about(flag):
            names = [*(str(Path(name, "config.json")) for name in self.folders), *self.single_files]
            weights = {str(Path(name, "*.safetensors")): weight_files(folder / name) for name in self.folders}
            missing = [name for name in names if not (folder / name).is_file()]
            missing += [pattern for pattern, files in weights.items() if not files]
            for name in self.tokenizers:
                if not any(all((folder / name / file).is_file() for file in files) for files in TOKENIZERS):
                    missing.append(f"{name}/{TOKENIZERS[0][0]}")
            if missing:
                reason = f"{folder} is not a complete {self.kind}: missing {', '.join(missing)}"
                raise CheckpointError(f"{reason}; download these files of {self.model_id}")
            for file in chain((folder / name for name in names), *weights.values()):
                check_file(file)


@contextmanager
def errors_about(flag: str) -> Iterator[None]:
    """Turn errors about a checkpoint's files in a `with` block into UserErrors about `flag`."""
    try:
        yield
    except CheckpointError as error:
        raise UserError(flag, error.message) from error
    except OSError as error:
        raise UserError(flag, f"{error.filename} cannot be read ({error.strerror}); check its permissions") from error


def weight_files(path: Path) -> list[Path]:
    """The weight files of a component: `path` itself, or those in that folder; empty if there are none.

    Raises:
        CheckpointError: shards are missing, several files have no index, or all are of an unsupported format.
    """
    if path.is_file():
        return [path]
    for index in sorted(path.glob("*.safetensors.index*.json"), key=lambda index: (len(index.name), index.name)):
        return indexed_files(index)  # of the shortest name: variants are read only if there is nothing else
    patterns = ("*.safetensors", "*.gguf", PICKLE)
    found = next(filter(None, ([file for file in sorted(path.glob(one)) if file.is_file()] for one in patterns)), [])
    files = [file for file in found if file.name in MAIN_FILES] or found
    if len(files) > 1:
        reason = f"{path} holds {len(files)} {files[0].suffix[1:]} files and no index"
        raise CheckpointError(f"{reason}; download {MAIN_FILES[0]}.index.json as well, or leave only one file there")
    for other in () if files else sorted(path.glob("*")):
        if other.suffix in OTHER_FORMATS:
            raise CheckpointError(f"{other} is not a .safetensors file; give one, as other formats are not read")
    return files


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; all must be in its folder."""
    try:
        files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards; download it again") from error
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
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def read_sizes(folder: Path, names: Collection[str]) -> dict[str, int]:
    """Read the sizes in `names` from config.json, if it has them; each must be a positive integer."""
    sizes = {key: value for key, value in read_json(folder / "config.json").items() if key in names}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{folder}/config.json: {key} = {format_value(value)} is not a size; download it again"
            )
    return sizes


@contextmanager
def open_safetensors(file: Path, framework: str = "np") -> Iterator[Any]:
    """Open a safetensors file, whose header the library checks against the file's size.

    Raises:
        CheckpointError: the file cannot be read, or is truncated or damaged.
    """
    try:
        with safe_open(file, framework=framework) as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        state = "is truncated or damaged" if isinstance(error, SafetensorError) else "cannot be read"
        raise CheckpointError(f"{file} {state} ({error}); download it again") from error


def check_file(file: Path) -> None:
    """Raise CheckpointError if a file is truncated, or not what its name says."""
    if file.suffix == ".json":
        read_json(file)
    elif file.suffix == ".gguf":
        read_gguf(file)
    elif file.suffix in (".pth", ".bin"):
        if not zipfile.is_zipfile(file):  # the format that torch writes
            raise CheckpointError(f"{file} is truncated or not a {file.suffix} checkpoint; download it again")
    else:
        with open_safetensors(file):
            pass
