import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import pytest

from guard.errors import EngineBusyError, EngineUnavailableError
from guard.types import AdapterUse
from server.engines.base import EngineResponse
from server.standin import create_standin


class Echo:
    """An engine that answers with what it was sent."""

    name, served_name = "echo", "echo"

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.left = asyncio.Event()
        self.endless = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def health(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def models(self) -> list[str]:
        return ["echo"]

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None: ...

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        if self.failure is not None:
            raise self.failure
        return EngineResponse(200, [("content-type", "application/json")], self._chunks(body))

    async def _chunks(self, body: bytes) -> AsyncIterator[bytes]:
        try:
            yield body[:3]
            if self.endless:
                await asyncio.Event().wait()
            yield body[3:]
        finally:
            self.left.set()


def client(engine: Echo) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(create_standin(engine)), base_url="http://test"
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bytes_go_through_as_they_are(path: str) -> None:
    async def work() -> None:
        engine = Echo()
        async with client(engine) as http:
            body = b'{ "any" : "thing", "prompt_embeds":"AAAA" }'
            answer = await http.post(path, content=body)
            assert (answer.status_code, answer.content) == (200, body)
            assert engine.left.is_set()
            models = (await http.get("/v1/models")).json()
            assert [entry["id"] for entry in models["data"]] == ["echo"]
            assert (await http.get("/health")).status_code == 200
            assert (await http.get(path)).status_code == 405

    asyncio.run(work())


@pytest.mark.parametrize(
    ("failure", "status"),
    [(EngineBusyError("full", 3), 429), (EngineUnavailableError("gone"), 502)],
)
def test_failures_are_openai_errors(failure: Exception, status: int) -> None:
    async def work() -> None:
        engine = Echo()
        engine.failure = failure
        async with client(engine) as http:
            answer = await http.post("/v1/completions", content=b"{}")
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert (await http.get("/health")).status_code == 503

    asyncio.run(work())


def test_a_client_that_leaves_ends_the_generation() -> None:
    async def work() -> None:
        engine = Echo()
        engine.endless = True
        gone = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append("body")
                return {"type": "http.request", "body": b'{"a":1}', "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
        }
        await create_standin(engine)(scope, receive, send)
        assert engine.left.is_set()

    asyncio.run(work())


def test_a_streamed_answer_is_relayed_event_by_event() -> None:
    async def work() -> None:
        async with client(Echo()) as http:
            body = json.dumps({"stream": True}).encode()
            async with http.stream("POST", "/v1/chat/completions", content=body) as answer:
                pieces = [piece async for piece in answer.aiter_raw()]
            assert b"".join(pieces) == body

    asyncio.run(work())
