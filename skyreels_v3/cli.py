"""The command line: parses flags and config files into values of the flags' types.

The command line overrides the `--config` file, which overrides the task's preset. All three go through the same table
of flags and the same checks. A wrong request raises `UserError`; nothing here imports torch or opens an input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyreels_v3.checks import KEYFRAME, REFERENCE, describe_value, is_set, parse_lora, request_of
from skyreels_v3.config_text import read_yaml_text
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.hints import SEE_HELP, suggest_flag, suggest_value
from skyreels_v3.request import BY_NAME, EXCLUSIVE, FLAGS, INSTEAD, OFF, ON, Flag, GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec
from skyreels_v3.version import __version__

SCRIPT = "python3 generate_video.py"
MAX_TEXT = 10_000  # characters of one value; the model reads 512 tokens of a prompt
MAX_CONFIG_BYTES = 256 << 10
RECORDS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".png")  # suffixes of a --config that is not YAML
MAX_COMMAS = 20  # in a file name of a comma-separated list
CONFIG_HELP = "YAML file with flags as keys, or a video made here, to make it again; the command line takes precedence"
HTTP_ONLY = ("host", "port", "allowed_hosts", "api_key", "no_auth")  # flags of an HTTP server only
METAVARS = {str: "TEXT", int: "N", float: "X"}
DASHES = (
    "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # dashes that web pages and word processors put in place of hyphens
)
ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises one-line errors beginning with the flag."""

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (--\w+): (.+)", message, re.DOTALL)
        flag, problem = named.groups() if named else ("command line", message)
        raise UserError(flag, f"{'no value given' if problem == 'expected one argument' else problem}; see --help")


def parse_request(argv: Sequence[str]) -> GenerationRequest:
    """Parse a command line into a checked request.

    Raises:
        UserError: the first problem.
        SystemExit: 0, after --help or --version.
    """
    return request_of(parse_flags(argv))


def parse_flags(argv: Sequence[str], default_task: str | None = None, command: str = SCRIPT) -> dict[str, Any]:
    """Parse the flags of a command line and its config file; raises like `parse_request`.

    Args:
        default_task: the task if neither of them names one.
        command: the command that --help shows.
    """
    found, unknown = build_parser(command).parse_known_args(join_values(argv))
    if unknown:
        refuse_unknown(unknown, argv)
    given = {name: value for name, value in vars(found).items() if value is not None}
    config = given.pop("config", None)
    values: dict[str, Any] = {
        name: convert_entries(BY_NAME[name], value) if BY_NAME[name].several else convert(BY_NAME[name], value)
        for name, value in given.items()
    }
    if config is not None:
        values = without_overruled(read_config_file(config), values) | values
    if default_task is not None:
        values.setdefault("task_type", default_task)
    if is_server(values):
        check_beside_serve(values)
        if values.get("gpu_num", 1) > 1:
            values["use_usp"] = True
    elif "jobs" in values:
        check_beside_jobs(values)
    elif values.get("gpu_num", 1) > 1:
        values["use_usp"] = True
    return values


