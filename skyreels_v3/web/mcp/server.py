"""MCP's transports: stdin and stdout of a process of the agent's own, or HTTP beside the API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

from anyio import CancelScope
from fastapi import FastAPI
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from skyreels_v3.errors import cause_of
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.ranks import SINGLE
from skyreels_v3.web.api import Api
from skyreels_v3.web.errors import ApiError
from skyreels_v3.web.mcp.tools import Tools
from skyreels_v3.web.queue import Queue
from skyreels_v3.web.settings import Limits, Settings
from skyreels_v3.web.supervisor import Supervisor
from skyreels_v3.web.uploads import chunks

logger = logging.getLogger(__name__)

PATH = "/mcp"
POLL_SECONDS = 1.0  # between checks whether another process still serves the folder


# HTTP


def mount_mcp(app: FastAPI) -> None:
    """Serve MCP in the API's application, behind the same guard and with the same limits.

    It is stateless: there are no sessions, as in the protocol's newest version.
    """
    api: Api = app.state.api
    limits = api.settings.limits
    manager = StreamableHTTPSessionManager(
        Tools(api, is_local=False).server(), stateless=True, max_request_body_size=limits.json_bytes
    )
    app.router.routes.append(Route(PATH, Endpoint(manager, limits), include_in_schema=False))
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with before(app), manager.run():
            yield

    app.router.lifespan_context = lifespan


class Endpoint:
    """ASGI application that reads a body within the API's limits of size and time."""

    def __init__(self, manager: StreamableHTTPSessionManager, limits: Limits) -> None:
        self.manager, self.limits = manager, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":  # tells a client that there are no sessions
            raise ApiError(405, "use POST", headers={"Allow": "POST"})
        request = Request(scope, receive)
        try:
            body = b"".join([chunk async for chunk in chunks(request, self.limits.json_bytes, self.limits)])
        except ClientDisconnect as error:
            raise ApiError(400, "the body was cut off") from error
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.manager.handle_request(scope, replay, send)


# stdin and stdout


def serve_stdio(settings: Settings, queue: Queue, supervise: Callable[[], Supervisor]) -> int:
    """Serve one client over stdin and stdout until it closes stdin; returns the exit code.

    Args:
        supervise: makes the workers' supervisor; workers run only while no other process serves the folder.
    """
    asyncio.run(converse(settings, queue, supervise))
    return 0


async def converse(settings: Settings, queue: Queue, supervise: Callable[[], Supervisor]) -> None:
    """See `serve_stdio`. After a signal or a failure this ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in processes.STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    api = Api(settings, queue)
    server = Tools(api, is_local=True).server()
    # inside, stdout goes to stderr, also that of child processes
    async with stdio_server() as (reading, writing):
        talk = asyncio.create_task(server.run(reading, writing, server.create_initialization_options()))
        tasks = (talk, asyncio.create_task(work(queue, supervise)), asyncio.create_task(stop.wait()))
        is_over = False
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            is_over = talk.done() and talk.exception() is None
        finally:
            for task in tasks:
                task.cancel()
            with CancelScope(shield=True):  # if stdout is closed, everything is cancelled
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                await api.planner.close()
            queue.close()
            if not is_over:  # a signal, nobody reads stdout, or a failure
                end_process(next((each for each in outcomes if isinstance(each, Exception)), None))


def end_process(failure: Exception | None) -> NoReturn:
    """End this process at once: the thread that waits for stdin cannot be stopped."""
    if failure is None:
        code = processes.report_exit("interrupted\n", processes.INTERRUPTED, SINGLE, KeyboardInterrupt())
    else:
        logger.error("failed", exc_info=failure)
        code = processes.report_exit(f"error: {cause_of(failure)}\n", 1, SINGLE)
    processes.exit_process(code, at_once=True)


async def work(queue: Queue, supervise: Callable[[], Supervisor]) -> None:
    """Supervise workers until cancelled, once no other process serves the folder."""
    if not queue.take_over():
        logger.info("another process is serving %s, and makes the videos", queue.folder)
    while not queue.take_over():
        await asyncio.sleep(POLL_SECONDS)
    with await run_in_threadpool(supervise):
        await asyncio.Event().wait()
