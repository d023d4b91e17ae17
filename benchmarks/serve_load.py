"""The client of `bench serve`: asks a server as fast as it is told to, and says how long it took.

A process of its own, so that it can be kept off the server's core: it reads jobs as JSON lines and
answers each with a line. Requests go over kept-alive connections of a bare protocol, so that the
client adds as little as it can to what it measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, cast

import httptools
import msgspec
import uvloop

from benchmarks.mock_upstream import PACED_MODEL, stamp_key
from benchmarks.serve_delays import arrivals, relay_delays

PATIENCE_S: Final = 120.0
FIXED_PROMPT: Final = (
    "I am planning a small vegetable garden behind my house this spring. The soil is heavy clay, "
    "the sun reaches it from about ten in the morning until four in the afternoon, and I can water "
    "it only twice a week. Which five vegetables would you plant, in what order, how far apart, "
    "and what should I mix into the soil before I begin?"
)
"""About 75 tokens."""


class Load(msgspec.Struct, kw_only=True):
    """What to ask.

    Attributes:
        port: Of the server, on this machine.
        concurrency: Connections; each asks again as soon as it was answered.
        seconds: For how long, at most.
        count: How many requests, at most; None is any number.
        fixed: Ask `FIXED_PROMPT` always, instead of each text once.
        start: Number of the text to begin with; after the last they come again with a number
            behind them, so that none is ever asked twice.
        texts: Which set of texts.
        stream: Ask for server-sent events.
        max_tokens: Tokens to ask for.
        model: Model to ask.
        rate: Requests a second, at most; None is as many as it can.
        key: Sent as a bearer token.
    """

    port: int
    concurrency: int = 1
    seconds: float = 1.0
    count: int | None = None
    fixed: bool = False
    start: int = 0
    texts: str = "plain"
    stream: bool = False
    max_tokens: int = 16
    model: str = "mock"
    rate: float | None = None
    key: str = "bench"


class Job(msgspec.Struct, kw_only=True):
    """A load, and streams that run beside it.

    Attributes:
        load: The load; None asks for the streams alone.
        streams: Paced streams, begun together and followed to their end; the load ends with them.
        chunks: Events of each.
        upstream: Port of the mock that knows when events were sent; the streams go to `port`.
        port: Where the streams go.
        start: As in `Load`.
        key: As in `Load`.
    """

    load: Load | None = None
    streams: int = 0
    chunks: int = 0
    upstream: int = 0
    port: int = 0
    start: int = 0
    key: str = "bench"


class Outcome(msgspec.Struct, kw_only=True):
    """What came of a load.

    Attributes:
        latency_ms: Of each answer that came, until its end.
        first_ms: Until the first byte of its body.
        seconds: How long the load ran.
        asked: Requests begun.
        statuses: Answers, by status; `0` is a connection that broke.
        delays_ms: How long each word of the paced streams was on its way: from the event that
            released it to its arrival.
        held: Words that were held back, as a rule.
    """

    latency_ms: list[float] = []
    first_ms: list[float] = []
    seconds: float = 0.0
    asked: int = 0
    statuses: dict[str, int] = {}
    delays_ms: list[float] = []
    held: int = 0


@dataclass(slots=True)
class Answer:
    """One answer: nanoseconds at which its body began and ended, and the pieces that came."""

    status: int = 0
    first_ns: int = 0
    last_ns: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)


class Channel(asyncio.Protocol):
    """A connection that is opened again when the server closed it.

    Args:
        port: Of the server.
        keep: Keep the pieces of bodies.
    """

    def __init__(self, port: int, keep: bool = False) -> None:
        self._port, self._keep = port, keep
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._answer = Answer()

    async def ask(self, data: bytes) -> Answer:
        """Send a request and wait for its whole answer.

        Raises:
            ConnectionError: If the connection broke before that.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        assert self._transport is not None
        self._answer, self._waiting = Answer(), loop.create_future()
        self._transport.write(data)
        return await self._waiting

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    # --- Called by the event loop and the parser -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin anew."""
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        self._fail(exc or ConnectionError("the server closed the connection"))

    def on_body(self, body: bytes) -> None:
        """Note the time."""
        now = time.monotonic_ns()
        if not self._answer.first_ns:
            self._answer.first_ns = now
        if self._keep:
            self._answer.pieces.append((now, body))

    def on_message_complete(self) -> None:
        """Hand the answer over."""
        self._answer.last_ns = time.monotonic_ns()
        self._answer.status = self._parser.get_status_code()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(self._answer)

    def _fail(self, error: Exception) -> None:
        self._transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


