"""The package as users install it: as a wheel or editable, used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from skyreels_v3 import __version__
from skyreels_v3.main import run_command
from skyreels_v3.tasks import TASK_NAMES

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("skyreels_v3", "configs", "training", "pyproject.toml", "setup.py", "README.md", "LICENSE")

Skyreels = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def skyreels(request, tmp_path_factory, cache) -> Skyreels:
    """Install the package offline into a new virtual environment; returns the path of its `skyreels` command.

    The environment sees the packages of the one that runs the tests, but not the repository.
    """
    folder = tmp_path_factory.mktemp(request.param)
    source, environment, elsewhere = folder / "source", folder / "venv", folder / "elsewhere"
    elsewhere.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    Path(packages, "tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    if request.param == "wheel":
        subprocess.run([*pip, "wheel", *offline, "--wheel-dir", folder, source], check=True)
        shutil.rmtree(source)
        (what,) = folder.glob("*.whl")
        contents = {name.partition("/")[0] for name in zipfile.ZipFile(what).namelist()}
        assert contents == {"skyreels_v3", f"skyreels_v3-{__version__}.dist-info"}  # no training/
    else:
        what = f"--editable={source}"
    subprocess.run([*pip, "--python", python, "install", *offline, what], check=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["SKYREELS_CACHE"] = str(cache)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "skyreels", *map(str, arguments)]
        return subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_help_and_version(skyreels: Skyreels) -> None:
    helped = skyreels("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("usage: skyreels COMMAND")
    assert skyreels("--version").stdout == f"skyreels_v3 {__version__}\n"
    helped = skyreels("generate", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    for task in TASK_NAMES:  # for each task an example, generated from its preset
        assert f"skyreels generate --task_type {task} " in helped.stdout


@pytest.mark.slow
def test_a_video(skyreels: Skyreels, tmp_path) -> None:
    task = ("--task_type", "t2v", "--prompt", "a cat", "--num_inference_steps", 1)
    size = ("--num_frames", 5, "--height", 32, "--width", 32)
    output = tmp_path / "a.mp4"
    made = skyreels("generate", "--model_id", "tiny", *task, *size, "--no_cache", "--output", output)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{output}\n"
    assert output.stat().st_size


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["paint"], "paint is not a command; see skyreels --help"),
        (
            ["--task_type", "t2v"],
            "--task_type is not a command; put a command before it: skyreels generate",
        ),
    ],
)
def test_no_command(argv: list[str], error: str, capsys) -> None:
    assert run_command(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: command line: {error}")
