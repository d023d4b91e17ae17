"""Adapters on a real vLLM: routed by strength, as the embedded engine answers, and never lost."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guard.embeds import embeds_part
from guard.errors import EngineError, EngineUnavailableError
from guard.prompts import ModelPrompts
from guard.types import AdapterUse
from server.engines.adapter_choice import AdapterOptions
from server.engines.base import Engine
from server.engines.embedded import EmbeddedEngine
from server.engines.vllm import VllmEngine
from tests.server.random_lora import ATTENTION, FORWARD, write_lora
from tests.vllm.conftest import SERVED_NAME, free_port, started_vllm

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
MODEL = SERVED_NAME
STEPS = (1 / 3, 2 / 3, 1.0)
QUESTIONS = ("What is the capital of France?", "Name a large animal of Africa.")


@pytest.fixture(scope="module")
def uses(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    """Two adapters that change answers at every strength."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [
        write_lora(folder / "one", ATTENTION | FORWARD, seed=1, rank=4, spread=0.05),
        write_lora(folder / "two", FORWARD, seed=2, rank=8, spread=0.05),
    ]
    ranks = [json.loads((path / "adapter_config.json").read_text())["r"] for path in made]
    return [
        AdapterUse(f"secret-{path.name}", path, rank, 1.0)
        for path, rank in zip(made, ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def embedded(smollm2_dir: Path) -> Iterator[Callable[..., list[str]]]:
    """Answers of the embedded engine, whose weights are exact."""
    with asyncio.Runner() as runner:
        engine = EmbeddedEngine(smollm2_dir, MODEL, threads=2)
        runner.run(engine.start())
        yield lambda adapters: runner.run(answers(engine, adapters))
        runner.run(engine.close())


def with_engine(url: str, work: Callable[[VllmEngine], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        engine = VllmEngine(url, adapters=AdapterOptions(**options))
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def ask(
    engine: Engine, path: str, adapters: Sequence[AdapterUse], **fields: Any
) -> dict[str, Any]:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 10, **fields}
    response = await engine.post(path, json.dumps(body).encode(), JSON, adapters)
    text = await response.read()
    assert response.status == 200, text
    answer: dict[str, Any] = json.loads(text)
    assert answer["model"] == MODEL
    return answer


async def answers(
    engine: Engine, adapters: Sequence[AdapterUse], questions: Sequence[str] = QUESTIONS
) -> list[str]:
    """Greedy answers to the questions."""
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        answer = await ask(engine, CHAT, adapters, messages=messages)
        found.append(answer["choices"][0]["message"]["content"])
    return found


def listed(url: str) -> set[str]:
    """The adapters that vLLM itself lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return {card["id"] for card in json.load(answer)["data"] if card["parent"]}


def test_strengths_answer_as_the_embedded_engine_does(
    vllm_url: str, uses: list[AdapterUse], embedded: Callable[..., list[str]]
) -> None:
    plain = embedded([])
    asked = [(use, step) for use in uses for step in STEPS]
    expected = [embedded([replace(use, weight=step)]) for use, step in asked]
    seen = {tuple(said) for said in [plain, *expected]}
    assert len(seen) == 7, "each adapter at each strength must change the answers"

    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses)
        assert len(listed(vllm_url)) == 6
        assert await engine.models() == [MODEL]
        assert await answers(engine, []) == plain
        near = dict(zip(STEPS, (0.4, 0.6, 1.2), strict=True))
        for (use, step), said in zip(asked, expected, strict=True):
            assert await answers(engine, [replace(use, weight=near[step])]) == said
        assert await answers(engine, []) == plain
        assert engine.adapter_counts.loads == 6

    with_engine(vllm_url, work)
    assert not listed(vllm_url), "closing leaves nothing behind"


def test_two_at_once_are_one_of_concatenated_ranks(
    vllm_url: str, uses: list[AdapterUse], embedded: Callable[..., list[str]]
) -> None:
    pair = [replace(uses[0], weight=1 / 3), replace(uses[1], weight=2 / 3)]
    both, first = embedded(pair), embedded(pair[:1])
    assert both != first

    async def work(engine: VllmEngine) -> list[str]:
        await engine.sync_adapters(uses)
        return await answers(engine, pair)

    assert with_engine(vllm_url, work, together="concatenate") == both
    assert with_engine(vllm_url, work, together="strongest") == first
    assert with_engine(vllm_url, work, together="concatenate", max_rank=11) == first


def test_streams_and_completions_take_adapters_too(vllm_url: str, uses: list[AdapterUse]) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]

    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses[:1])
        expected = (await answers(engine, uses[:1]))[0]
        body = {"model": MODEL, "temperature": 0, "max_tokens": 10, "stream": True}
        sent = json.dumps({**body, "messages": messages}).encode()
        response = await engine.post(CHAT, sent, JSON, uses[:1])
        stream = await response.read()
        events = [line[6:] for line in stream.decode().split("\n\n") if line]
        assert events.pop() == "[DONE]"
        pieces = [json.loads(event) for event in events]
        assert {piece["model"] for piece in pieces} == {MODEL}
        said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
        assert said == expected
        assert not any(name.encode() in stream for name in listed(vllm_url))
        plain = await ask(engine, COMPLETIONS, [], prompt="The capital of France is")
        other = await ask(engine, COMPLETIONS, uses[:1], prompt="The capital of France is")
        assert plain["choices"][0]["text"] != other["choices"][0]["text"]
        assert plain.keys() == other.keys()

    with_engine(vllm_url, work)


def test_adapters_embeddings_and_plain_requests_go_side_by_side(
    vllm_url: str, uses: list[AdapterUse], prompts: ModelPrompts
) -> None:
    """vLLM 0.32's CPU build needs two flags for it: see `Adapters` in docs/vllm.md."""
    text: list[dict[str, Any]] = [{"role": "user", "content": QUESTIONS[1]}]
    rows = prompts.embed(prompts.content_tokens(text, 0).ids)
    embeds = [{"role": "user", "content": [{"type": "prompt_embeds", "data": embeds_part(rows)}]}]
    asked = [(messages, adapters) for messages in (text, embeds) for adapters in ([], uses[:1])]

    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses[:1])
        alone = [await said(engine, *pair) for pair in asked]
        together = await asyncio.gather(*(said(engine, *pair) for pair in asked * 2))
        assert together == alone * 2
        assert alone[:2] == alone[2:] and alone[0] != alone[1]

    async def said(
        engine: VllmEngine, messages: list[dict[str, Any]], adapters: list[AdapterUse]
    ) -> str:
        answer = await ask(engine, CHAT, adapters, messages=messages)
        return str(answer["choices"][0]["message"]["content"])

    with_engine(vllm_url, work)


def test_an_error_does_not_tell_the_name(vllm_url: str, uses: list[AdapterUse]) -> None:
    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses[:1])
        refusals = []
        for adapters in (uses[:1], []):
            for fields in ({"temperature": -1}, {"max_tokens": -1}, {"n": "many"}):
                messages = [{"role": "user", "content": "x"}]
                body = {"model": MODEL, "messages": messages, "max_tokens": 1, **fields}
                response = await engine.post(CHAT, json.dumps(body).encode(), JSON, adapters)
                assert response.status == 400
                refusals.append(await response.read())
        assert refusals[:3] == refusals[3:]

    with_engine(vllm_url, work)


def test_a_reload_unloads_what_is_given_up(vllm_url: str, uses: list[AdapterUse]) -> None:
    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses)
        before, kept = listed(vllm_url), await answers(engine, uses[1:])
        await engine.sync_adapters(uses[1:])
        assert len(before) == 6 and len(listed(vllm_url)) == 3 and listed(vllm_url) < before
        assert await answers(engine, uses[1:]) == kept

    with_engine(vllm_url, work)


