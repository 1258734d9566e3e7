"""Every command of the README is accepted and planned as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from skyreels_v3.cli import FLAGS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python3 generate_video\.py (.+)$", README, re.MULTILINE)


def test_there_is_a_command_for_each_task():
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS, ids=[shlex.split(command)[1] for command in COMMANDS])
def test_command(generate, command):
    run = generate(*shlex.split(command), "--dry_run", cwd=ROOT)
    assert run.returncode == 0, run.stderr
    plan = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert plan["checkpoint"].startswith("Skywork/SkyReels-V3-")
    assert "Wan2.1_VAE.pth" in plan["to"] or "vae/*" in plan["to"]
    assert float(re.search(r"([\d.]+) PFLOP a forward", plan["pass"])[1]) > 5
    assert re.search(r"[23]\d\.\d GB weights \(bfloat16|[57]\d\.\d GB weights \(float32", plan["transformer"])
    assert re.search(r"resident [\d.]+ GB .*offload [\d.]+ GB .*stream [\d.]+ GB", plan["memory"])


def test_every_flag_is_documented():
    for flag in FLAGS:
        assert f"`--{flag.name}`" in README, flag.name


def test_the_files_it_names_exist():
    listing = README.split("## Files")[1]
    for name in re.findall(r"^ +([\w./]+(?: [\w.]+\.py)*) {2,}", listing, re.MULTILINE):
        for part in name.split():
            assert (ROOT / part).exists() or (ROOT / "skyreels_v3" / part).exists(), part
