"""The end of a server: told before it comes, and no answer is cut short by it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from server.app import create_app
from server.lifecycle import Lifecycle
from server.run import make_server
from server.types import ServerOptions
from tests.server.fake_vllm import (
    STREAM,
    Behaviour,
    FakeVllm,
    answers,
    chunk,
    fake_vllm,
    never_answers,
)
from tests.server.proxy_fakes import (
    CHAT,
    EVENTS,
    SSE,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
    running,
)
from tests.server.served import Served, served

MANY = 60
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_vllm() as made:
        yield made


def held(gate: threading.Event) -> Behaviour:
    """Stream some events, more than are held back, and the rest once the gate is open."""

    async def behaviour(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if not body.get("stream"):
            await answers(writer, body)
            return
        writer.write(STREAM + chunk(EVENTS[0]) * MANY)
        await writer.drain()
        while not gate.is_set():  # noqa: ASYNC110  (a thread's gate)
            await asyncio.sleep(0.01)
        writer.write(b"".join(chunk(event) for event in EVENTS[1:]) + b"0\r\n\r\n")

    return behaviour


def says_draining(app: Served) -> bool:
    answer = app.ready()
    return answer is not None and error_of(answer)["code"] == "draining"


def test_an_end_is_told_and_cuts_nothing(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    gate = threading.Event()
    fake.behaviour = held(gate)
    with (
        served(small_bundle, guard_key, tmp_path, [fake], drain_s=3) as app,
        app.http.stream("POST", CHAT, json=chat(stream=True), timeout=60) as response,
    ):
        pieces = response.iter_raw()
        received = next(pieces)
        app.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: says_draining(app), 2)
        assert httpx.post(f"{app.url}{CHAT}", json=chat()).status_code == 200
        assert eventually(
            lambda: httpx.get(f"{app.url}/health").headers.get("connection") == "close", 2
        )
        assert eventually(lambda: app.ready() is None)  # no more connections ...
        assert app.process.poll() is None  # ... but the stream is in work
        gate.set()
        received += b"".join(pieces)
        assert received == EVENTS[0] * MANY + b"".join(EVENTS[1:])
        assert app.process.wait(20) == 0
    assert "Traceback" not in app.log.read_text()


def never_ends(route: str) -> dict[str, Any]:
    """A request to a route for a stream that `held` does not end."""
    if route == RESPONSES:
        return {"model": "m", "input": "hello", "stream": True}
    return chat(stream=True) | ({"max_tokens": 99} if route == MESSAGES else {})


def last_event(route: str, text: str) -> dict[str, Any]:
    """The last event of a stream, of which no part may be missing."""
    assert text.endswith("\n\n")
    *_, last = text.split("\n\n")[:-1]
    name, _, data = last.rpartition("data: ")
    event: dict[str, Any] = json.loads(data)
    if route != CHAT:
        assert name == f"event: {event['type']}\n"
    return event


def told(route: str, event: dict[str, Any]) -> Any:
    """What the last event says in the form of its dialect."""
    if route == MESSAGES:
        assert (event["type"], event["error"]["type"]) == ("error", "api_error")
        return event["error"]["message"]
    if route == RESPONSES:
        assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
        return event["response"]["error"]["message"]
    assert (event["error"]["code"], event["error"]["type"]) == ("shutting_down", "server_error")
    return event["error"]["message"]


def test_what_does_not_end_is_cut_and_its_clients_are_told(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    fake.behaviour = held(threading.Event())
    with (
        served(small_bundle, guard_key, tmp_path, [fake], shutdown_timeout_s=1) as app,
        ExitStack() as stack,
        ThreadPoolExecutor() as threads,
    ):
        streams = {}
        for route in (CHAT, MESSAGES, RESPONSES):
            stream = app.http.stream("POST", route, json=never_ends(route), timeout=60)
            pieces = stack.enter_context(stream).iter_text()
            streams[route] = (next(pieces), pieces)
        fake.behaviour = never_answers
        whole = threads.submit(httpx.post, f"{app.url}{CHAT}", json=chat(), timeout=60)
        assert eventually(lambda: len(fake.posts) == 4)
        app.process.send_signal(signal.SIGTERM)
        for route, (first, pieces) in streams.items():
            text = first + "".join(pieces)  # ends as it should, or httpx would raise
            assert "could not finish the answer" in told(route, last_event(route, text))
        answer = whole.result(30)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
        assert app.process.wait(20) == 0
        assert eventually(lambda: fake.open == 0)
    assert "Traceback" not in app.log.read_text()


@pytest.mark.parametrize(("cut_off", "whole"), [(0, True), (5, False)])
def test_a_relayed_stream_ends_with_an_event_unless_it_is_cut_within_one(
    cut_off: int, whole: bool
) -> None:
    begun = EVENTS[0] + EVENTS[1][: len(EVENTS[1]) - cut_off]
    never = threading.Event()
    engine = ScriptedEngine(pieces=[begun, never], headers=SSE)
    app = create_app(WordGuard(), engine, ServerOptions(output_guard=False))
    with ExitStack() as ends, httpx.Client(timeout=60) as http:
        url = ends.enter_context(running(app))
        response = ends.enter_context(
            http.stream("POST", f"{url}{CHAT}", json=chat(stream=True), timeout=60)
        )
        pieces = response.iter_raw()
        received = next(pieces)
        with ThreadPoolExecutor() as threads:
            rest = threads.submit(lambda: b"".join(pieces))
            app.state.lifecycle.drain()
            if whole:
                text = (received + rest.result(30)).decode()
                assert told(CHAT, last_event(CHAT, text))
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    rest.result(30)
        assert engine.cancelled.wait(10)
        never.set()  # a thread waits for it


def test_a_body_that_is_still_on_its_way_gets_an_error_too() -> None:
    app = create_app(WordGuard(), ScriptedEngine())
    with ExitStack() as ends:
        address = urlsplit(ends.enter_context(running(app)))
        sock = socket.create_connection((str(address.hostname), address.port or 0), timeout=30)
        ends.enter_context(sock)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(f'{head}content-length: 99\r\n\r\n{{"model"'.encode())
        assert eventually(lambda: app.state.proxy.in_flight == 1)
        app.state.lifecycle.drain()
        answer = b"".join(iter(lambda: sock.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 503") and b'"shutting_down"' in answer


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_wait(
    fake: FakeVllm,
    small_bundle: BundleStore,
    guard_key: GuardKey,
    tmp_path: Path,
    second: signal.Signals,
) -> None:
    with served(small_bundle, guard_key, tmp_path, [fake], drain_s=300) as app:
        app.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: says_draining(app))
        app.process.send_signal(second)
        assert app.process.wait(20) == 0


def test_draining_takes_its_time() -> None:
    soon, later = Lifecycle(), Lifecycle(300)
    assert (soon.draining, soon.is_over) == (False, False)
    soon.drain()
    later.drain()
    assert (soon.draining, soon.is_over) == (True, True)
    assert (later.draining, later.is_over) == (True, False)
    later.drain()
    assert later.is_over


def test_an_interrupt_does_not_wait() -> None:
    lifecycle = Lifecycle(300)
    app = create_app(WordGuard(), ScriptedEngine(), lifecycle=lifecycle)
    server = make_server(app, port=0, lifecycle=lifecycle)
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit
    assert lifecycle.draining
