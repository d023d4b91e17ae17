"""The vLLM engine in the proxy, with everything that can break broken: nothing hangs or leaks."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from guard.reload import LiveGuard
from server.app import create_app
from server.engines.vllm import VllmEngine, VllmTimeouts
from server.types import GuardLike, ServerOptions
from tests.server.fake_vllm import (
    FakeVllm,
    fake_vllm,
    never_answers,
    open_files,
    resets_after_an_event,
    resets_before,
    resets_in_the_headers,
    streams,
)
from tests.server.proxy_fakes import (
    ANSWER,
    CHAT,
    EVENTS,
    Live,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
    running,
)

QUICK = VllmTimeouts(connect=1.0, read=2.0, control=2.0)
MANY_MAY_WAIT = ServerOptions(max_waiting=5_000, max_in_flight=5_000, decide_timeout_s=120)
FLAGGED = "Who is Harry Potter?"


class Faulty(Live):
    """A served proxy in front of a fake vLLM, and what all of it holds open."""

    def __init__(self, url: str, engine: VllmEngine, fake: FakeVllm) -> None:
        super().__init__(url, WordGuard(), ScriptedEngine())
        self.vllm, self.fake = engine, fake
        self.ask()
        self._before = self.held()

    def held(self) -> tuple[int, int, int]:
        """Count files and sockets, tasks of the server, and connections to vLLM."""
        session = self.vllm._session
        assert session is not None
        return open_files(), len(asyncio.all_tasks(session._loop)), self.fake.open

    def is_clean(self) -> bool:
        """Say if no more is held than before; idle connections may be kept for seconds."""
        return all(now <= before for now, before in zip(self.held(), self._before, strict=True))

    def is_idle(self) -> bool:
        return "unlearn_guard_in_flight 0.0" in self.http.get("/metrics").text


@contextmanager
def faulty(
    options: ServerOptions | None = None,
    guard: GuardLike | None = None,
    timeouts: VllmTimeouts = QUICK,
) -> Iterator[Faulty]:
    """Serve, and check at the end that nothing was left behind."""
    with fake_vllm() as fake:
        engine = VllmEngine(fake.url, timeouts=timeouts)
        with running(create_app(guard or WordGuard(), engine, options)) as url:
            app = Faulty(url, engine, fake)
            try:
                yield app
                assert eventually(app.is_clean, 20), (app.held(), app._before)
                assert eventually(app.is_idle)
            finally:
                app.http.close()


# --- vLLM dies ------------------------------------------------------------------------------------


async def cuts_a_whole_answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n"
    writer.write(head % len(ANSWER) + ANSWER[:50])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


@pytest.mark.parametrize("text", ["hello", "a wizard"])
@pytest.mark.parametrize("behaviour", [resets_before, resets_in_the_headers])
def test_a_death_before_the_answer_is_told(text: str, behaviour: Any) -> None:
    with faulty() as app:
        app.fake.behaviour = behaviour
        for stream in (False, True):
            response = app.ask(text, stream=stream)
            found = (response.status_code, error_of(response)["code"])
            assert found == (502, "engine_unavailable")


def test_a_vllm_that_is_gone_is_told_and_may_return() -> None:
    with faulty() as app:
        app.fake.down()
        assert error_of(app.ask())["code"] == "engine_unavailable"
        assert error_of(app.http.get("/ready"))["code"] == "not_ready"
        app.fake.up()
        assert app.ask().status_code == 200
        assert app.http.get("/ready").status_code == 200


@pytest.mark.parametrize("text", ["hello", "a wizard"])
def test_a_death_within_a_stream_is_told(text: str) -> None:
    with faulty() as app:
        app.fake.behaviour = resets_after_an_event
        for _ in range(5):
            try:
                raw = app.ask(text, stream=True).content
            except httpx.RemoteProtocolError:
                continue  # broken off: no client takes that for an answer
            assert b'"code":"engine_unavailable"' in raw
            assert b"[DONE]" not in raw


@pytest.mark.parametrize("text", ["hello", "a wizard"])
def test_a_death_within_a_whole_answer_is_told(text: str) -> None:
    with faulty() as app:
        app.fake.behaviour = cuts_a_whole_answer
        with suppress(httpx.RemoteProtocolError):
            assert app.ask(text).status_code == 502


def test_a_slow_answer_arrives_whole() -> None:
    with faulty() as app:
        app.fake.behaviour = streams(8, 0.2)
        assert app.ask(stream=True).content == EVENTS[0] * 8 + EVENTS[-1]


def test_one_that_never_answers_is_left() -> None:
    with faulty(ServerOptions(engine_timeout_s=0.3)) as app:
        app.fake.behaviour = never_answers
        assert error_of(app.ask())["code"] == "engine_timeout"


# --- Clients leave, or are slow -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "a wizard"])
def test_a_client_that_leaves_takes_the_upstream_connection_along(text: str) -> None:
    with faulty() as app:
        app.fake.behaviour = streams(10_000, 0.005)
        for _ in range(10):
            with app.http.stream("POST", CHAT, json=chat(text, stream=True)) as response:
                next(response.iter_raw())
        assert eventually(lambda: app.fake.open <= 1)  # long before the streams would end


def test_clients_that_leave_before_an_answer_leave_nothing() -> None:
    with faulty() as app:
        app.fake.behaviour = never_answers
        body = json.dumps(chat()).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        address = (app.http.base_url.host, app.http.base_url.port or 0)
        for _ in range(20):
            with socket.create_connection(address) as client:
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: len(app.fake.posts) >= 1)


def test_a_client_that_does_not_read_holds_back_the_engine_and_is_let_go() -> None:
    """What is in flight stays within socket buffers, however long the answer would be."""
    with faulty(ServerOptions(idle_timeout_s=1.5, output_guard=False)) as app:
        app.fake.behaviour = app.fake.floods
        with app.http.stream("POST", CHAT, json=chat(stream=True)) as response:
            next(response.iter_raw())
            sizes: list[int] = []
            threading.Event().wait(0.7)
            sizes.append(app.fake.sent)
            threading.Event().wait(0.4)
            sizes.append(app.fake.sent)
            assert sizes[0] == sizes[1] < 64_000_000
            assert eventually(lambda: app.fake.open <= 1)


# --- The guard's own disk -------------------------------------------------------------------------


@pytest.fixture
def real(
    small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts, tmp_path: Path
) -> Iterator[tuple[BundleStore, Any]]:
    """A bundle of the test's own, and what loads its guard with a given ledger."""
    store = BundleStore(shutil.copytree(small_bundle.root, tmp_path / "bundle"), guard_key)

    def load(ledger: Path) -> Any:
        return load_guard(
            store=store,
            key=guard_key,
            prompts=prompts,
            ledger=Ledger(ledger, guard_key),
            threads=1,
        )

    yield store, load


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_lets_no_flagged_answer_out(real: tuple[BundleStore, Any]) -> None:
    _, load = real
    with faulty(guard=load(Path("/dev/full"))) as app:
        for stream in (False, True):
            response = app.ask(FLAGGED, stream=stream)
            assert (response.status_code, error_of(response)["code"]) == (503, "guard_failed")
            assert app.ask(stream=stream).status_code == 200


