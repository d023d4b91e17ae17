from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.engines.base import EngineResponse
from server.engines.embedded import EmbeddedEngine
from server.engines.embedded.batch import BatchEngine

PATH = "/v1/chat/completions"


def body(question: str, **fields: Any) -> bytes:
    request = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
        **fields,
    }
    return json.dumps(request).encode()


BODIES = [
    body("What is the capital of France?"),
    body("Name three colours of the rainbow, please.", frequency_penalty=0.6, max_tokens=12),
    body("What is two plus two?", n=2, temperature=1.0, seed=5),
]


async def answers(engine: EmbeddedEngine, bodies: Sequence[bytes]) -> list[Any]:
    async def one(raw: bytes) -> Any:
        response: EngineResponse = await engine.post(PATH, raw, {})
        return json.loads(await response.read())

    await engine.start()
    try:
        return list(await asyncio.gather(*map(one, bodies)))
    finally:
        await engine.close()


def said(answer: Any) -> list[tuple[str, str]]:
    return [(c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]


def test_a_batch_answers_as_one_at_a_time(smollm2_dir: Path) -> None:
    together = asyncio.run(answers(BatchEngine(smollm2_dir, "smollm2", threads=2), BODIES))
    alone = asyncio.run(answers(EmbeddedEngine(smollm2_dir, "smollm2", threads=2), BODIES))
    assert [said(a) for a in together] == [said(a) for a in alone]
    assert [a["usage"] for a in together] == [a["usage"] for a in alone]
    first, second = (c["message"]["content"] for c in together[2]["choices"])
    assert first != second


def test_a_bad_request_spoils_no_batch(smollm2_dir: Path) -> None:
    bad = body("Hello", max_tokens=10_000_000)
    found = asyncio.run(answers(BatchEngine(smollm2_dir, "smollm2", threads=2), [bad, BODIES[0]]))
    assert found[0]["error"]["code"] == "context_length_exceeded"
    assert said(found[1])[0][0]