def test_more_than_fit_take_turns(vllm_url: str, uses: list[AdapterUse]) -> None:
    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses)
        assert len(listed(vllm_url)) == 2
        weights = [replace(use, weight=step) for use in uses for step in STEPS]
        once = [await answers(engine, [use], QUESTIONS[:1]) for use in weights]
        assert [await answers(engine, [use], QUESTIONS[:1]) for use in weights] == once
        for _ in range(50):
            if len(listed(vllm_url)) == 2:
                break
            await asyncio.sleep(0.05)
        assert len(listed(vllm_url)) == 2
        assert engine.adapter_counts.evictions >= 9

    with_engine(vllm_url, work, max_loaded=2)


def test_what_is_unloaded_behind_our_back_is_loaded_again(
    vllm_url: str, uses: list[AdapterUse]
) -> None:
    async def work(engine: VllmEngine) -> None:
        await engine.sync_adapters(uses)
        expected = await answers(engine, uses[:1])
        for name in listed(vllm_url):
            post(vllm_url, "/v1/unload_lora_adapter", {"lora_name": name})
        assert not listed(vllm_url)
        assert (
            await asyncio.gather(*(answers(engine, uses[:1]) for _ in range(3))) == [expected] * 3
        )
        assert len(listed(vllm_url)) == 1
        assert engine.adapter_counts.lost == 1

    with_engine(vllm_url, work)