def request_bytes(load: Load, prompt: str) -> bytes:
    """Return a chat request as it goes over the wire."""
    fields: dict[str, Any] = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.max_tokens,
    }
    if load.stream:
        fields["stream"] = True
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{load.port}\r\n"
        f"authorization: Bearer {load.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def numbered(texts: Sequence[str], start: int) -> Iterator[str]:
    """Yield texts from number `start` on, without end and none twice."""
    while True:
        turn, at = divmod(start, len(texts))
        yield f"{texts[at]} ({turn + 1})" if turn else texts[at]
        start += 1


async def run_load(load: Load, texts: Sequence[str], stop: asyncio.Event | None = None) -> Outcome:
    """Ask until the load is done or `stop` is set; an answer that is under way is waited for."""
    outcome, statuses = Outcome(), Counter[str]()
    prompts = numbered([FIXED_PROMPT] if load.fixed else texts, load.start)
    begun = time.monotonic()
    until = begun + load.seconds

    def goes_on() -> bool:
        stopped = stop is not None and stop.is_set()
        enough = load.count is not None and outcome.asked >= load.count
        return not stopped and not enough and time.monotonic() < until

    async def ask_on(channel: Channel) -> None:
        while goes_on():
            data = fixed if load.fixed else request_bytes(load, next(prompts))
            outcome.asked += 1
            if load.rate is not None:  # the n-th request not before its time
                await asyncio.sleep(begun + outcome.asked / load.rate - time.monotonic())
            sent = time.monotonic_ns()
            try:
                answer = await channel.ask(data)
            except OSError:
                statuses["0"] += 1
                continue
            statuses[str(answer.status)] += 1
            outcome.latency_ms.append((answer.last_ns - sent) / 1e6)
            outcome.first_ms.append(((answer.first_ns or answer.last_ns) - sent) / 1e6)

    fixed = request_bytes(load, FIXED_PROMPT)
    channels = [Channel(load.port) for _ in range(load.concurrency)]
    try:
        async with asyncio.timeout(load.seconds + PATIENCE_S):
            await asyncio.gather(*(ask_on(channel) for channel in channels))
    finally:
        for channel in channels:
            channel.close()
    outcome.seconds = time.monotonic() - begun
    outcome.statuses = dict(statuses)
    return outcome


async def run_job(job: Job, texts: dict[str, list[str]]) -> Outcome:
    """Run the load, and the streams beside it."""
    if not job.streams:
        assert job.load is not None
        return await run_load(job.load, texts[job.load.texts])
    stop = asyncio.Event()
    beside = None
    if job.load is not None:
        endless = msgspec.structs.replace(job.load, seconds=PATIENCE_S)
        beside = asyncio.create_task(run_load(endless, texts[job.load.texts], stop))
        await asyncio.sleep(0.2)  # streams that begin before the load would meet an idle server
    prompts = numbered(texts["plain"], job.start)
    follows = [_follow(job, next(prompts)) for _ in range(job.streams)]
    try:
        followed = await asyncio.gather(*follows)
    finally:
        stop.set()
        outcome = await beside if beside is not None else Outcome()
    outcome.delays_ms = [delay for delays, _ in followed for delay in delays]
    outcome.held = int(median(held for _, held in followed))
    return outcome


async def _follow(job: Job, prompt: str) -> tuple[list[float], int]:
    """Read one paced stream and ask the mock when it sent what."""
    load = Load(port=job.port, key=job.key, stream=True, max_tokens=job.chunks, model=PACED_MODEL)
    channel, mock = Channel(job.port, keep=True), Channel(job.upstream, keep=True)
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await channel.ask(request_bytes(load, prompt))
            head = f"GET /stamps?key={stamp_key(prompt)} HTTP/1.1\r\nhost: mock\r\n\r\n"
            told = await mock.ask(head.encode())
    finally:
        channel.close()
        mock.close()
    stamps: list[int] = json.loads(b"".join(body for _, body in told.pieces))
    return relay_delays(arrivals(answer.pieces), stamps)


async def _serve_jobs(lines: Iterator[str]) -> None:
    """Answer each job with a line; the first line holds the texts."""
    texts: dict[str, list[str]] = json.loads(next(lines))
    decoder = msgspec.json.Decoder(Job)
    for line in lines:
        outcome = await run_job(decoder.decode(line), texts)
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
        sys.stdout.flush()


def main() -> None:
    """Read jobs from standard input until it ends."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_jobs(iter(sys.stdin)))


if __name__ == "__main__":
    main()
