"""What agents can use through MCP: the tools, and the resources that these make.

The tools mirror the HTTP API: they read the same flags and use the same queue.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import mcp_types as types
from mcp import MCPError
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from starlette.concurrency import run_in_threadpool

from skyreels_v3.checkpoints import hub
from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import family_of, repositories_of
from skyreels_v3.forms import initial_request, initial_values
from skyreels_v3.media.files import is_full
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec
from skyreels_v3.version import __version__
from skyreels_v3.web.api import EVENT_SECONDS, Api, user_errors
from skyreels_v3.web.errors import ApiError, from_user_error, text_of
from skyreels_v3.web.fields import published
from skyreels_v3.web.mcp.arguments import LISTED, TOOLS, WAIT_SECONDS, ToolReader, input_kinds, read_arguments, schema
from skyreels_v3.web.mcp.resources import (
    CLIP,
    CONTENTS,
    FRAMES,
    LAST,
    PARTIAL,
    PREVIEW,
    URI,
    file_of,
    read_base64,
    uri_of,
)
from skyreels_v3.web.queue import FINAL, Job, State
from skyreels_v3.web.views import video_of

logger = logging.getLogger(__name__)

INSTRUCTIONS = (
    "Makes videos with the SkyReels models: from a prompt, from pictures, continuing a clip, or of a portrait that "
    "speaks. Call generate, which queues a video and returns its id; then call get until its status is completed, "
    "failed or cancelled. A completed one comes with a picture of its frames: look at it. A video takes seconds to "
    "hours: plan says what it would take, and models says which checkpoints are on this machine."
)
PAGE = 20  # resources per page of a list
PROGRESS = ("stage", "window", "windows", "step", "steps", "seconds_left")
DEFAULTS = ("resolution", "width", "height", "num_frames", "num_inference_steps", "fps")

Context = ServerRequestContext[Any, Any]
Report = Callable[[Job], Awaitable[None]]


class Tools:
    """The tools and resources of a server.

    Args:
        is_local: the client runs on this machine for the same user, so it is told the paths of files.
    """

    def __init__(self, api: Api, is_local: bool) -> None:
        self.api, self.is_local = api, is_local
        self.calls = {
            **{"generate": self.generate, "plan": self.plan, "get": self.get, "cancel": self.cancel},
            **{"list": self.list_videos, "models": self.list_models},
        }
        self.listed = [
            types.Tool(
                name=tool.name, title=tool.title, annotations=tool.hints, input_schema=schema(tool, api.settings),
                description=tool.description.format(inputs=input_kinds(api.settings.files)),
            )
            for tool in TOOLS.values()
        ]  # fmt: skip

    def server(self) -> Server[Any]:
        """An MCP server with these tools and resources."""
        return Server(
            "skyreels", title="SkyReels", version=__version__, instructions=INSTRUCTIONS,
            on_list_tools=self.list_tools, on_call_tool=self.call_tool, on_list_resources=self.list_resources,
            on_list_resource_templates=self.list_templates, on_read_resource=self.read_resource,
        )  # fmt: skip

    # The protocol

    async def list_tools(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=self.listed)

    async def call_tool(self, ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        if params.name not in TOOLS:
            raise MCPError(types.INVALID_PARAMS, f"there is no tool {format_value(params.name)}")
        values = {name: value for name, value in (params.arguments or {}).items() if value is not None}
        told = -1.0

        async def report(job: Job) -> None:
            nonlocal told
            if job.progress.part > told:  # the protocol requires it to increase
                told = job.progress.part
                await ctx.session.report_progress(100 * told, 100, job.progress.stage or job.state.value)

        try:
            return await self.calls[params.name](values, owner_of(ctx), report)
        except ApiError as error:
            text = text_of(error)
        except UserError as error:
            text = text_of(from_user_error(error, {}))
        except Exception as error:
            logger.exception("%s failed", params.name)
            text = "the disk is full; try again later" if is_full(error) else "the server has failed; its log says why"
        return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)

    async def list_resources(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        """The completed videos, the newest first."""
        owner, after = owner_of(ctx), params.cursor if params is not None else None
        with protocol_errors():
            if after is not None:
                await self.api.find(after, owner, "cursor")
        jobs, more = await run_in_threadpool(self.api.queue.list, owner, (State.COMPLETED,), after, PAGE)
        kind = CONTENTS[CLIP].kind
        resources = [
            types.Resource(name=job.id, uri=uri_of(job.id, CLIP), mime_type=kind, description=job.flags.get("prompt"))
            for job in jobs
        ]
        return types.ListResourcesResult(resources=resources, next_cursor=jobs[-1].id if more else None)

    async def list_templates(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        templates = [
            types.ResourceTemplate(
                name=name, uri_template=uri_of("{id}", name), mime_type=each.kind, description=each.title
            )
            for name, each in CONTENTS.items()
        ]
        return types.ListResourceTemplatesResult(resource_templates=templates)

    async def read_resource(self, ctx: Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        named = URI.fullmatch(params.uri)
        with protocol_errors():
            if named is None:
                raise ApiError(404, f"{format_value(params.uri)} is not {uri_of('ID', 'NAME')}", "uri")
            id, name = named.groups()
            job = await self.api.find(id, owner_of(ctx))
            blob = await run_in_threadpool(lambda: read_base64(file_of(job, name)))
        contents = types.BlobResourceContents(uri=params.uri, mime_type=CONTENTS[name].kind, blob=blob)
        return types.ReadResourceResult(contents=[contents])

    # The tools; all raise ApiError and UserError

    async def generate(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        async with self.api.new_folder(owner) as (id, folder):
            reader = self.reader(folder, owner)
            with user_errors(reader):
                flags, _ = await reader.read(values)
            await self.api.add(id, flags, owner, reader.parent)
        return result(await self.describe(await self.api.find(id, owner)))

    async def plan(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        async with self.api.new_folder(owner, keep=False) as (_, folder):
            reader = self.reader(folder, owner)
            with user_errors(reader):
                flags, _ = await reader.read(values)
            made = await self.api.make_plan(flags, reader)
        return types.CallToolResult(content=[types.TextContent(text=made["text"])])

    def reader(self, folder: Path, owner: str) -> ToolReader:
        return ToolReader(self.api.settings, folder, lambda id: self.api.find(id, owner))

    async def get(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        given = read_arguments(TOOLS["get"], values)
        job = await self.wait(given["id"], owner, given.get("wait", WAIT_SECONDS), report)
        content: list[types.ContentBlock] = []
        picture = FRAMES if job.state is State.COMPLETED else PREVIEW
        if given.get("picture", picture == FRAMES):
            with suppress(ApiError, OSError):  # there is none, or no room to make it
                data = await run_in_threadpool(lambda: read_base64(file_of(job, picture)))
                content.append(types.ImageContent(data=data, mime_type=CONTENTS[picture].kind))
        for name in (CLIP, PARTIAL):
            with suppress(ApiError, OSError):
                size, each = (await run_in_threadpool(file_of, job, name)).stat().st_size, CONTENTS[name]
                link = types.ResourceLink(name=name, uri=uri_of(job.id, name), mime_type=each.kind, size=size)
                content.append(link)
        return result(await self.describe(job), *content)

    async def wait(self, id: str, owner: str, seconds: float, report: Report) -> Job:
        """A job, once it has ended or `seconds` have passed."""
        streams, end = self.api.streams, monotonic() + seconds
        self.api.check_share(streams, owner, self.api.settings.limits.streams, "calls are waiting")
        streams[owner] += 1
        try:
            while (job := await self.api.find(id, owner)).state not in FINAL and monotonic() < end:
                await report(job)
                await asyncio.sleep(min(EVENT_SECONDS, max(0.0, end - monotonic())))
            return job
        finally:
            streams[owner] -= 1

    async def cancel(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        job = await self.api.find(read_arguments(TOOLS["cancel"], values)["id"], owner)
        await run_in_threadpool(self.api.queue.cancel, job.id)
        return result(await self.describe(await self.api.find(job.id, owner)))

    async def list_videos(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        given = read_arguments(TOOLS["list"], values)
        if (after := given.get("after")) is not None:
            await self.api.find(after, owner, "after")
        states = (State(given["status"]),) if "status" in given else ()
        jobs, more = await run_in_threadpool(self.api.queue.list, owner, states, after, given.get("limit", LISTED))
        return result({"videos": [await self.describe(job) for job in jobs], "has_more": more})

    async def list_models(self, values: dict[str, Any], owner: str, report: Report) -> types.CallToolResult:
        read_arguments(TOOLS["models"], values)
        return result({"tasks": [await run_in_threadpool(self.describe_task, name) for name in TASK_NAMES]})

    # Results

    async def describe(self, job: Job) -> dict[str, Any]:
        """The facts about a job, without empty ones."""
        video = video_of(job, self.api.settings)
        details, error = video["details"], video["error"] or {}
        facts = {
            **{"id": job.id, "status": job.state.value, "task_type": details["task_type"], "model": video["model"]},
            **{"prompt": video["prompt"], "seed": details["seed"], "size": video["size"]},
            **{"seconds": float(video["seconds"]) or None, "made_from": job.parent, "error": error.get("message")},
        }
        if job.state is State.QUEUED:
            facts["videos_before"] = await run_in_threadpool(self.api.queue.place, job.id)
        elif job.state is State.IN_PROGRESS:
            facts |= {"progress_percent": video["progress"], "cancelling": job.cancelling or None}
            facts |= {name: details["progress"][name] or None for name in PROGRESS}
        elif job.state is State.COMPLETED:
            made = job.facts or {}
            facts |= {"num_frames": made.get("frames"), "fps": made.get("fps"), "took_seconds": made.get("seconds")}
            facts |= {"quality": made.get("quality"), "video": uri_of(job.id, CLIP), "frames": uri_of(job.id, FRAMES)}
            facts |= {"last_frame": uri_of(job.id, LAST)}
            facts |= {"path": str(job.video)} if self.is_local else {"download": f"/v1/videos/{job.id}/content"}
        return {name: value for name, value in facts.items() if value not in (None, "")}

    def describe_task(self, name: str) -> dict[str, Any]:
        """A task: what it takes, and its models."""
        spec, settings = task_spec(name), self.api.settings
        _, request = initial_request(name, settings.defaults)
        values = initial_values(name, settings.defaults)
        length = {"default": spec.default_duration, "min": spec.min_duration, "max": spec.max_duration}
        return {
            **{"task_type": name, "makes": spec.summary, "needs": ["prompt", *spec.inputs]},
            **{"duration": length if spec.max_duration else "that of the sound", "fps": request.task.fps},
            "defaults": {each: values[each] for each in DEFAULTS if values[each] not in ("", None)},
            "models": [
                {"model": settings.model_name(model), **checkpoint_state(replace(request, model_id=model))}
                for model in dict.fromkeys((request.model_id, *published(spec), TINY))
            ],
        }


def owner_of(ctx: Context) -> str:
    """The owner of a request, set by `Guard`; "" on stdin and stdout, which have one client."""
    return "" if ctx.request is None else ctx.request.scope["owner"]


def result(facts: dict[str, Any], *content: types.ContentBlock) -> types.CallToolResult:
    """Facts as text: given structured content, some clients show a model nothing else, not even pictures."""
    text = types.TextContent(text=json.dumps(facts, ensure_ascii=False))
    return types.CallToolResult(content=[text, *content])


@contextmanager
def protocol_errors() -> Iterator[None]:
    """Turn an ApiError into a protocol error, where no tool's result can report it."""
    try:
        yield
    except ApiError as error:
        raise MCPError(types.INVALID_PARAMS, text_of(error)) from error


# Checkpoints


def checkpoint_state(request: GenerationRequest) -> dict[str, Any]:
    """Whether a request's checkpoint is on this machine, or what would be downloaded, without contacting a hub."""
    missing = [] if request.model_id == TINY else missing_repositories(request)
    if not missing:
        return {"on_this_machine": True}
    sizes = family_of(request.task).published_bytes(request.task)
    total = sum(sizes[name] for repository in missing for name in repository.components)
    names = [hub.model_id_of(request, repository) for repository in missing]
    return {"on_this_machine": False, "to_download": names, "about_gigabytes": round(total / 1e9, 1)}


def missing_repositories(request: GenerationRequest) -> list[Repository]:
    """The repositories that are missing from this machine, or incomplete."""
    missing, first = list[Repository](), None
    for repository in repositories_of(request):
        try:
            folder = hub.locate(request, repository, first)
            if folder is None and (folder := hub.cached(request, hub.model_id_of(request, repository))) is not None:
                repository.check(folder, repository.flag)
        except UserError:  # files are missing
            folder = None
        first = first or folder
        missing += [repository] if folder is None else []
    return missing
