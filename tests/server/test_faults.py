"""Engines that fail, stall or die, and clients that leave: in process and over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from aiohttp import web

from guard.errors import (
    EngineBusyError,
    EngineError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from guard.types import AdapterUse
from server.app import create_app
from server.engines.base import EngineResponse
from server.types import ServerOptions
from tests.server.proxy_fakes import (
    CHAT,
    EVENTS,
    SSE,
    Live,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
    live,
    running,
)

MESSAGES: Any = chat()["messages"]
AS_IT_COMES = ServerOptions(output_guard=False)
"""Nothing is held back; test_faults_upstream.py has the same with it on."""


# --- Before an answer began ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "a wizard"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineUnavailableError("gone"), 502, "engine_unavailable"),
        (EngineTimeoutError("late"), 504, "engine_timeout"),
        (EngineBusyError("full", retry_after_s=7), 429, "engine_busy"),
        (EngineError("odd"), 502, "engine_error"),
        (RuntimeError("bug"), 500, "internal_error"),
    ],
)
def test_failure_before_headers_has_its_status(
    text: str, stream: bool, failure: Exception, status: int, code: str
) -> None:
    with live(fails=failure) as app:
        response = app.ask(text, stream=stream)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (status, code)
        assert str(failure) not in error["message"]
        assert response.headers.get("retry-after") == ("7" if status == 429 else None)
        app.engine.fails = None
        assert app.ask().status_code == 200


def test_engine_that_never_answers_is_504() -> None:
    with live(ServerOptions(engine_timeout_s=0.1), hangs=True) as app:
        assert error_of(app.ask())["code"] == "engine_timeout"
        assert app.engine.cancelled.wait(5)


@pytest.mark.parametrize("status", [301, 401, 403, 999, 100])
def test_faults_of_the_set_up_are_502(status: int) -> None:
    with live(status=status) as app:
        response = app.ask()
        assert (response.status_code, error_of(response)["code"]) == (502, "engine_error")


# --- In the middle of an answer -------------------------------------------------------------------


def test_death_between_events_raises_in_openai_clients() -> None:
    with live(AS_IT_COMES, pieces=[EVENTS[0], EVENTS[1], EngineUnavailableError("gone")]) as app:
        stream = app.openai.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="can't be reached"):
            for piece in stream:
                text += piece.choices[0].delta.content or ""
        assert text == "Hello"
        raw = app.ask(stream=True).content
        assert raw.startswith(EVENTS[0] + EVENTS[1] + b'data: {"error":')
        assert b"[DONE]" not in raw
        assert raw.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("pieces", "headers"),
    [
        ([EVENTS[0], EVENTS[1][:20], EngineUnavailableError("gone")], SSE),
        ([b'{"choices":', EngineUnavailableError("gone")], [("content-type", "application/json")]),
        (
            [b'{"choices":', RuntimeError("bug")],
            [("content-type", "application/json"), ("content-length", "500")],
        ),
    ],
)
def test_answer_cut_inside_breaks_the_connection(pieces: Any, headers: Any) -> None:
    with live(AS_IT_COMES, pieces=pieces, headers=headers) as app:
        with pytest.raises(httpx.RemoteProtocolError):
            app.ask(stream=headers is SSE)
        app.engine.pieces = app.engine.headers = None
        assert app.ask().status_code == 200


def test_stall_ends_with_an_error_event() -> None:
    gate = threading.Event()
    with live(replace(AS_IT_COMES, idle_timeout_s=0.2), pieces=[EVENTS[0], gate]) as app:
        raw = app.ask(stream=True).content
        gate.set()
        assert raw.startswith(EVENTS[0])
        assert b'"code":"engine_timeout"' in raw


# --- Clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "a wizard"])
def test_leaving_in_a_stream_cancels_the_generation(text: str) -> None:
    gate = threading.Event()
    with live(AS_IT_COMES, pieces=[EVENTS[0], gate, EVENTS[1]]) as app:
        with app.http.stream("POST", CHAT, json=chat(text, stream=True)) as response:
            next(response.iter_raw())
        assert app.engine.cancelled.wait(10)
        gate.set()
        assert eventually(lambda: 'status="499"' in app.http.get("/metrics").text)


def test_leaving_before_the_answer_cancels_the_generation() -> None:
    with live(hangs=True) as app:
        with pytest.raises(httpx.ReadTimeout):
            app.http.post(CHAT, json=chat(), timeout=0.5)
        assert app.engine.cancelled.wait(10)


def test_leaving_while_the_guard_decides_sends_nothing_on() -> None:
    with live() as app:
        with pytest.raises(httpx.ReadTimeout):
            app.http.post(CHAT, json=chat("slow"), timeout=0.5)
        assert eventually(lambda: 'status="499"' in app.http.get("/metrics").text)
        app.guard.release.set()
        assert app.ask().status_code == 200
        assert len(app.engine.posts) == 1


def test_leaving_before_the_request_is_translated_sends_nothing_on() -> None:
    """A dialect's body waits for a worker; then it is too late to be told that the client left."""
    with live(ServerOptions(workers=1)) as app:
        held = threading.Thread(target=app.http.post, args=(CHAT,), kwargs={"json": chat("slow")})
        held.start()
        assert eventually(lambda: "unlearn_guard_in_flight 1.0" in app.http.get("/metrics").text)
        for path in ("/v1/messages", "/v1/embeddings"):
            body = {"model": "m", "input": "hello"} if "emb" in path else chat(max_tokens=5)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(app.url + path, json=body, timeout=0.5)
        app.guard.release.set()
        held.join()
        assert eventually(lambda: "unlearn_guard_in_flight 0.0" in app.http.get("/metrics").text)
        assert app.ask().status_code == 200
        assert [json.loads(body)["messages"] for _, body, _ in app.engine.posts] == [
            chat(text)["messages"] for text in ("slow", "hello")
        ]


