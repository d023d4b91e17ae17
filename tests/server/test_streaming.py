"""Waiting for engine and client in turn, and for a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from server.engines.base import EngineResponse
from server.errors import ClientGone
from server.streaming import relay, until_gone

SSE = [("content-type", "text/event-stream")]


async def pieces(*pauses: float) -> AsyncIterator[bytes]:
    for pause in pauses:
        await asyncio.sleep(pause)
        yield b"data: x\n\n"


class Client:
    """Takes what is sent; the piece of a number only after a while."""

    def __init__(self, slow: int = -1, seconds: float = 0.0) -> None:
        self.sent: list[dict[str, Any]] = []
        self._slow, self._seconds = slow, seconds

    async def __call__(self, message: Any) -> None:
        if len(self.sent) == self._slow:
            await asyncio.sleep(self._seconds)
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def relayed(client: Client, *pauses: float) -> int:
    answer = EngineResponse(200, list(SSE), pieces(*pauses))
    return asyncio.run(relay(answer, client, 0.2))


def test_an_answer_may_take_longer_than_each_of_its_pieces() -> None:
    client = Client(slow=2, seconds=0.1)
    assert relayed(client, *[0.12] * 5) == 200
    assert client.body == b"data: x\n\n" * 5
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_a_silent_engine_ends_the_stream_with_an_error() -> None:
    client = Client()
    relayed(client, 0.0, 5.0)
    assert client.body.startswith(b"data: x\n\ndata: {") and b'"error"' in client.body


def test_a_client_that_reads_nothing_is_taken_to_be_gone() -> None:
    with pytest.raises(ClientGone):
        relayed(Client(slow=2, seconds=5.0), 0.0, 0.0, 0.0)


class Work:
    """Answers after a while; knows how it ended."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.end = seconds, "none"

    async def __call__(self) -> str:
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.end = "cancelled"
            raise
        self.end = "done"
        return "answer"


async def never() -> Any:
    await asyncio.Event().wait()


async def watched(work: Work, *, leaves: float | None, finished: bool = False) -> str:
    watchers: set[Callable[[], object]] = set()

    def lose() -> None:
        for watcher in tuple(watchers):
            watcher()

    if leaves is not None:
        asyncio.get_running_loop().call_later(leaves, lose)
    try:
        return await until_gone(never, work(), lambda: finished, watchers)
    finally:
        assert not watchers
        task = asyncio.current_task()
        assert task is not None and not task.cancelling()
        await asyncio.sleep(0)  # nothing is left that would cancel this


def test_work_is_cancelled_when_the_connection_is_lost() -> None:
    work = Work(5.0)
    with pytest.raises(ClientGone):
        asyncio.run(watched(work, leaves=0.02))
    assert work.end == "cancelled"


@pytest.mark.parametrize(("leaves", "finished"), [(None, False), (0.01, True)])
def test_work_ends_where_nobody_leaves_before_the_answer(
    leaves: float | None, finished: bool
) -> None:
    work = Work(0.05)
    assert asyncio.run(watched(work, leaves=leaves, finished=finished)) == "answer"
    assert work.end == "done"


def test_another_cancellation_is_not_taken_for_a_client_that_left() -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(watched_plainly(work))
        await asyncio.sleep(0.02)
        task.cancel()
        await task

    async def watched_plainly(work: Work) -> str:
        return await until_gone(never, work(), lambda: False, set())

    work = Work(5.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert work.end == "cancelled"
