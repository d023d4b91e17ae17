"""Adapters on their way from the guard through the proxy to the engine, and on hot reload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from guard.cli_compose import CheckState
from guard.errors import EngineError, EngineUnavailableError, SelfCheckError
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.reload import LiveGuard
from guard.types import AdapterUse, TargetRoute
from server.app import create_app
from tests.guard.routed import ANN, BENIGN, BOTH, FILLED, WEIGHTS, adapter, filled, guard_of
from tests.server.proxy_fakes import (
    ANSWER,
    CHAT,
    EVENTS,
    TEXT,
    ScriptedEngine,
    chat,
    error_of,
    eventually,
    running,
)

JSON = {"content-type": "application/json"}
LORA_ERROR = b'{"error":{"message":"LoRA rank 8 is greater than 4","type":"BadRequestError"}}'


@dataclass
class Served:
    """A guarded engine behind real HTTP."""

    engine: ScriptedEngine
    http: httpx.Client

    def ask(self, text: str, path: str = CHAT, **fields: Any) -> httpx.Response:
        body = {"model": "m", "prompt": text, **fields} if path == TEXT else chat(text, **fields)
        return self.http.post(path, json=body)


@contextlib.contextmanager
def served(guard: Any, **engine: Any) -> Iterator[Served]:
    fake = ScriptedEngine(**engine)
    with running(create_app(guard, fake)) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(fake, http)


@pytest.fixture(scope="module")
def apps(prompts: ModelPrompts) -> Iterator[Mapping[str, Served]]:
    """An app for each route that ann may take; bob's is always to adapt."""
    routes: tuple[TargetRoute, ...] = ("corrupt", "adapt", "corrupt+adapt", "refuse")
    with contextlib.ExitStack() as stack:
        yield {
            route: stack.enter_context(served(guard_of(prompts, {"ann": route, "bob": "adapt"})))
            for route in routes
        }


@pytest.fixture
def app_of(apps: Mapping[str, Served]) -> Callable[[str], Served]:
    def fresh(route: str) -> Served:
        found = apps[route]
        found.engine.posts.clear()
        found.engine.adapters.clear()
        return found

    return fresh


# --- A request -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_adapt_sends_the_very_bytes_with_the_adapter(
    app_of: Callable[[str], Served], path: str
) -> None:
    field = '"messages" : [ {"role":"user","content":"Where is \\u0061nn?"} ]'
    if path == TEXT:
        field = '"prompt":\t"Where is \\u0061nn?"'
    body = ("{" + field + ',  "model":"m","temperature":0.70}\n').encode()
    app = app_of("adapt")
    response = app.http.post(path, content=body, headers=JSON)
    assert (response.status_code, response.content) == (200, ANSWER)
    assert [(p, sent) for p, sent, _ in app.engine.posts] == [(path, body)]
    assert app.engine.adapters == [(adapter("ann", WEIGHTS["ann"]),)]


def test_both_send_embeddings_with_the_adapter(app_of: Callable[[str], Served]) -> None:
    app = app_of("corrupt+adapt")
    response = app.ask(ANN)
    assert (response.status_code, response.content) == (200, ANSWER)
    assert filled(app.engine.posts[0][1]) == {FILLED["ann"]}
    assert app.engine.adapters == [(adapter("ann", WEIGHTS["ann"]),)]


def test_several_targets_send_all_their_adapters_the_surest_first(
    app_of: Callable[[str], Served],
) -> None:
    app = app_of("corrupt+adapt")
    assert app.ask(BOTH).status_code == 200
    assert app.engine.adapters == [(adapter("bob", 1.0), adapter("ann", 0.5))]
    mixed = app_of("corrupt")
    assert mixed.ask(BOTH).status_code == 200
    assert filled(mixed.engine.posts[0][1]) == {FILLED["ann"]}
    assert mixed.engine.adapters == [(adapter("bob", 1.0),)]


def test_no_adapter_goes_with_other_requests(app_of: Callable[[str], Served]) -> None:
    for route in ("corrupt", "adapt", "corrupt+adapt", "refuse"):
        app = app_of(route)
        assert app.ask(BENIGN).status_code == 200
        assert app.engine.adapters == [()]
    app = app_of("corrupt")
    assert app.ask(ANN).status_code == 200
    assert app.engine.adapters == [()]
    app = app_of("refuse")
    for text in (ANN, BOTH):
        assert error_of(app.ask(text))["code"] == "content_refused"
    assert app.engine.adapters == []


