"""The end of a server: told before it comes, and no answer is cut short by it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from server.app import create_app
from server.lifecycle import Lifecycle
from server.run import make_server
from tests.server.fake_vllm import STREAM, Behaviour, FakeVllm, answers, chunk, fake_vllm
from tests.server.proxy_fakes import (
    CHAT,
    EVENTS,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
)
from tests.server.served import Served, served

MANY = 60


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


def test_an_answer_that_does_not_end_is_cut_visibly(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    fake.behaviour = held(threading.Event())
    with (
        served(small_bundle, guard_key, tmp_path, [fake], shutdown_timeout_s=1) as app,
        app.http.stream("POST", CHAT, json=chat(stream=True), timeout=60) as response,
    ):
        pieces = response.iter_raw()
        assert next(pieces).startswith(EVENTS[0])
        app.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(pieces)
        assert app.process.wait(20) == 0
        assert eventually(lambda: fake.open == 0)


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
