"""A vLLM of a few lines, in a thread of its own: answers, breaks off and dies as a test wants."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from tests.server.proxy_fakes import ANSWER, EVENTS

Behaviour = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]

STREAM = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n\r\n"
)
_SHOWN = "authorization:"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(body: bytes, status: str = "200 OK") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n"
        "content-type: application/json\r\n\r\n"
    ).encode() + body


# --- Behaviours -----------------------------------------------------------------------------------


async def answers(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    if body.get("stream"):
        writer.write(STREAM + b"".join(chunk(event) for event in EVENTS) + b"0\r\n\r\n")
    else:
        writer.write(whole(ANSWER))


async def resets_before(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.transport.abort()


async def resets_in_the_headers(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(STREAM[:30])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def resets_after_an_event(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(STREAM + chunk(EVENTS[0]))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def is_overloaded(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(whole(b'{"error":{"message":"full"}}', "503 Service Unavailable"))


async def finds_it_wrong(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(whole(b'{"error":{"message":"no"}}', "400 Bad Request"))


async def never_answers(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    await asyncio.sleep(600)


def streams(events: int, pause_s: float) -> Behaviour:
    """Answer with so many events, so far apart."""

    async def behaviour(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(STREAM)
        for _ in range(events):
            writer.write(chunk(EVENTS[0]))
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.write(chunk(EVENTS[-1]) + b"0\r\n\r\n")

    return behaviour


class FakeVllm:
    """The server.

    Attributes:
        behaviour: What a completion gets.
        models: Names that it serves.
        healthy: What `/health` says.
        posts: Bodies of completions.
        loaded: Adapters that it was told to load and not to unload.
        keys: What it wants in front of everything under `/v1`, if anything.
        open: Connections now.
        sent: Bytes written by `floods`.
    """

    def __init__(self, *models: str) -> None:
        self.behaviour: Behaviour = answers
        self.models = models or ("m",)
        self.healthy = True
        self.keys: set[str] = set()
        self.posts: list[dict[str, Any]] = []
        self.loaded: set[str] = set()
        self.open = self.sent = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Listen, at the same port as before."""
        self._do(self._up())

    def down(self) -> None:
        """Die: stop listening and cut every connection; adapters are lost."""
        self._do(self._down())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def floods(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        """Stream for ever, as fast as it is read."""
        event = b"data: " + b"x" * 65_536 + b"\n\n"
        writer.write(STREAM)
        while True:
            writer.write(chunk(event))
            await writer.drain()
            self.sent += len(event)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _up(self) -> None:
        self._server = await asyncio.start_server(
            self._connection, "127.0.0.1", self.port, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while self._serving:  # a connection may have come meanwhile
            for task in self._serving:
                task.cancel()
            await asyncio.wait(self._serving.copy(), timeout=1)
        self.loaded.clear()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.open += 1
        try:
            while True:
                await self._request(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self.open -= 1
            self._serving.discard(task)

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lengths = [
            int(line.split(":")[1])
            for line in head.lower().split("\r\n")
            if line.startswith("content-length:")
        ]
        body = await reader.readexactly(lengths[0] if lengths else 0)
        path = head.split()[1]
        shown = [line[14:].strip() for line in head.split("\r\n") if line[:14].lower() == _SHOWN]
        if self.keys and path.startswith("/v1") and self.keys.isdisjoint(shown):
            writer.write(whole(b'{"error":{"message":"Unauthorized"}}', "401 Unauthorized"))
            return
        work = asyncio.create_task(self._answer(path, body, writer))
        gone = asyncio.create_task(reader.read(1))  # a client does not speak before its answer
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ConnectionError("the client left")
        finally:
            # `wait` takes their end as it is; awaiting one could swallow our own cancellation.
            ended = work.cancel() | gone.cancel()
            await asyncio.wait({work, gone} if ended else {work})
        work.result()
        await writer.drain()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            writer.write(whole(b"", "200 OK" if self.healthy else "503 Unavailable"))
        elif path == "/v1/models":
            entries = [{"id": name, "parent": None} for name in self.models]
            writer.write(whole(json.dumps({"object": "list", "data": entries}).encode()))
        elif path == "/v1/load_lora_adapter":
            self.loaded.add(json.loads(body)["lora_name"])
            writer.write(whole(b'"loaded"'))
        elif path == "/v1/unload_lora_adapter":
            self.loaded.discard(json.loads(body)["lora_name"])
            writer.write(whole(b'"unloaded"'))
        else:
            fields = json.loads(body)
            self.posts.append(fields)
            await self.behaviour(writer, fields)


@contextmanager
def fake_vllm(*models: str) -> Iterator[FakeVllm]:
    """Serve one until the block ends."""
    fake = FakeVllm(*models)
    fake.up()
    try:
        yield fake
    finally:
        fake.close()


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))
