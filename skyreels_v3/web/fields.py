"""Converts a request's fields, under OpenAI's names or ours, into a job's flags, as in a line of --jobs.

The table of flags in request.py defines them; the command line's checks validate them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from starlette.concurrency import run_in_threadpool

from skyreels_v3.checkpoints.hub import HUB_FILE, refuse_other_tasks
from skyreels_v3.checks import describe_value, parse_lora, request_of
from skyreels_v3.cli import convert_from_file, job_flags, split, unknown_key, without_overruled
from skyreels_v3.config_text import read_json_text
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import pipeline_of
from skyreels_v3.hints import SEE_HELP
from skyreels_v3.inputs import open_inputs
from skyreels_v3.media.download import download_async
from skyreels_v3.request import ALIKE, BY_NAME, FLAGS, INPUTS, Flag, GenerationRequest, ResolvedRequest
from skyreels_v3.runtime import check_compute, check_device
from skyreels_v3.tasks import TASK_NAMES, TaskSpec, task_spec
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.queue import STATES, Job
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.uploads import Fields, Upload, check_kind, decode_data_url, max_bytes

NAMES = {"model": "model_id", "seconds": "duration", "video": "input_video"}  # OpenAI's names for flags
EXTRA = ("extra_body", "extra_json")  # fields that hold more fields
REFERENCE = "input_reference"
LINKS = ("image_url", "url", "video_url", "audio_url")  # keys of an object given for a file
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
KEYFRAME_FIELD = re.compile(r"keyframes@([\d.]+)")
SWITCH = {"true": True, "false": False, "1": True, "0": False}  # in a form
OWN = tuple(flag.name for flag in FLAGS if not flag.is_for_clients)  # only the server sets them

FindJob = Callable[[str], Awaitable[Job]]  # finds a client's own job by its id; raises ApiError


@dataclass
class FlagReader:
    """Converts the fields of one request into flags.

    Attributes:
        folder: the job's folder, in which input files get their names.
        find: finds a job of this client.
        fields: the field names that the client used, by flag.
        parent: id of the job whose video was named as an input.
    """

    wanted: ClassVar[str] = "send the file itself, or an http or https address"
    otherwise: ClassVar[str] = "send the file itself"  # after a URL could not be fetched
    names: ClassVar[str] = "see /docs"  # for an unknown field that resembles none

    settings: Settings
    folder: Path
    find: FindJob
    fields: dict[str, str] = field(default_factory=dict)
    parent: str = ""

    async def read(self, given: Fields, **preset: Any) -> tuple[dict[str, Any], GenerationRequest]:
        """Read a new job: its flags, including the server's defaults, and the request made of them.

        Args:
            preset: values of flags that the client does not give.

        Raises:
            UserError, ApiError: the first problem.
        """
        values = self.rename(merge_extra(given))
        self.place_reference(values)
        for name, value in preset.items():
            values.setdefault(name, value)
        values.setdefault("task_type", self.settings.defaults.get("task_type") or guess_task(values))
        for name in INPUTS:
            if name in values:
                values[name] = await self.take_inputs(BY_NAME[name], values[name])
        return await self.check(values, self.settings.defaults)

    async def read_changes(self, given: Fields, job: Job) -> tuple[dict[str, Any], GenerationRequest]:
        """Read changes to another job's flags, and return the same; its input files must already be in the folder.

        Raises:
            UserError, ApiError: the first problem.
        """
        values = self.rename(merge_extra(given))
        for name in filter(values.__contains__, (REFERENCE, *INPUTS)):
            raise UserError(f"--{name}", "a remix has the first video's inputs; leave it out, or make a new video")
        if "prompt" not in values:
            raise UserError("--prompt", "missing; say what the new video shows")
        self.parent = job.id
        return await self.check(values, job.flags)

    async def check(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> tuple[dict[str, Any], GenerationRequest]:
        """The converted flags on top of `defaults`, and the request made of them; raises UserError."""
        converted = {name: convert_from_file(name, as_switch(name, value), "") for name, value in values.items()}
        flags = without_overruled(defaults, converted) | converted
        request = request_of(job_flags(flags, {}, str(self.folder)))
        check_device(request.device)
        check_compute(request)
        await run_in_threadpool(self.check_inputs, request)
        return flags | {"seed": request.seed}, request  # records a seed that was drawn

    def check_inputs(self, request: GenerationRequest) -> None:
        """Raise UserError now for what would otherwise fail when the job runs, perhaps hours later."""
        refuse_other_tasks(request)
        opened, inputs = open_inputs(request, self.folder)
        pipeline_of(request.task).check_inputs(ResolvedRequest.of(opened, output=self.folder / "video.mp4"), inputs)

    def rename(self, given: Fields) -> Fields:
        """Checked fields under the names of their flags, without those that are null."""
        values: Fields = {}
        for key, value in given.items():
            name = NAMES.get(key, key)
            if match := KEYFRAME_FIELD.fullmatch(key):
                name, value = "keyframes", [*values.get("keyframes", []), {"file": value, "seconds": match[1]}]
            elif name in values:
                raise ApiError(400, f"{key}: is given as {self.fields[name]} as well; give one of them", key)
            if value is not None:
                self.fields[name], values[name] = key, value
        self.check_size(values)
        self.check_names(values)
        self.check_models(values)
        return values

    def check_size(self, values: Fields) -> None:
        """Replace `size` with width and height."""
        if (size := values.pop("size", None)) is None:
            return
        sides = SIZE.fullmatch(size) if isinstance(size, str) else None
        if sides is None:
            raise UserError("--size", f"{describe_value(size)}: give WIDTHxHEIGHT in pixels, such as 1280x720")
        for name, side in zip(("width", "height"), sides.groups(), strict=True):
            if name in values:
                raise UserError("--size", f"conflicts with {name}; give one of them")
            self.fields[name], values[name] = "size", int(side)

    def check_names(self, values: Fields) -> None:
        """Refuse fields that are not flags or that clients may not set."""
        for name, value in values.items():
            if name in OWN or name == "config":
                raise UserError(f"--{name}", "is set by the server; leave it out")
            if name not in BY_NAME and name != REFERENCE:
                meant = unknown_key(name, value).replace(SEE_HELP, self.names)
                raise ApiError(400, meant, self.fields[name], "unknown_parameter")
            if name not in (*INPUTS, REFERENCE) and isinstance(value, Upload):
                raise UserError(f"--{name}", "was sent as a file; send a plain value")

    def check_models(self, values: Fields) -> None:
        """Replace the name of a model that is served with its --model_id; refuse LoRAs that are not hub ids."""
        if "model_id" in values:
            name = values["model_id"]
            if not isinstance(name, str) or name not in self.settings.models:
                message = (
                    f"model: {describe_value(name)} is not served; choose one of {', '.join(self.settings.models)}"
                )
                raise ApiError(400, message, self.fields["model_id"], "model_not_found")
            values["model_id"] = self.settings.models[name]
        entries = values.get("lora", [])
        for entry in [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else []:
            for source in (parse_lora(part.strip()).source for part in str(entry).split(",")):
                if not HUB_FILE.fullmatch(source) or os.path.exists(source):
                    raise UserError("--lora", f"{format_value(source)} is not a hub id; give OWNER/NAME")

    def place_reference(self, values: Fields) -> None:
        """Move `input_reference` to the task's flag for a picture."""
        if (reference := values.pop(REFERENCE, None)) is None:
            return
        name = "image"
        task = values.get("task_type") or task_of_model(values.get("model_id"))
        if isinstance(task, str) and task in TASK_NAMES:
            name = next((other for other in ALIKE[0] if BY_NAME[other].is_for(task_spec(task))), name)
        if name in values:
            raise UserError(f"--{REFERENCE}", f"conflicts with {name}; give one of them")
        self.fields[name], values[name] = REFERENCE, reference

    # Files

    async def take_inputs(self, flag: Flag, value: Any) -> Any:
        """Take the inputs that a client gives for a flag; returns their file names in the job's folder."""
        if not flag.several:
            return await self.take(flag, value, flag.name)
        entries = [value] if not isinstance(value, list) else value
        if isinstance(value, str) and value[:5].lower() != "data:":  # a data URL contains a comma
            entries = split(flag.name, value, "")
        taken = []
        for number, entry in enumerate(entries[: self.settings.limits.parts], start=1):
            time = ""
            if flag.name == "keyframes":
                entry, time = part_keyframe(entry)
            taken.append(await self.take(flag, entry, f"{flag.name}-{number}") + time)
        return taken

    async def take(self, flag: Flag, value: Any, stem: str) -> str:
        """Take one input, which is an upload, a URL or another job's video; returns its name in the job's folder."""
        name = f"--{flag.name}"
        if isinstance(value, dict):
            if isinstance(value.get("id"), str):
                return await self.take_video(value["id"], stem)
            value = next((value[key] for key in LINKS if key in value), value.get("file"))
            if isinstance(value, dict) and "url" in value:
                value = value["url"]
        param = self.fields.get(flag.name, flag.name)
        if isinstance(value, str) and value[:5].lower() == "data:":
            value = await run_in_threadpool(decode_data_url, value, self.folder, param, self.settings.limits)
        if isinstance(value, Upload):
            upload, status = value, 415
        elif isinstance(value, str) and re.match(r"https?://", value.strip(), re.IGNORECASE):
            upload, status = await self.fetch(value.strip(), name, max_bytes(flag.name)), 400
        else:
            shown = format_value(value) if isinstance(value, str | int | float) else "this"
            raise UserError(name, f"{shown} is not a file; {self.wanted}")
        if upload.path.stat().st_size > (most := max_bytes(flag.name)):
            raise ApiError(413, f"{param}: larger than {most >> 20} MiB; send a smaller file", param)
        try:
            await run_in_threadpool(check_kind, flag.name, upload.path, upload.name)
        except UserError as error:
            raise ApiError(status, f"{param}: {error.message}", param) from error
        return upload.path.rename(self.folder / f"{stem}{upload.suffix}").name

    async def fetch(self, url: str, name: str, most: int) -> Upload:
        """Download an input, under the command line's rules."""
        seconds = self.settings.defaults.get("url_timeout", GenerationRequest.url_timeout)
        private = self.settings.allow_private_urls
        try:
            path = await download_async(url, name, self.folder, seconds, most, False, private)
        except UserError as error:  # its advice is for users of the command line
            raise UserError(name, f"{error.message.partition('; ')[0]}; {self.otherwise}") from error
        return Upload(path, path.name)

    async def take_video(self, id: str, stem: str) -> str:
        """Link the video of another of this client's jobs into the folder; returns its name there."""
        job = await self.find(id)
        if not job.video.is_file():
            raise ApiError(409, f"{job.id} {STATES[job.state]}: it has no video", "video")
        self.parent = job.id
        name = f"{stem}.mp4"
        await run_in_threadpool(link, job.video, self.folder / name)
        return name


