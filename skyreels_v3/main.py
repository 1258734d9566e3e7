"""The command: `skyreels generate`, `python -m skyreels_v3 generate`, generate_video.py and video_generate.py.

The path of a request: argv -> `GenerationRequest` (cli.py, checks.py) -> `Checked` (resolve.py) -> `Plan` (plan.py) ->
`Generator` (generate.py) -> mp4. The last line on stdout is the path of the video. Exit codes: 0 done, 2 invalid
request, 130 interrupted, 1 any other error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyreels_v3.checks import request_of
from skyreels_v3.cli import SCRIPT, is_server, parse_flags, verbosity_of
from skyreels_v3.console import escape_unknown, say, set_up_logging, show
from skyreels_v3.errors import IncompleteOutput, UserError, cause_of, format_value
from skyreels_v3.media.files import is_url
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.ranks import SINGLE, Ranks, check_ranks, ranks_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.version import __version__

logger = logging.getLogger("skyreels_v3")

PROGRAM = "skyreels"  # the console script


def run(request: GenerationRequest, ranks: Ranks) -> None:
    """Run a request and print the paths of its videos, or its plan."""
    from skyreels_v3.dry_run import dry_run
    from skyreels_v3.resolve import downloads_folder

    check_ranks(request, ranks)
    with downloads_folder(ranks) as downloads:
        if request.dry_run:
            if ranks.is_main:
                show(dry_run(request, downloads, ranks))
            return
        for path in make_videos(request, downloads, ranks):
            if ranks.is_main:
                show(path)


def make_videos(request: GenerationRequest, downloads: Path, ranks: Ranks) -> Iterator[Path]:
    """Make a request's videos, together with the other ranks; yields the path of each."""
    from skyreels_v3.resolve import preflight
    from skyreels_v3.worker import Worker

    worker = Worker(ranks, ranks)
    first, *others = request.videos()
    checked = preflight(first, downloads, ranks) if ranks.is_local_main else None  # before the ranks connect
    if ranks.world_size > 1:
        processes.init_process_group(ranks, request.device)
    prompt = None
    for video in (first, *others):
        name = f"video/{video.number}"
        checked = worker.resolve(video if prompt is None else video.with_prompt(prompt), downloads, name, checked)
        if not checked.done:
            prompt = checked.request.prompt  # rewritten only once, for the first video
        if checked.done:
            logger.info("%s is already done", checked.request.output)
            yield checked.request.output
        else:
            try:
                yield worker.make(checked).path
            except IncompleteOutput as error:
                yield error.output
                raise
        checked = None
    processes.destroy()


def act_on(flags: Mapping[str, Any], ranks: Ranks) -> int:
    """Run what the flags ask for; returns the exit code."""
    if is_server(flags):
        if ranks.world_size > 1:
            flag = "--serve" if flags.get("serve") else "--mcp"
            raise UserError(flag, "starts its own processes; run it without torchrun, and give --use_usp")
        from skyreels_v3.web.serve import serve

        return serve(flags)
    if "jobs" in flags:
        from skyreels_v3.batch import run_jobs

        return run_jobs(flags, ranks)
    run(request_of(flags), ranks)
    return 0


def start_processes(flags: Mapping[str, Any], argv: Sequence[str], wanted: int) -> int:
    """Run what the flags ask for in `wanted` processes on this machine; returns the exit code."""
    ranks = Ranks(world_size=wanted, local_world_size=wanted)
    if flags.get("dry_run"):
        return act_on(flags, ranks)  # one process can plan for all
    logger.setLevel(logging.ERROR)  # the started processes log
    request = None if "jobs" in flags else request_of(flags)
    if request is not None and not request.text and not any(is_url(source) for _, source in request.sources):
        from skyreels_v3.resolve import preflight

        checked = preflight(request, Path(), ranks)  # to report errors before the processes start
        if checked.done and request.video_num == 1:
            show(checked.request.output)
            return 0
    from skyreels_v3.parallel.launch import launch

    task = [f"--task_type={flags['task_type']}"] if "task_type" in flags else []
    return launch([str(Path(__file__).with_name("__main__.py")), "generate", *argv, *task], wanted)


