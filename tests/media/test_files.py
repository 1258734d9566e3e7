"""Inputs are checked or downloaded; outputs are written whole, overwrite nothing and leave no partial files."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from skyreels_v3.errors import UserError
from skyreels_v3.media import files
from skyreels_v3.media.files import (
    check_readable,
    check_writable,
    format_value,
    is_url,
    local_file,
    publish,
    run_folder,
    temporary_name,
)

FLAG = "--output"


def make(path: Path, folder: bool, text: str) -> Path:
    """Write a file that contains `text`, or a folder with one such file."""
    if folder:
        path.mkdir()
        (path / "content").write_text(text)
    else:
        path.write_text(text)
    return path


def said(path: Path) -> str:
    return (path / "content" if path.is_dir() else path).read_text()


@pytest.fixture(params=["link", "no link"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with hard links, and as on a file system without them."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no link":
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("folder", [False, True])
def test_publish_never_overwrites(tmp_path: Path, folder: bool, links: None, caplog: pytest.LogCaptureFixture) -> None:
    final = tmp_path / ("frames.v1" if folder else "clip.mp4")
    names = []
    for text in "abc":
        temporary = make(temporary_name(final), folder, text)
        with caplog.at_level(logging.WARNING):
            names.append(publish(temporary, final).name)
        assert not temporary.exists()
    assert names == (
        ["frames.v1", "frames.v1-2", "frames.v1-3"] if folder else ["clip.mp4", "clip-2.mp4", "clip-3.mp4"]
    )
    assert [said(tmp_path / name) for name in names] == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert [names[1] in record.getMessage() for record in caplog.records] == [True, False]


def test_publish_leaves_an_empty_folder_and_a_dangling_link_alone(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    assert publish(make(tmp_path / "tmp", False, "x"), tmp_path / "link.mp4").name == "link-2.mp4"
    assert publish(make(tmp_path / "tmp", True, "x"), tmp_path / "folder").name == "folder-2"
    assert not (tmp_path / "nowhere").exists() and not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize("folder", [False, True])
def test_publish_is_race_free(tmp_path: Path, folder: bool, links: None) -> None:
    workers = 16
    barrier = threading.Barrier(workers)
    results: list[Path] = []

    def work(number: int) -> None:
        temporary = make(temporary_name(tmp_path / "a.mp4"), folder, str(number))
        barrier.wait()
        results.append(publish(temporary, tmp_path / "a.mp4"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == workers
    assert sorted(int(said(path)) for path in results) == list(range(workers))
    assert len(os.listdir(tmp_path)) == workers


def test_publish_passes_other_errors_on(tmp_path: Path) -> None:
    temporary = make(tmp_path / "tmp", False, "x")
    with pytest.raises(FileNotFoundError):
        publish(temporary, tmp_path / "missing" / "a.mp4")
    assert said(temporary) == "x"


def test_names(tmp_path: Path) -> None:
    for name, folder, expected in (("a.b.mp4", False, "a.b.partial.mp4"), ("a.b", True, "a.b.partial")):
        for number in ("", "-2"):
            made = publish(make(tmp_path / "tmp", folder, "x"), tmp_path / name, partial=True)
            assert made.name == expected.replace(".partial", f".partial{number}")
    name = temporary_name(Path("r") / ("x" * 230 + ".mp4"))
    assert name.parent == Path("r")
    assert name.name.startswith(".")
    assert name.suffix == ".mp4"
    assert len(name.name) < 100
    assert temporary_name(Path("a.mp4")) != temporary_name(Path("a.mp4"))


def check_refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_writable(path, FLAG)
    assert str(caught.value).startswith(f"{FLAG}: {format_value(path)}")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_writable(tmp_path / "new.mp4", FLAG)
    check_writable(tmp_path / "a" / "b" / "new.mp4", FLAG)
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.mp4"), FLAG)
    check_refused(tmp_path / "file", "exists already", "another name")
    check_refused(tmp_path / "folder", "exists already", "file name in it")
    check_refused(tmp_path / "dangling", "exists already")
    check_refused(tmp_path / "file" / "new.mp4", "is not a folder")
    check_refused(tmp_path / ("x" * 250 + ".mp4"), "file name")
    check_refused(Path("a\0b.mp4"), "file name")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "folder"]
    assert not os.listdir(tmp_path / "folder")


def test_check_writable_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, so the error is simulated."""

    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    check_refused(tmp_path / "a" / "new.mp4", "not writable", "Permission denied", "another path")


