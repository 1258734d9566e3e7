"""Access to the page: sign-in with a key, and an allowlist of the Gradio routes that the page needs.

A browser sends its key as a cookie that scripts cannot read and other sites cannot make it send.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyreels_v3.web.errors import ApiError, from_status, response_of
from skyreels_v3.web.security import KEY, Guard
from skyreels_v3.web.settings import Settings

COOKIE, SIGN_OUT = "skyreels_key", "/sign_out"
MONTH = 30 * 24 * 3600
MAX_SIGN_IN_BYTES = 4096
MAX_EVENT_BYTES = 4 << 20
BODY_SECONDS = 20
OF_API = re.compile(r"/(v1|docs|openapi\.json|health|metrics)(/|$)")
STATIC = re.compile(r"/(assets|static|svelte)/|/(theme\.css|favicon\.ico)$")
# requested by the page's own scripts
GRADIO = re.compile(
    r"/$|/config$|/gradio_api/(heartbeat/\w+$|file=/|((queue/(join|data)|run/predict|upload|upload_progress|cancel|reset"
    r"|startup-events|info|app_id|theme\.css)/?$))"
)
EVENTS = re.compile(r"/gradio_api/(queue/join|run/predict)/?$")
ADDRESS = re.compile(r"\s*[\w+.-]+:", re.ASCII)
FILE, UPLOAD = "/gradio_api/file=", "/gradio_api/upload"
# Gradio compiles functions from strings, and loads WebAssembly in a worker for clips
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
)
SIGN_IN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SkyReels</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root{{color-scheme:light dark}}
body{{font:16px system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}}
form{{display:grid;gap:12px;width:min(320px,90vw)}}p{{color:#dc2626;margin:0}}
input,button{{font:inherit;padding:10px;border-radius:8px;border:1px solid #888}}
button{{background:#0f766e;color:#fff;border:0;cursor:pointer}}
</style></head><body>
<form method="post" action="/"><h1>SkyReels</h1><label for="key">This server's key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>{problem}
<button>Sign in</button></form>
</body></html>"""


class Drops:
    """The owners of the files in Gradio's folder: a client sees and uses only its own files and the examples.

    Gradio puts each file into a folder named after its content, so several clients may own the same one.

    Args:
        folder: emptied first, since no page knows the files of an earlier server.
    """

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder.resolve()
        self.owners: dict[Path, set[str]] = {}
        self.examples: set[Path] = set()

    def share(self) -> None:
        """Let everyone access the files that are there now."""
        self.examples = {*self.folder.iterdir()}

    def add(self, path: Path, owner: str) -> None:
        self.owners.setdefault(path.resolve().parent, set()).add(owner)

    def allows(self, path: Path, owner: str) -> bool:
        """Whether an owner may access a file."""
        folder = path.resolve().parent
        return folder in self.examples or owner in self.owners.get(folder, ())


def protect(app: FastAPI, settings: Settings, drops: Drops) -> None:
    """Put the access checks in front of the page, which was mounted last."""
    routes = app.router.routes
    mount = routes.pop()
    assert isinstance(mount, Mount)
    routes[:] = [route for route in routes if getattr(route, "path", "") != "/"]  # drops the API's redirect to /docs
    routes.append(PageMount("/", PageAccess(mount.app, settings, drops)))
    app.add_middleware(CookieKey)


