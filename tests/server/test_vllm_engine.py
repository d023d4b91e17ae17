"""The vLLM engine's edge: what it does when the upstream misbehaves; tests/vllm has a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from guard.errors import (
    ConfigError,
    EngineRefusedError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from server.engines.vllm import VllmEngine, VllmTimeouts

Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
SHORT = VllmTimeouts(connect=0.5, read=0.5, control=0.5)


class Upstream:
    """A server that answers with the bytes a test gives it, and records what it was sent."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[bytes] = []
        self.arrived, self.left = asyncio.Event(), asyncio.Event()
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length:")
                    ),
                    0,
                )
                self.requests.append(head + await reader.readexactly(length))
                self.arrived.set()
                await self.handler(self.requests[-1], reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.left.set()
            writer.close()


@asynccontextmanager
async def upstream(handler: Handler, path: Path | None = None) -> AsyncIterator[Upstream]:
    up = Upstream(handler)
    if path:
        server = await asyncio.start_unix_server(up.serve, path)
        up.url = "http://vllm"
    else:
        server = await asyncio.start_server(up.serve, "127.0.0.1", 0)
        up.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield up
    finally:
        server.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def engine(url: str, **options: Any) -> AsyncIterator[VllmEngine]:
    made = VllmEngine(url, **options)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n"
        f"content-type: application/json\r\n{headers}\r\n"
    ).encode() + body


