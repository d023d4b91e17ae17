"""Puts asked names back into an engine's answer, whole or streamed (`guard.restore`).

The answer keeps its shape: as many events as the engine sent, the same fields, and none without a
text that had one. An event whose piece of a name is held back waits, and those behind it, until the
name is decided; then the name is dealt out to the events that waited for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
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
            # What came together leaves together: each piece takes a system call.
            if out := b"".join(
                one + _EVENT_END for event in events for one in stream.events(event)
            ):
                yield out
    finally:
        await response.aclose()
    if left := [*(stream.events(rest) if rest else ()), *stream.rest()]:
        yield _EVENT_END.join(left) if rest else _EVENT_END.join([*left, b""])


def _put_back(restorer: NameRestorer, _field: str, text: str) -> str:
    return restorer.restore(text)


@dataclass(slots=True)
class _Event:
    """An event on its way.

    Attributes:
        raw: Its bytes, if it leaves as it is.
        body: Else what it holds.
        waits: How many of its texts are still to come.
    """

    raw: bytes
    body: dict[str, Any] | None = None
    waits: int = 0

    def encoded(self) -> bytes:
        """Return its bytes."""
        return self.raw if self.body is None else b"data: " + msgspec.json.encode(self.body)


class _Stream:
    """The restorers of a stream's choices and fields, and the events that wait for a name."""

    def __init__(self, stand_ins: Sequence[StandIn]) -> None:
        self._stand_ins = stand_ins
        self._restorers: dict[tuple[int, str], tuple[int, NameRestorer]] = {}
        self._queue: list[_Event] = []
        self._waiting: dict[tuple[int, str], list[tuple[_Event, dict[str, Any]]]] = {}

    def events(self, raw: bytes) -> Iterator[bytes]:
        """Take the next event, and yield those that can leave; comments and `[DONE]` stay."""
        self._queue.append(self._event(raw))
        while self._queue and not self._queue[0].waits:
            yield self._queue.pop(0).encoded()

    def rest(self) -> Iterator[bytes]:
        """Yield what waits for more of a stream that broke off."""
        for event in self._queue:
            yield event.encoded()
        self._queue.clear()

    def _event(self, raw: bytes) -> _Event:
        data = raw.removeprefix(b"data:").strip() if self._stand_ins else b""
        if not (raw.startswith(b"data:") and data.startswith(b"{")):
            return _Event(raw)
        event = _Event(raw, msgspec.json.decode(data, type=dict[str, Any]))
        assert event.body is not None
        for choice in event.body.get("choices", ()):
            self._choice(event, choice)
        return event

    def _choice(self, event: _Event, choice: dict[str, Any]) -> None:
        number = choice.get("index", 0)
        ended = choice.get("finish_reason") is not None
        seen: set[str] = set()

        def put(field: str, text: str) -> str:
            seen.add(field)
            before, restorer = self._restorer(number, field)
            out = before + restorer.feed(text)
            if ended:
                out += restorer.flush()
            elif text and not out:
                event.waits += 1
                self._waiting.setdefault((number, field), []).append((event, choice))
            return self._deal(number, field, out, own=bool(text))

        _each_text(choice, put)
        _tokens(choice.get("logprobs"), NameRestorer(self._stand_ins))
        if ended:
            self._give_rest(choice, number, seen)

    def _deal(self, number: int, field: str, text: str, *, own: bool) -> str:
        """Give a text to the events that wait for it; return the part that is left for the last."""
        waiting = self._waiting.pop((number, field), []) if text else []
        if not waiting:
            return text
        parts = _parts(text, len(waiting) + own)
        for (event, choice), part in zip(waiting, parts, strict=False):
            _each_text(choice, partial(_replaced, field, part))
            event.waits -= 1
        return parts[-1] if own else ""

    def _give_rest(self, choice: dict[str, Any], number: int, seen: set[str]) -> None:
        """Deal out what is still held; the last event may have no text of its own."""
        for (owner, field), (_, restorer) in self._restorers.items():
            if owner != number or field in seen or not (rest := restorer.flush()):
                continue
            if left := self._deal(number, field, rest, own=False):
                _set_text(choice, field, left)

    def _restorer(self, number: int, field: str) -> tuple[str, NameRestorer]:
        """Return a field's restorer, and what is left of one that knew fewer names."""
        known, restorer = self._restorers.get((number, field), (-1, None))
        if restorer is not None and known == len(self._stand_ins):
            return "", restorer
        left = "" if restorer is None else restorer.flush()
        fresh = NameRestorer(self._stand_ins)
        self._restorers[number, field] = len(self._stand_ins), fresh
        return left, fresh


def _replaced(wanted: str, part: str, field: str, text: str) -> str:
    return part if field == wanted else text


def _parts(text: str, count: int) -> list[str]:
    """Cut a text into as many parts as events are to carry it, about as long as one another."""
    ends = [len(text) * place // count for place in range(count + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


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
