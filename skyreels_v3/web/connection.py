"""uvicorn's HTTP connection with a time limit for request headers; uvicorn limits only the time between requests."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # to receive all headers


class Connection(H11Protocol):
    """A connection that closes if a client sends its headers too slowly, or none at all."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_timer()
        super().connection_lost(exc)

    def watch_head(self) -> None:
        """Start the timer with the connection, later with a request's first byte; stop it after the last header."""
        if self.conn.their_state is not h11.IDLE:
            self.end_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def end_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