def replies(body: bytes, **kwargs: Any) -> Handler:
    async def handler(
        request: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(answer(body, **kwargs))

    return handler


CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


# --- What goes through -------------------------------------------------------------------------


def test_body_and_allowed_headers_go_out_unchanged() -> None:
    async def test() -> None:
        body = b'{ "model":"m",\n "messages":[] , "x":"\xc3\xa4"}'
        async with upstream(replies(b"{}")) as up, engine(up.url + "/v1/", api_key="k1") as vllm:
            headers = {**JSON, "X-Request-Id": "r1", "Cookie": "c", "X-Data-Parallel-Rank": "3"}
            headers |= {"traceparent": "00-1-2-01", "tracestate": "a=b"}
            response = await vllm.post(CHAT, body, headers)
            assert await response.read() == b"{}"
            head, _, sent = up.requests[0].partition(b"\r\n\r\n")
        assert sent == body
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1")
        lowered = head.lower()
        assert b"authorization: bearer k1" in lowered
        assert b"x-request-id: r1" in lowered
        assert b"traceparent: 00-1-2-01" in lowered and b"tracestate: a=b" in lowered
        assert b"accept-encoding: identity" in lowered
        for kept_back in (b"cookie", b"parallel", b"user-agent"):
            assert kept_back not in lowered

    run(test)


@pytest.mark.parametrize("length", [2**20 - 1, 2**20, 5_000_000])
def test_a_long_body_arrives_whole(length: int) -> None:
    """A prompt of thousands of embeddings is one; aiohttp warns where it would be sent at once."""

    async def test() -> None:
        body = b"x" * (length - 1) + b"y"
        async with upstream(replies(b"{}")) as up, engine(up.url) as vllm:
            assert await (await vllm.post(CHAT, body, JSON)).read() == b"{}"
            head, _, sent = up.requests[0].partition(b"\r\n\r\n")
        assert sent == body
        lowered = head.lower()
        assert f"content-length: {length}".encode() in lowered
        assert b"content-type: application/json" in lowered

    run(test)


@pytest.mark.parametrize("own", ["Bearer k2", ""])
def test_a_client_that_has_to_show_its_own_key_never_gets_in_by_ours(own: str) -> None:
    async def test() -> None:
        async with upstream(replies(b"{}")) as up, engine(up.url, api_key="k1") as vllm:
            await (await vllm.post(CHAT, b"{}", {**JSON, "authorization": own})).read()
            head = up.requests[0].partition(b"\r\n\r\n")[0]
        (line,) = [one for one in head.split(b"\r\n") if one.lower().startswith(b"authorization:")]
        assert line.partition(b":")[2].strip().decode() == own

    run(test)


def test_status_and_allowed_headers_come_back() -> None:
    async def test() -> None:
        extra = "Retry-After: 7\r\nSet-Cookie: a=b\r\nServer: uvicorn\r\nX-Request-Id: r\r\n"
        handler = replies(b'{"error":1}', status="429 Too Many", headers=extra)
        async with upstream(handler) as up, engine(up.url) as vllm:
            response = await vllm.post(CHAT, b"{}", JSON)
            assert response.status == 429
            assert dict(response.headers) == {
                "content-type": "application/json",
                "retry-after": "7",
                "x-request-id": "r",
            }
            assert await response.read() == b'{"error":1}'

    run(test)


def test_each_event_is_passed_on_before_the_next_is_sent() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def handler(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(CHUNKED + chunk(b"data: 1\n\n"))
            await writer.drain()
            await gate.wait()
            writer.write(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

        async with upstream(handler) as up, engine(up.url) as vllm:
            response = await vllm.post(CHAT, b"{}", JSON)
            assert await anext(response.chunks) == b"data: 1\n\n"
            gate.set()
            assert await response.read() == b"data: 2\n\n"

    run(test)


def test_connections_are_reused() -> None:
    async def test() -> None:
        async with upstream(replies(b"{}")) as up, engine(up.url) as vllm:
            for _ in range(3):
                await (await vllm.post(CHAT, b"{}", JSON)).read()
            assert up.connections == 1

    run(test)


def test_a_compressed_or_redirecting_answer_is_not_followed() -> None:
    async def test() -> None:
        handler = replies(b"x", status="307 Go", headers="location: http://127.0.0.1:1/\r\n")
        async with upstream(handler) as up, engine(up.url) as vllm:
            assert (await vllm.post(CHAT, b"{}", JSON)).status == 307
            assert len(up.requests) == 1
        gzipped = replies(b"\x1f\x8b not gzip", headers="content-encoding: gzip\r\n")
        async with upstream(gzipped) as up, engine(up.url) as vllm:
            assert await (await vllm.post(CHAT, b"{}", JSON)).read() == b"\x1f\x8b not gzip"

    run(test)


def test_a_unix_socket_can_be_used(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "s"
        async with (
            upstream(replies(b"{}"), path) as up,
            engine(up.url, socket_path=str(path)) as vllm,
        ):
            assert await (await vllm.post(CHAT, b"{}", JSON)).read() == b"{}"

    run(test)


# --- Cancelling ----------------------------------------------------------------------------------


async def stream_forever(
    _: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(CHUNKED + chunk(b"data: 1\n\n"))
    await writer.drain()
    if await reader.read(1) == b"":
        raise ConnectionResetError


@pytest.mark.parametrize("begun", [True, False])
def test_closing_an_answer_closes_the_connection(begun: bool) -> None:
    async def test() -> None:
        async with upstream(stream_forever) as up, engine(up.url) as vllm:
            response = await vllm.post(CHAT, b"{}", JSON)
            if begun:
                await anext(response.chunks)
            await response.aclose()
            await asyncio.wait_for(up.left.wait(), 5)

    run(test)


@pytest.mark.parametrize("where", ["before the answer", "while reading"])
def test_cancelling_closes_the_connection(where: str) -> None:
    async def silent(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"":
            raise ConnectionResetError

    async def test() -> None:
        handler = silent if where == "before the answer" else stream_forever
        async with upstream(handler) as up, engine(up.url) as vllm:

            async def work() -> None:
                await (await vllm.post(CHAT, b"{}", JSON)).read()

            task = asyncio.create_task(work())
            await up.arrived.wait()
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(up.left.wait(), 5)

    run(test)


# --- Faults --------------------------------------------------------------------------------------


def test_an_upstream_that_is_down_is_unavailable() -> None:
    async def test() -> None:
        async with upstream(replies(b"")) as up:
            url = up.url
        async with engine(url, timeouts=SHORT) as vllm:
            for call in (vllm.post(CHAT, b"{}", JSON), vllm.health(), vllm.models()):
                with pytest.raises(EngineUnavailableError, match="can't be reached"):
                    await call

    run(test)


async def hang_up(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    raise ConnectionResetError


async def gibberish(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SMTP ready\r\n\r\n")


@pytest.mark.parametrize("handler", [hang_up, gibberish])
def test_an_upstream_that_answers_no_http_is_unavailable(handler: Handler) -> None:
    async def test() -> None:
        async with upstream(handler) as up, engine(up.url) as vllm:
            with pytest.raises(EngineUnavailableError):
                await vllm.post(CHAT, b"{}", JSON)

    run(test)


def dying(sent: bytes) -> Handler:
    async def handler(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()
        raise ConnectionResetError

    return handler


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + chunk(b"data: 1\n\n"),
        CHUNKED + chunk(b"data: 1\n\n") + b"20\r\ndata: 2",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ndata: 1\n\n",
    ],
    ids=["between chunks", "within a chunk", "short of its length"],
)
def test_dying_in_the_middle_surfaces_from_the_chunks(sent: bytes) -> None:
    async def test() -> None:
        async with upstream(dying(sent)) as up, engine(up.url) as vllm:
            response = await vllm.post(CHAT, b"{}", JSON)
            received = b""
            with pytest.raises(EngineUnavailableError, match="in the middle of an answer"):
                async for piece in response.chunks:
                    received += piece
            assert received.startswith(b"data: 1\n\n")
            await response.aclose()

    run(test)


def test_silence_is_a_timeout_before_and_within_an_answer() -> None:
    async def silent(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(1)
        raise ConnectionResetError

    async def test() -> None:
        async with upstream(silent) as up, engine(up.url, timeouts=SHORT) as vllm:
            for call in (vllm.post(CHAT, b"{}", JSON), vllm.health(), vllm.models()):
                with pytest.raises(EngineTimeoutError):
                    await call
        async with upstream(stream_forever) as up, engine(up.url, timeouts=SHORT) as vllm:
            response = await vllm.post(CHAT, b"{}", JSON)
            assert await anext(response.chunks) == b"data: 1\n\n"
            with pytest.raises(EngineTimeoutError, match="stopped sending"):
                await anext(response.chunks)

    run(test)


def test_the_engine_works_again_when_the_upstream_does() -> None:
    async def test() -> None:
        faults = [hang_up, replies(b"{}")]

        async def handler(*arguments: Any) -> None:
            await faults.pop(0)(*arguments)

        async with upstream(handler) as up, engine(up.url) as vllm:
            with pytest.raises(EngineUnavailableError):
                await vllm.post(CHAT, b"{}", JSON)
            assert await (await vllm.post(CHAT, b"{}", JSON)).read() == b"{}"

    run(test)


# --- Health and models ---------------------------------------------------------------------------


def listing(*models: dict[str, Any]) -> Handler:
    return replies(json.dumps({"object": "list", "data": list(models)}).encode())


def test_adapters_are_hidden() -> None:
    async def test() -> None:
        handler = listing({"id": "base", "parent": None}, {"id": "secret-lora", "parent": "base"})
        async with upstream(handler) as up, engine(up.url) as vllm:
            assert await vllm.models() == ["base"]
            await vllm.health()
            assert up.requests[-2].startswith(b"GET /health")

    run(test)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"data": 3}', b'{"data": [{}]}', b"x" * 5_000_000]
)
def test_an_upstream_that_is_not_vllm_is_unavailable(body: bytes) -> None:
    async def test() -> None:
        async with upstream(replies(body)) as up, engine(up.url) as vllm:
            with pytest.raises(EngineUnavailableError, match="vLLM"):
                await vllm.health()

    run(test)


def test_no_model_is_not_healthy() -> None:
    async def test() -> None:
        async with upstream(listing()) as up, engine(up.url) as vllm:
            with pytest.raises(EngineUnavailableError, match="no model"):
                await vllm.health()

    run(test)


def test_a_wrong_key_shows_the_upstreams_answer() -> None:
    async def test() -> None:
        handler = replies(b'{"error":"Unauthorized"}', status="401 Unauthorized")
        async with upstream(handler) as up, engine(up.url) as vllm:
            with pytest.raises(EngineRefusedError, match=r"401.*Unauthorized"):
                await vllm.models()

    run(test)


def test_starting_and_closing_twice_is_harmless_and_use_before_is_not() -> None:
    async def test() -> None:
        vllm = VllmEngine("http://127.0.0.1:9")
        with pytest.raises(EngineUnavailableError, match="not started"):
            await vllm.post(CHAT, b"{}", JSON)
        await vllm.start()
        await vllm.start()
        await vllm.close()
        await vllm.close()

    run(test)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://h/?a=1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        VllmEngine(url)


def test_a_key_within_the_url_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        VllmEngine("http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)
