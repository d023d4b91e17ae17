"""An engine over HTTP without a guard: a stand-in for vLLM, and the reference to compare with."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from guard.errors import EngineError
from guard.request import ENDPOINTS
from server.engines.base import Engine
from server.errors import ClientGone, log_failure, send_error, to_api_error
from server.limits import read_body
from server.streaming import relay, until_gone

_MAX_BODY_BYTES = 64_000_000  # embeddings are larger than the text whose place they take
_TIMEOUT_S = 600.0


def create_standin(engine: Engine) -> Starlette:
    """Build an application that hands every request to `engine` as it is.

    It takes what vLLM takes, embeddings parts included, and guards nothing: for this machine only.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.close()

    async def models(_: Request) -> Response:
        entry = {"object": "model", "created": int(time.time()), "owned_by": "unguarded"}
        data = [{"id": name, **entry} for name in await engine.models()]
        return _json({"object": "list", "data": data})

    async def health(_: Request) -> Response:
        try:
            await engine.health()
        except EngineError as error:
            return _json({"status": "failed", "error": str(error)}, 503)
        return _json({"status": "alive"})

    routes = [
        *(Route(path, _Relay(path, engine), methods=["POST"]) for path in ENDPOINTS),
        Route("/v1/models", models, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Relay:
    """ASGI endpoint of one of the two completion routes."""

    def __init__(self, path: str, engine: Engine) -> None:
        self._path, self._engine = path, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        begun = finished = False

        async def watched(message: Message) -> None:
            nonlocal begun, finished
            begun = True
            finished = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            body = await read_body(scope, receive, _MAX_BODY_BYTES, _TIMEOUT_S)
            await until_gone(receive, self._answer(body, watched), lambda: finished)
        except ClientGone:
            return
        except Exception as error:
            log_failure(f"{self._path} failed", error)
            if not begun:
                await send_error(send, to_api_error(error))

    async def _answer(self, body: bytes, send: Send) -> None:
        answer = await self._engine.post(self._path, body, {"content-type": "application/json"})
        try:
            await relay(answer, send, _TIMEOUT_S)
        finally:
            await answer.aclose()


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
