"""What runs a server elsewhere fits it: the image, the systemd unit and the Compose file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
import yaml

from benchmarks.serve_load import running_server
from skyreels_v3.cli import parse_flags
from skyreels_v3.parallel.processes import GRACE, INTERRUPTED
from skyreels_v3.web import serve
from skyreels_v3.web.serve import check_access, listen
from tests.conftest import ROOT
from tests.web.conftest import HINT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = (ROOT / "cluster" / "skyreels.service").read_text(encoding="utf-8")
PYTHON = "/opt/skyreels/.venv/bin/python"
ENDS_WITHIN = serve.GRACE + GRACE  # seconds: of open answers, of workers
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "compose.yaml").read_text(encoding="utf-8"))


def unit_value(name: str) -> str:
    """The value of a setting that the unit has once; continued lines are joined."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.replace("\\\n", ""), re.MULTILINE)
    return value


def check_command(words: list[str]) -> dict[str, Any]:
    """The flags of a command that serves, as the program reads them."""
    flags = parse_flags(words)
    assert flags["serve"]
    check_access(flags["host"], (flags["api_key"],), no_auth=False)
    return flags


def healthcheck() -> list[str]:
    (command,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*?\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    return json.loads(command)


def test_the_image_has_all_that_a_server_needs():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [word for words in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in words.split()]
    assert "requirements-web.txt" in sources
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in sources)
    assert "--requirement requirements-web.txt" in DOCKERFILE
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE) == [str(serve.GenerationRequest.port)]
    (example,) = re.findall(r"skyreels serve (.*)$", DOCKERFILE, re.MULTILINE)
    check_command(["--serve", *shlex.split(example)])


@pytest.mark.slow
def test_the_health_of_a_server(tmp_path, cache, monkeypatch):
    pytest.importorskip("fastapi", reason=HINT)
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    (tmp_path / "keys").write_text("a-key", encoding="utf-8")
    _, option, code = healthcheck()
    with running_server(tmp_path, workers=1) as (_, address):
        port = address.rpartition(":")[2]
        assert "8000" in code
        command = [sys.executable, option, code.replace("8000", port)]
        assert subprocess.run(command, check=False).returncode == 0
        unknown = [word.replace("/health", "/v1/videos") for word in command]  # needs a key
        assert subprocess.run(unknown, check=False).returncode == 1
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "skyreels.service"
    unit.write_text(UNIT.replace(PYTHON, sys.executable), encoding="utf-8")
    checked = subprocess.run([ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    hardened = [ANALYZE, "security", "--offline=true", "--threshold=25", str(unit)]  # 2.5 of 10
    assert subprocess.run(hardened, capture_output=True, check=False).returncode == 0


def test_the_units_command():
    python, script, *words = shlex.split(unit_value("ExecStart"))
    assert (python, script) == (PYTHON, "/opt/skyreels/generate_video.py")
    flags = check_command(words)
    assert flags["api_key"] == "${CREDENTIALS_DIRECTORY}/" + unit_value("LoadCredential").partition(":")[0]
    assert flags["outdir"].startswith("${STATE_DIRECTORY}/")
    assert unit_value("KillMode") == "mixed" and int(unit_value("TimeoutStopSec")) > ENDS_WITHIN
    assert str(INTERRUPTED) in unit_value("SuccessExitStatus").split()
    assert int(unit_value("LimitNOFILE")) > 2 * serve.MAX_CONNECTIONS


def test_the_compose_file(compose):
    (server,) = compose["services"].values()
    command, *words = server["command"]
    flags = check_command([f"--{command}", *words])
    assert flags["api_key"] == f"/run/secrets/{server['secrets'][0]}" and server["secrets"] == [*compose["secrets"]]
    mounts = dict(volume.split(":") for volume in server["volumes"])
    assert mounts.keys() == compose["volumes"].keys() and flags["outdir"].startswith(mounts["videos"])
    assert server["ports"] == [f"127.0.0.1:8000:{flags.get('port', 8000)}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > ENDS_WITHIN
    (devices,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert (ROOT / "cluster" / server["build"] / "Dockerfile").is_file()
    kept = subprocess.run(["git", "check-ignore", "cluster/api_key"], cwd=ROOT, check=False, capture_output=True)
    assert kept.returncode in (0, 128)  # 128: not a checkout


def test_small_answers_are_sent_at_once():
    """asyncio turns Nagle's algorithm off only for sockets that name their protocol; it costs 40 ms an answer."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
