"""One connection of the HTTP/1.1 client: a request, the answer as it comes, the next request.

A protocol of the event loop on httptools. A kept connection has one timer for all its requests:
setting one for each would take longer than the rest of what happens here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

import httptools

MOST_WAITING: Final = 256 * 1024
"""Bytes of an answer that nobody has read, beyond which the engine has to wait."""

MOST_HEADERS: Final = 65_536
"""Bytes of an answer's headers."""

_PIECE: Final = 256 * 1024


class ConnectTimeout(TimeoutError):
    """There was no connection in time."""


class ReadTimeout(TimeoutError):
    """The peer was silent for too long."""


class BrokenOff(ConnectionError):
    """The peer went away, or what it said is no HTTP."""


class Answer:
    """An answer: status and headers now, its body as it comes.

    Whoever has one reads it to its end or closes it.

    Attributes:
        status: HTTP status.
        headers: In the peer's order; names in lower case.
    """

    __slots__ = ("_connection", "_error", "_is_whole", "_pieces", "_waiter", "headers", "status")

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._pieces: list[bytes] = []
        self._is_whole = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def piece(self) -> bytes:
        """Return what has come since the last call, or wait for it; nothing at the end.

        Raises:
            ReadTimeout: The peer was silent for too long.
            BrokenOff: It went away.
        """
        while not self._pieces:
            if self._is_whole:
                return b""
            if self._error is not None:
                raise self._error
            await self.changed()
        pieces, self._pieces = self._pieces, []
        if self._connection is not None:
            self._connection.taken()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close the connection unless the whole answer has come; harmless when done before."""
        if self._connection is not None:
            self._connection.abort()

    # --- For the connection ----------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether status and headers are there, or will never be."""
        return bool(self.status) or self._error is not None

    async def began(self) -> None:
        """Wait for status and headers.

        Raises:
            ReadTimeout: The peer was silent for too long.
            BrokenOff: It went away, or speaks no HTTP.
        """
        while not self.status:
            if self._error is not None:
                raise self._error
            await self.changed()

    async def changed(self) -> None:
        """Wait until more of it is there, or nothing more will be."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def add(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._pieces.append(piece)

    def finish(self, error: BaseException | None = None) -> None:
        """Take the end, or what broke it off; the connection is no longer its."""
        self._connection, self._error = None, error
        self._is_whole = error is None
        self.wake()

    def wake(self) -> None:
        """Let who waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One connection; it has one request at a time.

    Args:
        loop: The event loop.
        read_timeout_s: How long the peer may be silent while it is asked something.
        ended: Called when a request has ended, and told whether another may come.
        gone: Called once when the connection is lost.

    Attributes:
        idle_since: When the last request ended, by the loop's clock.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        read_timeout_s: float,
        ended: Callable[[Connection, bool], None],
        gone: Callable[[Connection], None],
    ) -> None:
        self._loop, self._read_timeout_s = loop, read_timeout_s
        self._ended, self._gone = ended, gone
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silent_until = 0.0
        self._writable: asyncio.Future[None] | None = None
        self._is_writing = self._is_held = False
        self._waiting_bytes = 0
        self._reset()
        self.idle_since = 0.0

    def _reset(self) -> None:
        """Make ready for an answer's head."""
        self._header_bytes = 0
        self._is_framed = self._is_interim = self._is_over = self._keeps = False

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request and wait for the head of its answer.

        Raises:
            ReadTimeout: The peer was silent for too long.
            BrokenOff: It went away, or speaks no HTTP.
        """
        answer = self._answer = Answer(self)
        self._watch()
        try:
            if self._transport is None:
                raise BrokenOff("the connection is closed")
            if len(body) <= _PIECE:
                self._transport.write(head + body)
            else:
                await self._write(answer, head, body)
            await answer.began()
        except BaseException:
            answer.close()  # not `abort`: if it is whole, another request may be under way here
            raise
        return answer

    async def _write(self, answer: Answer, head: bytes, body: bytes) -> None:
        """Send a long body in pieces, between which others have their turn."""
        self._is_writing = True
        view = memoryview(head + body)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            if answer.has_begun or self._transport is None:  # it wants no more, or is gone
                return
            self._transport.write(piece)
            self._silent_until = self._loop.time() + self._read_timeout_s
            if self._writable is not None:
                await self._writable
            else:
                await asyncio.sleep(0)
        self._is_writing = False

    def abort(self) -> None:
        """Close at once; an answer that is not whole is broken off."""
        if self._transport is not None:
            self._transport.abort()
        self._end(BrokenOff("the connection was closed"))

    def taken(self) -> None:
        """Take note that what had come of the answer was read."""
        self._waiting_bytes = 0
        if self._is_held and self._transport is not None:
            self._is_held = False
            self._silent_until = self._loop.time() + self._read_timeout_s
            self._transport.resume_reading()

    # --- Called by the loop ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to the peer."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is left: an answer without a length is whole now, any other broken off."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()
        answer = self._answer
        if exc is None and answer is not None and answer.status and not self._is_framed:
            self._end()
        else:
            said = "the peer closed the connection" if exc is None else f"{exc}"
            self._end(BrokenOff(said))
        self._gone(self)

    def pause_writing(self) -> None:
        """Send no more until the peer has read."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Go on sending."""
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Read on; what is no HTTP, or was not asked for, ends the connection."""
        self._silent_until = self._loop.time() + self._read_timeout_s
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keeps = False
            if not self._is_over:
                self._end(BrokenOff(f"no HTTP ({type(error).__name__})"))
                self.abort()
                return
        if self._is_over:
            self._complete()
        elif self._answer is not None:
            self._hold_back()
            if self._answer.status:
                self._answer.wake()

    def _complete(self) -> None:
        keeps = self._keeps and not self._is_writing and self.is_open
        self.taken()
        self._reset()
        self.idle_since = self._loop.time()
        self._end(keeps=keeps)
        if not keeps:
            self.abort()

    def _hold_back(self) -> None:
        if self._waiting_bytes > MOST_WAITING and not self._is_held and self._transport is not None:
            self._is_held = True
            self._transport.pause_reading()

    # --- Called by the parser --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Refuse what nobody asked for."""
        if self._answer is None or self._is_over:
            raise BrokenOff("an answer that was not asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MOST_HEADERS:
            raise BrokenOff("its headers are too large")
        known = name.decode("latin-1").lower()
        if known in ("content-length", "transfer-encoding"):
            self._is_framed = True
        assert self._answer is not None  # on_message_begin saw to it
        self._answer.headers.append((known, value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """Keep the status; 1xx only announces an answer."""
        assert self._answer is not None
        status = self._parser.get_status_code()
        self._is_interim = 100 <= status < 200
        if self._is_interim:
            self._answer.headers.clear()
            self._is_framed = False
        else:
            self._answer.status = status

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body over."""
        assert self._answer is not None
        self._answer.add(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        """Take note of the end."""
        if not self._is_interim:
            self._is_over, self._keeps = True, self._parser.should_keep_alive()

    # --- Time ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._silent_until = self._loop.time() + self._read_timeout_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._silent_until, self._look)

    def _look(self) -> None:
        """See if the peer was silent for too long; who is made to wait is not silent."""
        self._timer = None
        if self._answer is None or self._transport is None:
            return
        now = self._loop.time()
        until = now + self._read_timeout_s if self._is_held else self._silent_until
        if now < until:
            self._timer = self._loop.call_at(until, self._look)
            return
        self._end(ReadTimeout(f"nothing came for {self._read_timeout_s:g} s"))
        self.abort()

    def _end(self, error: BaseException | None = None, *, keeps: bool = False) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.finish(error)
            self._ended(self, keeps)