def merge_extra(given: Fields) -> Fields:
    """Fields merged with those inside `extra_body` and `extra_json`, which hold a JSON object or its text."""
    merged = {name: value for name, value in given.items() if name not in EXTRA}
    for name in EXTRA:
        more = given.get(name)
        if isinstance(more, str):
            with suppress(ValueError, RecursionError):
                more = read_json_text(more)
        if more is None:
            continue
        if not isinstance(more, dict):
            raise UserError(f"--{name}", "is not a JSON object; give one, with flags as keys")
        merged |= more
    return merged


def guess_task(values: Mapping[str, Any]) -> str:
    """The task that the inputs suggest; if the model is published only for other tasks, the first of those."""
    guess = next((task for name, task in TASKS.items() if name in values), "t2v")
    model = values.get("model_id")
    owned = [spec.name for spec in map(task_spec, TASK_NAMES) if model in published(spec)]
    return guess if guess in owned or not owned else owned[0]


# the first input that is given decides
TASKS = {
    "input_audio": "talking_avatar",
    "input_image": "talking_avatar",
    "ref_imgs": "reference_to_video",
    "input_video": "single_shot_extension",
    "image": "i2v",
}


def task_of_model(model: Any) -> str | None:
    """The first task of a published model; None for other models."""
    return next((spec.name for spec in map(task_spec, TASK_NAMES) if model in published(spec)), None)


