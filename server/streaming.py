"""Relays an engine's answer to the client: the same bytes, in order, as they arrive."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, TypeVar

from starlette.types import Receive, Send

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
) -> int:
    """Send an engine's answer on.

    If the engine fails on the way, or a server that ends cancels this and `is_cut` says so, an
    event stream ends with an error event; anything else (and a stream cut inside an event) is left
    unfinished, so that the connection breaks and no client takes the part for the whole.

    Returns:
        The status that was sent.
    """
    headers = response_headers(response)
    start = {"type": "http.response.start", "status": response.status, "headers": headers}
    is_stream = any(
        name == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in headers
    )
    tail = b"\n\n"
    await send(start)
    try:
        async with _Patience(idle_timeout_s) as patience:
            async for chunk in response.chunks:
                if chunk:
                    tail = (tail + chunk)[-4:] if len(chunk) < 4 else chunk[-4:]
                    patience.client()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                patience.engine()
    except ClientGone:
        raise
    except (Exception, asyncio.CancelledError) as error:
        failure = _failure(error, is_cut())
        if not (is_stream and tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))):
            return response.status
        await _deliver(send, failure.event(), idle_timeout_s)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return response.status


class _Patience:
    """Waits for engine and client in turn, for so long at a time and up to a tenth longer.

    One timer for a whole answer: one for each of its pieces would take longer than to send it. A
    client that does not read for that long is taken to be gone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._loop = seconds, asyncio.get_running_loop()
        self._until = self._loop.time() + seconds
        self._timeout = asyncio.timeout_at(self._until + seconds / 10)
        self._is_sending = False

    async def __aenter__(self) -> _Patience:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._is_sending:
                raise ClientGone from None
            raise

    def client(self) -> None:
        """Wait for the client from now on."""
        self._is_sending = True
        self._begin()

    def engine(self) -> None:
        """Wait for the engine from now on."""
        self._is_sending = False
        self._begin()

    def _begin(self) -> None:
        until = self._loop.time() + self._seconds
        if until > self._until + self._seconds / 10:
            self._until = until
            self._timeout.reschedule(until + self._seconds / 10)


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
