"""Every command of the README is accepted and planned as written."""

from __future__ import annotations

import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest

from skyreels_v3.request import FLAGS
from skyreels_v3.tasks import TASK_NAMES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python3 generate_video\.py (.+)$", README, re.MULTILINE)
OLD_COMMANDS = re.findall(r"^    python3 video_generate\.py (.+)$", README, re.MULTILINE)


def test_there_is_a_command_for_each_task():
    assert sorted(shlex.split(command)[1] for command in COMMANDS) == sorted(TASK_NAMES)
    assert len(OLD_COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=[shlex.split(command)[1] for command in COMMANDS])
def test_command(main, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    code, stdout, stderr = main(*shlex.split(command), "--dry_run")
    assert code == 0, stderr
    plan = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert plan["checkpoint"].startswith("Skywork/SkyReels-V")
    assert "Wan2.1_VAE.pth" in plan["download"] or "vae/*" in plan["download"]
    assert float(re.search(r"([\d.]+) PFLOP a forward", plan["pass"])[1]) > 2
    assert re.search(r"[23]\d\.\d GB weights \(bfloat16|[57]\d\.\d GB weights \(float32", plan["transformer"])
    assert re.search(r"resident [\d.]+ GB.*offload [\d.]+ GB.*stream [\d.]+ GB", plan["memory"])


@pytest.mark.parametrize("command", OLD_COMMANDS, ids=["one-gpu", "several-gpus"])
def test_commands_by_the_old_name(main, monkeypatch, command):
    """As in V1's README, the second one without a task."""
    monkeypatch.chdir(ROOT)
    code, stdout, stderr = main(*shlex.split(command), "--dry_run", default_task="t2v")
    assert code == 0, stderr
    plan = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert plan["task"].startswith("t2v")
    assert plan["video"].startswith("960 x 544, 97 new frames at 24 fps")
    assert re.search(r"resident [\d.]+ GB, offload [\d.]+ GB, stream [\d.]+ GB", plan["memory"])
    assert ("guidance 2 x ring 1 x Ulysses 2" in stdout) == ("--gpu_num 4" in command)


def test_the_options_page_is_current():
    """If it fails: python docs/generate_options.py."""
    made = runpy.run_path(str(ROOT / "docs" / "generate_options.py"))["options_table"]()
    assert made in OPTIONS
    assert all(f"`--{flag.name}`" in made for flag in FLAGS)


def test_the_files_it_names_exist():
    listing = README.split("## Files")[1].split("[CONTRIBUTING")[0]
    for name in re.findall(r"[\w./]+(?:\.py|/)(?= |$)", listing, re.MULTILINE):
        assert (ROOT / name).exists() or (ROOT / "skyreels_v3" / name).exists(), name


@pytest.mark.slow
def test_the_python_example(monkeypatch, cache, capsys):
    """With the toy model, at a small size."""
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"^    from skyreels_v3 import load\n(?:(?:    .*)?\n)+", README, re.MULTILINE)
    small = 'model_id="tiny", device="cpu", height=32, width=48, num_frames=5'
    exec(textwrap.dedent(example).replace('memory="offload"', small))
    assert "Done\n" in capsys.readouterr().out
