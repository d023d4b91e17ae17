"""Relays an engine's answer to the client: the same bytes, in order, as they arrive."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from starlette.types import Receive, Send

from server.deadline import Deadline
from server.engines.base import EngineResponse
from server.errors import (
    ApiError,
    ClientGone,
    Headers,
    content_refused,
    log_failure,
    send_error,
    server_ends,
    to_api_error,
)

T = TypeVar("T")

RESPONSE_HEADERS: Final = frozenset(
    {"content-type", "content-length", "cache-control", "retry-after", "x-request-id"}
)
_UNPRINTABLE: Final = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
_MAX_ERROR_BYTES: Final = 65_536
_TELLING: Final = (b"embed", b"lora")


def response_headers(response: EngineResponse) -> Headers:
    """Return the engine's headers that a client may see."""
    encoded = any(name.lower() == "content-encoding" for name, _ in response.headers)
    return [
        (name.lower().encode(), value.encode("latin-1"))
        for name, value in response.headers
        if name.lower() in RESPONSE_HEADERS
        and not _UNPRINTABLE.search(value)
        and not (encoded and name.lower() == "content-length")
    ]


async def relay(
    response: EngineResponse,
    send: Send,
    idle_timeout_s: float,
    is_cut: Callable[[], bool] = lambda: False,
    deadline: Deadline | None = None,
) -> int:
    """Send an engine's answer on.

    If the engine fails on the way, or a server that ends cancels this and `is_cut` says so, an
    event stream ends with an error event; anything else (and a stream cut inside an event) is left
    unfinished, so that the connection breaks and no client takes the part for the whole.

    Args:
        response: The answer.
        send: The ASGI callable.
        idle_timeout_s: For engine and client, each time; a client that does not read for that
            long is taken to be gone.
        is_cut: Says whether the server ends.
        deadline: The request's own, to be used again.

    Returns:
        The status that was sent.
    """
    pieces = _Pieces(response, send, idle_timeout_s, deadline or Deadline())
    await pieces.begin()
    try:
        await pieces.relay()
    except ClientGone:
        raise
    except (Exception, asyncio.CancelledError) as error:
        failure = _failure(error, is_cut())
        if not pieces.can_be_told:
            return response.status
        await _deliver(send, failure.event(), idle_timeout_s)
    finally:
        if deadline is None:
            pieces.deadline.close()
    await pieces.end()
    return response.status


class _Pieces:
    """An answer on its way to the client.

    Attributes:
        deadline: Limits each wait, for the engine and for the client.
    """

    def __init__(
        self, response: EngineResponse, send: Send, timeout_s: float, deadline: Deadline
    ) -> None:
        self._response, self._send, self._timeout_s = response, send, timeout_s
        self.deadline = deadline
        self._headers = response_headers(response)
        kind = dict(self._headers).get(b"content-type", b"")
        self._is_stream = kind.startswith(b"text/event-stream")
        self._tail = b"\n\n"

    @property
    def can_be_told(self) -> bool:
        """Whether an event can follow: of an event stream that is not within another one."""
        between = self._tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        return self._is_stream and between

    async def begin(self) -> None:
        """Send the head."""
        status, headers = self._response.status, self._headers
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def relay(self) -> None:
        """Send each piece as it comes."""
        is_sending = False
        try:
            with self.deadline.within(self._timeout_s):
                async for chunk in self._response.chunks:
                    if chunk:
                        is_sending = True
                        await self._piece(chunk)
                        is_sending = False
                    self.deadline.within(self._timeout_s)
        except TimeoutError:
            if is_sending:
                raise ClientGone from None
            raise

    async def _piece(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-4:] if len(chunk) < 4 else chunk[-4:]
        self.deadline.within(self._timeout_s)
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        """Send the end."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _failure(error: BaseException, is_cut: bool) -> ApiError:
    """Say what a client is told whose answer ends early."""
    if isinstance(error, asyncio.CancelledError):
        if not is_cut:
            raise error
        return server_ends()
    log_failure("the engine failed in the middle of an answer", error)
    return to_api_error(error)


async def _deliver(send: Send, chunk: bytes, timeout_s: float) -> None:
    """Send a piece; a client that does not read for that long is taken to be gone."""
    try:
        async with asyncio.timeout(timeout_s):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except TimeoutError:
        raise ClientGone from None


async def relay_refusal(response: EngineResponse, send: Send, timeout_s: float) -> int:
    """Send an error status of the engine on, for a request whose content was replaced.

    The engine's words must not tell what the guard did, so an error about embeddings or adapters
    becomes ours.

    Returns:
        The status that was sent.
    """
    body = b""
    async with asyncio.timeout(timeout_s):
        async for chunk in response.chunks:
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    told = any(word in body.lower() for word in _TELLING)
    if told or len(body) > _MAX_ERROR_BYTES:
        error: ApiError = content_refused()
        await send_error(send, error)
        return error.status
    headers = [line for line in response_headers(response) if line[0] != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return response.status


async def until_gone(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    finished: Callable[[], bool],
    watchers: set[Callable[[], object]] | None = None,
) -> T:
    """Do `work`, but cancel it as soon as the client leaves.

    Args:
        receive: The ASGI callable; the request's body must have been read.
        work: Answers the request.
        finished: True once the whole answer was sent; then a client may leave.
        watchers: Those that the connection calls when it is lost, if it does: then no further
            tasks are needed.

    Raises:
        ClientGone: If the client left first.
    """
    if watchers is not None:
        return await _until_lost(work, finished, watchers)
    task = asyncio.create_task(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() or finished():
            return await task
        raise ClientGone
    finally:
        watcher.cancel()
        await _ended(task)


async def _until_lost(
    work: Coroutine[Any, Any, T],
    finished: Callable[[], bool],
    watchers: set[Callable[[], object]],
) -> T:
    """Do `work` in this task, which is cancelled if the connection is lost meanwhile."""
    task = asyncio.current_task()
    assert task is not None  # called in a coroutine
    gone = False

    def lost() -> None:
        nonlocal gone
        if not finished():
            gone = True
            task.cancel()

    watchers.add(lost)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watchers.discard(lost)


async def _ended(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
