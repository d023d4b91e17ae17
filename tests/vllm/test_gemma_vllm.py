"""Gemma-3-270M in a vLLM of its own: clean embeddings as text, corrupted ones not (test-slow)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.embeds import embeds_part
from guard.prompts import ModelPrompts
from server.engines.embedded.packaged import GEMMA3
from server.engines.embedded.prepare import prepare_model
from server.engines.vllm import VllmEngine
from tests.server.gemma_files import require_self_check
from tests.vllm.conftest import SERVED_NAME, started_vllm

pytestmark = pytest.mark.slow

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a guide."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "It is Paris."},
    {"role": "user", "content": "  Who is Harry Potter, and who are his friends? größer 🚀\n"},
]
PARTS = [{"type": "text", "text": "Who is "}, {"type": "text", "text": " Harry Potter?"}]


@pytest.fixture(scope="module")
def gemma_dir() -> Path:
    return prepare_model(GEMMA3)


@pytest.fixture(scope="module")
def prompts(gemma_dir: Path) -> ModelPrompts:
    return ModelPrompts.load(gemma_dir)


@pytest.fixture(scope="module")
def gemma_url(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started_vllm(gemma_dir, tmp_path_factory.mktemp("gemma") / "vllm.log") as url:
        yield url


def ask(url: str, path: str, **fields: Any) -> Any:
    async def work() -> Any:
        engine = VllmEngine(url)
        await engine.start()
        body = {"model": SERVED_NAME, "temperature": 0, "max_tokens": 16, **fields}
        try:
            response = await engine.post(
                path, json.dumps(body).encode(), {"content-type": "application/json"}
            )
            return json.loads(await response.read())
        finally:
            await engine.close()

    answer = asyncio.run(work())
    assert "choices" in answer, answer
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, answer["usage"]["prompt_tokens"]


def chat(url: str, messages: list[dict[str, Any]]) -> Any:
    return ask(url, "/v1/chat/completions", messages=messages)


def replaced(prompts: ModelPrompts, messages: list[dict[str, Any]], index: int) -> Any:
    rows = prompts.embed(prompts.content_tokens(messages, index).ids)
    part = {"type": "prompt_embeds", "data": embeds_part(rows, "float32")}
    return [*messages[:index], {**messages[index], "content": [part]}, *messages[index + 1 :]]


def test_every_role_is_answered_as_its_text(gemma_url: str, prompts: ModelPrompts) -> None:
    expected = chat(gemma_url, CONVERSATION)
    for index in range(len(CONVERSATION)):
        assert chat(gemma_url, replaced(prompts, CONVERSATION, index)) == expected


def test_parts_are_walked_as_the_guard_walks_them(gemma_url: str, prompts: ModelPrompts) -> None:
    messages = [{"role": "user", "content": PARTS}]
    assert chat(gemma_url, replaced(prompts, messages, 0)) == chat(gemma_url, messages)


def test_a_completion_is_answered_as_its_text(gemma_url: str, prompts: ModelPrompts) -> None:
    text = "The three primary colours are"
    embeds = embeds_part(prompts.embed(prompts.prompt_tokens(text).ids), "float32")
    expected = ask(gemma_url, "/v1/completions", prompt=text)
    assert expected[0].startswith(" red, yellow and blue")
    assert ask(gemma_url, "/v1/completions", prompt_embeds=embeds) == expected


def test_raw_rows_of_the_table_are_not_what_vllm_reads(
    gemma_url: str, prompts: ModelPrompts
) -> None:
    text = "The three primary colours are"
    rows = prompts.embed(prompts.prompt_tokens(text).ids) / prompts.fingerprint.embed_scale
    raw = ask(gemma_url, "/v1/completions", prompt_embeds=embeds_part(rows, "float32"))
    assert raw != ask(gemma_url, "/v1/completions", prompt=text)


def test_the_self_check_passes(gemma_url: str, prompts: ModelPrompts) -> None:
    require_self_check(VllmEngine(gemma_url), prompts)
