"""The HTTP API: OpenAI's for videos, and more endpoints. The videos themselves are made by workers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Message, Receive, Scope, Send

from skyreels_v3.errors import UserError, format_value
from skyreels_v3.media.files import is_full
from skyreels_v3.tasks import TASK_NAMES, task_spec
from skyreels_v3.version import __version__
from skyreels_v3.web.docs import docs_page
from skyreels_v3.web.errors import ApiError, from_status, from_user_error, response_of, without_paths
from skyreels_v3.web.fields import FlagReader, files_of, link, published, schema
from skyreels_v3.web.metrics import Metrics
from skyreels_v3.web.pictures import picture_of
from skyreels_v3.web.planning import PlanFailed, Planner
from skyreels_v3.web.queue import FINAL, STATES, Job, Queue, QueueFull, State
from skyreels_v3.web.security import Guard
from skyreels_v3.web.settings import Settings
from skyreels_v3.web.uploads import FORM, JSON, Fields, read_fields
from skyreels_v3.web.views import progress_of, video_of

logger = logging.getLogger(__name__)

ID = re.compile(r"video_[0-9a-f]{32}")
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
POLL = "openai-poll-after-ms"
POLL_MS = {State.QUEUED: "2000", State.IN_PROGRESS: "1000"}
EVENT_SECONDS = 0.5  # between polls of a job
PING_SECONDS = 15
EXTENSIONS = tuple(name for name in TASK_NAMES if task_spec(name).condition_frames)
KINDS = {"video": "video/mp4", "partial": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
GONE = "there is no such file of this video"
ERROR = {"error": {"message": "", "type": "", "param": None, "code": ""}}


def app_of(settings: Settings, queue: Queue) -> FastAPI:
    """The FastAPI application of a server whose jobs are in `queue`."""
    api = Api(settings, queue)
    app = FastAPI(
        title="SkyReels", version=__version__, docs_url=None, redoc_url=None, lifespan=api.lifespan,
        responses={"4XX": {"description": "refused", "content": {JSON: {"example": ERROR}}}},
    )  # fmt: skip
    app.state.api = api  # for the page
    app.add_middleware(Guard, settings=settings, finished=api.metrics.finished)
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(RequestValidationError, answer_error)
    app.add_exception_handler(OSError, answer_error)
    body = {"requestBody": {"required": True, "content": {kind: {"schema": schema()} for kind in (FORM, JSON)}}}
    for path, method, endpoint in (
        ("/v1/videos", "POST", api.create),
        ("/v1/videos/extensions", "POST", api.extend),
        ("/v1/videos/plan", "POST", api.plan),
        ("/v1/videos/{id}/remix", "POST", api.remix),
        ("/v1/videos", "GET", api.list),
        ("/v1/videos/{id}", "GET", api.get),
        ("/v1/videos/{id}", "DELETE", api.delete),
        ("/v1/videos/{id}/cancel", "POST", api.cancel),
        ("/v1/videos/{id}/content", "GET,HEAD", api.content),
        ("/v1/videos/{id}/preview", "GET,HEAD", api.preview),
        ("/v1/videos/{id}/events", "GET", api.events),
        ("/v1/models", "GET", api.models),
        ("/health", "GET,HEAD", api.health),
        ("/metrics", "GET", api.show_metrics),
    ):
        reads = endpoint in (api.create, api.extend, api.plan, api.remix)
        for each in method.split(","):
            app.add_api_route(
                path, endpoint, methods=[each], openapi_extra=body if reads else None,
                operation_id=endpoint.__name__, include_in_schema=each != "HEAD", response_model=None,
            )  # fmt: skip
    app.add_api_route("/docs", lambda: HTMLResponse(docs_page(app.openapi())), include_in_schema=False)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    return app


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler: the error response to an exception."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])
        error = ApiError(400, f"{name}: {first['msg']}", name)
    elif isinstance(error, HTTPException):
        error = from_status(error.status_code, str(error.detail), error.headers)
    elif isinstance(error, OSError):
        if not is_full(error):
            raise error
        error = ApiError(507, "the server's disk is full; try again later")
    assert isinstance(error, ApiError)
    return response_of(error)


class Api:
    """The endpoints. Disk and database access runs in threads."""

    def __init__(self, settings: Settings, queue: Queue) -> None:
        self.settings, self.queue = settings, queue
        self.metrics = Metrics(queue.counts)
        self.planner = Planner(settings.limits.plan_seconds, settings.group)
        self.uploads, self.streams = Counter[str](), Counter[str]()  # by owner

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await self.planner.close()

    # New jobs

    async def create(self, request: Request) -> JSONResponse:
        """Queue a video: OpenAI's fields, and all flags of a line of --jobs."""
        return await self.submit(request)

    async def extend(self, request: Request) -> JSONResponse:
        """Queue a video that continues {id} or a file; with `include_input` (the default) it begins with that video."""
        fields = {"input_video": "video", "duration": "seconds"}
        return await self.submit(request, fields, task_type=EXTENSIONS[-1], include_input=True)

    async def submit(self, request: Request, names: Mapping[str, str] | None = None, **preset: Any) -> JSONResponse:
        owner = owner_of(request)
        async with self.new_folder(owner) as (id, folder):
            reader = self.flag_reader(folder, owner, names)
            with user_errors(reader):
                flags, made = await reader.read(await read_fields(request, folder, self.settings.limits), **preset)
                if names is not None and made.task.name not in EXTENSIONS:
                    raise UserError("--task_type", f"{made.task.name}: choose {' or '.join(EXTENSIONS)}")
            return await self.add(id, flags, owner, reader.parent)

    async def remix(self, id: str, request: Request) -> JSONResponse:
        """Queue a video like a completed one, with another prompt; other flags may change as well."""
        owner = owner_of(request)
        source = await self.find(id, owner)
        if source.state is not State.COMPLETED:
            raise ApiError(409, f"{id} {STATES[source.state]}; remix a completed video", "id")
        return await self.repeat(source, owner, lambda folder: read_fields(request, folder, self.settings.limits))

    async def repeat(self, source: Job, owner: str, read: Callable[[Path], Awaitable[Fields]]) -> JSONResponse:
        """Queue a video with the inputs and flags of `source`, and the changes that `read` returns for its folder."""
        async with self.new_folder(owner) as (id, folder):
            reader = self.flag_reader(folder, owner)
            with user_errors(reader):
                fields = await read(folder)
                for name in files_of(source.flags):
                    await run_in_threadpool(link, source.folder / name, folder / name)
                flags, _ = await reader.read_changes(fields, source)
            return await self.add(id, flags, owner, source.id)

    async def plan(self, request: Request) -> dict[str, Any]:
        """What a request for a video would need: the text of --dry_run, and its numbers. Nothing is queued."""
        owner = owner_of(request)
        async with self.new_folder(owner, keep=False) as (_, folder):
            reader = self.flag_reader(folder, owner)
            with user_errors(reader):
                flags, _ = await reader.read(await read_fields(request, folder, self.settings.limits))
            return {"object": "video.plan", **await self.make_plan(flags, reader)}

    async def make_plan(self, flags: dict[str, Any], reader: FlagReader) -> dict[str, Any]:
        """The plan for flags that `reader` has read; raises ApiError."""
        with user_errors(reader):
            try:
                made = await self.planner.plan(flags, reader.folder)
            except PlanFailed as error:
                raise ApiError(503, f"{without_paths(str(error))}; try again", code="no_plan") from error
        return {**made, "text": without_paths(made["text"].replace(f"{reader.folder}/", ""))}

    def flag_reader(self, folder: Path, owner: str, names: Mapping[str, str] | None = None) -> FlagReader:
        """The reader for an owner's request with files in `folder`."""
        return FlagReader(self.settings, folder, lambda id: self.find(id, owner), dict(names or {}))

    @asynccontextmanager
    async def new_folder(self, owner: str, keep: bool = True) -> AsyncIterator[tuple[str, Path]]:
        """Yield a new id and its folder, which is removed after an error, or always unless `keep`."""
        self.check_share(self.uploads, owner, self.settings.limits.uploads, "requests are being read")
        self.uploads[owner] += 1
        try:
            id, folder = await run_in_threadpool(self.queue.new_id)
            try:
                yield id, folder
            except BaseException:
                keep = False
                raise
            finally:
                if not keep:
                    self.queue.delete(id)  # not awaited: this may be a cancelled task
        finally:
            self.uploads[owner] -= 1

    def check_share(self, counts: Counter[str], owner: str, most: int, what: str) -> None:
        """Raise ApiError if all owners together have `most` open, or one with a key a quarter of that."""
        if counts.total() >= most or (owner and counts[owner] >= max(1, most // 4)):
            raise ApiError(429, f"too many {what}; try again", headers={"Retry-After": "5"})

    async def add(self, id: str, flags: dict[str, Any], owner: str, parent: str) -> JSONResponse:
        """Queue a job."""
        try:
            job = await run_in_threadpool(self.queue.add, id, flags, owner, parent)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "60"}) from error
        logger.info("%s is queued: %s", job.id, job.flags.get("task_type"))
        return await self.answer(job)

    # Jobs

    async def answer(self, job: Job) -> JSONResponse:
        """The response for a job: its Video object, with its place in the queue."""
        headers = {POLL: POLL_MS[job.state]} if job.state in POLL_MS else {}
        video = video_of(job, self.settings)
        if job.state is State.QUEUED:
            video["details"]["place"] = await run_in_threadpool(self.queue.place, job.id)
        return JSONResponse(video, headers=headers)

    async def find(self, id: str, owner: str, param: str = "id") -> Job:
        """An owner's job by its id; raises an ApiError that names `param` if there is none."""
        job = await run_in_threadpool(self.queue.get, id) if ID.fullmatch(id) else None
        if job is None or job.owner != owner:
            raise ApiError(404, f"there is no video {format_value(id)}", param)
        return job

    async def list(
        self,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> JSONResponse:
        """Your videos, those behind `after`, newest first unless `order` is asc."""
        owner = owner_of(request)
        if after is not None:
            await self.find(after, owner, "after")
        newest = order == "desc"
        jobs, more = await run_in_threadpool(self.queue.list, owner, (), after, limit, newest)
        data = [video_of(job, self.settings) for job in jobs]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})

    async def get(self, id: str, request: Request) -> JSONResponse:
        """A video; the header openai-poll-after-ms says when to ask again."""
        return await self.answer(await self.find(id, owner_of(request)))

    async def delete(self, id: str, request: Request) -> dict[str, Any]:
        """Delete a video and its files; if it is being made, it is cancelled first."""
        await self.find(id, owner_of(request))
        deleted = await run_in_threadpool(self.queue.delete, id)
        if not deleted:
            raise ApiError(404, f"there is no video {id}", "id")
        return {"id": id, "object": "video.deleted", "deleted": True}

    async def cancel(self, id: str, request: Request) -> JSONResponse:
        """Cancel a video that is queued or being made; one that has ended does not change."""
        await self.find(id, owner_of(request))
        job = await run_in_threadpool(self.queue.cancel, id)
        if job is None:
            raise ApiError(404, f"there is no video {id}", "id")
        return await self.answer(job)

    # Files

    async def content(
        self, id: str, request: Request, variant: Literal["video", "partial", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        """The bytes of a completed video or a picture of it; `partial`: of the frames finished before its job ended."""
        job = await self.find(id, owner_of(request))
        if variant == "partial":
            return await send_file(job.partial, KINDS[variant], request, f"{id}-partial.mp4")
        if job.state is not State.COMPLETED:
            hint = "variant=partial has what was finished" if job.partial.exists() else "it has no video"
            hint = hint if job.state in FINAL else "its content is available once it is completed"
            raise ApiError(409, f"{id} {STATES[job.state]}; {hint}", "id", "not_ready")
        path = job.video
        if variant != "video":
            try:
                path = await run_in_threadpool(picture_of, job.video, variant)
            except (FileNotFoundError, RuntimeError) as error:  # it was deleted meanwhile
                raise ApiError(404, f"there is no {variant} of this video", "variant") from error
        return await send_file(path, KINDS[variant], request, f"{id}{path.suffix}")

    async def preview(self, id: str, request: Request, number: int = 0) -> Response:
        """The latest preview of a video that is being made; `number` only keeps caches from returning an older one."""
        job = await self.find(id, owner_of(request))
        try:  # read at once: the next preview may replace it
            return Response(await run_in_threadpool(job.preview.read_bytes), media_type="image/png")
        except OSError:
            raise ApiError(404, GONE, "variant") from None

    # Events

    async def events(self, id: str, request: Request) -> EventSourceResponse:
        """Server-sent events: `progress`, `preview` with a URL, and `end` with the video."""
        owner = owner_of(request)
        await self.find(id, owner)
        self.check_share(self.streams, owner, self.settings.limits.streams, "event streams are open")
        return EventSourceResponse(self.follow(id, owner), ping=PING_SECONDS)

    async def follow(self, id: str, owner: str) -> AsyncIterator[ServerSentEvent]:
        """Yield a job's events until it ends or is deleted."""
        self.streams[owner] += 1
        try:
            shown: Any = None
            preview = 0
            while True:
                try:
                    job = await self.find(id, owner)
                except ApiError:
                    yield event("end", {"id": id, "object": "video.deleted", "deleted": True})
                    return
                if job.state in FINAL:
                    yield event("end", video_of(job, self.settings))
                    return
                video = video_of(job, self.settings)
                now = {"id": id, "status": video["status"], "progress": video["progress"], **progress_of(job)}
                if now != shown:
                    yield event("progress", now)
                    shown = now
                if job.progress.preview > preview:
                    preview = job.progress.preview
                    yield event("preview", {"id": id, "number": preview, "url": now["preview"]})
                await asyncio.sleep(EVENT_SECONDS)
        finally:
            self.streams[owner] -= 1

    # The server

    async def models(self) -> dict[str, Any]:
        """The models that `model` may name, the default first."""
        tasks = {
            name: [task for task in TASK_NAMES if name in published(task_spec(task))] for name in self.settings.models
        }
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "skyreels", "tasks": tasks[name] or [*TASK_NAMES]}
            for name in self.settings.models
        ]
        return {"object": "list", "data": data}

    async def health(self) -> dict[str, str]:
        """Whether the server responds and can reach its queue."""
        await run_in_threadpool(self.queue.counts)
        return {"status": "ok", "version": __version__}

    async def show_metrics(self) -> Response:
        """Metrics for Prometheus."""
        text = await run_in_threadpool(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def owner_of(request: Request) -> str:
    """The owner of a request, set by `Guard`."""
    return request.scope["owner"]


@contextmanager
def user_errors(reader: FlagReader) -> Iterator[None]:
    """Turn a UserError into an ApiError that names the field as the client did."""
    try:
        yield
    except UserError as error:
        cleaned = UserError(error.flag, error.message.replace(f"{reader.folder}/", ""))
        raise from_user_error(cleaned, reader.fields) from error


def event(name: str, content: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content), event=name)


