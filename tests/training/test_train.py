"""`training/train.py` and `training/pack.py` as commands."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from skyreels_v3.checkpoints.tiny import WEIGHTS
from tests.conftest import ROOT
from training import pack, train


def run(script: str, *args: object) -> tuple[int, str]:
    """Returns the exit code, and the output on both streams."""
    done = subprocess.run(
        [sys.executable, ROOT / "training" / script, *map(str, args)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("more", [(), ("--resume", str(WEIGHTS), "--encoders"), ("--only", "vae_hunyuan")])
def test_a_transformer_needs_a_vae(more, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "made", "--only", "video", *more])
    with pytest.raises(SystemExit, match="2"):
        train.parse()
    assert "--only video: needs a VAE; add --only vae_wan" in capsys.readouterr().err


def test_weights_are_packed_only_if_they_are_complete(tmp_path, monkeypatch, capsys):
    tensors = load_file(WEIGHTS / "wan.safetensors")
    video = {name: value for name, value in tensors.items() if name.startswith("video.")}
    save_file(video, tmp_path / "wan.safetensors")
    monkeypatch.setattr(sys, "argv", ["pack.py", "--weights", str(tmp_path), "--out", str(tmp_path / "packs")])
    with pytest.raises(SystemExit, match="2"):
        pack.main()
    assert "wan.safetensors lacks talking_avatar" in capsys.readouterr().err
    assert not (tmp_path / "packs").exists()


@pytest.mark.extended
def test_everything_is_trained_and_packed(tmp_path):
    code, output = run("train.py", "--toy", "--minutes", 2.5, "--threads", 1, "--out", tmp_path / "made")
    assert code == 0, output
    assert (tmp_path / "made" / "sheet.png").is_file()
    code, output = run("pack.py", "--weights", tmp_path / "made", "--out", tmp_path / "packs")
    assert code == 0, output
    for family in ("wan", "hunyuan"):
        trained, packed = (load_file(tmp_path / part / f"{family}.safetensors") for part in ("made", "packs"))
        assert trained.keys() <= packed.keys()
