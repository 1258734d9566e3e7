"""The tools and their arguments: a video's come from the table of flags; others are checked in the same way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mcp_types as types
from starlette.concurrency import run_in_threadpool

from skyreels_v3.cli import convert
from skyreels_v3.errors import FLAG, UserError, format_value
from skyreels_v3.forms import SHOWN, initial_values, limits_of
from skyreels_v3.media.files import is_full, is_url, reason_of
from skyreels_v3.request import COMMAND_ONLY, FLAGS, SHORTHANDS, Flag
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.web.api import ID
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.fields import OWN, FlagReader, link, schema_of
from skyreels_v3.web.mcp.files import Outside, copy_below
from skyreels_v3.web.mcp.resources import CLIP, LAST, URI, file_of
from skyreels_v3.web.queue import State
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.uploads import IMAGES, Upload, max_bytes

WAIT_SECONDS, MAX_WAIT = 20, 300
LISTED, MAX_LISTED = 10, 100
FETCHED = re.compile(r"\s*(https?://|data:)", re.IGNORECASE)
# arguments of a video, without shorthands and flags that only the server sets
VIDEO = tuple(flag for flag in FLAGS if flag.name not in (*OWN, *SHORTHANDS, *COMMAND_ONLY, "model_id"))
INPUT = "an http(s) URL, a data URL, {files}or the id of a video made here (for a picture: its last frame)"
FILES = "a path below the server's folder of files, "


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        description: may contain {inputs}, which stands for the kinds of inputs.
        flags: its arguments.
        hints: what a client should know before it calls the tool.
    """

    name: str
    title: str
    description: str
    flags: tuple[Flag, ...]
    required: tuple[str, ...]
    hints: types.ToolAnnotations


READS = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)
ID_FLAG = Flag("id", "id of the video, video_...")
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "generate", "Make a video",
            "Queue a video; returns its id at once. Give only what should differ from the defaults. An input file is "
            "{inputs}.",
            VIDEO, ("task_type", "prompt"),
            types.ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=True),
        ),
        Tool(
            "plan", "Plan a video",
            "What generate would do with the same arguments, without doing it: whether they are valid, the size, the "
            "frames and steps, what would be downloaded, the memory, and the time if this machine's speed is known.",
            VIDEO, ("task_type", "prompt"), types.ToolAnnotations(read_only_hint=True, open_world_hint=True),
        ),
        Tool(
            "get", "Get a video",
            "Status, progress, error or result of a video; waits for its end, but not forever. A completed one comes "
            "with a link to the mp4 and a picture of its frames.",
            (
                ID_FLAG,
                Flag("wait", f"seconds to wait for its end; default {WAIT_SECONDS}", float, low=0, high=MAX_WAIT),
                Flag("picture", "add a picture: frames of a completed video, row by row, or the newest preview of one "
                    "that is being made; default: only for a completed one", bool),
            ),
            ("id",), READS,
        ),
        Tool(
            "cancel", "Cancel a video",
            "Stop a video that is queued or being made. One that has ended is left unchanged.",
            (ID_FLAG,), ("id",),
            types.ToolAnnotations(read_only_hint=False, idempotent_hint=True, open_world_hint=False),
        ),
        Tool(
            "list", "List videos",
            "Your videos, newest first.",
            (
                Flag("status", "only such videos", choices=tuple(state.value for state in State)),
                Flag("limit", f"how many; default {LISTED}", int, low=1, high=MAX_LISTED),
                Flag("after", "id of a video: only older ones"),
            ),
            (), READS,
        ),
        Tool(
            "models", "List tasks and models",
            "What each task makes, needs and does by default, and its models, the default first: which are on this "
            "machine, and what would be downloaded for the others.",
            (), (), READS,
        ),
    )
}  # fmt: skip


def read_arguments(tool: Tool, values: Mapping[str, Any]) -> dict[str, Any]:
    """The converted arguments of a tool that is not about a new video; raises UserError."""
    flags = {flag.name: flag for flag in tool.flags}
    for name in filter(lambda name: name not in values, tool.required):
        raise UserError(f"--{name}", f"missing; give the {flags[name].help}")
    for name in filter(lambda name: name not in flags, values):
        raise UserError(f"--{format_value(name)}", f"{tool.name} does not take it; leave it out")
    return {name: convert(flags[name], value) for name, value in values.items()}