@pytest.mark.parametrize("route", ["adapt", "corrupt+adapt"])
def test_the_answer_is_passed_on_untouched(app_of: Callable[[str], Served], route: str) -> None:
    app = app_of(route)
    plain, adapted = app.ask(BENIGN), app.ask(ANN)
    assert adapted.content == plain.content
    assert {*adapted.headers} == {*plain.headers}
    plain, adapted = app.ask(BENIGN, stream=True), app.ask(ANN, stream=True)
    assert adapted.content == plain.content == b"".join(EVENTS)
    assert {*adapted.headers} == {*plain.headers}


def test_no_field_of_a_request_chooses_an_adapter(app_of: Callable[[str], Served]) -> None:
    app = app_of("adapt")
    response = app.ask(BENIGN, adapters=["key of ann"], lora_request={"lora_name": "key of ann"})
    assert response.status_code in (200, 400)
    assert app.engine.adapters in ([], [()])
    assert app.ask(BENIGN, model="key of ann").status_code == 404
    assert b"key of" not in app.http.get("/v1/models").content


# --- Engines that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["adapt", "corrupt+adapt"])
@pytest.mark.parametrize("message", [LORA_ERROR, b'{"error":{"message":"bad prompt_embeds"}}'])
def test_the_engines_words_about_adapters_become_a_refusal(
    prompts: ModelPrompts, route: Any, message: bytes
) -> None:
    headers = [("content-type", "application/json")]
    guard = guard_of(prompts, {"ann": route})
    with served(guard, status=400, pieces=[message], headers=headers) as app:
        refused, plain = app.ask(ANN), app.ask(BENIGN)
    with served(guard_of(prompts, {"ann": "refuse"})) as app:
        elsewhere = app.ask(ANN)
    assert (refused.status_code, refused.json()) == (elsewhere.status_code, elsewhere.json())
    assert plain.content == message


@pytest.mark.parametrize("route", ["adapt", "corrupt+adapt"])
def test_an_error_of_the_clients_own_is_passed_on(prompts: ModelPrompts, route: Any) -> None:
    message = b'{"error":{"message":"max_tokens is too large","type":"BadRequestError"}}'
    headers = [("content-type", "application/json")]
    guard = guard_of(prompts, {"ann": route})
    with served(guard, status=400, pieces=[message], headers=headers) as app:
        assert [app.ask(text).content for text in (ANN, BENIGN)] == [message, message]


@pytest.mark.parametrize(
    "failure", [EngineError("vLLM can't load adapters"), EngineUnavailableError("lora is gone")]
)
def test_an_adapter_that_cannot_be_loaded_looks_like_any_failure(
    prompts: ModelPrompts, failure: Exception
) -> None:
    with served(guard_of(prompts, {"ann": "adapt"}), fails=failure) as app:
        adapted, plain = app.ask(ANN), app.ask(BENIGN)
    assert adapted.status_code == plain.status_code == 502
    assert error_of(adapted) == error_of(plain)
    assert "lora" not in adapted.text.lower() and "adapter" not in adapted.text.lower()


# --- Hot reload ----------------------------------------------------------------------------------