def check_current_folder() -> None:
    """Raise UserError if the current folder was removed; relative paths and importing torch would fail."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("command line", "the current folder was removed; change to another") from error


def main(argv: Sequence[str], default_task: str | None = None, command: str = SCRIPT) -> int:
    """Make the videos that `argv` asks for.

    Args:
        argv: the flags, without the name of the program.
        default_task: the task if neither flags nor a config file name one.
        command: the command that --help shows.

    Returns:
        The exit code.
    """
    verbosity, ranks = 1, SINGLE
    escape_unknown()
    try:
        ranks = ranks_of(os.environ)
        flags = parse_flags(argv, default_task, command)
        # where each process makes its own videos, each may have to clean up
        each_its_own = "jobs" in flags and not flags.get("use_usp")
        processes.handle_signals(replace(ranks, local_rank=0) if each_its_own else ranks)
        if not ranks.is_main:
            flags = {name: value for name, value in flags.items() if name != "verbose"} | {"quiet": True}
        verbosity = verbosity_of(flags)
        set_up_logging(verbosity, ranks.is_main)
        wanted = 1 if is_server(flags) else flags.pop("gpu_num", 1)
        check_current_folder()
        if wanted > 1 and ranks.world_size == 1:
            return start_processes(flags, argv, wanted)
        if wanted not in (1, ranks.world_size):
            reason = f"{wanted}: {ranks.world_size} processes are already running"
            raise UserError("--gpu_num", f"{reason}; leave it out, or start without torchrun")
        return act_on(flags, ranks)
    except UserError as error:
        return processes.report_exit(f"error: {error}\n", 2, ranks)
    except KeyboardInterrupt as error:
        return processes.report_exit("interrupted\n", processes.INTERRUPTED, ranks, error)
    except Exception as error:
        if verbosity > 0:
            logging.exception("failed")
        return processes.report_exit(f"error: {cause_of(error)} (--verbose shows where)\n", 1, ranks)


def generate_command(argv: Sequence[str]) -> int:
    return main(argv, command=f"{PROGRAM} generate")


def convert_command(argv: Sequence[str]) -> int:
    """Convert a transformer and print the path of the result."""
    from skyreels_v3.convert import convert

    escape_unknown()
    set_up_logging(0)
    try:
        check_current_folder()
        show(convert(argv))
    except UserError as error:
        return processes.report_exit(f"error: {error}\n", 2, SINGLE)
    except KeyboardInterrupt as error:
        return processes.report_exit("interrupted\n", processes.INTERRUPTED, SINGLE, error)
    except Exception as error:
        return processes.report_exit(f"error: {cause_of(error)}\n", 1, SINGLE)
    return 0


def serve_command(argv: Sequence[str]) -> int:
    return main(["--serve", *argv], command=f"{PROGRAM} serve")


def mcp_command(argv: Sequence[str]) -> int:
    return main(["--mcp", *argv], command=f"{PROGRAM} mcp")


COMMANDS = {
    "generate": (generate_command, "make one video, several, or those of a jobs file"),
    "convert": (convert_command, "convert a transformer to a folder in diffusers' layout, or to one file"),
    "serve": (serve_command, "serve an HTTP API that makes videos: OpenAI's video API"),
    "mcp": (mcp_command, "serve MCP to agents that make videos, over stdin and stdout"),
}


def run_command(argv: Sequence[str]) -> int:
    """Run a subcommand, named by the first of `argv`; returns the exit code."""
    name, *rest = argv or ("--help",)
    if name in COMMANDS:
        return COMMANDS[name][0](rest)
    escape_unknown()
    if name in ("-h", "--help", "--version"):
        show(f"skyreels_v3 {__version__}" if name == "--version" else usage())
        return 0
    meant = f"put a command before it: {PROGRAM} generate {name} ..." if name[:1] == "-" else f"see {PROGRAM} --help"
    say(f"error: command line: {format_value(name)} is not a command; {meant}\n")
    return 2


def usage() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())
    flags = f"{PROGRAM} COMMAND --help lists the flags of a command."
    return f"usage: {PROGRAM} COMMAND [flags]\n\nInference for the SkyReels video models.\n\n{commands}\n\n{flags}"
