"""The real application with the real guard, called in this process, and what each decided."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.pipeline import Guard, Inspection
from guard.prompts import ModelPrompts
from server.app import create_app
from server.engines.base import EngineResponse
from server.types import ServerOptions
from tests.server.test_bypass import App, Engine, texts

Make = Callable[[Any], dict[str, Any]]

REPLACED = ("corrupt", "adapt", "corrupt+adapt")


@dataclass
class Watched:
    """A guard that remembers what it has decided on."""

    guard: Guard
    decided: list[Inspection] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guard, name)

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        return self._noted(self.guard.inspect(endpoint, body))

    def begin(self, endpoint: str, body: bytes) -> Inspection | Callable[[], Inspection]:
        begun = self.guard.begin(endpoint, body)
        return (lambda: self._noted(begun())) if callable(begun) else self._noted(begun)

    def _noted(self, inspection: Inspection) -> Inspection:
        with self._lock:
            self.decided.append(inspection)
        return inspection


@dataclass
class Embedding(Engine):
    """An engine that also makes embeddings."""

    async def post(self, path: str, body: bytes, *rest: Any) -> EngineResponse:
        response = await super().post(path, body, *rest)
        if "input" in json.loads(body):
            self.pieces, self.headers = [b'{"data":[]}'], [("content-type", "application/json")]
            response = await super(Engine, self).post(path, body, *rest)
            self.posts.pop()
        return response


@dataclass
class Judged:
    """An application, its guard and its engine."""

    app: App
    guard: Watched

    def send(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a request, and see that what came to the engine is what was decided on.

        Returns:
            Status and body of the answer.
        """
        self.guard.decided.clear()
        status, answer = self.app.send(path, body)
        assert status < 500, answer
        posts = list(self.app.engine.posts)
        self.seen = self.app.seen()
        for (where, sent, _), _ in zip(posts, self.seen, strict=True):
            assert len(self.guard.decided) == 1, "it came to the engine unjudged"
            (inspection,) = self.guard.decided
            route = inspection.decision.route
            if route == "pass" and where == "/v1/embeddings":
                prompts = inspection.request.raw["prompt"]
                assert json.loads(sent)["input"] == prompts
            elif route == "pass":
                assert inspection.decision.coverage == 1.0
                assert sent == inspection.request.body
            else:
                assert route in REPLACED and b"prompt_embeds" in sent
        if status != 200:
            error = json.loads(answer)["error"]
            assert isinstance(error["message"], str) and error["type"]
        return status, answer

    def treatment(self) -> str:
        """Say what was done with the last request."""
        return self.guard.decided[-1].decision.route if self.guard.decided else "undecided"

    def shows(self, text: str) -> bool:
        """Say if the engine saw a text in the last request."""
        return any(text in texts(body) for body in self.seen)


@contextmanager
def judging(
    store: BundleStore, key: GuardKey, prompts: ModelPrompts, ledger: Path
) -> Iterator[Judged]:
    """Make the application; until the block ends."""
    guard = load_guard(store=store, key=key, prompts=prompts, ledger=Ledger(ledger, key))
    watched, engine = Watched(guard), Embedding()
    made = create_app(watched, engine, ServerOptions(embeddings="pass"))
    loop = asyncio.new_event_loop()
    yield Judged(App(guard, engine, made, loop), watched)
    made.state.proxy.close()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