class Picky(ScriptedEngine):
    """Refuses to be given some adapters, or takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Event()

    refused: frozenset[str] = frozenset()
    error: Exception = EngineError("no room")
    hold: threading.Event | None = None

    async def sync_adapters(self, adapters: Any) -> None:
        await super().sync_adapters(adapters)
        if self.hold is not None:
            self.held.set()
            await asyncio.to_thread(self.hold.wait, 20)
        if any(use.key in self.refused for use in adapters):
            raise self.error


class Versions:
    """A bundle whose versions differ by the routes of their targets."""

    def __init__(self, prompts: ModelPrompts) -> None:
        self.prompts = prompts
        self.all: list[dict[str, TargetRoute]] = [
            {"ann": "adapt"},
            {"ann": "adapt", "bob": "adapt"},
        ]
        self.version = 0

    def load(self) -> Guard:
        guard = guard_of(self.prompts, self.all[self.version])
        guard.version = self.version
        return guard

    def live(self) -> LiveGuard:
        return LiveGuard(self.load, lambda: self.version, closed=True)


def checked(engine: ScriptedEngine, live: LiveGuard, then: Callable[[], Any]) -> Any:
    """Check as `serve` does, then do something in the thread that follows the bundle."""

    async def main() -> Any:
        await CheckState(wanted=False).check(engine, live)
        return await asyncio.to_thread(then)

    return asyncio.run(main())


def keys(engine: ScriptedEngine) -> list[list[str]]:
    return [[use.key.removeprefix("key of ") for use in some] for some in engine.synced]


def test_the_engine_gets_the_adapters_at_the_start(prompts: ModelPrompts) -> None:
    engine, live = Picky(), Versions(prompts).live()
    with pytest.raises(EngineUnavailableError):
        live.inspect(CHAT, json.dumps(chat(ANN)).encode())
    checked(engine, live, lambda: None)
    assert engine.synced == [(adapter("ann"),)]
    assert live.inspect(CHAT, json.dumps(chat(ANN)).encode()).decision.route == "adapt"


def test_a_new_version_has_old_and_new_adapters_ready_before_it_is_used(
    prompts: ModelPrompts,
) -> None:
    versions = Versions(prompts)
    engine, live = Picky(), versions.live()
    old = live.guard
    used: list[bool] = []
    sync = engine.sync_adapters

    async def noted(adapters: Any) -> None:
        used.append(live.guard is old)
        await sync(adapters)

    engine.sync_adapters = noted  # type: ignore[method-assign]

    def swap() -> bool:
        versions.version = 1
        return live.refresh()

    assert checked(engine, live, swap) is True
    assert keys(engine) == [["ann"], ["ann", "ann", "bob"], ["ann", "bob"]]
    assert used == [True, True, False]
    assert live.guard.adapters == (adapter("ann"), adapter("bob"))


@pytest.mark.parametrize("error", [EngineError("no room"), EngineUnavailableError("gone")])
def test_a_new_version_that_cannot_be_made_ready_is_not_used(
    prompts: ModelPrompts, error: Exception
) -> None:
    versions = Versions(prompts)
    engine, live = Picky(), versions.live()
    engine.refused, engine.error = frozenset({"key of bob"}), error

    def swap() -> bool:
        versions.version = 1
        return live.refresh()

    assert checked(engine, live, swap) is False
    assert live.guard.version == 0
    assert live.inspect(CHAT, json.dumps(chat(BOTH)).encode()).decision.route == "corrupt+adapt"
    assert keys(engine) == [["ann"], ["ann", "ann", "bob"]]


def test_old_adapters_that_stay_loaded_do_not_stop_a_new_version(prompts: ModelPrompts) -> None:
    versions = Versions(prompts)
    versions.all = [{"ann": "adapt"}, {"ann": "refuse", "bob": "adapt"}]
    engine, live = Picky(), versions.live()

    def swap() -> bool:
        versions.version = 1
        prepare = live.prepare

        def failing_at_the_end(adapters: Any) -> None:
            prepare(adapters)
            if adapters == (adapter("bob"),):
                raise EngineError("can't unload")

        live.prepare = failing_at_the_end
        return live.refresh()

    assert checked(engine, live, swap) is True
    assert live.guard.version == 1
    assert keys(engine) == [["ann"], ["ann", "bob"], ["bob"]]


def test_an_engine_that_takes_no_adapters_is_a_failed_self_check(prompts: ModelPrompts) -> None:
    engine, live = Picky(), Versions(prompts).live()
    engine.refused = frozenset({"key of ann"})
    with pytest.raises(SelfCheckError, match="no room"):
        checked(engine, live, lambda: None)
    with pytest.raises(EngineUnavailableError):
        live.inspect(CHAT, json.dumps(chat(ANN)).encode())


def test_a_server_that_stops_while_adapters_are_loaded_does_stop(prompts: ModelPrompts) -> None:
    versions = Versions(prompts)
    engine, live = Picky(), versions.live()
    follower = threading.Thread(target=live.refresh, daemon=True)

    async def main() -> None:
        await CheckState(wanted=False).check(engine, live)
        engine.hold = threading.Event()
        versions.version = 1
        follower.start()
        assert await asyncio.to_thread(engine.held.wait, 20)
        asyncio.get_running_loop().call_later(0.2, engine.hold.set)

    asyncio.run(main())  # which cancels what is under way
    follower.join(20)
    assert not follower.is_alive()
    assert live.guard.version == 0
    versions.all.append({"ann": "adapt"})
    versions.version = 2
    assert live.refresh() is False, "the loop is closed"


def test_requests_are_answered_with_the_new_versions_adapters(prompts: ModelPrompts) -> None:
    versions = Versions(prompts)
    engine, live = Picky(), versions.live()
    live.open()

    def given(text: str) -> tuple[AdapterUse, ...]:
        engine.adapters.clear()
        assert app.post(CHAT, json=chat(text)).status_code == 200
        (found,) = engine.adapters
        return found

    with running(create_app(live, engine)) as url, httpx.Client(base_url=url) as app:
        assert given("Who is bob?") == ()
        assert given(ANN) == (adapter("ann", 0.5),)
        live.follow(0.02)
        versions.version = 1
        assert eventually(lambda: live.guard.version == 1)
        live.stop()
        assert given("Who is bob?") == (replace(adapter("bob"), weight=1.0),)