def published(spec: TaskSpec) -> tuple[str, ...]:
    return (spec.model_id, *spec.also_published_as)


def as_switch(name: str, value: Any) -> Any:
    """A field's value; for a boolean flag, the text in a form is converted."""
    flag = BY_NAME.get(name)
    is_switch = flag is not None and flag.kind is bool and isinstance(value, str)
    return SWITCH.get(value.lower(), value) if is_switch else value


def part_keyframe(entry: Any) -> tuple[Any, str]:
    """A keyframe's picture, and its time as "@SECONDS"."""
    if isinstance(entry, dict):
        return {key: value for key, value in entry.items() if key != "seconds"}, f"@{entry.get('seconds', '')}"
    image, mark, seconds = entry.rpartition("@") if isinstance(entry, str) else (entry, "", "")
    if not mark:
        raise UserError(
            "--keyframes", "a picture without a time; give it as URL@SECONDS, or as the field keyframes@SECONDS"
        )
    return image, f"@{seconds}"


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is not possible."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def files_of(flags: Mapping[str, Any]) -> list[str]:
    """The names of a job's input files in its folder, from its flags."""
    names: list[str] = []
    for name in filter(flags.__contains__, INPUTS):
        entries = flags[name] if isinstance(flags[name], list | tuple) else [flags[name]]
        names += [str(entry).rpartition("@")[0] if name == "keyframes" else str(entry) for entry in entries]
    return names


def schema_of(flag: Flag) -> dict[str, Any]:
    """The JSON schema of a flag's value, or of one entry if the flag takes several."""
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    entry: dict[str, Any] = {"type": kinds[flag.kind]}
    entry |= {"enum": list(flag.choices)} if flag.choices else {}
    return entry | ({"minimum": flag.low, "maximum": flag.high} if abs(flag.low) != float("inf") else {})


def schema() -> dict[str, Any]:
    """The JSON schema of a request's fields, for the OpenAPI description."""
    properties: dict[str, Any] = {
        "model": {"type": "string", "description": "one of GET /v1/models"},
        "seconds": {"type": "string", "description": BY_NAME["duration"].help},
        "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels"},
        REFERENCE: {"type": "string", "format": "binary", "description": "a picture: a file, or {image_url}"},
    }
    for flag in FLAGS:
        if flag.name in (*OWN, "model_id"):
            continue
        entry = {"description": flag.help, **schema_of(flag)}
        entry |= {"format": "binary"} if flag.name in INPUTS else {}
        properties[flag.name] = {"type": "array", "items": entry} if flag.several else entry
    return json.loads(json.dumps({"type": "object", "properties": properties, "required": ["prompt"]}))