def test_a_folder_that_vllm_can_not_read_is_said(
    vllm_url: str, uses: list[AdapterUse], tmp_path: Path
) -> None:
    async def work(engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match="adapter_dir_upstream"):
            await engine.sync_adapters(uses)

    with_engine(vllm_url, work, folder=tmp_path, upstream_folder="/not/there")


def test_a_rank_above_the_limit_is_said(vllm_url: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "wide", FORWARD, rank=24)

    async def work(engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match="--max-lora-rank"):
            await engine.sync_adapters([AdapterUse("wide", path, 24, 1.0)])

    with_engine(vllm_url, work)


def test_a_restarted_vllm_gets_its_adapters_again(
    smollm2_dir: Path, uses: list[AdapterUse], tmp_path: Path
) -> None:
    """A vLLM of our own, stopped and started again under the same address."""
    port = free_port()

    async def work(engine: VllmEngine) -> None:
        with started_vllm(smollm2_dir, tmp_path / "before.log", port):
            await engine.sync_adapters(uses)
            expected = [await answers(engine, [use]) for use in uses]
        with pytest.raises(EngineUnavailableError):
            await answers(engine, uses[:1])
        with started_vllm(smollm2_dir, tmp_path / "after.log", port) as url:
            assert not listed(url)
            assert [await answers(engine, [use]) for use in uses] == expected
            assert len(listed(url)) == 2
            assert engine.adapter_counts.lost == 2

    with_engine(f"http://127.0.0.1:{port}", work)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["--enable-lora", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_a_vllm_started_without_is_refused_with_the_flags(
    smollm2_dir: Path, uses: list[AdapterUse], tmp_path: Path, missing: str
) -> None:
    port = free_port()

    async def work(engine: VllmEngine) -> None:
        with started_vllm(smollm2_dir, tmp_path / "vllm.log", port, missing):
            await engine.sync_adapters([])
            with pytest.raises(EngineError) as refusal:
                await engine.sync_adapters(uses)
            assert "--enable-lora" in str(refusal.value)
            assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in str(refusal.value)
            await engine.health()
            await answers(engine, [])

    with_engine(f"http://127.0.0.1:{port}", work)


def post(url: str, path: str, fields: dict[str, Any]) -> None:
    request = urllib.request.Request(url + path, json.dumps(fields).encode(), JSON)
    urllib.request.urlopen(request, timeout=30).close()
