"""Relays an engine's answer to the client: the same bytes, in order, as they arrive."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
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


async def relay(response: EngineResponse, send: Send, idle_timeout_s: float) -> int:
    """Send an engine's answer on.

    If the engine fails on the way, an event stream ends with an error event; anything else (and a
    stream cut inside an event) is left unfinished, so that the connection breaks and no client
    takes the part for the whole.

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
        chunks = aiter(response.chunks)
        while True:
            try:
                async with asyncio.timeout(idle_timeout_s):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            if chunk:
                tail = (tail + chunk)[-4:]
                await _deliver(send, chunk, idle_timeout_s)
    except ClientGone:
        raise
    except Exception as error:
        log_failure("the engine failed in the middle of an answer", error)
        if not (is_stream and tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))):
            return response.status
        await _deliver(send, to_api_error(error).event(), idle_timeout_s)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return response.status


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
    receive: Receive, work: Coroutine[Any, Any, T], finished: Callable[[], bool]
) -> T:
    """Do `work`, but cancel it as soon as the client leaves.

    Args:
        receive: The ASGI callable; the request's body must have been read.
        work: Answers the request.
        finished: True once the whole answer was sent; then a client may leave.

    Raises:
        ClientGone: If the client left first.
    """
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


async def _ended(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
