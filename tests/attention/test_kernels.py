"""Checks on the choice of attention kernel that need no torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from skyreels_v3.attention.kernels import KERNELS, check_attention
from skyreels_v3.errors import UserError
from tests.conftest import ROOT

GPU_ONLY = [name for name in KERNELS if name != "sdpa"]
PACKAGES = [name for name in KERNELS if KERNELS[name].package]


@pytest.fixture
def packages(monkeypatch):
    """The set of packages that count as installed; tests add to it."""
    there: set[str] = set()
    monkeypatch.setattr("skyreels_v3.packages.find_spec", lambda name: object() if name in there else None)
    return there


def test_checks_do_not_import_torch():
    code = (
        "import sys, skyreels_v3.attention.kernels as available\n"
        "for name in available.KERNELS: available.is_installed(name)\n"
        "available.check_attention('cudnn', 'cuda')\n"
        "sys.exit(bool({'torch', 'diffusers', 'flash_attn', 'xformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu", "mps"])
def test_possible_everywhere(name, device, packages):
    check_attention(name, device)
    check_attention(name, device, "float32")


@pytest.mark.parametrize("name", GPU_ONLY)
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_gpu_only(name, device, packages):
    packages.update(kernel.package for kernel in KERNELS.values())
    with pytest.raises(UserError, match=rf"--attention: {name}: .* not on {device}; use --attention auto or sdpa"):
        check_attention(name, device)
    check_attention(name, "auto")
    check_attention(name, "cuda", "bfloat16")


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_missing_package(name, device, packages):
    kernel = KERNELS[name]
    way = f"pip install {kernel.install}, or use --attention auto"
    expected = f"--attention: {name}: the package {kernel.package} is not installed; {way}"
    with pytest.raises(UserError, match=re.escape(expected)):
        check_attention(name, device)
    packages.add(kernel.package)
    check_attention(name, device)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_float32(name, packages):
    packages.update(kernel.package for kernel in KERNELS.values())
    if KERNELS[name].half_only:
        with pytest.raises(UserError, match=f"--attention: {name}: .* float32; use --dtype bfloat16 or --attention a"):
            check_attention(name, "cuda", "float32")
    else:
        check_attention(name, "cuda", "float32")
