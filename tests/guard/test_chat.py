import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from guard.chat import ask
from guard.errors import CannotCorruptError, EngineRefusedError
from guard.pipeline import Inspection, Rewritten
from guard.request import parse_request
from guard.types import AdapterUse, Decision, Route
from server.engines.base import EngineResponse


class RoutingGuard:
    """Gives every request one route."""

    def __init__(self, route: Route, corruptible: bool = True) -> None:
        self.route, self.corruptible = route, corruptible
        self.recorded = 0

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        decision = Decision(self.route != "pass", self.route, 1.0, ())
        return Inspection(parse_request(endpoint, body), decision)

    def rewrite(self, inspection: Inspection) -> Rewritten:
        if not self.corruptible:
            raise CannotCorruptError("messages/0/content", "no place")
        return Rewritten(inspection.request.body.replace(b"secret", b"noise"))

    def record(self, inspection: Inspection) -> None:
        self.recorded += 1


class Parrot:
    """Streams the last user message back, in events cut at odd places."""

    name = "parrot"

    def __init__(self, status: int = 200, tail: bytes = b"data: [DONE]\n\n") -> None:
        self.status, self.tail = status, tail
        self.bodies: list[bytes] = []
        self.closed = False

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def health(self) -> None: ...

    async def models(self) -> list[str]:
        return ["parrot"]

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None: ...

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        self.bodies.append(body)
        return EngineResponse(self.status, [], self._chunks(json.loads(body)))

    async def _chunks(self, body: dict[str, list[dict[str, str]]]) -> AsyncIterator[bytes]:
        try:
            words = body["messages"][-1]["content"].split(" ")
            events = b"".join(
                b"data: " + json.dumps({"choices": [{"delta": {"content": w}}]}).encode() + b"\n\n"
                for w in words
            )
            whole = events + self.tail
            for start in range(0, len(whole), 17):
                yield whole[start : start + 17]
        finally:
            self.closed = True


def said(guard: RoutingGuard, engine: Parrot, text: str) -> list[str]:
    async def work() -> list[str]:
        messages = [{"role": "user", "content": text}]
        turn = await ask(guard, engine, "parrot", messages, 8, 0.0)
        return [piece async for piece in turn.answer]

    return asyncio.run(work())


def test_an_unflagged_turn_is_streamed_as_it_comes() -> None:
    guard, engine = RoutingGuard("pass"), Parrot()

    assert said(guard, engine, "a secret é") == ["a", "secret", "é"]
    assert (guard.recorded, engine.closed) == (0, True)
    assert json.loads(engine.bodies[0])["stream"] is True


def test_a_flagged_turn_is_rewritten_and_recorded() -> None:
    guard, engine = RoutingGuard("corrupt"), Parrot()

    assert said(guard, engine, "a secret") == ["a", "noise"]
    assert guard.recorded == 1


@pytest.mark.parametrize(
    "guard", [RoutingGuard("refuse"), RoutingGuard("block"), RoutingGuard("corrupt", False)]
)
def test_what_cannot_be_corrupted_never_reaches_the_engine(guard: RoutingGuard) -> None:
    engine = Parrot()

    assert "can't be answered" in said(guard, engine, "a secret")[0]
    assert engine.bodies == []


@pytest.mark.parametrize(
    "engine", [Parrot(status=400), Parrot(tail=b'data: {"error": {"message": "broke"}}\n\n')]
)
def test_an_engine_that_fails_is_an_error(engine: Parrot) -> None:
    with pytest.raises(EngineRefusedError):
        said(RoutingGuard("pass"), engine, "a b")
    assert engine.closed or engine.status != 200
