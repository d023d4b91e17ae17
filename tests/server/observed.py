"""A small application that uses keys and observer as the proxy does, behind the real protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from guard.request import ENDPOINTS
from server.errors import ClientGone, log_failure, send_error, to_api_error
from server.keys import KeyRing
from server.limits import Workers, read_body
from server.metrics import Metrics
from server.observe import Observer
from server.streaming import until_gone
from server.tracing import Tracing
from tests.server.proxy_fakes import WordGuard, running

MAX_BODY = 100_000


class ObservedApp:
    """Decides on every POST, waits for `gate`, and answers with 10 bytes in two pieces.

    Attributes:
        lets_errors_out: Errors are left to uvicorn.
        upstream_headers: What each request would have sent on.
    """

    def __init__(self, keys: KeyRing, tracing: Tracing | None = None) -> None:
        self.keys = keys
        self.metrics = Metrics(lambda: 0)
        self.observer = Observer(self.metrics, tracing)
        self.guard = WordGuard()
        self.workers = Workers(1, 16)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.lets_errors_out = False
        self.upstream_headers: list[dict[str, str]] = []

    def open_gate(self) -> None:
        """Let requests end; for another thread to call."""
        self._loop.call_soon_threadsafe(self.gate.set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._loop = asyncio.get_running_loop()
            await _live(receive, send)
            return
        endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
        observation = self.observer.begin(endpoint, scope)
        status = 499

        async def seen(message: Message) -> None:
            observation.sent(message)
            await send(message)

        async def answer(body: bytes) -> int:
            with observation.stage("decide"):
                inspection = await self.workers.run(
                    observation.detecting(self.guard.inspect), endpoint, body
                )
            observation.decided(inspection.decision, inspection.decision.route)
            if inspection.decision.flagged:
                with observation.stage("rewrite"):
                    await self.workers.run(self.guard.rewrite, inspection)
            with observation.stage("upstream"):
                self.upstream_headers.append(observation.headers())
                self.waiting += 1
                await self.gate.wait()
            await seen({"type": "http.response.start", "status": 200, "headers": []})
            for more in (True, False):
                message = {"type": "http.response.body", "body": b"12345", "more_body": more}
                await seen(message)
            return 200

        try:
            async with self.keys.admit(scope) as caller:
                observation.key = caller.name
                with observation.stage("body"):
                    body = await read_body(scope, receive, caller.body_limit(MAX_BODY), 5.0)
                observation.bytes_in = len(body)
                status = await until_gone(receive, answer(body), lambda: False)
        except ClientGone:
            pass
        except Exception as error:
            api_error = to_api_error(error)
            status = api_error.status
            if self.lets_errors_out:
                raise
            if status >= 500:
                log_failure(f"{endpoint} answered {status}", error)
            await send_error(seen, api_error)
        finally:
            observation.done(status)


async def _live(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


@contextlib.contextmanager
def observed(
    keys: KeyRing | None = None, tracing: Tracing | None = None
) -> Iterator[tuple[ObservedApp, httpx.Client]]:
    """Serve the application, and yield it and a client of it."""
    app = ObservedApp(keys or KeyRing(), tracing)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        try:
            yield app, http
        finally:
            app.guard.release.set()


def headers(key: str | None = None, **more: str) -> dict[str, Any]:
    """Return a request's headers, with a key."""
    given = {name.replace("_", "-"): value for name, value in more.items()}
    return given | ({} if key is None else {"authorization": f"Bearer {key}"})
