"""Computed tensors on disk: found again, never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from skyreels_v3 import cache
from skyreels_v3.cache import TensorCache, cache_folder, compiled_folder, identity_of


def context(rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {"context": torch.randn(1, rows, 8).to(dtype), "pooled": torch.randn(1, 4)}


def assert_same(found: dict[str, torch.Tensor] | None, made: dict[str, torch.Tensor]) -> None:
    assert found is not None and found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 511, 512])
def test_what_is_kept_is_found(tmp_path, rows, dtype):
    prompts, made = TensorCache(tmp_path / "not" / "there", "an encoder"), context(rows, dtype)
    assert prompts.recall("a cat") is None
    prompts.store("a cat", made)
    found = TensorCache(tmp_path / "not" / "there", "an encoder").recall("a cat")
    assert_same(found, made)


def test_prompts_and_encoders_are_told_apart(tmp_path):
    made = {}
    for identity in ("one", "two"):
        for prompt in ("a cat", "a cat ", "A cat", "", "\ud83d\ude00", "caf\udce9"):  # the last from a bad encoding
            made[identity, prompt] = context()
            TensorCache(tmp_path, identity).store(prompt, made[identity, prompt])
    for (identity, prompt), expected in made.items():
        assert_same(TensorCache(tmp_path, identity).recall(prompt), expected)
    assert len(files(tmp_path)) == len(made)
    assert TensorCache(tmp_path, "three").recall("a cat") is None


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4, b"no such file" * 100, None], ids=["empty", "short", "other", "cut"]
)
def test_a_damaged_file_is_not_used_and_is_replaced(tmp_path, content):
    prompts, made = TensorCache(tmp_path, "an encoder"), context()
    prompts.store("p", made)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    assert prompts.recall("p") is None
    prompts.store("p", made)
    assert_same(prompts.recall("p"), made)
    assert files(tmp_path) == [file]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    prompts = TensorCache(tmp_path / "file" / "prompts", "an encoder")
    prompts.store("p", context())
    assert prompts.recall("p") is None


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    prompts, made = TensorCache(tmp_path, "an encoder"), context()
    prompts.store("p", made)
    tmp_path.chmod(0o500)
    try:
        prompts.store("other", context())
        assert prompts.recall("other") is None
        assert_same(prompts.recall("p"), made)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk(tmp_path, monkeypatch):
    """Nothing is left of what could not be written."""
    prompts = TensorCache(tmp_path, "an encoder")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    prompts.store("p", context())
    assert prompts.recall("p") is None
    assert not files(tmp_path)


def test_no_folder():
    prompts = TensorCache(None, "an encoder")
    prompts.store("p", context())
    assert prompts.recall("p") is None


def test_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 3)
    prompts = TensorCache(tmp_path, "an encoder")
    for number in range(5):
        prompts.store(f"{number}", context())
        for file in files(tmp_path):  # a second has passed
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
    assert [prompts.recall(f"{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert len(files(tmp_path)) == 3


def test_an_encoder_is_its_files(tmp_path):
    """Changed when a file's content is, by length or time, or it is another file; the same for the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_bytes(b"weights")
        os.utime(file, ns=(10**18, 10**18))
    known = identity_of([one], torch.bfloat16, None)
    assert identity_of([one], torch.bfloat16, None) == known
    assert identity_of([tmp_path / "." / "one"], torch.bfloat16, None) == known
    assert identity_of([two], torch.bfloat16, None) != known
    assert identity_of([one, two], torch.bfloat16, None) != known
    assert identity_of([one], torch.float32, None) != known
    assert identity_of([one], torch.bfloat16, "fp8") != known
    os.utime(one, ns=(10**18, 10**18 + 1))
    assert identity_of([one], torch.bfloat16, None) != known
    one.write_bytes(b"more weights")
    os.utime(one, ns=(10**18, 10**18))
    assert identity_of([one], torch.bfloat16, None) != known


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SKYREELS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "all"))
    assert cache_folder() == tmp_path / "all" / "skyreels_v3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "skyreels_v3"


def test_code_for_other_instructions_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    slow = compiled_folder()
    assert slow == compiled_folder() and slow.parent == tmp_path / "compiled"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert compiled_folder() != slow
