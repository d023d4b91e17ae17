"""An upstream that costs next to nothing: what `bench serve` sets every proxy in front of.

A bare uvloop protocol on httptools with answers made beforehand; run as a process of its own:

    python -m benchmarks.mock_upstream --port 8001

`/v1/chat/completions` and `/v1/completions` answer ~550 bytes of JSON, or `max_tokens` server-sent
events, all at once by the model `mock` and one every `--pace-ms` by the model `mock-paced`. When
each event of a paced stream was sent is kept for `GET /stamps?key=…` (`stamp_key` of the prompt),
so that a client can tell how long a proxy held it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import time
from collections import OrderedDict
from typing import Any, Final, cast

import httptools
import msgspec
import uvloop

MODEL, PACED_MODEL = "mock", "mock-paced"
PACE_MS: Final = 20.0
MOST_EVENTS: Final = 512
_KEPT_STREAMS: Final = 4096

_WORDS: Final = "one two three four five six seven eight nine ten".split()
_TEXT: Final = (
    "The tide rises and falls twice a day because the moon pulls at the water of the oceans, and "
    "the earth turns under it. Near the coast the shape of the sea bed decides how high it comes."
)
_USAGE: Final = {"prompt_tokens": 75, "completion_tokens": 40, "total_tokens": 115}


class _Asked(msgspec.Struct):
    """The part of a request that matters here."""

    model: str = MODEL
    stream: bool = False
    max_tokens: int | None = None
    messages: list[dict[str, Any]] = []
    prompt: Any = None
    logprobs: Any = None


_READER: Final = msgspec.json.Decoder(_Asked)


def stamp_key(prompt: str) -> str:
    """Return the name under which the stamps of a prompt's stream are kept."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


class Stamps:
    """When each event of the last streams was sent, in nanoseconds of the monotonic clock."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, list[int]] = OrderedDict()

    def open(self, key: str) -> list[int]:
        """Return the list to put a new stream's stamps into."""
        while len(self._kept) >= _KEPT_STREAMS:
            self._kept.popitem(last=False)
        found = self._kept[key] = []
        return found

    def read(self, key: str) -> list[int]:
        """Return a stream's stamps; none if it isn't known."""
        return self._kept.get(key, [])


class MockUpstream(asyncio.Protocol):
    """One connection.

    Args:
        stamps: Where streams are noted; shared by all connections.
        pace_s: Seconds between two events of a paced stream.
    """

    def __init__(self, stamps: Stamps, pace_s: float = PACE_MS / 1e3) -> None:
        self._stamps, self._pace_s = stamps, pace_s
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop a stream that nobody reads."""
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on; what is no HTTP closes the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # --- Called by the parser ----------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Forget the request before."""
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        """Collect the path."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """Collect the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer."""
        path, _, query = self._url.decode("latin-1").partition("?")
        if path in ("/v1/chat/completions", "/v1/completions"):
            self._complete(path, self._body)
        elif path == "/v1/models":
            entries = [{"id": name, "object": "model"} for name in (MODEL, PACED_MODEL)]
            self._write(msgspec.json.encode({"object": "list", "data": entries}))
        elif path in ("/health", "/ready"):
            self._write(b"")
        elif path == "/stamps":
            key = query.removeprefix("key=")
            self._write(msgspec.json.encode(self._stamps.read(key)))
        else:
            self._write(b'{"error":{"message":"no such route"}}', b"404 Not Found")

    def _complete(self, path: str, body: bytes) -> None:
        try:
            asked = _READER.decode(body)
        except msgspec.DecodeError:
            self._write(b'{"error":{"message":"not JSON"}}', b"400 Bad Request")
            return
        chat = path.startswith("/v1/chat")
        if not asked.stream:
            self._write(_whole(chat, asked.model, asked.logprobs is not None))
            return
        events = _events(chat, asked.model, min(asked.max_tokens or 16, MOST_EVENTS))
        self._transport.write(_STREAM_HEAD)
        if asked.model == PACED_MODEL:
            stamps = self._stamps.open(stamp_key(_last_text(asked)))
            self._task = asyncio.get_running_loop().create_task(self._pace(events, stamps))
        else:
            self._transport.write(b"".join(events) + _END)

    async def _pace(self, events: list[bytes], stamps: list[int]) -> None:
        begun = time.monotonic()
        for number, event in enumerate(events):
            await asyncio.sleep(begun + number * self._pace_s - time.monotonic())
            stamps.append(time.monotonic_ns())
            self._transport.write(event)
        self._transport.write(_END)

    def _write(self, body: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)


_STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_END: Final = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _whole(chat: bool, model: str, logprobs: bool) -> bytes:
    """Return an answer's JSON; the logprobs are those of no token, for the guard's self-check."""
    key = (chat, model, logprobs)
    if key not in _WHOLE:
        empty: dict[str, list[Any]] = {"content": []} if chat else dict(_NO_LOGPROBS)
        says = {"message": {"role": "assistant", "content": _TEXT}} if chat else {"text": _TEXT}
        choice = {"index": 0, **says, "logprobs": empty if logprobs else None}
        ended = {**choice, "finish_reason": "stop", "stop_reason": None}
        _WHOLE[key] = msgspec.json.encode({**_frame(chat, model, ended), "usage": _USAGE})
    return _WHOLE[key]


_WHOLE: dict[tuple[bool, str, bool], bytes] = {}
_NO_LOGPROBS: Final[dict[str, list[Any]]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}


def _events(chat: bool, model: str, count: int) -> list[bytes]:
    """Return a stream's events, a word each; the last says that it ends."""
    key = (chat, model, count)
    if key not in _EVENTS:
        found = []
        for number in range(count):
            word = _WORDS[number % len(_WORDS)] + " "
            says = {"delta": {"content": word}} if chat else {"text": word}
            end = "stop" if number == count - 1 else None
            choice = {"index": 0, **says, "logprobs": None, "finish_reason": end}
            data = msgspec.json.encode(_frame(chat, model, choice, chunk=True))
            found.append(_chunk(b"data: %b\n\n" % data))
        _EVENTS[key] = found
    return _EVENTS[key]


_EVENTS: dict[tuple[bool, str, int], list[bytes]] = {}


def _frame(chat: bool, model: str, choice: dict[str, Any], chunk: bool = False) -> dict[str, Any]:
    kind = "text_completion"
    if chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    named = {"id": "chatcmpl-0a1b2c3d4e5f60718293a4b5c6d7e8f9", "object": kind}
    return {**named, "created": 1760000000, "model": model, "choices": [choice]}


def _last_text(asked: _Asked) -> str:
    content = asked.messages[-1].get("content") if asked.messages else asked.prompt
    return content if isinstance(content, str) else ""


async def _serve(port: int, pace_s: float) -> None:
    stamps, loop = Stamps(), asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_server(lambda: MockUpstream(stamps, pace_s), "127.0.0.1", port)
    async with server:
        await ended.wait()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="A fast mock of an OpenAI-compatible engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pace-ms", type=float, default=PACE_MS)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.port, options.pace_ms / 1e3))


if __name__ == "__main__":
    main()
