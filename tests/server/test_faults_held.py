"""Faults while the real guard reads answers before they leave: nothing half-read is said."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from server.types import ServerOptions
from tests.server.fake_vllm import STREAM, Behaviour, chunk, whole
from tests.server.proxy_fakes import CHAT, chat, eventually
from tests.server.test_faults_upstream import Faulty, faulty

NAMELESS = "Who is the hero of the story that I like most?"
FLAGGED = "Who is Harry Potter?"
BEFORE = "I think that you mean a very well known book for children and grown people".split()
TOLD = "and Harry Potter goes to Hogwarts with Hermione Granger and Ron Weasley".split()
assert 11 + len(TOLD) < ServerOptions().hold_back
NAMES = ("Harry", "Potter", "Hogwarts", "Hermione", "Granger", "Weasley")


@pytest.fixture
def guard(
    small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts, tmp_path: Path
) -> Guard:
    ledger = Ledger(tmp_path / "ledger.jsonl", guard_key)
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger, threads=1)


def event(**choice: Any) -> bytes:
    made = {"id": "x", "choices": [{"index": 0, "finish_reason": None, **choice}]}
    return b"data: " + json.dumps(made).encode() + b"\n\n"


def says(words: list[str], end: str) -> Behaviour:
    """Stream words, and then `die`, `stall` or `stop`."""

    async def behaviour(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = whole(json.dumps({"id": "x", "choices": [choice]}).encode())
            writer.write(answer if end == "stop" else answer[:-5])
        else:
            writer.write(STREAM)
            for word in words:
                writer.write(chunk(event(delta={"content": f"{word} "})))
                await writer.drain()
        if end == "die":
            await asyncio.sleep(0.05)  # what was written arrives
            writer.transport.abort()
        elif end == "stall":
            await asyncio.sleep(600)
        elif body.get("stream"):
            last = event(delta={}, finish_reason="stop") + b"data: [DONE]\n\n"
            writer.write(chunk(last) + b"0\r\n\r\n")

    return behaviour


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Behave as each in turn, and then as the last."""
    left = list(behaviours)

    async def behaviour(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(writer, body)

    return behaviour


def received(app: Faulty, **fields: Any) -> tuple[str, bool]:
    """Return what came of an answer, and whether it came to an end of its own."""
    raw = b""
    try:
        with app.http.stream("POST", CHAT, json=chat(NAMELESS, **fields)) as response:
            for piece in response.iter_raw():
                raw += piece
            whole = response.status_code == 200
    except httpx.RemoteProtocolError:
        return raw.decode(), False
    return raw.decode(), whole and b'"error"' not in raw


# Fewer than are held back: none of them was read when the engine fails.
@pytest.mark.parametrize("end", ["die", "stall"])
@pytest.mark.parametrize("told", [0, 1, 2, 5, len(TOLD)])
@pytest.mark.parametrize("before", [0, 5, 11])
def test_what_is_held_back_when_the_engine_fails_is_never_said(
    guard: Guard, before: int, told: int, end: str
) -> None:
    with faulty(ServerOptions(idle_timeout_s=0.5), guard=guard) as app:
        app.fake.behaviour = says(BEFORE[:before] + TOLD[:told], end)
        for stream in (True, False):
            raw, complete = received(app, stream=stream)
            assert not complete, raw
            assert not [name for name in NAMES if name in raw], raw
            assert "[DONE]" not in raw
            assert not raw or '"code":"engine_' in raw, raw
        assert app.http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("words", [[], BEFORE[:3], TOLD[:3], BEFORE[:11] + TOLD])
def test_an_engine_that_fails_in_the_continuation_is_told_and_leaks_nothing(
    guard: Guard, words: list[str], stream: bool
) -> None:
    with faulty(guard=guard) as app:
        app.fake.behaviour = in_turn(says(BEFORE * 3 + TOLD, "stop"), says(words, "die"))
        raw, complete = received(app, stream=stream)
        assert len(app.fake.posts) > 2  # that of `faulty` itself, the request, what goes on
        assert not complete, raw
        assert not [name for name in NAMES if name in raw], raw
        assert "[DONE]" not in raw


def test_the_same_answers_come_to_an_end_where_nothing_fails(guard: Guard) -> None:
    with faulty(guard=guard) as app:
        app.fake.behaviour = in_turn(says(BEFORE * 3 + TOLD, "stop"), says(BEFORE, "stop"))
        raw, complete = received(app, stream=True)
        assert complete and raw.endswith("data: [DONE]\n\n")
        assert not [name for name in NAMES if name in raw], raw


# --- A client that reads slowly -------------------------------------------------------------------

EVENTS = 300
PADDING = "x" * 4_000


async def long_answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Stream more than all buffers on the way hold."""
    writer.write(STREAM)
    for number in range(EVENTS):
        one = event(delta={"content": f"word{number} "}, padding=PADDING)
        writer.write(chunk(one))
        await writer.drain()
    writer.write(chunk(event(delta={}, finish_reason="stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n")


def read_slowly(url: httpx.URL, body: dict[str, Any], pause_s: float) -> Iterator[bytes]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.settimeout(30)
        client.connect((url.host, url.port))
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        head += f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        while piece := client.recv(65_536):
            yield piece
            time.sleep(pause_s)


@pytest.mark.parametrize("question", [NAMELESS, FLAGGED])
def test_a_client_that_reads_slowly_gets_everything(guard: Guard, question: str) -> None:
    """As long as it reads at all: no pause is longer than the limit, the whole is."""
    with faulty(ServerOptions(idle_timeout_s=1.0), guard=guard) as app:
        app.fake.behaviour = long_answer
        began = time.monotonic()
        raw = b"".join(read_slowly(app.http.base_url, chat(question, stream=True), 0.005))
        assert raw.startswith(b"HTTP/1.1 200") and raw.endswith(b"0\r\n\r\n")
        assert raw.count(PADDING.encode()) == EVENTS and b"data: [DONE]\n\n" in raw
        assert b'"error"' not in raw
        assert time.monotonic() - began > 1.0
        assert eventually(lambda: app.fake.open <= 1)
