"""The cache folder: what is stored is found again, and damage only costs time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from skyreels_v3 import cache
from skyreels_v3.cache import TensorCache, cache_folder, compiled_folder, identity_of


def context(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {"context": torch.randn(1, 3, 8).to(dtype), "pooled": torch.randn(1, 4)}


def assert_same(found: dict[str, torch.Tensor] | None, made: dict[str, torch.Tensor]) -> None:
    assert found is not None and found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_stored_is_recalled(tmp_path, dtype):
    prompts, made = TensorCache(tmp_path / "not" / "there", "an encoder"), context(dtype)
    assert prompts.recall("a cat") is None
    prompts.store("a cat", made)
    found = TensorCache(tmp_path / "not" / "there", "an encoder").recall("a cat")
    assert_same(found, made)


def test_prompts_and_encoders_are_distinguished(tmp_path):
    made = {}
    for identity in ("one", "two"):
        for prompt in ("a cat", "a cat ", "A cat", "", "\ud83d\ude00", "caf\udce9"):  # the last is not valid UTF-8
            made[identity, prompt] = context()
            TensorCache(tmp_path, identity).store(prompt, made[identity, prompt])
    for (identity, prompt), expected in made.items():
        assert_same(TensorCache(tmp_path, identity).recall(prompt), expected)
    assert len(files(tmp_path)) == len(made)
    assert TensorCache(tmp_path, "three").recall("a cat") is None


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4, b"no such file" * 100, None], ids=["empty", "short", "other", "cut"]
)
def test_a_damaged_file_is_replaced(tmp_path, content):
    prompts, made = TensorCache(tmp_path, "an encoder"), context()
    prompts.store("p", made)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    assert prompts.recall("p") is None
    prompts.store("p", made)
    assert_same(prompts.recall("p"), made)
    assert files(tmp_path) == [file]


@pytest.mark.parametrize("folder", [None, Path("/dev/null/prompts")])
def test_no_folder(folder):
    prompts = TensorCache(folder, "an encoder")
    prompts.store("p", context())
    assert prompts.recall("p") is None


def test_a_full_disk(tmp_path, monkeypatch):
    """No partial file is left."""
    prompts = TensorCache(tmp_path, "an encoder")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    prompts.store("p", context())
    assert prompts.recall("p") is None
    assert not files(tmp_path)


def test_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_FILES", 3)
    prompts = TensorCache(tmp_path, "an encoder")
    for number in range(5):
        prompts.store(f"{number}", context())
        for file in files(tmp_path):  # as if a second had passed
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
    assert [prompts.recall(f"{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert len(files(tmp_path)) == 3


def test_identity_of_an_encoder(tmp_path):
    """It depends on each file's path, size and modification time, and on all other arguments."""
    one, two = tmp_path / "one", tmp_path / "two"

    def write(file: Path, content: bytes, time: int) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(10**18, time))

    for file in (one, two):
        write(file, b"weights", 10**18)
    known = identity_of([one], torch.bfloat16, None)
    assert identity_of([tmp_path / "." / "one"], torch.bfloat16, None) == known
    others = [([two], torch.bfloat16, None), ([one, two], torch.bfloat16, None)]
    others += [([one], torch.float32, None), ([one], torch.bfloat16, "fp8")]
    assert known not in {identity_of(files, *more) for files, *more in others}
    for content, time in ((b"weights", 10**18 + 1), (b"more weights", 10**18)):
        write(one, content, time)
        assert identity_of([one], torch.bfloat16, None) != known


def test_location(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SKYREELS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "all"))
    assert cache_folder() == tmp_path / "all" / "skyreels_v3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "skyreels_v3"


def test_one_folder_of_compiled_code_per_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    default = compiled_folder()
    assert default == compiled_folder() and default.parent == tmp_path / "compiled"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert compiled_folder() != default