@dataclass
class ToolReader(FlagReader):
    """Reads the arguments of a new video. Inputs may also be files in the folder of --files, and earlier videos."""

    wanted: ClassVar[str] = "give a string: a URL, a path or an id"
    otherwise: ClassVar[str] = "give another address"
    names: ClassVar[str] = "see the tool's schema"

    async def take(self, flag: Flag, value: Any, stem: str) -> str:
        if isinstance(value, str) and not FETCHED.match(value):
            name = value.strip()
            made = URI.fullmatch(name) or ID.fullmatch(name)
            value = await (
                self.take_made(flag, made, stem) if made else run_in_threadpool(self.take_file, flag, name, stem)
            )
        return await super().take(flag, value, stem)

    async def take_made(self, flag: Flag, named: re.Match[str], stem: str) -> Upload:
        """Take the named content of an earlier video, or its last frame where a picture is needed."""
        id, content = named.groups() or (named[0], CLIP)
        if content == CLIP and flag.name in IMAGES:
            content = LAST
        job = await self.find(id)
        path = await run_in_threadpool(file_of, job, content)
        upload = Upload(self.folder / f"made-{stem}", f"{id}{path.suffix}")
        await run_in_threadpool(link, path, upload.path)
        self.parent = id
        return upload

    def take_file(self, flag: Flag, name: str, stem: str) -> Upload:
        """Take a copy of a file in the folder of --files; raises ApiError."""
        files, upload = self.settings.files, Upload(self.folder / f"file-{stem}", Path(name).name)
        try:
            if files is None or not name or is_url(name):
                reason = "" if files else " (the server reads no files: it was started without a folder for them)"
                problem = f"is not {input_kinds(files)}{reason}"
            else:
                copy_below(files, name, self.settings.folder.resolve(), upload.path, max_bytes(flag.name))
                return upload
        except Outside:
            problem = "is not below the server's folder of files; give a path in it, without .."
        except (OSError, ValueError) as error:  # ValueError: a NUL character
            if is_full(error):
                raise
            problem = f"cannot be read ({reason_of(error)}); check the path"
        raise ApiError(400, f"{flag.name}: {format_value(name) if name else 'an empty value'} {problem}", flag.name)


# Descriptions


def schema(tool: Tool, settings: Settings) -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    properties: dict[str, Any] = {}
    for flag in tool.flags:
        kind = schema_of(flag)
        properties[flag.name] = {
            "description": describe(flag, settings) if tool.flags is VIDEO else flag.help,
            **({"type": "array", "items": kind} if flag.several else kind),
        }
    if tool.flags is VIDEO:
        models = {"type": "string", "enum": [*settings.models]}
        properties["model"] = {"description": "default: the first one that models lists for the task", **models}
    return {"type": "object", "properties": properties, "required": [*tool.required], "additionalProperties": False}


def describe(flag: Flag, settings: Settings) -> str:
    """What a flag does, the tasks that take it, and their defaults and limits."""
    tasks = [task_spec(name) for name in TASK_NAMES if flag.is_for(task_spec(name))]
    if flag.name == "task_type":
        return "; ".join(f"{task.name}: {task.summary}; needs {', '.join(('prompt', *task.inputs))}" for task in tasks)
    ways: dict[str, list[str]] = {}
    for task in tasks:
        value, limits = initial_values(task.name, settings.defaults)[flag.name], limits_of(flag, task)
        way = [] if value in ("", None, False) else [f"default {value}"]
        way += [f"{limits[0]} to {limits[1]}"] if limits != (flag.low, flag.high) else []
        ways.setdefault(", ".join(way), []).append(task.name)
    parts = [FLAG.sub(r"\1", SHOWN.sub("", flag.help))]
    if len(ways) > 1:
        parts += [f"{', '.join(names)}: {way}" for way, names in ways.items() if way]
    else:
        parts += filter(None, ways)
        parts += [f"only for {', '.join(*ways.values())}"] if len(tasks) < len(TASK_NAMES) else []
    form = (flag.metavar or "").removesuffix("[,...]")
    return "; ".join([*parts, *([f"as {form}"] if re.search("[@:;]", form) else [])])


def input_kinds(files: Path | None) -> str:
    """What an input may be, for descriptions and errors."""
    return INPUT.format(files="" if files is None else FILES)