class SentFile(FileResponse):
    """A file that may be deleted before it is sent, so headers are held back until its first bytes are read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting: list[Message] = []

        async def send_later(message: Message) -> None:
            waiting.append(message)
            if message["type"] != "http.response.start":
                for each in waiting:
                    await send(each)
                waiting.clear()

        try:
            await super().__call__(scope, receive, send_later)
        except FileNotFoundError:
            logger.info("%s was deleted before it could be sent", Path(self.path).name)
            await response_of(ApiError(404, GONE, "variant"))(scope, receive, send)


async def send_file(path: Path, kind: str, request: Request, name: str) -> Response:
    """The response with a file or the requested range of it, or 304 if the client has it; raises ApiError."""
    try:
        status = await run_in_threadpool(path.stat)
    except OSError:
        raise ApiError(404, GONE, "variant") from None
    made = SentFile(path, media_type=kind, filename=name, stat_result=status, content_disposition_type="inline")
    if StaticFiles(check_dir=False).is_not_modified(made.headers, request.headers):
        return NotModifiedResponse(made.headers)
    if (asked := request.headers.get("range")) is None:
        return made
    unit, version = asked.partition("=")[0].strip().lower(), request.headers.get("if-range")
    if unit != "bytes" or version not in (None, made.headers["etag"], made.headers["last-modified"]):
        # ignored: the range is in another unit, or of another version of the file
        request.scope["headers"] = [(key, value) for key, value in request.scope["headers"] if key != b"range"]
    elif not is_satisfiable(asked, status.st_size):
        raise ApiError(
            416,
            "Range is not a single byte range within the file",
            headers={"Content-Range": f"bytes */{status.st_size}"},
        )
    return made


def is_satisfiable(asked: str, size: int) -> bool:
    """Whether a Range header names exactly one range within a file of `size` bytes."""
    found = RANGE.fullmatch(asked.strip())
    if found is None or not any(found.groups()):
        return False
    start, end = found.groups()
    if not start:
        return int(end) > 0 and size > 0
    return int(start) < size and (not end or int(start) <= int(end))
