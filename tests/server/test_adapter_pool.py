"""The vLLM engine with adapters, against a server that loads them as vLLM does; faults above all.

The server follows vLLM 0.32 (`entrypoints/serve/lora`, `openai/models/serving.py`), its words
included; tests/vllm has the real one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import load_file, save_file

from guard.cli_compose import adapter_options, make_engine
from guard.cli_session import Session
from guard.errors import ConfigError, EngineError, EngineUnavailableError
from guard.types import AdapterUse
from server.app import create_app
from server.engines.adapter_choice import AdapterOptions
from server.engines.vllm import VllmEngine, VllmTimeouts
from tests.server.proxy_fakes import WordGuard

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BODY = b'{"model": "m2",  "messages": [{"role":"user","content":"hi"}], "seed": 1}'


@dataclass
class FakeVllm:
    """A vLLM of two names, `m` and `m2`.

    Attributes:
        loaded: Folder by name.
        log: What was asked of it: `load`, `unload` or `chat`, and the name.
        has_lora: Started with `--enable-lora`.
        has_routes: Started with VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        gate: Answers and loads wait for it.
        forgetful: It says that it loaded, and doesn't know the adapter.
    """

    loaded: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    has_lora: bool = True
    has_routes: bool = True
    forgetful: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    chat_gate: asyncio.Event = field(default_factory=asyncio.Event)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    def did(self, what: str) -> int:
        return sum(done == what for done, _ in self.log)

    async def load(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name, path = asked["lora_name"], asked["lora_path"]
        self.log.append(("load", name))
        await self.gate.wait()
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded. If you want ...")
        if not self.has_lora:
            return error(
                500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora"
            )
        if not config_of(path):
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        self.loaded[name] = path
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.log.append(("unload", name))
        if self.loaded.pop(name, None) is None:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def models(self, _: web.Request) -> web.Response:
        cards = [{"id": name, "parent": None} for name in ("m", "m2")]
        cards += [{"id": name, "root": path, "parent": "m"} for name, path in self.loaded.items()]
        return web.json_response({"object": "list", "data": cards})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        body = json.loads(self.bodies[-1])
        name = body["model"]
        self.log.append(("chat", name))
        if (name not in self.loaded or self.forgetful) and name not in ("m", "m2"):
            return error(404, f"The model `{name}` does not exist.")
        if body.get("n") == 0:
            return error(400, f"model {name}: n must be at least 1")
        spoken = "m" if name in ("m", "m2") else name
        event = b'data: {"id": 1, "model":"%s", "choices": []}\n\n' % spoken.encode()
        if not body.get("stream"):
            await self.chat_gate.wait()
            return web.Response(body=event[6:-2], content_type="application/json")
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        cut = event.index(spoken.encode()) + 5
        for piece in (event[:cut], event[cut:], event):
            await answer.write(piece)
            await asyncio.sleep(0.01)
        await self.chat_gate.wait()
        await answer.write(b"data: [DONE]\n\n")
        return answer


def error(status: int, message: str) -> web.Response:
    fault = {"message": message, "type": "Error", "param": None, "code": status}
    return web.json_response({"error": fault}, status=status)


@asynccontextmanager
async def vllm(**options: Any) -> AsyncIterator[tuple[FakeVllm, VllmEngine]]:
    fake = FakeVllm(**{k: options.pop(k) for k in ("has_lora", "has_routes") if k in options})
    fake.gate.set()
    fake.chat_gate.set()
    app = web.Application()
    app.router.add_post(CHAT, fake.chat)
    app.router.add_get("/v1/models", fake.models)
    if fake.has_routes:
        app.router.add_post("/v1/load_lora_adapter", fake.load)
        app.router.add_post("/v1/unload_lora_adapter", fake.unload)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    timeouts = VllmTimeouts(connect=2, read=5, control=5, adapter=5)
    engine = VllmEngine(fake.url, timeouts=timeouts, adapters=AdapterOptions(**options))
    await engine.start()
    try:
        yield fake, engine
    finally:
        await engine.close()
        await runner.cleanup()


@pytest.fixture
def uses(tmp_path: Path) -> list[AdapterUse]:
    """Four adapters of rank 8."""
    return [adapter(tmp_path / f"target-{number}", number) for number in range(4)]


def adapter(path: Path, seed: int, rank: int = 8) -> AdapterUse:
    path.mkdir()
    rng = np.random.default_rng(seed)
    shapes = {"A": (rank, 6), "B": (5, rank)}
    tensors = {
        f"base_model.model.layers.0.q_proj.lora_{half}.weight": rng.normal(size=shape).astype("f2")
        for half, shape in shapes.items()
    }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return AdapterUse(f"key-{seed}", path, rank, 1.0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def ask(engine: VllmEngine, adapters: Sequence[AdapterUse], body: bytes = BODY) -> Any:
    response = await engine.post(CHAT, body, JSON, adapters)
    assert response.status == 200, await response.read()
    return json.loads(await response.read())


async def settled(engine: VllmEngine, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to pass")


def config_of(path: str) -> dict[str, Any]:
    """Read a peft config; empty if there is none."""
    file = Path(path, "adapter_config.json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def alpha(path: str) -> float:
    return float(config_of(path)["lora_alpha"])


# --- Names ---------------------------------------------------------------------------------------


def test_a_client_never_sees_the_name(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses[:1])
            assert await engine.models() == ["m", "m2"]
            with_one = await engine.post(CHAT, BODY, JSON, uses[:1])
            without = await engine.post(CHAT, BODY, JSON)
            assert await with_one.read() == await without.read()
            assert with_one.headers == without.headers
            streams = []
            for adapters in (uses[:1], []):
                streamed = BODY.replace(b'"seed"', b'"stream": true, "seed"')
                response = await engine.post(CHAT, streamed, JSON, adapters)
                streams.append(await response.read())
            assert streams[0] == streams[1]
            refused = await engine.post(CHAT, BODY.replace(b'"seed"', b'"n": 0, "s"'), JSON, uses)
            assert refused.status == 400
            assert b"model m2: n must" in await refused.read()
            sent = fake.bodies[0]
            assert json.loads(sent).pop("model") in fake.loaded
            assert b'[{"role":"user","content":"hi"}]' in sent and b'"seed":1' in sent

    run(test)


def test_names_say_nothing_and_are_others_in_each_process(uses: list[AdapterUse]) -> None:
    async def names() -> set[str]:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses)
            return set(fake.loaded)

    one, two = asyncio.run(names()), asyncio.run(names())
    assert len(one) == 12 and not one & two
    for name in one | two:
        assert len(name) == 32 and int(name, 16)
        assert not any(use.key in name for use in uses)


def test_a_client_can_neither_list_nor_ask_for_an_adapter(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses[:1])
            transport = httpx.ASGITransport(create_app(WordGuard(), engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://guard") as client:
                listed = (await client.get("/v1/models")).json()["data"]
                assert [model["id"] for model in listed] == ["m", "m2"]
                refusals = []
                for name in [*fake.loaded, "0123456789abcdef" * 2]:
                    answer = await client.post(
                        CHAT, content=BODY.replace(b"m2", name.encode()), headers=JSON
                    )
                    assert answer.status_code == 404
                    refusals.append(answer.text.replace(name, "NAME"))
                assert len(set(refusals)) == 1, "a name that exists is refused as any other"
                assert fake.did("chat") == 0

    run(test)


# --- Strengths and the number loaded -------------------------------------------------------------


def test_the_nearest_strength_answers(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses[:2])
            assert sorted(map(alpha, fake.loaded.values())) == pytest.approx([4, 4, 8, 8, 12, 12])
            chosen = []
            for weight in (0.001, 0.6, 0.9, 1.2):
                await ask(engine, [replace(uses[1], weight=weight)])
                chosen.append(alpha(fake.loaded[fake.log[-1][1]]))
            assert chosen == pytest.approx([4, 8, 12, 12])
            assert (engine.adapter_counts.hits, engine.adapter_counts.loads) == (4, 6)

    run(test)


def test_full_strength_is_loaded_first_and_only_what_fits(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm(max_loaded=6) as (fake, engine):
            await engine.sync_adapters(uses)
            assert sorted(map(alpha, fake.loaded.values())) == pytest.approx([8] * 2 + [12] * 4)
            before = set(fake.loaded)
            await ask(engine, [replace(uses[3], weight=0.1)])
            await settled(engine, lambda: len(fake.loaded) == 6)
            (gone,) = before - set(fake.loaded)
            assert fake.log.count(("unload", gone)) == 1
            assert sorted(map(alpha, fake.loaded.values())) == pytest.approx([4, 8] + [12] * 4)
            assert (engine.adapter_counts.evictions, engine.adapters_loaded) == (1, 6)

    run(test)


def test_the_least_recently_used_that_nobody_uses_makes_room(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm(max_loaded=2, strengths=1) as (fake, engine):
            await engine.sync_adapters(uses)
            names = {}
            for use in uses[:2]:
                await ask(engine, [use])
                names[use.key] = fake.log[-1][1]
            fake.chat_gate.clear()
            running = asyncio.create_task(ask(engine, uses[:1]))  # the oldest, but in use from here
            await settled(engine, lambda: fake.did("chat") == 3)
            later = asyncio.create_task(ask(engine, uses[2:3]))
            await settled(engine, lambda: fake.did("unload") == 1)
            assert ("unload", names["key-1"]) in fake.log
            fake.chat_gate.set()
            await asyncio.gather(running, later)
            assert names["key-0"] in fake.loaded

    run(test)


def test_more_in_use_than_fit_are_answered_all_the_same(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm(max_loaded=1, strengths=1) as (fake, engine):
            await engine.sync_adapters(uses)
            fake.chat_gate.clear()
            tasks = [asyncio.create_task(ask(engine, [use])) for use in uses]
            await settled(engine, lambda: fake.did("chat") == 4)
            assert fake.did("unload") == 0
            fake.chat_gate.set()
            await asyncio.gather(*tasks)
            await settled(engine, lambda: len(fake.loaded) == 1)

    run(test)


# --- Given up and lost ---------------------------------------------------------------------------


def test_a_given_up_adapter_is_unloaded_after_its_last_user(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm(strengths=1) as (fake, engine):
            await engine.sync_adapters(uses[:2])
            fake.chat_gate.clear()
            streamed = BODY.replace(b'"seed"', b'"stream": true, "seed"')
            response = await engine.post(CHAT, streamed, JSON, uses[:1])
            name = fake.log[-1][1]
            path = fake.loaded[name]
            await engine.sync_adapters(uses[1:])
            assert name in fake.loaded and config_of(path) and len(fake.loaded) == 4
            fake.chat_gate.set()
            assert (await response.read()).endswith(b"[DONE]\n\n")
            await settled(engine, lambda: name not in fake.loaded and not config_of(path))
            assert len(fake.loaded) == 3

    run(test)


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_client_that_leaves_gives_its_adapter_back(uses: list[AdapterUse], how: str) -> None:
    async def test() -> None:
        async with vllm(strengths=1) as (fake, engine):
            await engine.sync_adapters(uses[:1])
            fake.chat_gate.clear()
            if how == "closed":
                streamed = BODY.replace(b'"seed"', b'"stream": true, "seed"')
                response = await engine.post(CHAT, streamed, JSON, uses[:1])
                await anext(response.chunks)
                await engine.sync_adapters([])
                assert len(fake.loaded) == 1
                await response.aclose()
            else:
                task = asyncio.create_task(ask(engine, uses[:1]))
                await settled(engine, lambda: fake.did("chat") == 1)
                await engine.sync_adapters([])
                assert len(fake.loaded) == 1
                task.cancel()
            await settled(engine, lambda: not fake.loaded)

    run(test)


def test_a_request_decided_before_the_reload_still_gets_its_adapter(
    uses: list[AdapterUse],
) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses[:1])
            await engine.sync_adapters([])
            assert not fake.loaded
            await ask(engine, uses[:1])
            assert fake.log[-1][0] == "chat" or fake.log[-1][0] == "unload"
            await settled(engine, lambda: not fake.loaded)

    run(test)


def test_what_a_restarted_vllm_lost_is_loaded_once_for_all_that_wait(
    uses: list[AdapterUse],
) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses)
            fake.loaded.clear()
            answers = await asyncio.gather(*(ask(engine, uses[:1]) for _ in range(5)))
            assert [answer["model"] for answer in answers] == ["m"] * 5
            assert fake.did("load") == 13
            assert len(fake.loaded) == 1
            assert engine.adapter_counts.lost == 1

    run(test)


def test_an_adapter_that_vllm_never_finds_is_an_error_and_no_bare_answer(
    uses: list[AdapterUse],
) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            fake.forgetful = True
            with pytest.raises(EngineUnavailableError, match="--api-server-count 1"):
                await ask(engine, uses[:1])
            assert fake.did("chat") == 2
            assert {name for what, name in fake.log if what == "chat"} <= {
                name for what, name in fake.log if what == "load"
            }

    run(test)


def test_an_answer_lost_on_the_way_of_loading_does_no_harm(uses: list[AdapterUse]) -> None:
    """vLLM loaded it, but we never heard: it then says `already loaded`, which is fine."""

    async def test() -> None:
        async with vllm(strengths=1) as (fake, engine):
            await engine.sync_adapters(uses[:1])
            (entry,) = engine._adapters.pool._entries.values()
            entry.is_loaded = False
            assert (await ask(engine, uses[:1]))["model"] == "m"
            assert fake.did("load") == 2

    run(test)


# --- At the same time ----------------------------------------------------------------------------


def test_requests_at_once_load_once(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            fake.gate.clear()
            tasks = [asyncio.create_task(ask(engine, uses[:1])) for _ in range(6)]
            await settled(engine, lambda: fake.did("load") == 1)
            tasks[0].cancel()  # whoever began the load leaves; the others need it still
            await asyncio.sleep(0.05)
            fake.gate.set()
            answers = await asyncio.gather(*tasks[1:])
            assert [answer["model"] for answer in answers] == ["m"] * 5
            assert fake.did("load") == 1

    run(test)


def test_much_coming_and_going_ends_in_order(uses: list[AdapterUse], tmp_path: Path) -> None:
    """Few slots, reloads, restarts and clients that leave: nothing fails, nothing is left over."""

    async def test() -> None:
        rng = np.random.default_rng(0)
        async with vllm(max_loaded=2, folder=tmp_path / "out") as (fake, engine):

            async def client(number: int) -> None:
                await asyncio.sleep(rng.random() * 0.5)
                use = replace(uses[number % 4], weight=float(rng.random()) + 0.01)
                task = asyncio.create_task(ask(engine, [use]))
                if number % 7 == 0:
                    await asyncio.sleep(rng.random() * 0.02)
                    task.cancel()
                (answer,) = await asyncio.gather(task, return_exceptions=True)
                assert isinstance(answer, dict | asyncio.CancelledError), answer

            async def operator() -> None:
                for step in range(6):
                    await engine.sync_adapters(uses[step % 3 :])
                    await asyncio.sleep(0.05)
                    if step % 2:
                        fake.loaded.clear()

            await asyncio.gather(operator(), *(client(number) for number in range(120)))
            await engine.sync_adapters([])
            await settled(engine, lambda: not fake.loaded)
            assert engine.adapters_loaded == 0
            (home,) = (tmp_path / "out").iterdir()
            await settled(engine, lambda: not list(home.iterdir()))
        assert list((tmp_path / "out").iterdir()) == []

    run(test)


# --- A vLLM that can't ---------------------------------------------------------------------------


def test_a_vllm_without_lora_is_refused_with_the_flags(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        for missing in ({"has_lora": False}, {"has_routes": False}):
            async with vllm(**missing) as (fake, engine):
                await engine.sync_adapters([])
                with pytest.raises(EngineError) as refusal:
                    await engine.sync_adapters(uses)
                for flag in ("--enable-lora", "--max-loras", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
                    assert flag in str(refusal.value)
                with pytest.raises(EngineError, match="--enable-lora"):
                    await ask(engine, uses[:1])
                assert fake.did("chat") == 0, "no answer without the adapter"

    run(test)


def test_a_folder_that_vllm_does_not_see_is_named(uses: list[AdapterUse], tmp_path: Path) -> None:
    async def test() -> None:
        options = {"folder": tmp_path / "here", "upstream_folder": "/nowhere"}
        async with vllm(**options) as (_, engine):
            with pytest.raises(EngineError, match="adapter_dir_upstream") as refusal:
                await engine.sync_adapters(uses)
            assert "/nowhere/guard-" in str(refusal.value)

    run(test)


def test_a_failed_sync_gives_nothing_up(uses: list[AdapterUse], tmp_path: Path) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses[:1])
            before = dict(fake.loaded)
            broken = AdapterUse("broken", tmp_path / "nothing", 8, 1.0)
            with pytest.raises(EngineError, match="nothing"):
                await engine.sync_adapters([broken, *uses[1:]])
            await ask(engine, uses[:1])
            assert before.items() <= fake.loaded.items()

    run(test)


def test_closing_leaves_nothing_in_vllm(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses)
            folders = {Path(path).parent for path in fake.loaded.values()}
            await engine.close()
            assert not fake.loaded
            assert not any(folder.exists() for folder in folders)

    run(test)


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    session = Session()
    session.load(
        engine="vllm",
        upstream="http://127.0.0.1:1",
        adapter_strengths=5,
        adapter_dir=str(tmp_path),
        adapter_dir_upstream="/adapters",
        max_loaded_adapters=7,
        adapters_together="concatenate",
        max_lora_rank=32,
    )
    expected = AdapterOptions(5, tmp_path, "/adapters", 7, "concatenate", 32)
    assert adapter_options(session.settings) == expected
    assert make_engine(session).name == "vllm"
    session.load(engine="vllm", upstream="http://127.0.0.1:1", adapter_dir_upstream="/adapters")
    with pytest.raises(ConfigError, match="adapter_dir"):
        make_engine(session)


# --- Several in one request ----------------------------------------------------------------------


def test_concatenated_ranks_answer_at_once(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm(together="concatenate") as (fake, engine):
            await engine.sync_adapters(uses)
            pair = [uses[0], replace(uses[1], weight=0.4)]
            await ask(engine, pair)
            path = Path(fake.loaded[fake.log[-1][1]])
            tensors = load_file(path / "adapter_model.safetensors")
            assert {tensor.shape for tensor in tensors.values()} == {(16, 6), (5, 16)}
            await ask(engine, pair[::-1])
            assert fake.loaded[fake.log[-1][1]] == str(path), "the order makes no other adapter"
            assert engine.adapter_counts.left_out == 0

    run(test)


def test_a_concatenation_above_the_limit_leaves_out_visibly(
    uses: list[AdapterUse], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with vllm(together="concatenate", max_rank=15) as (fake, engine):
            await engine.sync_adapters(uses)
            for _ in range(3):
                await ask(engine, uses[:2])
                tensors = load_file(Path(fake.loaded[fake.log[-1][1]], "adapter_model.safetensors"))
                first = load_file(uses[0].path / "adapter_model.safetensors")
                assert all(np.array_equal(tensors[name], first[name]) for name in first)
            assert engine.adapter_counts.left_out == 3

    with caplog.at_level(logging.WARNING):
        run(test)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "max_lora_rank" in warning and "key-" not in warning


def test_a_pair_that_recurs_becomes_one_in_the_background(uses: list[AdapterUse]) -> None:
    async def test() -> None:
        async with vllm() as (fake, engine):
            await engine.sync_adapters(uses)
            for _ in range(2):
                await ask(engine, uses[:2])
                await ask(engine, uses[1:3])
            assert fake.did("load") == 12
            fake.gate.clear()
            await ask(engine, uses[:2])  # the third: answered by the strongest, without waiting
            await settled(engine, lambda: fake.did("load") == 13)
            await ask(engine, uses[:2])
            assert engine.adapter_counts.left_out == 6
            fake.gate.set()
            await settled(engine, lambda: engine.adapters_loaded == 13)
            await ask(engine, uses[:2])
            assert engine.adapter_counts.left_out == 6
            assert config_of(fake.loaded[fake.log[-1][1]])["r"] == 16
            await engine.sync_adapters(uses[1:])
            assert len(fake.loaded) == 9, "a pair goes with either of its targets"

    run(test)