def join_values(argv: Sequence[str]) -> list[str]:
    """Join `--flag value` to `--flag=value` if the value begins with one dash; argparse would take it for a flag."""
    takes_value = {f"--{flag.name}" for flag in FLAGS if flag.kind is not bool} | {"--config"}
    words: list[str] = []
    for word in argv:
        if words and words[-1] in takes_value and re.match(r"-(?!-)", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def refuse_unknown(words: Sequence[str], argv: Sequence[str]) -> NoReturn:
    """Raise UserError for words that argparse did not recognize."""
    name, _, value = words[0].partition("=")
    if len(words) > 1 and not value and not words[1].startswith("-"):
        value = words[1]
    meant = suggest_flag(name, value, (*BY_NAME, "config", "help", "version")) if re.match(r"-+\w", name) else SEE_HELP
    if re.match(r"--.", name) or meant != SEE_HELP:
        raise UserError(format_value(name), f"there is no such flag; {meant}")
    word, before = describe_value(words[0]), argv[argv.index(words[0]) - 1] if words[0] in argv[1:] else ""
    switch = BY_NAME.get(before.removeprefix("--"))
    if switch is not None and switch.kind is bool:
        remedy = f"give {before} alone for yes, or leave it out for no"
        raise UserError(before, f"{word}: a switch takes no value; {remedy}")
    if name and name[0] in DASHES:
        remedy = f"type --{format_value(name.lstrip(DASHES + '-'))}"
        raise UserError("command line", f"{word} begins with a typographic dash instead of two hyphens; {remedy}")
    raise UserError("command line", f"{word} does not belong to any flag; put quotes around values with spaces")


def build_parser(command: str = SCRIPT) -> Parser:
    """A parser of all flags; values stay text until `convert`."""
    examples = []
    for spec in map(task_spec, TASK_NAMES):
        lines = (f"{command} --task_type {spec.name}", *(f"  {line}" for line in spec.example))
        examples.append(f"  {spec.summary}:\n    " + " \\\n    ".join(lines))
    parser = Parser(
        prog=command,
        usage="%(prog)s --task_type TASK --prompt TEXT [flags]",
        description="Make videos with the SkyReels V3 and V1 models. Examples of each task are below.",
        epilog="Tasks, each with an example (add --dry_run to see first what it would take):\n\n"
        + "\n\n".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    for flag in FLAGS:
        if flag.group:
            group = parser.add_argument_group(flag.group)
        if flag.kind is bool:
            group.add_argument(f"--{flag.name}", action="store_const", const=True, help=flag.help)
            continue
        options: dict[str, Any] = {} if flag.bare is None else {"nargs": "?", "const": flag.bare}
        options |= {"action": "append"} if flag.several else {}
        metavar = flag.metavar or "|".join(flag.choices) or METAVARS[flag.kind]
        group.add_argument(f"--{flag.name}", metavar=metavar, help=flag.help.replace("%", "%%"), **options)
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    group.add_argument("--version", action="version", version=f"skyreels_v3 {__version__}", help="print the version")
    group.add_argument("-h", "--help", action="help", help="print this")
    return parser


# Values


def convert(flag: Flag, value: Any) -> Any:
    """Convert a value (text, or any YAML type from a config file) to the flag's type, and check its range."""
    name = f"--{flag.name}"
    if isinstance(value, bool) and OFF in (flag.choices or (flag.metavar or "").split("|")):
        return ON if value else OFF  # YAML reads both as booleans
    if flag.kind is str:
        return convert_text(flag, value)
    if flag.kind is bool:
        if not isinstance(value, bool):
            raise UserError(name, f"{describe_value(value)}: give true or false")
        return value
    kind = "a whole number" if flag.kind is int else "a number"
    limits = "" if math.isinf(flag.low) else f" from {flag.low} to {flag.high}"
    allowed = int | str if flag.kind is int else int | float | str
    try:
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError
        number = flag.kind(value)
    except (ValueError, OverflowError):
        raise UserError(name, f"{describe_value(value)} is not {kind}; give {kind}{limits}") from None
    if not flag.low <= number <= flag.high:  # also catches NaN
        raise UserError(name, f"{describe_value(value)} is out of range; give {kind}{limits}")
    return number


def convert_text(flag: Flag, value: Any) -> str:
    """Check that a value is UTF-8 text of limited length and, if the flag has choices, one of them."""
    name, shown = f"--{flag.name}", describe_value(value)
    if flag.choices and value not in flag.choices:
        choices = f"{', '.join(flag.choices[:-1])} or {flag.choices[-1]}"
        raise UserError(name, f"{shown}: choose {choices}{suggest_value(flag.name, shown, flag.choices)}")
    if not isinstance(value, str):
        raise UserError(name, f"{shown} is not text; put it in quotes")
    if flag.path == "output" and not value.strip():  # would be the current folder
        raise UserError(name, f"an empty value; give {flag.metavar}")
    if len(value) > MAX_TEXT:
        raise UserError(name, f"{shown}: {len(value)} characters are too many; give at most {MAX_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(value).decode()
        except UnicodeError:
            remedy = ", or rename the file" if flag.path else ""
            raise UserError(name, f"{shown} is not UTF-8; type it again{remedy}") from None
        locale = f"is UTF-8, but the terminal's locale says {sys.getfilesystemencoding()}"
        raise UserError(name, f"{shown} {locale}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8") from None
    return value


def convert_entries(flag: Flag, texts: Iterable[Any]) -> list[str]:
    """The entries of a flag that takes several: comma-separated, given once or more."""
    return [entry for text in texts for entry in split(flag.name, convert(flag, text))]


def convert_from_file(name: str, value: Any, folder: str) -> Any:
    """Convert a value from a file in `folder`; a flag that takes several entries may have a list."""
    flag = BY_NAME[name]
    if not flag.several:
        return from_folder(flag, convert(flag, value), folder)
    if isinstance(value, list):
        entries = [convert(flag, entry) for entry in value]
        convert(flag, ",".join(entries))  # the length limit is for all entries together
    else:
        entries = split(name, convert(flag, value), folder)
    return [from_folder(flag, entry, folder) for entry in entries]


def from_folder(flag: Flag, entry: Any, folder: str) -> Any:
    """Resolve a relative path in a file against the file's `folder`; other values stay as they are.

    A path that exists only relative to the current folder is kept, since runs record paths that way; so is a possible
    hub id.
    """
    if not folder or not flag.path or not entry.strip() or REFERENCE.fullmatch(entry):
        return entry
    if "://" in entry or entry == TINY or os.path.isabs(os.path.expanduser(entry)):
        return entry
    there = os.path.join(folder, entry)
    if flag.path == "output" or exists(flag.name, there):
        return there
    return entry if flag.path == "hub" or exists(flag.name, entry) else there


def split(name: str, text: str, folder: str = "") -> list[str]:
    """Split a comma-separated value; commas in URLs and in names of existing files do not separate.

    Args:
        folder: another folder that files may be in.
    """
    parts, entries = text.split(","), []
    while parts:
        count = file_length(name, parts, folder) or address_length(name, parts, folder) or 1
        entries.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return entries


def file_length(name: str, parts: Sequence[str], folder: str) -> int:
    """The largest number of leading parts that together name an existing file; 0 for none."""
    lengths = range(min(len(parts), MAX_COMMAS), 0, -1)
    return next((length for length in lengths if exists(name, ",".join(parts[:length]), folder)), 0)


def address_length(name: str, parts: Sequence[str], folder: str) -> int:
    """The number of leading parts that make up a URL, which ends before the next URL or existing file; 0 for none."""
    if not ADDRESS.match(parts[0]):
        return 0
    for length in range(1, len(parts)):
        ended = name == "keyframes" and KEYFRAME.fullmatch(parts[length - 1].strip())
        if ended or ADDRESS.match(parts[length]) or file_length(name, parts[length:], folder):
            return length
    return len(parts)


def exists(name: str, entry: str, folder: str = "") -> bool:
    """Whether a flag's entry names an existing file or folder, relative to the current folder or to `folder`."""
    entry = entry.strip()
    if name == "lora":
        entry = parse_lora(entry).source
    elif name == "keyframes":
        entry = entry.rpartition("@")[0] if KEYFRAME.fullmatch(entry) else ""
    path = os.path.expanduser(entry)
    return bool(entry) and (os.path.exists(path) or (bool(folder) and os.path.exists(os.path.join(folder, path))))


def convert_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert flags given in Python; raises UserError for unknown flags and wrong values."""
    converted = {}
    for name, value in values.items():
        if name not in BY_NAME:
            raise UserError(f"--{name}", f"there is no such flag; {suggest_flag(name, describe_value(value), BY_NAME)}")
        plain = [*map(str, value)] if isinstance(value, tuple | list) else value
        plain = os.fspath(plain) if isinstance(plain, os.PathLike) else plain
        if plain is not None and plain is not False:
            converted[name] = convert_from_file(name, plain, "")
    return converted


def without_overruled(values: Mapping[str, Any], winners: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that conflict with a flag in `winners`."""
    pairs = (*EXCLUSIVE, *INSTEAD)
    overruled = {pair[1 - side] for pair in pairs for side in (0, 1) if is_set(winners, pair[side])}
    return {name: value for name, value in values.items() if name not in overruled}


def verbosity_of(values: Mapping[str, Any]) -> int:
    """-1 for warnings and the result only, 0 by default, 1 for everything."""
    return int(values.get("verbose", False)) - int(values.get("quiet", False))


# Files of flags


def read_config_file(name: str) -> dict[str, Any]:
    """Read and convert the flags in a YAML file or in a video's metadata."""
    path = Path(os.path.expanduser(name))
    recorded = path.suffix.lower() in RECORDS or (bool(name) and os.path.isdir(path))  # Path.is_dir may raise
    content = read_record(path) if recorded else read_yaml(name)
    if not isinstance(content, Mapping):
        reason = f"{format_value(name)} holds no 'flag: value' lines"
        raise UserError("--config", f"{reason}; write some, such as 'seed: 1'")
    values = {}
    for key, value in content.items():
        try:
            if key not in BY_NAME:
                raise ValueError(unknown_key(key, value))
            values[key] = convert_from_file(key, value, "" if recorded else os.path.dirname(path))
        except (UserError, ValueError) as error:
            raise UserError("--config", f"{format_value(name)}: {error}") from None
    return values


def read_record(path: Path) -> Any:
    """Read the flags in the comment of a video, a frame or a folder of frames; the content is untrusted."""
    from skyreels_v3.media.files import check_readable
    from skyreels_v3.media.video_writer import read_comment

    if not path.is_dir():
        check_readable(path, "--config")
    try:
        flags = json.loads(read_comment(path))["flags"]
        return {name: value for name, value in flags.items() if name not in BY_NAME or BY_NAME[name].recorded}
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{format_value(path)} does not say how it was made"
        raise UserError("--config", f"{reason}; give a video that generate_video.py made, or a YAML file") from error


def read_yaml(name: str) -> Any:
    """Read a user's YAML file."""
    path = Path(os.path.expanduser(name))
    try:
        status = path.stat()
        if not name or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONFIG_BYTES:
            limit = f"a file of at most {MAX_CONFIG_BYTES >> 10} KiB"
            raise UserError("--config", f"{describe_value(name)} is not {limit}; give one")
        return read_yaml_text(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            "--config", f"{format_value(name)} cannot be read ({error.strerror}); check the path"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else format_value(error)
        raise UserError("--config", f"{format_value(name)} is not YAML ({place}); write 'flag: value' lines") from error


def unknown_key(key: Any, value: Any) -> str:
    meant = suggest_flag(describe_value(key), describe_value(value), BY_NAME)
    meant = meant if meant == SEE_HELP else meant.replace(" --", " ")  # keys have no dashes
    return f"unknown key {describe_value(key)}; {meant}"


def check_beside_jobs(values: Mapping[str, Any]) -> None:
    """Raise UserError for an empty --jobs, or for a flag that cannot be combined with it."""
    if not values["jobs"].strip():
        raise UserError("--jobs", "an empty path; give a file")
    for name, value in values.items():
        if value is not False and (remedy := BY_NAME[name].only_in_line):
            shown = "" if value is True else f"{describe_value(value)}: "
            raise UserError(f"--{name}", f"{shown}is for one video, but --jobs makes several; {remedy}")


def is_server(values: Mapping[str, Any]) -> bool:
    """Whether flags ask for a server."""
    return is_set(values, "serve") or is_set(values, "mcp")


def check_beside_serve(values: Mapping[str, Any]) -> None:
    """Raise UserError for a flag that --serve or --mcp does not allow, or that lacks another one it needs."""
    allowed = ("serve", "outdir", "allow_private_urls", "quiet", "verbose", "gpu_num", "use_usp")
    command = "--serve" if is_set(values, "serve") else "--mcp"
    if "files" in values and not is_set(values, "mcp"):
        raise UserError("--files", "is for MCP; add --mcp")
    for name in HTTP_ONLY if command == "--mcp" else ():
        if is_set(values, name):
            raise UserError(f"--{name}", "is for an HTTP server; add --serve")
    together = is_set(values, "use_usp") or values.get("gpu_num", 1) > 1
    if together and "workers" in values:
        raise UserError("--workers", "conflicts with --use_usp, which uses all processes for each video; leave it out")
    for name, value in values.items():
        flag = BY_NAME[name]
        if flag.usp and is_set(values, name) and not together:
            raise UserError(f"--{name}", "is for several processes; add --use_usp")
        one_video = flag.path in ("input", "output") or name in ("prompt", "text") or not (flag.in_line or flag.usp)
        if is_set(values, name) and one_video and not flag.server and name not in allowed:
            shown = "" if value is True else f"{describe_value(value)}: "
            raise UserError(
                f"--{name}", f"{shown}cannot be combined with {command}, whose requests say what to make; leave it out"
            )


def job_flags(line: Mapping[str, Any], defaults: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Convert the flags of a line of --jobs and add those of the command line that do not contradict them.

    Args:
        folder: the folder of the file, which its paths are relative to.

    Raises:
        UserError: an unknown flag, one that is not allowed in a line, or a wrong value.
    """
    for name in line:
        if name == "config" or (name in BY_NAME and not BY_NAME[name].in_line):
            raise UserError(f"--{name}", "is not allowed in a line of --jobs; give it on the command line")
        if name not in BY_NAME:
            raise UserError("--jobs", unknown_key(name, line[name]))
    values = {name: convert_from_file(name, value, folder) for name, value in line.items()}
    return without_overruled(defaults, values) | values