# --- Many at once ---------------------------------------------------------------------------------


async def ask_many(url: str, count: int, text: str = "hello") -> Counter[str]:
    """Ask for so many streams at once, and say how they ended."""
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=limits) as session:

        async def one() -> str:
            try:
                async with session.post(CHAT, json=chat(text, stream=True)) as response:
                    raw = await response.read()
            except aiohttp.ClientError as error:
                return type(error).__name__
            if response.status != 200:
                return str(json.loads(raw)["error"]["code"])
            ended = raw.endswith(EVENTS[-1]) and raw.count(EVENTS[0]) == 20
            return "whole" if ended else "error" if b'"error"' in raw else "CUT SHORT"

        return Counter(await asyncio.gather(*(one() for _ in range(count))))


def test_two_hundred_streams_at_once_are_all_whole() -> None:
    with faulty(MANY_MAY_WAIT) as app:
        app.fake.behaviour = streams(20, 0.05)
        assert asyncio.run(ask_many(app.url, 200)) == {"whole": 200}


@pytest.mark.slow
def test_a_thousand_streams_at_once_are_all_whole() -> None:
    with faulty(MANY_MAY_WAIT, timeouts=VllmTimeouts(read=60)) as app:
        app.fake.behaviour = streams(20, 0.2)
        assert asyncio.run(ask_many(app.url, 1_000)) == {"whole": 1_000}


def test_beyond_the_limit_the_rest_is_refused_clearly() -> None:
    with faulty(ServerOptions(max_in_flight=20)) as app:
        app.fake.behaviour = streams(20, 0.05)
        ends = asyncio.run(ask_many(app.url, 100))
        assert set(ends) == {"whole", "overloaded"}
        assert ends["whole"] >= 20


def test_a_vllm_that_dies_under_load_leaves_clear_errors() -> None:
    with faulty(MANY_MAY_WAIT) as app:
        app.fake.behaviour = streams(20, 0.1)
        killer = threading.Timer(0.8, app.fake.down)
        killer.start()
        ends = asyncio.run(ask_many(app.url, 100))
        killer.join()
        assert ends["CUT SHORT"] == 0
        assert sum(ends.values()) == 100
        assert ends["whole"] < 100
        app.fake.up()
        app.fake.behaviour = streams(20, 0.0)
        assert asyncio.run(ask_many(app.url, 5)) == {"whole": 5}


def test_a_reload_under_load_drops_no_stream(real: tuple[BundleStore, Any], tmp_path: Path) -> None:
    store, load = real
    guard = LiveGuard(lambda: load(tmp_path / "ledger.jsonl"), store.current_version)
    with faulty(MANY_MAY_WAIT, guard=guard) as app:
        app.fake.behaviour = streams(20, 0.1)
        done = threading.Event()

        def reloads() -> None:
            for _ in range(3):
                with store.transaction() as draft:
                    draft.manifest.targets["harry-potter"].notes.append("another version")
                guard.refresh()
            done.set()

        before = guard.guard.version
        thread = threading.Thread(target=reloads)
        thread.start()
        ends: Counter[str] = Counter()
        while not done.is_set():
            ends += asyncio.run(ask_many(app.url, 8))
            ends += asyncio.run(ask_many(app.url, 4, FLAGGED))
        thread.join()
        assert set(ends) == {"whole"}
        assert guard.guard.version == before + 3