class PageMount(Mount):
    """A mount for all paths but the API's, which keep their own errors."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.NONE, {}) if OF_API.match(scope["path"]) else super().matches(scope)


class CookieKey:
    """ASGI middleware before `Guard`: copies the key from a browser's cookie to the header that `Guard` checks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/manifest.json":  # browsers request it without cookies
            await JSONResponse({"name": "SkyReels", "start_url": "/"})(scope, receive, send)
            return
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            key = key_of(headers)
            if key and "authorization" not in headers:
                scope = {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {key}".encode("latin-1"))]}
        await self.app(scope, receive, send)


def key_of(headers: Headers) -> str:
    """The key in a cookie; "" for none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None and KEY.fullmatch(found.value) else ""


class PageAccess:
    """ASGI application: the page for clients with access, a sign-in form for others."""

    def __init__(self, app: ASGIApp, settings: Settings, drops: Drops) -> None:
        self.app, self.drops, self.keys = app, drops, settings.keys
        self.guard = Guard(app, settings, lambda *_: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, paths = scope["path"], bytearray()
        uploaded = False

        async def with_policy(message: Message) -> None:
            nonlocal uploaded
            if uploaded:  # the response is a list of paths
                paths.extend(message["body"])
                if not message.get("more_body"):
                    for dropped in json.loads(paths):
                        self.drops.add(Path(dropped), scope["owner"])
            if message["type"] == "http.response.start":
                uploaded = path.rstrip("/") == UPLOAD and message["status"] == 200
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "same-origin"  # with no-referrer, a form's Origin is null
                if STATIC.match(path):
                    headers["Cache-Control"] = "private, max-age=3600"
            await send(message)

        if path == SIGN_OUT:
            answer = RedirectResponse("/", 303, {"Clear-Site-Data": '"storage"'})  # clears what was typed into forms
            answer.delete_cookie(COOKIE)
            await answer(scope, receive, with_policy)
            return
        if path == "/" and self.keys:
            if scope["method"] == "POST":
                await (await self.sign_in(Request(scope, receive)))(scope, receive, with_policy)
                return
            key = key_of(Headers(scope=scope))
            if not key or not self.is_key(key, scope):
                await HTMLResponse(SIGN_IN.format(problem=""))(scope, receive, with_policy)
                return
        if not self.is_needed(path, scope["owner"]):
            await response_of(from_status(404, ""))(scope, receive, send)
            return
        if EVENTS.match(path):
            try:
                receive = await self.checked(Request(scope, receive))
            except ApiError as error:
                await response_of(error)(scope, receive, send)
                return
        await self.app(scope, receive, with_policy)

    async def checked(self, request: Request) -> Receive:
        """A `receive` that gives Gradio the body of an event after checking it; raises ApiError."""
        body = await read_all(request, MAX_EVENT_BYTES)
        try:
            foreign = names_address(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "the body is not JSON") from error
        if foreign:
            raise ApiError(403, "files are uploaded, not fetched from an address")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await request.receive()

        return receive

    def is_needed(self, path: str, owner: str) -> bool:
        """Whether the page needs a route; of files, only the user's own and the examples."""
        if path.startswith(FILE):
            return self.drops.allows(Path(path.removeprefix(FILE)), owner)
        return bool(STATIC.match(path) or GRADIO.match(path))

    def is_key(self, key: str, scope: Scope) -> bool:
        """Whether a key is one of the server's; raises ApiError after too many wrong ones."""
        try:
            return bool(self.guard.authenticate(Headers({"authorization": f"Bearer {key}"}), client_of(scope)))
        except ApiError as error:
            if error.status == 429:
                raise
            return False

    async def sign_in(self, request: Request) -> Response:
        """Give the browser its cookie if the key is right."""
        try:
            body = await read_all(request, MAX_SIGN_IN_BYTES)
        except ApiError as error:
            return response_of(error)
        key = parse_qs(body.decode("latin-1")).get("key", [""])[0].strip()
        try:
            known = self.is_key(key, request.scope)
        except ApiError as error:
            return response_of(error)
        if not known:
            problem = """<p role="alert">This is not one of the server's keys.</p>"""
            return HTMLResponse(SIGN_IN.format(problem=problem), 401)
        answer = RedirectResponse("/", 303)
        # the same text as in the header, for load balancers: set_cookie would quote a key with "/" or "="
        kind = f"Max-Age={MONTH}; Path=/; HttpOnly; SameSite=strict"
        answer.headers["Set-Cookie"] = f"{COOKIE}={key}; {kind}{'; Secure' * (request.url.scheme == 'https')}"
        return answer


async def read_all(request: Request, most: int) -> bytes:
    """Read a body of up to `most` bytes; raises ApiError if it is larger, too slow or incomplete."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise ApiError(413, "the body is too large")
    except TimeoutError:
        raise ApiError(408, "the body arrives too slowly", headers={"Connection": "close"}) from None
    except ClientDisconnect as error:
        raise ApiError(400, "the body was cut off") from error
    return body


def names_address(value: Any) -> bool:
    """Whether an event of a page names a file by its URL, which Gradio would fetch without any limit."""
    if isinstance(value, list):
        return any(map(names_address, value))
    if not isinstance(value, dict):
        return False
    path = value.get("path")
    return (isinstance(path, str) and ADDRESS.match(path) is not None) or any(map(names_address, value.values()))


def client_of(scope: Scope) -> str:
    return (scope.get("client") or ("", 0))[0]
