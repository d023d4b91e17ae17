"""The self-check against engines that read embeddings rightly, wrongly, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from guard.embeds import decode_embeds_part
from guard.errors import EngineError, SelfCheckError
from guard.prompts import PLACEHOLDER, ModelPrompts
from guard.types import AdapterUse
from server.engines.base import EngineResponse
from server.selfcheck import SelfCheckReport, self_check


class TokenEngine:
    """Reads a prompt's tokens as an engine does, and answers with a function of them.

    Embeddings are looked up in the engine's own table; the answer is the digest of the tokens, so
    that any other token, anywhere, gives another answer.
    """

    name = "tokens"

    def __init__(self, prompts: ModelPrompts, refuses: tuple[str, ...] = ()) -> None:
        self.prompts, self.refuses = prompts, refuses
        table = prompts.embed(range(prompts.fingerprint.vocab_size))
        self.ids = {row.tobytes(): i for i, row in enumerate(table)}
        self.status = 200
        self.nudge = 0.0
        self.longer = 0

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def health(self) -> None: ...

    async def models(self) -> list[str]:
        return ["tokens"]

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None: ...

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        status, answer = self.answer(path, json.loads(body))

        async def chunks() -> AsyncIterator[bytes]:
            yield json.dumps(answer).encode()

        return EngineResponse(status, [], chunks())

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"error": {"message": "out of order"}}
        embeds: list[str] = []
        if path == "/v1/completions":
            embeds = [body["prompt_embeds"]] if "prompt_embeds" in body else []
            ids = self.prompts.prompt_tokens(body.get("prompt", PLACEHOLDER)).ids
        else:
            messages = []
            for message in body["messages"]:
                if isinstance(message["content"], list):
                    if message["role"] in self.refuses:
                        return 400, {"error": {"message": f"no embeds in {message['role']}"}}
                    embeds.append(message["content"][0]["data"])
                    message = {**message, "content": PLACEHOLDER}
                messages.append(message)
            ids = self.prompts.prompt_tokens(self.prompts.render(messages), False).ids
        special = self.prompts.prompt_tokens(PLACEHOLDER, False).ids[0]
        if embeds:
            rows = decode_embeds_part(embeds[0], 10_000_000)
            found = [self.ids.get(row.tobytes(), -1) for row in rows]
            at = ids.index(special)
            ids = ids[:at] + found + ids[at + 1 :]
        return 200, self.reply(path, ids, body["max_tokens"], bool(embeds))

    def reply(self, path: str, ids: list[int], count: int, embeds: bool) -> Any:
        digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:count]
        value = -1.0 - (self.nudge if embeds else 0.0)
        usage = {"prompt_tokens": len(ids) + (self.longer if embeds else 0)}
        if path == "/v1/completions":
            logprobs: Any = {
                "tokens": list(digest),
                "token_logprobs": [value] * count,
                "top_logprobs": [{token: value} for token in digest],
            }
        else:
            logprobs = {
                "content": [
                    {"token": t, "logprob": value, "top_logprobs": [{"token": t, "logprob": value}]}
                    for t in digest
                ]
            }
        return {"choices": [{"logprobs": logprobs}], "usage": usage}


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> ModelPrompts:
    return ModelPrompts.load(smollm2_dir)


@pytest.fixture
def engine(prompts: ModelPrompts) -> TokenEngine:
    return TokenEngine(prompts)


def check(engine: TokenEngine, prompts: ModelPrompts, **kwargs: Any) -> SelfCheckReport:
    return asyncio.run(self_check(engine, prompts, **kwargs))


def test_an_engine_with_the_same_model_passes(engine: TokenEngine, prompts: ModelPrompts) -> None:
    report = check(engine, prompts)
    report.require()
    assert report.passed
    assert report.roles == {"system": "passed", "assistant": "passed", "tool": "passed"}
    assert [c.name for c in report.checks if c.name.startswith("chat")] == [
        "chat user 1",
        "chat user 2",
        "chat user 3",
    ]
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_another_table_fails(engine: TokenEngine, prompts: ModelPrompts) -> None:
    engine.ids = {row: (i + 1) % len(engine.ids) for row, i in engine.ids.items()}
    report = check(engine, prompts)
    assert not report.passed
    with pytest.raises(SelfCheckError, match=r"embedding tables differ.*--model"):
        report.require()


def test_a_template_that_differs_around_the_content_is_harmless(
    engine: TokenEngine, prompts: ModelPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(ModelPrompts):
        def __init__(self) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(prompts, name)

        def render(self, messages: Any, *args: Any, **kwargs: Any) -> str:
            return "Chat:\n" + prompts.render(messages, *args, **kwargs)

    monkeypatch.setattr(engine, "prompts", Other())
    assert check(engine, prompts).passed


def test_other_probabilities_fail_even_where_the_answer_is_equal(
    engine: TokenEngine, prompts: ModelPrompts
) -> None:
    engine.nudge = 0.2
    assert check(engine, prompts).passed
    engine.nudge = 0.3
    assert not check(engine, prompts).passed


def test_another_prompt_length_fails(engine: TokenEngine, prompts: ModelPrompts) -> None:
    engine.longer = 1
    with pytest.raises(SelfCheckError, match="prompt tokens"):
        check(engine, prompts).require()


def test_a_role_without_embeddings_is_reported_and_safe(prompts: ModelPrompts) -> None:
    report = check(TokenEngine(prompts, refuses=("tool",)), prompts)
    assert report.passed
    assert report.roles["tool"] == "refused"
    assert "no embeds in tool" in report.checks[5].detail


def test_the_user_role_must_take_embeddings(prompts: ModelPrompts) -> None:
    with pytest.raises(SelfCheckError, match="no embeds in user"):
        check(TokenEngine(prompts, refuses=("user",)), prompts).require()


def test_a_model_that_is_not_served_fails(engine: TokenEngine, prompts: ModelPrompts) -> None:
    with pytest.raises(SelfCheckError, match="serves tokens, not 'other'"):
        check(engine, prompts, model="other").require()


def test_a_broken_engine_is_an_engine_error(engine: TokenEngine, prompts: ModelPrompts) -> None:
    engine.status = 500
    with pytest.raises(EngineError, match=r"500.*out of order"):
        check(engine, prompts)


def test_an_answer_that_is_no_completion_is_an_engine_error(
    engine: TokenEngine, prompts: ModelPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "reply", lambda *args: ["no"])
    with pytest.raises(EngineError, match="can't be read"):
        check(engine, prompts)


def test_a_near_tie_may_break_either_way(
    engine: TokenEngine, prompts: ModelPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(path: str, ids: list[int], count: int, embeds: bool) -> Any:
        first, other = ("x", "y") if embeds else ("y", "x")
        content = [
            {
                "token": first,
                "logprob": -0.70,
                "top_logprobs": [
                    {"token": first, "logprob": -0.70},
                    {"token": other, "logprob": -0.70 - gap},
                ],
            }
        ]
        return {"choices": [{"logprobs": {"content": content}}], "usage": {"prompt_tokens": 9}}

    monkeypatch.setattr(engine, "reply", reply)
    gap = 0.01
    assert check(engine, prompts, completions=False).passed
    gap = 0.5
    assert not check(engine, prompts, completions=False).passed


def test_only_what_is_asked_for_is_checked(engine: TokenEngine, prompts: ModelPrompts) -> None:
    report = check(engine, prompts, sample=["Hi"], roles=(), completions=False)
    assert [item.name for item in report.checks] == ["chat user 1"]