def test_check_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make(tmp_path / "good", False, "x")
    check_readable(good, FLAG)
    os.mkfifo(tmp_path / "fifo")  # reading it would block forever
    (tmp_path / "empty").touch()
    for name, word in [
        ("missing", "does not exist"),
        ("good/below", "does not exist"),
        (".", "is a folder"),
        ("fifo", "not a regular file"),
        ("empty", "is empty"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=word):
            check_readable(tmp_path / name, FLAG)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        check_readable(good, FLAG)


def test_checking_inputs_needs_no_large_library() -> None:
    code = (
        "import sys, pathlib, skyreels_v3.inputs, skyreels_v3.media.video_writer\n"
        "skyreels_v3.media.audio.probe_audio(pathlib.Path('assets/speech.mp3'))\n"
        "large = {'torch', 'httpx', 'diffusers', 'transformers', 'librosa', 'pyloudnorm', 'scipy', 'soundfile'}\n"
        "print(sorted(large & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


HOLDER = "from skyreels_v3.media.files import run_folder as f\nwith f() as folder: print(folder, flush=True), input()"


def test_temporary_folders_of_killed_runs_are_removed(tmp_path, monkeypatch):
    """Only those: folders of live runs and of anybody else stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(root)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    held = Path(holder.stdout.readline().strip())
    assert held.parent == tmp_path
    (held / "download.mp4").write_text("half")
    kept = {make(tmp_path / f"skyreels-{name}", name == "unmarked", "a") for name in ("unmarked", "file")}
    link = tmp_path / "skyreels-link"
    link.symlink_to(held)
    with run_folder() as folder:
        assert {*tmp_path.iterdir()} == {held, folder, link, *kept}
    holder.kill()
    holder.communicate()
    with run_folder() as folder:
        assert {*tmp_path.iterdir()} == {folder, link, *kept}
    assert not folder.exists()


INPUT = "--ref_imgs"


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd: name, with = signs.png"
    path.write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(path), f"~/{path.name}"):
        assert not is_url(source)
        assert local_file(source, INPUT, tmp_path / "downloads", 1) == path
    assert not (tmp_path / "downloads").exists()


@pytest.mark.parametrize(
    "source, reason",
    [
        ("missing.png", "missing.png does not exist"),
        ("", "an empty path"),
        ("x" * 100_000, "xxx...xxx"),
        ("a\nb.png", r"a\nb.png"),
        *(
            (url, f"{url}: only http and https addresses are fetched")
            for url in ("ftp://a.example/b.png", "file:///etc/hostname", "s3://a/b", "data:image/png;base64,AA")
        ),
        ("https://h/a.png?...", "https://h/a.png?...: its query or password was not recorded; give the whole address"),
        ("https://...@h/a.png", "https://...@h/a.png: its query or password was not recorded"),
    ],
)
def test_refused(tmp_path: Path, source: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        local_file(source, INPUT, tmp_path / "downloads", 1)
    assert str(caught.value).startswith(f"{INPUT}: ")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "downloads").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_what_others_put_into_the_temporary_folder_is_left_alone(tmp_path, monkeypatch):
    """A FIFO would block forever, and a link could lead anywhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "skyreels-fifo").mkdir()
    os.mkfifo(tmp_path / "skyreels-fifo" / ".in-use")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".in-use").touch()
    (tmp_path / "skyreels-link").symlink_to(other)
    with run_folder() as folder:
        assert folder.is_dir()
    assert other.is_dir() and (tmp_path / "skyreels-fifo").is_dir()
