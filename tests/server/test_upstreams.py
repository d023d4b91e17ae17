"""Several vLLMs as one engine: who is asked, who is asked next, who is left out and comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from guard.cli_compose import make_engine, self_checked
from guard.cli_session import Session
from guard.errors import (
    ConfigError,
    EngineError,
    EngineTimeoutError,
    EngineUnavailableError,
    SelfCheckError,
)
from guard.prompts import ModelPrompts
from guard.settings import load_settings
from guard.types import AdapterUse
from server.app import create_app
from server.engines.base import Engine
from server.engines.replica import HealthOptions
from server.engines.upstreams import UpstreamPool
from server.engines.vllm import VllmEngine, VllmTimeouts
from tests.server.fake_vllm import (
    FakeVllm,
    fake_vllm,
    finds_it_wrong,
    is_overloaded,
    never_answers,
    open_files,
    resets_after_an_event,
    resets_before,
    resets_in_the_headers,
    streams,
)
from tests.server.proxy_fakes import CHAT, EVENTS, Live, ScriptedEngine, WordGuard, running
from tests.server.random_lora import write_lora

JSON = {"content-type": "application/json"}
PLAIN, STREAMED = b'{"model":"m"}', b'{"model":"m","stream":true}'
QUICK = HealthOptions(period_s=0.05, fall=2, rise=2)
SELDOM = HealthOptions(period_s=60, fall=2, rise=2)
BROKEN = [resets_before, resets_in_the_headers, is_overloaded]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.fixture
def pair() -> Iterator[tuple[FakeVllm, FakeVllm]]:
    with fake_vllm() as first, fake_vllm() as second:
        yield first, second


@asynccontextmanager
async def pool(
    fakes: Sequence[FakeVllm], options: HealthOptions = QUICK, **timeouts: float
) -> AsyncIterator[UpstreamPool]:
    limits = VllmTimeouts(**{"connect": 1.0, "read": 5.0, "control": 1.0, **timeouts})
    made = UpstreamPool([VllmEngine(fake.url, timeouts=limits) for fake in fakes], options)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def ask(engine: Engine, body: bytes = PLAIN, adapters: Sequence[AdapterUse] = ()) -> int:
    response = await engine.post(CHAT, body, JSON, adapters)
    await response.read()
    return response.status


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (a thread's doing, not a task's)
            await asyncio.sleep(0.01)


def healthy(made: UpstreamPool) -> list[int]:
    return [figures["healthy"] for figures in made.upstream_figures().values()]


def use(folder: Path, name: str) -> AdapterUse:
    path = folder / name
    if not path.exists():
        write_lora(path, seed=len(name))
    return AdapterUse(name, path, 4, 1.0)


# --- Who is asked ---------------------------------------------------------------------------------


def test_requests_go_to_the_least_busy(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            pair[0].behaviour = pair[1].behaviour = streams(1, 0.2)
            held = [await made.post(CHAT, STREAMED, JSON) for _ in range(6)]
            assert [len(fake.posts) for fake in pair] == [3, 3]
            kept = [one for one in held if one is not held[0]]
            await held[0].read()
            before = Counter({number: len(fake.posts) for number, fake in enumerate(pair)})
            await ask(made)
            freed = next(n for n, fake in enumerate(pair) if len(fake.posts) > before[n])
            await ask(made)
            assert len(pair[freed].posts) == before[freed] + 2  # it is less busy all the while
            for response in kept:
                await response.aclose()
            figures = made.upstream_figures().values()
            assert [one["outstanding"] for one in figures] == [0, 0]

    run(test)


def test_a_client_that_leaves_frees_the_place_and_the_connection(
    pair: tuple[FakeVllm, FakeVllm],
) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            for fake in pair:
                fake.behaviour = never_answers
            tasks = [asyncio.create_task(ask(made)) for _ in range(4)]
            await until(lambda: sum(len(fake.posts) for fake in pair) == 4)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            figures = made.upstream_figures().values()
            assert [one["outstanding"] for one in figures] == [0, 0]
            assert [one["failures"] for one in figures] == [0, 0]
            await until(lambda: sum(fake.open for fake in pair) <= 2)  # idle ones of the checks

    run(test)


# --- Who is asked next ----------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", BROKEN)
@pytest.mark.parametrize("body", [PLAIN, STREAMED])
def test_a_request_without_an_answer_goes_on(
    pair: tuple[FakeVllm, FakeVllm], behaviour: Any, body: bytes
) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            pair[0].behaviour = behaviour
            assert [await ask(made, body) for _ in range(4)] == [200] * 4
            assert len(pair[1].posts) == 4
            assert len(pair[0].posts) >= 1
            assert made.upstream_figures()["0"]["retried"] == len(pair[0].posts)

    run(test)


def test_a_replica_that_refuses_connections_costs_no_request(
    pair: tuple[FakeVllm, FakeVllm],
) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            pair[0].down()
            assert [await ask(made) for _ in range(6)] == [200] * 6
            assert healthy(made) == [0, 1]  # two failures in a row were enough

    run(test)


@pytest.mark.parametrize("behaviour", [resets_before, is_overloaded])
def test_each_replica_is_tried_once(pair: tuple[FakeVllm, FakeVllm], behaviour: Any) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            for fake in pair:
                fake.behaviour = behaviour
            if behaviour is is_overloaded:
                assert await ask(made) == 503  # the engine's own answer, in its own words
            else:
                with pytest.raises(EngineUnavailableError):
                    await ask(made)
            assert [len(fake.posts) for fake in pair] == [1, 1]

    run(test)


def test_a_refusal_is_an_answer(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            for fake in pair:
                fake.behaviour = finds_it_wrong
            assert await ask(made) == 400
            assert sum(len(fake.posts) for fake in pair) == 1

    run(test)


def test_nothing_is_asked_again_after_the_first_byte(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            for fake in pair:
                fake.behaviour = resets_after_an_event
            response = await made.post(CHAT, STREAMED, JSON)
            assert await anext(response.chunks) == EVENTS[0]
            with pytest.raises(EngineUnavailableError):
                await response.read()
            assert sum(len(fake.posts) for fake in pair) == 1
            assert sum(one["failures"] for one in made.upstream_figures().values()) == 1

    run(test)


def test_a_late_answer_is_not_asked_for_twice(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM, read=0.2) as made:
            for fake in pair:
                fake.behaviour = never_answers
            with pytest.raises(EngineTimeoutError):
                await ask(made)
            assert sum(len(fake.posts) for fake in pair) == 1

    run(test)


# --- Who is left out, and comes back --------------------------------------------------------------


def test_a_replica_that_dies_is_left_out_and_comes_back(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair) as made:
            pair[1].down()
            await until(lambda: healthy(made) == [1, 0])
            pair[1].up()
            await until(lambda: healthy(made) == [1, 1])
            for _ in range(4):
                await ask(made)
            assert len(pair[1].posts) == 2
            assert made.upstream_figures()["1"]["ejections"] == 1

    run(test)


def test_one_that_says_that_it_is_ill_is_left_out(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair) as made:
            pair[0].healthy = False
            await until(lambda: healthy(made) == [0, 1])
            await made.health()
            pair[1].healthy = False
            await until(lambda: healthy(made) == [0, 0])
            for refused in (made.health, made.models, lambda: ask(made)):
                with pytest.raises(EngineUnavailableError, match="none of 2"):
                    await refused()
            with pytest.raises(EngineUnavailableError):
                await made.sync_adapters([])

    run(test)


def test_requests_never_take_out_the_last_one(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async with pool(pair, SELDOM) as made:
            for fake in pair:
                fake.behaviour = resets_before
            for _ in range(8):
                with pytest.raises(EngineUnavailableError):
                    await ask(made)
            assert sum(healthy(made)) == 1

    run(test)


def test_one_that_starts_later_is_let_in() -> None:
    async def test() -> None:
        with fake_vllm() as first, fake_vllm() as second:
            second.down()
            async with pool([first, second]) as made:
                assert healthy(made) == [1, 0]
                second.up()
                await until(lambda: healthy(made) == [1, 1])

    run(test)


def test_only_names_that_all_serve_are_served() -> None:
    async def test() -> None:
        with fake_vllm("a", "m", "n") as first, fake_vllm("n", "m") as second:
            async with pool([first, second]) as made:
                assert await made.models() == ["m", "n"]
                second.down()
                await until(lambda: healthy(made) == [1, 0])
                assert await made.models() == ["a", "m", "n"]
                second.models = ("other",)
                second.up()
                await asyncio.sleep(0.5)
                assert healthy(made) == [1, 0]  # it would leave no name at all
                assert await made.models() == ["a", "m", "n"]

    run(test)


def test_pools_are_of_something() -> None:
    with pytest.raises(ConfigError):
        UpstreamPool([])


# --- What all have to pass and hold ---------------------------------------------------------------


def test_all_are_examined_and_one_that_returns_is_again(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        seen: list[str] = []
        verdict: list[Exception] = []

        async def examine(engine: Engine) -> None:
            assert isinstance(engine, VllmEngine)
            seen.append(engine.url)
            if verdict:
                raise verdict[0]

        async with pool(pair) as made:
            await made.examine(examine)
            assert sorted(seen) == sorted(fake.url for fake in pair)
            seen.clear()
            verdict.append(SelfCheckError("another table"))
            pair[1].down()
            await until(lambda: healthy(made) == [1, 0])
            pair[1].up()
            await until(lambda: seen == [pair[1].url])
            await asyncio.sleep(0.1)
            assert healthy(made) == [1, 0]
            verdict.clear()
            await until(lambda: healthy(made) == [1, 1])

    run(test)


def test_an_examination_that_fails_is_told(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        async def examine(engine: Engine) -> None:
            assert isinstance(engine, VllmEngine)
            if engine.url == pair[1].url:
                raise SelfCheckError("another table")

        async with pool(pair) as made:
            with pytest.raises(SelfCheckError):
                await made.examine(examine)

    run(test)


def test_adapters_are_on_all_before_they_are_asked(
    pair: tuple[FakeVllm, FakeVllm], tmp_path: Path
) -> None:
    async def test() -> None:
        one, two = use(tmp_path, "one"), use(tmp_path, "two!")
        async with pool(pair) as made:
            await made.sync_adapters([one])
            each = made.adapter_figures()["loads"] // 2
            assert [len(fake.loaded) for fake in pair] == [each, each]
            pair[1].down()
            await until(lambda: healthy(made) == [1, 0])
            await made.sync_adapters([one, two])
            assert [len(fake.loaded) for fake in pair] == [2 * each, 0]
            pair[1].up()
            await until(lambda: healthy(made) == [1, 1])
            assert len(pair[1].loaded) >= each  # what it had lost is loaded when it is asked for
            for _ in range(4):
                assert await ask(made, PLAIN, [two]) == 200
            assert {post["model"] for post in pair[1].posts} <= pair[1].loaded
            assert {post["model"] for post in pair[0].posts} <= pair[0].loaded
        assert [len(fake.loaded) for fake in pair] == [0, 0]

    run(test)


def test_adapters_that_one_refuses_are_an_error(
    pair: tuple[FakeVllm, FakeVllm], tmp_path: Path
) -> None:
    async def test() -> None:
        async with pool(pair) as made:
            with pytest.raises(EngineError):
                await made.sync_adapters([AdapterUse("none", tmp_path / "none", 4, 1.0)])

    run(test)


# --- In the proxy ---------------------------------------------------------------------------------


def test_the_proxy_loses_nothing_when_a_replica_dies(pair: tuple[FakeVllm, FakeVllm]) -> None:
    engines = [VllmEngine(fake.url) for fake in pair]
    made = UpstreamPool(engines, HealthOptions(period_s=0.1, fall=1, rise=1))
    guard = WordGuard()
    with running(create_app(guard, made)) as url:
        app = Live(url, guard, ScriptedEngine())
        assert {app.ask(stream=bool(n % 2)).status_code for n in range(8)} == {200}
        pair[0].down()
        assert {app.ask("a wizard", stream=bool(n % 2)).status_code for n in range(8)} == {200}
        assert app.http.get("/ready").status_code == 200
        shown = app.http.get("/metrics").text
        assert 'unlearn_guard_upstream_healthy{upstream="0"} 0.0' in shown
        assert 'unlearn_guard_upstream_healthy{upstream="1"} 1.0' in shown
        assert pair[0].url not in shown
        pair[1].down()
        assert app.ask().status_code == 502
        app.http.close()


def test_nothing_is_left_open(pair: tuple[FakeVllm, FakeVllm]) -> None:
    async def test() -> None:
        before, tasks = open_files(), len(asyncio.all_tasks())
        async with pool(pair) as made:
            pair[0].behaviour = resets_before
            await asyncio.gather(*(ask(made) for _ in range(20)))
            pair[1].down()
            with pytest.raises(EngineUnavailableError):
                await ask(made)
        await until(lambda: sum(fake.open for fake in pair) == 0)
        await until(lambda: open_files() <= before)
        assert len(asyncio.all_tasks()) == tasks

    run(test)


# --- As it is set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{a},{b}/v1/", "[{a}, {b}/]", "{a}, {b}"])
def test_several_upstreams_are_one_engine(
    quiet_surroundings: None, tmp_path: Path, form: str
) -> None:
    first, second = "http://127.0.0.1:8001", "http://127.0.0.1:8002"
    config = tmp_path / "guard.yaml"
    config.write_text(f"engine: vllm\nupstream: {form.format(a=first, b=second)}\n")
    session = Session(str(config))
    assert session.settings.upstreams == (first, second)
    assert isinstance(make_engine(session), UpstreamPool)


def test_one_upstream_is_as_ever(quiet_surroundings: None, tmp_path: Path) -> None:
    config = tmp_path / "guard.yaml"
    config.write_text("engine: vllm\nupstream: [http://127.0.0.1:8001/v1]\n")
    session = Session(str(config))
    assert session.settings.upstream == "http://127.0.0.1:8001"
    assert isinstance(make_engine(session), VllmEngine)


@pytest.mark.parametrize("value", ["http://a,http://a/v1", "http://a,b", ","])
def test_upstreams_that_can_not_be_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="setting upstream"):
        load_settings({"upstream": value}, environ={})


@pytest.mark.slow
def test_the_self_check_is_for_each(unguarded_url: str, prompts: ModelPrompts) -> None:
    """The model itself passes, alone; beside it, one that isn't the model is found."""

    async def test(*urls: str) -> str:
        made = UpstreamPool([VllmEngine(url) for url in urls], SELDOM)
        await made.start()
        try:
            return await self_checked(made, prompts)
        finally:
            await made.close()

    with fake_vllm("smollm2-135m-instruct") as fake:
        assert asyncio.run(test(unguarded_url)) == "smollm2-135m-instruct"
        with pytest.raises(EngineError, match="self-check"):
            asyncio.run(test(unguarded_url, fake.url))
