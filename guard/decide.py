"""`unlearn-guard decide`: the decisions that `serve` would make, for lines of a file.

A line becomes the body of a request, is parsed by the parser of the server, and decided by the
same `Guard`.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from guard.errors import GuardError, RequestError
from guard.request import ImagePolicy, ParsedRequest, parse_request
from guard.types import Decision

FORMS = '{"messages"}, {"prompt"}, {"text"} or {"endpoint", "body"}'
BATCH = 64
_CHAT = "/v1/chat/completions"
_MODEL = b'{"model":"decide","messages":'
_USER = b'[{"role":"user","content":'
_CONTENT_PATH = "messages/0/content"


class Decider(Protocol):
    """The part of `guard.pipeline.Guard` that is used here."""

    def decide(self, request: ParsedRequest) -> Decision:
        """Decide on one request."""
        ...

    def decide_many(self, requests: Sequence[ParsedRequest]) -> list[Decision]:
        """Decide on several requests at once."""
        ...


class _Line(msgspec.Struct):
    """A line; what is not named here (`target`, `category`, `attack`, …) is ignored."""

    id: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    question: msgspec.Raw = msgspec.Raw()
    endpoint: msgspec.Raw = msgspec.Raw()
    body: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True, slots=True)
class _Asked:
    """A line that could be read.

    Attributes:
        id: The line's id, or its number.
        request: What the server would have parsed.
        path: Name of the field that stands for the one message's content, if it has one.
    """

    id: Any
    request: ParsedRequest
    path: str | None


@dataclass(frozen=True, slots=True)
class _Refused:
    id: Any
    error: str


def decide_line(guard: Decider, line: str | bytes, line_number: int) -> dict[str, Any]:
    """Decide on one line.

    Args:
        guard: Decides.
        line: The line, without its end.
        line_number: One-based; the row's id where the line gives none.

    Returns:
        `{"id", "flagged", "route", "coverage", "margin", "targets"}`, or `{"id", "error"}`.
    """
    return _decide([_read(line, line_number, None)], guard)[0]


def decide_lines(
    guard: Decider,
    lines: Iterable[bytes],
    max_body_bytes: int | None = None,
    images: ImagePolicy = "deny",
) -> Iterator[dict[str, Any]]:
    """Decide on many lines, in order, several at a time as they come.

    Args:
        guard: Decides.
        lines: The lines; whoever waits for one at a time gets its answer at once.
        max_body_bytes: Longest body that the server would take.
        images: Whether the server would take images.
    """
    for batch in _batches(lines):
        read = [_read(line, number, max_body_bytes, images) for number, line in batch]
        yield from _decide(read, guard)


def _decide(asked: Sequence[_Asked | _Refused], guard: Decider) -> list[dict[str, Any]]:
    requests = [one.request for one in asked if isinstance(one, _Asked)]
    decisions = iter(_decisions(requests, guard))
    return [
        _row(one, next(decisions))
        if isinstance(one, _Asked)
        else {"id": one.id, "error": one.error}
        for one in asked
    ]


def _decisions(requests: Sequence[ParsedRequest], guard: Decider) -> list[Decision | GuardError]:
    """Decide on all; where one fails, the others still get their decisions."""
    try:
        return list(guard.decide_many(requests)) if requests else []
    except GuardError as error:
        if len(requests) == 1:
            return [error]
    middle = len(requests) // 2
    return _decisions(requests[:middle], guard) + _decisions(requests[middle:], guard)


def _row(asked: _Asked, decision: Decision | GuardError) -> dict[str, Any]:
    if isinstance(decision, GuardError):
        return {"id": asked.id, "error": str(decision)}
    return {
        "id": asked.id,
        "flagged": decision.flagged,
        "route": decision.route,
        "coverage": decision.coverage,
        # JSON knows no infinity: a bundle without targets has no margin.
        "margin": decision.margin if math.isfinite(decision.margin) else None,
        "targets": [
            {
                "name": hit.name,
                "score": hit.score,
                "p_value": hit.p_value,
                "weight": hit.weight,
                "spans": [
                    {"path": asked.path or span.path, "start": span.start, "end": span.end}
                    for span in hit.spans
                ],
            }
            for hit in decision.targets
        ],
    }


def _read(
    line: str | bytes, number: int, max_body_bytes: int | None, images: ImagePolicy = "deny"
) -> _Asked | _Refused:
    """Turn a line into a request; its own bytes become the body, so that none is lost."""
    row_id: Any = number
    try:
        data = line.encode() if isinstance(line, str) else line
        parsed = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=_Line)
        row_id = _id(parsed, number)
        endpoint, body, path = _request(parsed)
        if max_body_bytes is not None and len(body) > max_body_bytes:
            raise RequestError(f"the body is longer than {max_body_bytes} bytes")
        return _Asked(row_id, parse_request(endpoint, body, images), path)
    except RequestError as error:
        where = f"{error.param}: " if error.param and error.param not in str(error) else ""
        return _Refused(row_id, f"{where}{error}")
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        row_id = _rescued_id(line, number)
        return _Refused(row_id, f"not a JSON object of a form known ({FORMS}): {error}")


def _id(line: _Line, number: int) -> Any:
    try:
        return json.loads(bytes(line.id)) if bytes(line.id) else number
    except (ValueError, RecursionError):
        return number


def _rescued_id(line: str | bytes, number: int) -> Any:
    """Find the id of a line that a strict reader refuses but a lenient one can read."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return number
    return value.get("id", number) if isinstance(value, dict) else number


def _request(line: _Line) -> tuple[str, bytes, str | None]:
    """Return endpoint, body, and the name that the content goes by in the output."""
    given = [
        name
        for name in ("messages", "prompt", "text", "question", "endpoint")
        if bytes(getattr(line, name))
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise RequestError(f"expected one of {FORMS}; found {found}")
    if given == ["endpoint"]:
        return (*_endpoint_and_body(line), None)
    if given == ["messages"]:
        return _CHAT, _MODEL + bytes(line.messages) + b"}", None
    content = bytes(getattr(line, given[0]))
    if not content.startswith(b'"'):
        raise RequestError("expected a string", param=given[0])
    return _CHAT, _MODEL + _USER + content + b"}]}", given[0]


def _endpoint_and_body(line: _Line) -> tuple[str, bytes]:
    endpoint = msgspec.json.decode(bytes(line.endpoint))
    if not isinstance(endpoint, str):
        raise RequestError("expected a string such as /v1/chat/completions", param="endpoint")
    if not bytes(line.body):
        raise RequestError("missing beside endpoint", param="body")
    return endpoint, bytes(line.body)


def _batches(lines: Iterable[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    """Read ahead in a thread; yield all that is there, `BATCH` lines at most, one at least."""
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=4 * BATCH)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=read, name="decide-reader", daemon=True).start()
    number = 0
    while True:
        batch: list[tuple[int, bytes]] = []
        end: bytes | BaseException | None = waiting.get()
        while isinstance(end, bytes):
            number += 1
            batch.append((number, end.rstrip(b"\r\n")))
            if len(batch) == BATCH:
                break
            try:
                end = waiting.get_nowait()
            except queue.Empty:
                break
        if batch:
            yield batch
        if isinstance(end, BaseException):
            raise end
        if end is None:
            return
