"""Starting processes without torchrun: what they end with is what the command ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skyreels_v3.launch import exit_code
from tests.conftest import ROOT

SCRIPT = """
import os, signal, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
open(f"{sys.argv[1]}/{rank}-of-{world}-{sys.argv[2]}", "w").close()
end = sys.argv[3]
if rank == "0" and end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "0" and end != "0":
    sys.exit(int(end))
time.sleep(0 if end == "0" else 60)  # the others are ended
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("0", 0), ("2", 2), ("130", 130), ("7", 1), ("kill", 1)])
def test_how_they_end(script, tmp_path, end, code):
    argument = "as it is; $HOME"
    program = "import sys; from skyreels_v3.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    command = [sys.executable, "-c", program, str(script), str(tmp_path), argument, end]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert (made.returncode, made.stdout, made.stderr) == (code, "", "")  # nobody speaks but the processes
    assert (tmp_path / f"0-of-2-{argument}").exists()


def test_exit_codes():
    assert [exit_code(code) for code in (2, 130, 1, -9, 77)] == [2, 130, 1, 1, 1]
