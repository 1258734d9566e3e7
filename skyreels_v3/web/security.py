"""Checks before every request: keys, hosts and origins, rate limits; and security headers on every response.

A web page in a browser on this machine could send requests here through a name that resolves to 127.0.0.1 (DNS
rebinding), or from another site. So Host must be an address or a name of this server, and Origin, if sent, the same.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyreels_v3.web.errors import ApiError, response_of
from skyreels_v3.web.settings import Settings

logger = logging.getLogger(__name__)

OPEN = ("/", "/docs", "/openapi.json", "/health")  # paths that need no key
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
}
BY_POST = ("/gradio_api/", "/mcp")  # their clients also read by POST, so the limit on posts does not apply
SCHEMES = ("http", "https")  # https: behind a proxy that terminates TLS
MINUTE = 60.0
MAX_BUCKETS = 10_000
KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # valid unquoted in a header and a cookie (RFC 6750)
WRONG_KEY = "this server needs a key: send it as 'Authorization: Bearer KEY'"


class Buckets:
    """A token bucket per client: allows `per_minute` requests per minute, and as many at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self.filled: dict[str, tuple[float, float]] = {}  # requests left, and when that was counted

    def take(self, client: str) -> float:
        """Count a request; returns 0 if it is allowed, otherwise the seconds until one is."""
        now = self.clock()
        if len(self.filled) > MAX_BUCKETS:  # buckets that were idle for a minute are full again
            self.filled = {name: entry for name, entry in self.filled.items() if now - entry[1] < MINUTE}
        left, before = self.filled.get(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - before) * self.per_minute / MINUTE)
        allowed = left >= 1
        self.filled[client] = (left - allowed, now)
        return 0.0 if allowed else (1 - left) * MINUTE / self.per_minute


def owner_of(key: str) -> str:
    """The owner id of a key, a hash, which is stored with its jobs."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


class Guard:
    """ASGI middleware that checks a request before anything reads it, and sets `scope["owner"]` to its owner.

    Args:
        finished: called with method, route, status and seconds of each request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, finished: Callable[[str, str, int, float], None]) -> None:
        self.app, self.settings, self.finished = app, settings, finished
        self.owners = [(hashlib.sha256(key.encode()).digest(), owner_of(key)) for key in settings.keys]
        self.requests, self.posts = Buckets(settings.limits.requests), Buckets(settings.limits.posts)
        self.names = {"localhost", *(name.lower() for name in (settings.host, *settings.allowed_hosts))}
        if not is_loopback(settings.host):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        start, status = time.monotonic(), 0

        async def secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                scope["owner"] = self.check(scope)
            except ApiError as error:
                await response_of(error)(scope, receive, secured)
            else:
                await self.app(scope, receive, secured)
        except Exception:
            logger.exception("%s failed", route_of(scope))
            if status:  # the response has already started
                raise
            await response_of(ApiError(500, "the server has failed; its log says why"))(scope, receive, secured)
        finally:
            self.finished(scope["method"], route_of(scope), status, time.monotonic() - start)

    def check(self, scope: Scope) -> str:
        """The owner of a request, "" where no key is needed; raises ApiError if it is refused."""
        headers = Headers(scope=scope)
        self.check_host(headers)
        client = (scope.get("client") or ("", 0))[0]
        owner = self.authenticate(headers, client) if scope["path"] not in OPEN else ""
        is_post = scope["method"] == "POST" and not scope["path"].startswith(BY_POST)
        buckets = [self.requests, *([self.posts] if is_post else [])]
        if wait := max(bucket.take(owner or client) for bucket in buckets):
            raise too_many(wait)
        return owner

    def check_host(self, headers: Headers) -> None:
        """Refuse host names that are not this server's, and requests from pages of other sites."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or not self.is_own(hosts[0]):
            raise ApiError(403, "Host is not a name of this server; use its address, or a name in --allowed_hosts")
        if origin is not None and origin.lower() not in [f"{scheme}://{hosts[0].lower()}" for scheme in SCHEMES]:
            raise ApiError(403, "Origin is another site; only this server's own pages may call it")
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            raise ApiError(403, "pages of other sites may not call this server")

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server. IP addresses are safe: DNS cannot rebind them."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            _ = urlsplit(f"//{host}").port  # raises ValueError
        except ValueError:
            return False
        if name in self.names:
            return True
        address = address_of(name)
        return address is not None and (address.is_loopback or not is_loopback(self.settings.host))

    def authenticate(self, headers: Headers, client: str) -> str:
        """The owner of the key that was sent, compared in constant time; raises ApiError for a wrong key."""
        if not self.owners:
            return ""
        sent = headers.getlist("authorization")
        kind, _, key = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [owner for expected, owner in self.owners if hmac.compare_digest(expected, digest)]
        if found and kind.lower() == "bearer":
            return found[0]
        if wait := self.posts.take(f"no key, {client}"):  # slows down guessing
            raise too_many(wait)
        raise ApiError(401, WRONG_KEY, headers={"WWW-Authenticate": "Bearer"})


def too_many(wait: float) -> ApiError:
    return ApiError(429, "too many requests; wait a moment", headers={"Retry-After": str(int(wait) + 1)})


def route_of(scope: Scope) -> str:
    """The path pattern of the matched route, as a label; never text from a client."""
    return getattr(scope.get("route"), "path", "other")


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    address = address_of(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)
