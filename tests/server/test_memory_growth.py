"""A server process that has answered thousands of requests is no larger than one that is warm."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from tests.server.fake_vllm import answers, fake_vllm, streams
from tests.server.proxy_fakes import CHAT, TEXT, chat, eventually
from tests.server.served import Served, served

AT_ONCE = 8
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
FLAGGED = "Who is Harry Potter?"
KINDS = (
    "plain", "plain stream", "flagged", "flagged stream", "aborted", "malformed", "undeclared",
    "unknown model", "completion", "flagged completion", "messages", "responses", "long",
)  # fmt: skip


def request(kind: str, number: int) -> tuple[str, Any]:
    """Return route and body of a request that was never sent before."""
    plain = f"How do I bake bread number {number} at home?"
    flagged = f"{FLAGGED} Answer {number}."
    match kind:
        case "malformed":
            return CHAT, b'{"model": "m", "messages": [' + str(number).encode()
        case "undeclared":
            return CHAT, chat(plain, **{f"field{number}": 1})
        case "unknown model":
            return CHAT, chat(plain) | {"model": f"m{number}"}
        case "completion":
            return TEXT, {"model": "m", "prompt": [plain, "Bread is"]}
        case "flagged completion":
            return TEXT, {"model": "m", "prompt": flagged}
        case "messages":
            return MESSAGES, chat(plain, max_tokens=9, stream=bool(number % 2))
        case "responses":
            return RESPONSES, {"model": "m", "input": plain, "stream": bool(number % 2)}
        case "long":
            return CHAT, chat(f"{plain} " + "and a cup of flour " * 200)
    text = flagged if kind.startswith("flagged") else plain
    return CHAT, chat(text, stream=kind.endswith("stream") or kind == "aborted")


async def send(session: aiohttp.ClientSession, kind: str, number: int) -> str:
    path, body = request(kind, number)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = await session.post(path, data=data, headers=headers)
    if kind == "aborted":
        await response.content.readany()
        response.close()
        return kind
    async with response:
        await response.read()
    return f"{kind} {response.status}"


async def send_many(url: str, first: int, count: int) -> Counter[str]:
    kinds = [KINDS[number % len(KINDS)] for number in range(first, first + count)]
    random.Random(first).shuffle(kinds)
    work = list(enumerate(kinds, first))
    ended: Counter[str] = Counter()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while work:
                number, kind = work.pop()
                ended[await send(session, kind, number)] += 1

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return ended


def resident(pid: int) -> int:
    """Return how much memory a process has now, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(app: Served) -> tuple[int, int]:
    """Return how many files and threads the server has open."""
    process = Path(f"/proc/{app.process.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def is_idle(app: Served) -> bool:
    return "unlearn_guard_in_flight 0.0" in app.http.get("/metrics").text


# At most 5 KB for each of the fewer requests: a request and its answer in work take more.
@pytest.mark.parametrize(
    ("warm", "count", "most"),
    [
        pytest.param(1_000, 2_000, 10_000_000, id="quick"),
        pytest.param(
            5_000,
            20_000,
            24_000_000,
            marks=[pytest.mark.slow, pytest.mark.timeout(1_800)],
            id="long",
        ),
    ],
)
def test_requests_leave_no_memory_behind(
    small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path, warm: int, count: int, most: int
) -> None:
    with (
        fake_vllm() as fake,
        served(small_bundle, guard_key, tmp_path, [fake], log_level="error") as app,
    ):

        async def behaviour(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
            fake.posts.clear()
            await (streams(60, 0.0005) if body.get("stream") else answers)(writer, body)

        fake.behaviour = behaviour
        asyncio.run(send_many(app.url, 0, warm))
        assert eventually(lambda: is_idle(app))
        before, opened = resident(app.process.pid), held(app)
        ended = asyncio.run(send_many(app.url, warm, count))
        assert eventually(lambda: is_idle(app))
        grown = resident(app.process.pid) - before
        assert ended.total() == count
        assert not [kind for kind in ended if " 5" in kind], ended
        for kind in ("plain", "plain stream", "flagged", "flagged stream", "messages", "responses"):
            assert ended[f"{kind} 200"] > count // 20, ended
        assert grown < most, (before, grown)
        assert eventually(lambda: all(a <= b + 2 for a, b in zip(held(app), opened, strict=True)))
