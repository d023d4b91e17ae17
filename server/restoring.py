"""Puts asked names back into an engine's answer, whole or streamed (`guard.restore`).

The answer keeps its shape: as many events as the engine sent, the same fields. A piece that is held
back leaves its event with less text or none, and goes out with a later event of the same choice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from guard.restore import NameRestorer
from guard.rewrite import StandIn
from server.engines.base import EngineResponse

_TEXTS: Final = ("content", "reasoning_content", "reasoning", "refusal")
_EVENT_END: Final = b"\n\n"


async def restored(
    response: EngineResponse, stand_ins: Sequence[StandIn], may_grow: bool = False
) -> EngineResponse:
    """Make an answer name whom the client asked about.

    A whole answer keeps its `content-length`: without one, its headers would tell that it was
    flagged.

    Args:
        response: A 2xx answer in the form of chat or text completions.
        stand_ins: Names that the model read instead; none returns the answer as it is.
        may_grow: More may be added to `stand_ins` while a streamed answer comes.
    """
    if not (stand_ins or may_grow):
        return response
    streamed = any(
        name.lower() == "content-type" and value.startswith("text/event-stream")
        for name, value in response.headers
    )
    if streamed:
        return EngineResponse(response.status, response.headers, _events(response, stand_ins))
    if not stand_ins:
        return response
    try:
        body = _whole(await response.read(), stand_ins)
    finally:
        await response.aclose()
    headers = [
        (name, str(len(body)) if name.lower() == "content-length" else value)
        for name, value in response.headers
    ]
    return EngineResponse(response.status, headers, _once(body))


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def _whole(body: bytes, stand_ins: Sequence[StandIn]) -> bytes:
    answer = msgspec.json.decode(body)
    for choice in answer.get("choices", ()):
        restorer = NameRestorer(stand_ins)
        _each_text(choice, partial(_put_back, restorer))
        _tokens(choice.get("logprobs"), restorer)
    return msgspec.json.encode(answer)


async def _events(
    response: EngineResponse, stand_ins: Sequence[StandIn]
) -> AsyncGenerator[bytes, None]:
    stream = _Stream(stand_ins)
    rest = b""
    try:
        async for chunk in response.chunks:
            *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(_EVENT_END)
            for event in events:
                yield stream.event(event) + _EVENT_END
    finally:
        await response.aclose()
    if rest:
        yield stream.event(rest)


def _put_back(restorer: NameRestorer, _field: str, text: str) -> str:
    return restorer.restore(text)


class _Stream:
    """The restorers of a stream's choices and fields."""

    def __init__(self, stand_ins: Sequence[StandIn]) -> None:
        self._stand_ins = stand_ins
        self._restorers: dict[tuple[int, str], tuple[int, NameRestorer]] = {}

    def event(self, event: bytes) -> bytes:
        """Rewrite one event; comments and `[DONE]` stay as they are."""
        if not (self._stand_ins and event.startswith(b"data:")):
            return event
        data = event.removeprefix(b"data:").strip()
        if not data.startswith(b"{"):
            return event
        body = msgspec.json.decode(data)
        for choice in body.get("choices", ()):
            self._choice(choice)
        return b"data: " + msgspec.json.encode(body)

    def _choice(self, choice: dict[str, Any]) -> None:
        number = choice.get("index", 0)
        ended = choice.get("finish_reason") is not None
        seen: set[str] = set()

        def put(field: str, text: str) -> str:
            seen.add(field)
            before, restorer = self._restorer(number, field)
            out = before + restorer.feed(text)
            return out + restorer.flush() if ended else out

        _each_text(choice, put)
        _tokens(choice.get("logprobs"), NameRestorer(self._stand_ins))
        if ended:
            self._give_rest(choice, number, seen)

    def _give_rest(self, choice: dict[str, Any], number: int, seen: set[str]) -> None:
        """Put what is still held into the last event, which may have no text of its own."""
        for (owner, field), (_, restorer) in self._restorers.items():
            if owner == number and field not in seen and (rest := restorer.flush()):
                _set_text(choice, field, rest)

    def _restorer(self, number: int, field: str) -> tuple[str, NameRestorer]:
        """Return a field's restorer, and what is left of one that knew fewer names."""
        known, restorer = self._restorers.get((number, field), (-1, None))
        if restorer is not None and known == len(self._stand_ins):
            return "", restorer
        left = "" if restorer is None else restorer.flush()
        fresh = NameRestorer(self._stand_ins)
        self._restorers[number, field] = len(self._stand_ins), fresh
        return left, fresh


def _each_text(choice: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Let `change(field, text)` rewrite every text that a choice carries."""
    if isinstance(choice.get("text"), str):
        choice["text"] = change("text", choice["text"])
    message = choice.get("message") or choice.get("delta") or {}
    for field in _TEXTS:
        if isinstance(message.get(field), str):
            message[field] = change(field, message[field])
    for place, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), str):
            field = f"tool/{call.get('index', place)}"
            function["arguments"] = change(field, function["arguments"])


def _set_text(choice: dict[str, Any], field: str, text: str) -> None:
    if field == "text":
        choice["text"] = text
        return
    delta = choice.setdefault("delta", {})
    if field.startswith("tool/"):
        call = {"index": int(field.removeprefix("tool/")), "function": {"arguments": text}}
        delta.setdefault("tool_calls", []).append(call)
    else:
        delta[field] = text


def _tokens(logprobs: Any, restorer: NameRestorer) -> None:
    """Rewrite tokens that are a stand-in's word; what stands beside a name may still differ."""
    if not isinstance(logprobs, dict):
        return
    for entry in logprobs.get("content") or ():
        for token in (entry, *(entry.get("top_logprobs") or ())):
            _token(token, restorer)
    if isinstance(logprobs.get("tokens"), list):
        logprobs["tokens"] = [restorer.restore(token) for token in logprobs["tokens"]]
    if isinstance(logprobs.get("top_logprobs"), list):
        logprobs["top_logprobs"] = [
            top and {restorer.restore(token): value for token, value in top.items()}
            for top in logprobs["top_logprobs"]
        ]


def _token(token: dict[str, Any], restorer: NameRestorer) -> None:
    text = token.get("token")
    if isinstance(text, str) and (asked := restorer.restore(text)) != text:
        token["token"] = asked
        if token.get("bytes") is not None:
            token["bytes"] = list(asked.encode())
