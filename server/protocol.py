"""Uvicorn's HTTP protocol with limits on headers, and errors in OpenAI's format.

Uvicorn itself waits for ever for a first request's headers, and takes any amount of them. Each
request carries the times of its beginning, so that waiting is measured from the socket on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import ApiError

RECEIVED_AT: Final = "unlearn_guard.received_at"
"""In a scope's state: when the request's first byte was read (`time.perf_counter`)."""
ACCEPTED_AT: Final = "unlearn_guard.accepted_at"
"""In the state of a connection's first request: when the connection was accepted."""

WATCHERS: Final = "unlearn_guard.watchers"
"""In a scope's state: a set of functions that are called when the connection is lost."""

_MOST_KEPT: Final = 65_536


class _HeadersTooLarge(Exception):
    """More header bytes than are accepted."""


class LimitedProtocol(HttpToolsProtocol):
    """One client connection."""

    header_timeout_s: ClassVar[float] = 20.0
    max_header_bytes: ClassVar[int] = 65_536

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes = 0
        self._accepted_at: float | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._has_begun = False  # a request, whose headers are not complete
        self._watchers: set[Callable[[], object]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]
        self._accepted_at = time.perf_counter()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, and tell those who watch."""
        self._disarm()
        super().connection_lost(exc)
        if self.scope is not None:  # who asks from now on is told by `receive` instead
            self.scope["state"].pop(WATCHERS, None)
        for watcher in tuple(self._watchers):
            watcher()

    def data_received(self, data: bytes) -> None:
        """Read on; start the clock for headers that did not come at once."""
        super().data_received(data)
        if self._has_begun and self._header_timer is None:
            self._arm()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        state = self.scope["state"]
        state[RECEIVED_AT] = time.perf_counter()
        state[WATCHERS] = self._watchers
        if self._accepted_at is not None:
            state[ACCEPTED_AT], self._accepted_at = self._accepted_at, None
        self._header_bytes = 0
        self._has_begun = True
        self._disarm()

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock."""
        self._has_begun = False
        self._disarm()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in OpenAI's format, and close."""
        error = ApiError(400, "this is not valid HTTP", code="bad_request", close=True)
        if self._header_bytes > self.max_header_bytes:
            text = f"the headers are too large: at most {self.max_header_bytes} bytes are accepted"
            error = ApiError(431, text, code="headers_too_large", close=True)
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or cycle.response_complete:
            self.transport.write(_raw(error))
        self.transport.close()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.max_header_bytes:
            raise _HeadersTooLarge

    def _arm(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._late)

    def _disarm(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class _Joined:
    """A transport that writes an answer's head together with what follows it at once.

    Each write is a system call, which takes as long as a tenth of all that the proxy does.
    """

    __slots__ = ("_kept", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._kept = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, but keep a head, and what comes after it, until the loop's next turn."""
        if self._kept:
            self._kept += data
            if len(self._kept) > _MOST_KEPT:
                self._flush()
        elif data.startswith(b"HTTP/1.1 "):
            self._kept = data
            self._loop.call_soon(self._flush)
        elif data:
            self._transport.write(data)

    def close(self) -> None:
        """Write what is kept, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._kept:
            data, self._kept = self._kept, b""
            self._transport.write(data)


def _raw(error: ApiError) -> bytes:
    body = error.body()
    lines = [b": ".join(line) for line in error.header_lines(len(body))]
    return b"\r\n".join([b"HTTP/1.1 %d Error" % error.status, *lines, b"", body])
