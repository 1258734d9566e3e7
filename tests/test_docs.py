"""The README, CONTRIBUTING and docs/: commands work as written, links lead somewhere, generated tables are current."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from itertools import chain, pairwise
from pathlib import Path

import pytest

from docs import generate_facts, generate_options, generate_troubleshooting
from docs.page_commands import FENCE, commands_of
from skyreels_v3 import convert
from skyreels_v3.cli import parse_flags
from skyreels_v3.errors import UserError
from skyreels_v3.main import COMMANDS as COMMANDS_OF_SKYREELS
from skyreels_v3.request import BY_NAME, FLAGS, INPUTS
from skyreels_v3.tasks import TASK_NAMES
from tests.conftest import ROOT, files_in

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
SCRIPTS = ("generate_video.py", "video_generate.py")
SUBCOMMANDS = {"generate": [], "serve": ["--serve"], "mcp": ["--mcp"]}  # of skyreels, with the same flags
# commands with these flags are parsed but not planned: their files or packages are not on every machine
ELSEWHERE = {"transformer", "text", "vocals", "speech_only", "diarization", "enhance_prompt", "serve", "mcp"}
FILES = re.compile(r"(?<![\w/.-])(?:assets|cluster|benchmarks|comfyui|training)/[\w./-]+|requirements[\w-]*\.txt")
FOREIGN = ("nproc_per_node", "node_rank", "cpu", "input_reference", "size")  # torchrun's, ComfyUI's, the API's fields
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOTEBOOK = DOCS / "skyreels.ipynb"


def flags_of(command: str) -> list[str] | None:
    """The flags of a video command, without placeholders; None for any other command."""
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    scripts = [place for place, word in enumerate(words) if word in SCRIPTS]
    if words[0] == "skyreels" and words[1] in SUBCOMMANDS:
        return [*SUBCOMMANDS[words[1]], *words[2:]]
    return words[scripts[0] + 1 :] if scripts else None


def plannable(command: str) -> bool:
    """Whether a command is complete and needs only files of the repository; or invalid, so that a test reports it."""
    try:
        flags = parse_flags(flags_of(command) or [])
    except UserError:
        return True
    given = [flags[name] for name in (*INPUTS, "jobs") if name in flags]
    files = [file for each in given for file in (each if isinstance(each, list) else [each])]
    return "..." not in command and not flags.keys() & ELSEWHERE and all((ROOT / file).is_file() for file in files)


def missing_files(command: str) -> list[str]:
    """Files of the repository that a command names but that do not exist."""
    return [name for name in FILES.findall(command) if not (ROOT / name).exists() and name != "cluster/api_key"]


OURS = [command for command in COMMANDS if flags_of(command) is not None]
PLANNED = [command for command in OURS if plannable(command)]
TINY = [command for command in PLANNED if "--model_id tiny" in command and "--jobs" not in command]
NAMES = [re.sub(r"python3 generate_video.py |--task_type |--prompt .*", "", command)[:60] for command in PLANNED]


def test_each_task_has_commands():
    in_readme = [command for command in commands_of(ROOT / "README.md") if command.startswith("python3 generate")]
    assert sorted(shlex.split(command)[3] for command in in_readme) == sorted(TASK_NAMES)
    assert sum("video_generate.py" in command for command in PLANNED) == 2
    for name in TASK_NAMES:
        first, tiny, *_ = commands_of(DOCS / "tasks" / f"{name}.md")
        assert first in PLANNED and tiny in TINY and all(f"--task_type {name} " in each for each in (first, tiny))


@pytest.mark.parametrize("command", PLANNED, ids=NAMES)
def test_command(main, monkeypatch, command):
    """The plan is for the published checkpoint, except for commands with the built-in model."""
    monkeypatch.chdir(ROOT)
    flags = flags_of(command)
    if command.startswith("torchrun"):
        from torch.distributed.run import get_args_parser

        flags += ["--gpu_num", get_args_parser().parse_args(shlex.split(command)[1:]).nproc_per_node]
    if "--dry_run" not in flags:
        flags += ["--dry_run"]
    code, stdout, stderr = main(*flags, default_task="t2v" if "video_generate.py" in command else None)
    assert code == 0, stderr
    if "--jobs" in flags or "tiny" in flags:
        return
    plan = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert plan["checkpoint"].startswith("Skywork/SkyReels-V")
    assert "Wan2.1_VAE.pth" in plan["download"] or "vae/*" in plan["download"]
    assert float(re.search(r"([\d.]+) PFLOP a forward", plan["pass"])[1]) > 2
    assert re.search(r"[2-7]\d\.\d GB weights \((bfloat16|float32)", plan["transformer"])
    assert re.search(r"resident [\d.]+ GB.*offload [\d.]+ GB.*stream [\d.]+ GB", plan["memory"])
    if "video_generate.py" in command:
        assert plan["video"].startswith("960 x 544, 97 new frames at 24 fps")
    assert ("processes" in plan) == ("--gpu_num" in flags)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reference_to_video", "shot_switching_extension"])
def test_command_of_the_built_in_model(main, tmp_path, task):
    """For the fastest tasks, with toys in place of the built-in model."""
    (command,) = (each for each in TINY if f"--task_type {task} " in each)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    code, stdout, stderr = main(*flags_of(command), "--quiet")
    assert code == 0, stderr
    assert Path(stdout.strip()).is_file()


@pytest.mark.parametrize("command", [command for command in OURS if command not in PLANNED])
def test_command_that_needs_more_is_parsed(command):
    parse_flags(flags_of(command))
    assert missing_files(command) == []
    if command.startswith("torchrun"):
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(shlex.split(command)[1:]).training_script in SCRIPTS


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in OURS])
def test_other_command(command):
    """It is one of those below, and the files that it names exist."""
    program, *words = shlex.split(command, comments=True)
    assert missing_files(command) == []
    if program == "make":
        rules = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
        for target in (word for word in words if "=" not in word):
            assert re.search(rf"^(?:[\w./ -]+ )?{re.escape(target)}(?: [\w./ -]+)?:", rules, re.MULTILINE), target
    elif program == "skyreels":
        assert words[0] in COMMANDS_OF_SKYREELS
        if words[0] == "convert":
            convert.build_parser().parse_args(words[1:])
    elif program == "curl":
        (url,) = (word for word in words if "/v1/" in word)
        path = re.sub(r"\$\w+|\{id\}", "{id}", url[url.index("/v1/") :])
        assert re.search(rf"`(?:GET|POST) {re.escape(path)}`", (DOCS / "server.md").read_text(encoding="utf-8")), path
        fields = [word.partition("=")[0] for before, word in pairwise(words) if before == "-F"]
        assert {*fields} <= {*BY_NAME, "seconds", "size", "video"}
    else:
        assert program in ("python3", "python", "pip", "docker", "openssl", "install", "cp", "ln", "ray", "systemctl")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_flags(page):
    """Links lead to files and headings, those in docs/ to files in docs/; flags in code are ours."""
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_file() and (page.parent == ROOT or target.is_relative_to(DOCS)), link
            assert not anchor or anchor in headings(target), link
    for block in (block for language, block in FENCE.findall(text) if language == "python"):
        compile(block, str(page), "exec")
    for name in re.findall(r"`--([a-z]\w*)(?: [^`]*)?`", text):
        assert name in BY_NAME or name in ("config", "help", *FOREIGN), name


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as repository hosts generate them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_made_tables_are_current():
    """If this fails, run the script that it names."""
    options = generate_options.options_table()
    assert options in (DOCS / "options.md").read_text(encoding="utf-8"), "docs/generate_options.py"
    assert all(f"`--{flag.name}`" in options for flag in FLAGS)
    for name in TASK_NAMES:
        page = generate_facts.page_of(name).read_text(encoding="utf-8")
        assert generate_facts.task_table(name) in page, "docs/generate_facts.py"
    measured = generate_facts.measured_table()
    assert measured in (DOCS / "memory_and_speed.md").read_text(encoding="utf-8"), "docs/generate_facts.py"
    errors = generate_troubleshooting.tables()
    assert errors in (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), "docs/generate_troubleshooting.py"
    for line in (
        "`--width`: *value*: not a multiple of 16 | give *below* or *...* |",  # from a loop
        "| `--voice`: *value*: is for text to be spoken | add `--text` |",  # from a table
        "| *flag*: *url*: took more than 300 s | download it and give the path |",  # one of several values of a name
    ):
        assert line in errors


def test_all_pages_are_in_the_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    entries = [value for entry in nav for value in entry.values()]
    named = [[each] if isinstance(each, str) else [page for part in each for page in part.values()] for each in entries]
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(chain.from_iterable(named)) == sorted(pages)


def test_the_site_builds(tmp_path):
    """In strict mode, which checks links and anchors."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build" / "site"
    made = {file for file in files_in(site) if not file.startswith(("assets/", "search"))}
    assert {"index.html", "tasks/t2v/index.html", "tasks/t2v.webp", NOTEBOOK.name} <= made
    assert not any(file.endswith(".py") for file in made)
    assert max(file.stat().st_size for file in (site / "tasks").glob("*.webp")) < 100_000


@pytest.mark.slow
def test_the_notebook(monkeypatch, tmp_path):
    """All cells except those tagged as downloading or needing a GPU."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    here = [cell for cell in code if {"download", "gpu"}.isdisjoint(cell.metadata.get("tags", ()))]
    notebook.cells = here
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SKYREELS_CACHE", str(tmp_path / "cache"))
    for name in ("generate_video.py", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.id: "".join(map(str, cell.outputs)) for cell in here}
    (video,) = re.findall(r"data:video/mp4;base64,([\w+/=]+)", shown["show-tiny"])
    assert base64.b64decode(video) == (tmp_path / "tiny.mp4").read_bytes()
    assert re.search(r"320 x 320, 17 new frames.*stream [\d.]+ GB", shown["dry-run"], re.DOTALL)
    assert "tiny.mp4" in shown["files"]


def test_the_files_that_the_readme_names_exist():
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
