from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from guard.errors import EngineError
from guard.types import AdapterUse
from server.engines.base import EngineResponse
from server.engines.embedded import EmbeddedEngine
from server.engines.embedded.batch import BatchEngine
from server.engines.embedded.lora_files import adapter_at
from tests.server.random_lora import write_lora

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


async def read(engine: EmbeddedEngine, raw: bytes, adapters: Sequence[AdapterUse] = ()) -> Any:
    response: EngineResponse = await engine.post(PATH, raw, {}, adapters)
    return json.loads(await response.read())


async def answers(engine: EmbeddedEngine, bodies: Sequence[bytes]) -> list[Any]:
    await engine.start()
    try:
        return list(await asyncio.gather(*(read(engine, raw) for raw in bodies)))
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


class RecordingEngine(BatchEngine):
    """Says how many requests each batch had."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []

    async def _answer(self, batch: Sequence[Any]) -> None:
        self.sizes.append(len(batch))
        await super()._answer(batch)


def test_like_adapters_at_like_weights_run_together(smollm2_dir: Path, tmp_path: Path) -> None:
    one = adapter_at(write_lora(tmp_path / "one", spread=0.05), 0.37)
    two = adapter_at(write_lora(tmp_path / "two", spread=0.05, seed=1), 0.8)
    missing = AdapterUse("missing", tmp_path / "missing", 2, 1.0)
    uses = [(), (one,), (one, two), (one,), (), (replace(one, weight=0.9),), (two, one)]
    bodies = [BODIES[0], BODIES[0], *BODIES[:2], BODIES[1], BODIES[0], BODIES[1]]
    engine = RecordingEngine(smollm2_dir, "smollm2", threads=2)

    async def go(together: bool) -> list[Any]:
        posts = [read(engine, raw, used) for raw, used in zip(bodies, uses, strict=True)]
        return list(await asyncio.gather(*posts)) if together else [await post for post in posts]

    async def both() -> tuple[list[Any], list[Any]]:
        await engine.start()
        try:
            refused, *found = await asyncio.gather(
                engine.post(PATH, BODIES[0], {}, [missing]), go(True), return_exceptions=True
            )
            assert isinstance(refused, EngineError)
            together, engine.sizes = engine.sizes, []
            assert sorted(together) == [1, 2, 2, 2]
            alone = await go(False)
            assert engine.sizes == [1] * len(bodies)
            return found[0], alone
        finally:
            await engine.close()

    together, alone = asyncio.run(both())
    assert [said(a) for a in together] == [said(a) for a in alone]
    assert len({str(said(together[i])) for i in (0, 1, 2, 5)}) >= 3, "adapters must matter here"
