"""A secret name never leaves, however the answer is cut, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator

import pytest

from guard.errors import EngineError
from server.answer_model import Renamer, asked_model, renamed, with_model
from server.engines.base import EngineResponse

SECRET = "5f2c9d0ab1"
STREAM = b"".join(
    b'data: {"id":"%d", "model":"5f2c9d0ab1","choices":[{"text":"5f2c9 \xc3\xa4"}]}\n\n' % number
    for number in range(4)
)


def through(pieces: list[bytes], public: str = "my/model") -> list[bytes]:
    renamer = Renamer(SECRET, public)
    return [*(renamer.feed(piece) for piece in pieces), renamer.flush()]


def test_any_cut_gives_the_same_bytes() -> None:
    expected = STREAM.replace(SECRET.encode(), b"my/model")
    rng = random.Random(0)
    for _ in range(300):
        cuts = sorted(rng.sample(range(len(STREAM)), rng.randrange(1, 30)))
        pieces = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
        assert b"".join(through(pieces)) == expected
    assert b"".join(through([bytes([byte]) for byte in STREAM])) == expected


def test_a_whole_event_is_never_held_back() -> None:
    event = STREAM[: STREAM.index(b"\n\n") + 2]
    assert through([event])[0] == event.replace(SECRET.encode(), b"my/model")


def test_the_beginning_of_a_name_at_the_end_comes_out() -> None:
    assert through([b"abc 5f2c", b"9d"]) == [b"abc ", b"", b"5f2c9d"]
    assert b"".join(through([b"5f2c5f2c9d0ab1"], "m")) == b"5f2cm"


@pytest.mark.parametrize("public", ['we"ird\\n', "mödel", "a/b:c"])
def test_the_public_name_is_written_as_json(public: str) -> None:
    (answer, _) = through([b'{"model":"5f2c9d0ab1"}'], public)
    assert json.loads(answer) == {"model": public}


def test_a_request_keeps_the_bytes_of_all_other_values() -> None:
    body = (
        b'{"a": 1.50, "model" : "m", "b": {"model": "m", "x":"\\u00e4" }, '
        b'"seed": 18446744073709551615}'
    )
    changed = with_model(body, SECRET)
    assert json.loads(changed) == {**json.loads(body), "model": SECRET}
    for kept in (b"1.50", b'{"model": "m", "x":"\\u00e4" }', b"18446744073709551615"):
        assert kept in changed
    assert (asked_model(body), asked_model(b"{}"), asked_model(b"[")) == ("m", None, None)


def test_a_request_that_is_no_object_gets_no_adapter() -> None:
    with pytest.raises(EngineError, match="JSON object"):
        with_model(b"[1]", SECRET)


class Chunks:
    """An engine's answer of two pieces, and whether it was closed."""

    def __init__(self, fails: bool = False) -> None:
        self.closed = 0
        self.chunks = self._pieces(fails)

    async def _pieces(self, fails: bool) -> AsyncGenerator[bytes, None]:
        try:
            yield b'{"model":"5f2c9'
            if fails:
                raise EngineError("gone")
            yield b'd0ab1"}'
        finally:
            self.closed += 1


@pytest.mark.parametrize("how", ["read", "closed", "closed unread", "failed"])
def test_the_end_is_told_once(how: str) -> None:
    async def test() -> None:
        source, ends = Chunks(how == "failed"), list[int]()
        headers = [("content-type", "application/json"), ("content-length", "22")]
        answer = renamed(
            EngineResponse(200, headers, source.chunks),
            Renamer(SECRET, "m"),
            lambda: ends.append(1),
        )
        assert answer.headers == headers[:1]
        if how == "read":
            assert await answer.read() == b'{"model":"m"}'
            assert ends == [1]
        elif how == "failed":
            with pytest.raises(EngineError, match="gone"):
                await answer.read()
            assert ends == [1]
        elif how == "closed":
            await anext(answer.chunks)
        await answer.aclose()
        await answer.aclose()
        assert ends == [1]
        assert source.closed or how == "closed unread"

    asyncio.run(test())
