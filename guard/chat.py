"""One turn of a conversation through the guard, as the server would answer it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guard.errors import CannotCorruptError, EngineRefusedError
from guard.pipeline import Inspection
from guard.restore import NameRestorer
from guard.types import AdapterUse

if TYPE_CHECKING:
    from server.engines.base import Engine
    from server.types import GuardLike

ENDPOINT = "/v1/chat/completions"
_REFUSED = "This request can't be answered here; rephrase it or leave that content out."


@dataclass(slots=True)
class Turn:
    """A turn: what was decided, and the answer as it comes."""

    inspection: Inspection
    answer: AsyncIterator[str]


async def ask(
    guard: GuardLike,
    engine: Engine,
    model: str,
    messages: Sequence[dict[str, str]],
    max_tokens: int,
    temperature: float,
) -> Turn:
    """Send the conversation and return the answer's pieces.

    Raises:
        RequestError: If the guard doesn't accept it.
        EngineError: If the engine fails.
    """
    body = _body(model, messages, max_tokens, temperature)
    inspection = await asyncio.to_thread(guard.inspect, ENDPOINT, body)
    if inspection.decision.flagged:
        await asyncio.to_thread(guard.record, inspection)
    route = inspection.decision.route
    restorer = NameRestorer(())
    adapters: tuple[AdapterUse, ...] = ()
    if route not in ("pass", "refuse", "block"):
        try:
            rewritten = await asyncio.to_thread(guard.rewrite, inspection)
            body, restorer = rewritten.body, NameRestorer(rewritten.stand_ins)
            adapters = rewritten.adapters
        except CannotCorruptError:
            route = "refuse"
    if route in ("refuse", "block"):
        return Turn(inspection, _once(_REFUSED))
    return Turn(inspection, _named(_pieces(engine, body, adapters), restorer))


def _body(
    model: str, messages: Sequence[dict[str, str]], max_tokens: int, temperature: float
) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
    }
    return json.dumps(body).encode()


async def _once(text: str) -> AsyncIterator[str]:
    yield text


async def _named(pieces: AsyncIterator[str], restorer: NameRestorer) -> AsyncIterator[str]:
    async for piece in pieces:
        if text := restorer.feed(piece):
            yield text
    if rest := restorer.flush():
        yield rest


async def _pieces(
    engine: Engine, body: bytes, adapters: Sequence[AdapterUse]
) -> AsyncIterator[str]:
    """Post the request and read the answer's text out of its event stream."""
    answer = await engine.post(ENDPOINT, body, {"content-type": "application/json"}, adapters)
    try:
        if answer.status != 200:
            raise EngineRefusedError(answer.status, await answer.read())
        waiting = b""
        async for chunk in answer.chunks:
            *events, waiting = (waiting + chunk).split(b"\n\n")
            for event in events:
                if text := _text_of(event):
                    yield text
    finally:
        await answer.aclose()


def _text_of(event: bytes) -> str:
    data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    if not data or data == b"[DONE]":
        return ""
    value = json.loads(data)
    if "error" in value:
        raise EngineRefusedError(500, data)
    choices = value.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