def test_client_that_does_not_read_is_let_go() -> None:
    big = b"data: " + b"x" * 100_000 + b"\n\n"
    with (
        live(ServerOptions(idle_timeout_s=0.3), pieces=[big] * 2_000) as app,
        app.http.stream("POST", CHAT, json=chat(stream=True)),
    ):
        assert app.engine.cancelled.wait(20)


# --- Over real HTTP -------------------------------------------------------------------------------


class HttpEngine:
    """The smallest engine over HTTP: what a relay may expect of a real one."""

    name = "http"

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def health(self) -> None:
        return None

    async def models(self) -> list[str]:
        return ["m"]

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None: ...

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        assert self._session is not None
        try:
            response = await self._session.post(self._url + path, data=body, headers=headers)
        except aiohttp.ClientError as error:
            raise EngineUnavailableError("the engine can't be reached") from error
        found = [(name.lower(), value) for name, value in response.headers.items()]
        return EngineResponse(response.status, found, _Body(response))


class _Body:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._response.content.readany()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        self._response.close()


Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Upstream:
    """An HTTP server whose behaviour a test sets."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = _answers
        self.left = threading.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        try:
            return await self.behaviour(request)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise


async def _stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    return response


async def _answers(request: web.Request) -> web.StreamResponse:
    response = await _stream(request)
    for event in EVENTS:
        await response.write(event)
    await response.write_eof()
    return response


async def _dies_between_events(request: web.Request) -> web.StreamResponse:
    response = await _stream(request)
    await response.write(EVENTS[0])
    await asyncio.sleep(0.1)
    assert request.transport is not None
    request.transport.abort()
    return response


async def _dies_in_an_event(request: web.Request) -> web.StreamResponse:
    response = await _stream(request)
    await response.write(EVENTS[0] + EVENTS[1][:9])
    await asyncio.sleep(0.1)
    assert request.transport is not None
    request.transport.abort()
    return response


async def _dies_before_headers(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _talks_garbage(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"\x00\x01 not http at all\r\n\r\n")  # type: ignore[attr-defined]
    request.transport.close()
    return web.Response()


async def _never_ends(request: web.Request) -> web.StreamResponse:
    response = await _stream(request)
    while True:
        await response.write(EVENTS[0])
        await asyncio.sleep(0.02)


@contextlib.contextmanager
def upstream() -> Iterator[tuple[Upstream, str]]:
    """Serve an `Upstream` in a thread of its own."""
    parts, ready, found = Upstream(), threading.Event(), list[str]()
    stop: list[Callable[[], Any]] = []

    async def main() -> None:
        application = web.Application()
        application.router.add_post("/{tail:.*}", parts.handle)
        runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        ready.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield parts, found[0]
    finally:
        stop[0]()
        thread.join(20)


@pytest.fixture(scope="module")
def relayed() -> Iterator[tuple[Live, Upstream]]:
    with upstream() as (server, address):
        engine: Any = HttpEngine(address)
        guard = WordGuard()
        with running(create_app(guard, engine, AS_IT_COMES)) as url:
            parts = Live(url, guard, ScriptedEngine())
            yield parts, server
            parts.http.close()


def test_events_survive_real_http(relayed: tuple[Live, Upstream]) -> None:
    app, server = relayed
    server.behaviour = _answers
    response = app.ask(stream=True)
    assert response.content == b"".join(EVENTS)
    assert set(response.headers) == {"date", "content-type", "transfer-encoding"}


def test_upstream_death_between_events(relayed: tuple[Live, Upstream]) -> None:
    app, server = relayed
    server.behaviour = _dies_between_events
    raw = app.ask(stream=True).content
    assert raw.startswith(EVENTS[0] + b'data: {"error":')
    with pytest.raises(openai.APIError):
        list(app.openai.chat.completions.create(model="m", messages=MESSAGES, stream=True))


def test_upstream_death_in_an_event(relayed: tuple[Live, Upstream]) -> None:
    app, server = relayed
    server.behaviour = _dies_in_an_event
    with pytest.raises(httpx.RemoteProtocolError):
        app.ask(stream=True)


@pytest.mark.parametrize("behaviour", [_dies_before_headers, _talks_garbage])
def test_upstream_death_before_headers(relayed: tuple[Live, Upstream], behaviour: Any) -> None:
    app, server = relayed
    server.behaviour = behaviour
    response = app.ask(stream=True)
    assert (response.status_code, error_of(response)["code"]) == (502, "engine_unavailable")
    server.behaviour = _answers
    assert app.ask(stream=True).status_code == 200


def test_leaving_client_reaches_the_upstream(relayed: tuple[Live, Upstream]) -> None:
    app, server = relayed
    server.behaviour = _never_ends
    server.left.clear()
    with app.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        next(response.iter_raw())
    assert server.left.wait(10)


def test_upstream_that_is_down() -> None:
    engine: Any = HttpEngine("http://127.0.0.1:9")
    guard = WordGuard()
    with running(create_app(guard, engine)) as url:
        app = Live(url, guard, ScriptedEngine())
        response = app.ask()
        assert (response.status_code, error_of(response)["code"]) == (502, "engine_unavailable")
        assert app.http.get("/health").status_code == 200
        app.http.close()
