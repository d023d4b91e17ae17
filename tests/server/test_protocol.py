"""The head of an answer leaves with its body, and no later than the loop's next turn."""

from __future__ import annotations

import asyncio
from typing import Any

from server.protocol import _MOST_KEPT, _Joined

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written.append(data)

    def close(self) -> None:
        self.is_closed = True


async def written(*steps: bytes | None, close: bool = False) -> list[bytes]:
    """Write each step; None lets the loop turn."""
    transport: Any = Transport()
    joined = _Joined(transport, asyncio.get_running_loop())
    for step in steps:
        if step is None:
            await asyncio.sleep(0)
        else:
            joined.write(step)
    if close:
        joined.close()
        assert transport.is_closed
    await asyncio.sleep(0)
    found: list[bytes] = transport.written
    return found


def test_a_head_leaves_with_what_follows_it() -> None:
    assert asyncio.run(written(HEAD, b"body", b"", b"end")) == [HEAD + b"bodyend"]
    assert asyncio.run(written(HEAD, b"body", None, b"a", b"b")) == [HEAD + b"body", b"a", b"b"]


def test_no_more_than_a_little_is_kept() -> None:
    big = b"x" * _MOST_KEPT
    assert asyncio.run(written(HEAD, big, b"end")) == [HEAD + big, b"end"]


def test_a_head_alone_leaves_at_the_next_turn() -> None:
    assert asyncio.run(written(HEAD, None, b"late")) == [HEAD, b"late"]
    assert asyncio.run(written(HEAD)) == [HEAD]


def test_nothing_is_lost_on_closing() -> None:
    assert asyncio.run(written(HEAD, close=True)) == [HEAD]
