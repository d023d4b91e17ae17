"""Limits that a client meets before the guard: keys, body size and time, workers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from starlette.types import Receive, Scope, Send

from server.deadline import Deadline
from server.errors import ApiError, ApiErrorRaised, ClientGone, overloaded, send_error

P = ParamSpec("P")
R = TypeVar("R")

_HEADERS = "unlearn_guard.headers"
_JSON = "application/json"
NICER = 10
"""Steps of priority that threads which give way are below the event loop."""

LINGER_BYTES = 128 * 1024 * 1024
LINGER_S = 10.0


def header(scope: Scope, name: bytes) -> str | None:
    """Return a request header, or None; several of one name are joined by a comma."""
    lines, known = scope.get(_HEADERS, (None, {}))
    if lines is not scope["headers"]:
        lines, known = scope["headers"], {}
        for key, value in lines:
            known[key] = known[key] + b", " + value if key in known else value
        scope[_HEADERS] = lines, known
    found = known.get(name)
    return None if found is None else found.decode("latin-1")


class BearerKeys:
    """Bearer tokens that are accepted, compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str | None) -> bool:
        """Return True if the Authorization header carries one of the keys."""
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode()).digest()
        # Compare with all, so that the time tells nothing about which one matched.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def check(self, scope: Scope) -> None:
        """Raise the 401 if there are keys and the request carries none of them."""
        if self._digests and not self.accept(header(scope, b"authorization")):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            challenge = (("www-authenticate", "Bearer"),)
            error = ApiError(401, message, code="invalid_api_key", headers=challenge)
            raise ApiErrorRaised(error)


def check_content_type(scope: Scope) -> None:
    """Raise the 415 unless the body says that it is plain JSON."""
    if not _is_json(header(scope, b"content-type") or ""):
        message = "the body must be sent as 'Content-Type: application/json', in UTF-8"
        raise ApiErrorRaised(ApiError(415, message, code="unsupported_media_type"))
    if (header(scope, b"content-encoding") or "identity").lower() != "identity":
        message = "compressed bodies are not accepted; leave Content-Encoding out"
        raise ApiErrorRaised(ApiError(415, message, code="unsupported_media_type"))


def _is_json(content_type: str) -> bool:
    if content_type == _JSON:
        return True
    media, *params = [part.strip().lower() for part in content_type.split(";")]
    charset = [param for param in params if param.startswith("charset")]
    return media == _JSON and all("utf-8" in param for param in charset)


async def read_body(
    scope: Scope,
    receive: Receive,
    max_bytes: int,
    timeout_s: float,
    deadline: Deadline | None = None,
) -> bytes:
    """Read a request's body, never more than `max_bytes` of it.

    Args:
        scope: The request's.
        receive: The ASGI callable.
        max_bytes: Longest body.
        timeout_s: For all of it to arrive.
        deadline: The request's own, to be used again.

    Raises:
        ApiErrorRaised: 413 above the limit, 408 when it takes too long.
        ClientGone: If the client left meanwhile.
    """
    declared = header(scope, b"content-length") or "0"
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > max_bytes:
        raise ApiErrorRaised(_too_large(max_bytes))
    limit = deadline or Deadline()
    try:
        with limit.within(timeout_s):
            return await _body(receive, max_bytes)
    except TimeoutError:
        text = f"the body did not arrive within {timeout_s:g} s; send it faster"
        error = ApiError(408, text, code="request_timeout", close=True)
        raise ApiErrorRaised(error) from None
    finally:
        if deadline is None:
            limit.close()


async def _body(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise ApiErrorRaised(_too_large(max_bytes))
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(max_bytes: int) -> ApiError:
    message = f"the body is too large: at most {max_bytes} bytes are accepted"
    return ApiError(413, message, code="request_too_large", close=True)


async def send_and_linger(send: Send, receive: Receive, error: ApiError) -> None:
    """Answer at once, then read on for a while and throw it away before closing.

    Closing while a client still sends would reset the connection, and the client would lose the
    answer.
    """
    await send_error(send, error, finish=False)
    try:
        async with asyncio.timeout(LINGER_S):
            left = LINGER_BYTES
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Workers:
    """Threads for the guard's work, with a bounded queue in front.

    Args:
        count: Threads.
        max_waiting: Calls that may wait; a further one is refused at once.
        names: Prefix of the threads' names.
        yielding: Let other threads on the same core go first: a running stream can't wait for the
            milliseconds that a decision takes.
    """

    def __init__(
        self, count: int, max_waiting: int, names: str = "guard", *, yielding: bool = False
    ) -> None:
        first = _give_way if yielding else None
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=names, initializer=first)
        self._limit = count + max_waiting
        self._count = count
        self._calls = 0

    @property
    def waiting(self) -> int:
        """Calls that wait for a thread."""
        return max(0, self._calls - self._count)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in a thread.

        A call whose caller was cancelled keeps its thread until it returns, and keeps counting.

        Raises:
            ApiErrorRaised: 503, if too many calls wait already.
        """
        if self._calls >= self._limit:
            raise ApiErrorRaised(overloaded())
        self._calls += 1
        job = self._pool.submit(function, *args, **kwargs)
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            # After a shutdown the loop may be gone; then nobody counts any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._finish)

        job.add_done_callback(done)
        return await asyncio.wrap_future(job)

    def _finish(self) -> None:
        self._calls -= 1

    def close(self) -> None:
        """Take no more calls; those that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    """Lower this thread's priority, where threads have one of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(nice + NICER, 19))


def pick_headers(scope: Scope, names: Iterable[bytes]) -> dict[str, str]:
    """Return the request's headers that are on a list."""
    found = {name.decode(): header(scope, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
