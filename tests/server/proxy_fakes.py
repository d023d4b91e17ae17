"""A rule-based guard, a scripted engine and a live server, for tests of the proxy alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from guard.errors import CannotCorruptError, EngineError, StageError
from guard.pipeline import Rewritten
from guard.request import ENDPOINTS, ParsedRequest, parse_request, replace_contents
from guard.rewrite import StandIn
from guard.types import AdapterUse, Decision, TargetHit, TextHit
from server.app import create_app
from server.engines.base import EngineResponse
from server.run import make_server
from server.types import Readiness, ServerOptions

CHAT, TEXT = ENDPOINTS
EVENTS = [
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"He"}}]}\n\n',
    b'data: {"choices": [{"index":0,"delta":{"content":"llo"}}]}\n\n',
    b"data: [DONE]\n\n",
]
ANSWER = (
    b'{"id":"x1", "object":"chat.completion","created":1,"model":"m","choices":'
    b'[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}]}'
)
SSE = [("content-type", "text/event-stream; charset=utf-8"), ("x-internal", "1")]
JSON_HEADERS = [
    ("content-type", "application/json"),
    ("content-length", str(len(ANSWER))),
    ("x-request-id", "r-1"),
    ("server", "uvicorn"),
    ("x-internal", "1"),
]


@dataclass
class Inspected:
    """What the guard hands back; shaped as `guard.pipeline.Inspection`."""

    request: ParsedRequest
    decision: Decision


@dataclass
class WordGuard:
    """Decides by words in the text; each word asks for one behaviour.

    `wizard`: corrupt; `sealed`: corrupt, but it can't be; `forbidden`: refuse; `garbled`: block;
    `unread`: a pass that did not read everything; `broken`, `slow`, `bug`: failures of the guard.
    """

    recorded: list[str] = field(default_factory=list)
    ledger_fails: bool = False
    rewrite_fails: bool = False
    stand_ins: tuple[StandIn, ...] = ()
    release: threading.Event = field(default_factory=threading.Event)

    def inspect(self, endpoint: str, body: bytes) -> Inspected:
        request = parse_request(endpoint, body)
        text = " ".join(segment.text for segment in request.segments(str))
        if "broken" in text:
            raise StageError("detect", ValueError(text))
        if "bug" in text:
            raise KeyError(text)
        if "slow" in text:
            self.release.wait(20)
        routes = {
            "garbled": "block",
            "forbidden": "refuse",
            "wizard": "corrupt",
            "sealed": "corrupt",
        }
        route: Any = next((routes[word] for word in routes if word in text), "pass")
        hit = (TargetHit("t", 9.0, 0.0, 1.0, (), True),) if route != "pass" else ()
        coverage = 0.5 if "unread" in text else 1.0
        return Inspected(request, Decision(route != "pass", route, coverage, hit))

    def rewrite(self, inspection: Inspected) -> Rewritten:
        request = inspection.request
        if self.rewrite_fails:
            raise StageError("rewrite", ValueError(str(request.raw)))
        if "sealed" in request.body.decode():
            raise CannotCorruptError("messages/0/content", "the template refuses it")
        messages = request.raw.get("messages", [None])
        return Rewritten(replace_contents(request, {len(messages) - 1: b"QUJD"}), self.stand_ins)

    def record(self, inspection: Inspected) -> None:
        if self.ledger_fails:
            raise OSError("disk full while writing " + inspection.request.body.decode())
        self.recorded.append(inspection.decision.route)

    def answers(self, inspection: Inspected) -> CleanAnswers:
        return CleanAnswers(self, inspection)


@dataclass
class CleanAnswers:
    """Finds nothing in answers; tests/server/test_output_guard.py has one that does."""

    guard: WordGuard
    inspection: Inspected
    watches: bool = True

    def touched(self, *texts: str) -> tuple[TextHit, ...]:
        return ()


@dataclass
class ScriptedEngine:
    """Answers from a script, in the process of the proxy.

    Attributes:
        pieces: The body; an exception is raised where it stands, an Event is waited for.
        fails: Raised instead of an answer.
        hangs: Never answers.
        posts: Path, body and headers of every request.
        adapters: Those of every request.
        synced: Those of every call of `sync_adapters`.
        cancelled: Set when a generation was ended before its time.
    """

    name: str = "scripted"
    status: int = 200
    headers: list[tuple[str, str]] | None = None
    pieces: list[bytes | Exception | threading.Event] | None = None
    fails: Exception | None = None
    hangs: bool = False
    unhealthy: bool = False
    posts: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    adapters: list[tuple[AdapterUse, ...]] = field(default_factory=list)
    synced: list[tuple[AdapterUse, ...]] = field(default_factory=list)
    asked_models: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    started: int = 0
    closed: int = 0

    async def start(self) -> None:
        self.started += 1

    async def close(self) -> None:
        self.closed += 1

    async def health(self) -> None:
        if self.unhealthy:
            raise EngineError("unhealthy because of a wizard")

    async def models(self) -> list[str]:
        self.asked_models += 1
        return ["m", "m2"]

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None:
        self.synced.append(tuple(adapters))

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        self.posts.append((path, body, dict(headers)))
        self.adapters.append(tuple(adapters))
        if self.fails is not None:
            raise self.fails
        if self.hangs:
            try:
                await asyncio.sleep(600)
            finally:
                self.cancelled.set()
        stream = bool(json.loads(body).get("stream"))
        pieces = self.pieces or (list(EVENTS) if stream else [ANSWER])
        found = self.headers or (SSE if stream else JSON_HEADERS)
        return EngineResponse(self.status, list(found), _Chunks(pieces, self.cancelled))


class _Chunks:
    """The body of a scripted answer; unlike a generator's, its `aclose` works before it began."""

    def __init__(self, pieces: list[Any], cancelled: threading.Event) -> None:
        self._pieces, self._cancelled, self._ended = list(pieces), cancelled, False

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        while self._pieces:
            piece = self._pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, bytes):
                return piece
            await asyncio.to_thread(piece.wait, 20)
        self._ended = True
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if not self._ended:
            self._cancelled.set()


@contextlib.contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Serve an application on a free loopback port, in a thread, and yield its address."""
    ready = threading.Event()
    found: list[str] = []

    def on_started(address: str) -> None:
        found.append(address)
        ready.set()

    server = make_server(app, port=0, on_started=on_started, shutdown_timeout_s=2, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        yield found[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer after checking that it has OpenAI's format."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["type"]
    return dict(body["error"])


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return True as soon as a condition holds, False if it doesn't within `seconds`."""
    gate = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return True
        gate.wait(0.01)
    return False


class Live:
    """A served application with its parts."""

    def __init__(self, url: str, guard: WordGuard, engine: ScriptedEngine) -> None:
        self.url, self.guard, self.engine = url, guard, engine
        self.http = httpx.Client(base_url=url, timeout=20)
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    def ask(self, text: str = "hello", path: str = CHAT, **fields: Any) -> httpx.Response:
        body = chat(text, **fields)
        if path == TEXT:
            body = {"model": "m", "prompt": text, **fields}
        return self.http.post(path, json=body)


@contextlib.contextmanager
def live(
    options: ServerOptions | None = None, readiness: Any = Readiness, **engine: Any
) -> Iterator[Live]:
    guard, fake = WordGuard(), ScriptedEngine(**engine)
    with running(create_app(guard, fake, options, readiness)) as url:
        parts = Live(url, guard, fake)
        try:
            yield parts
        finally:
            guard.release.set()
            parts.http.close()
