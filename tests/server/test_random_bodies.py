"""Requests that were right but for some places: nothing breaks, nothing goes on unjudged.

test_bypass.py sends noise and plants questions into right requests. These are the requests of every
dialect with a question or ordinary words in them, changed at random as JSON and as bytes: many are
still accepted, and what then comes to the engine is exactly what the guard has decided on.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from tests.server.judged import Judged
from tests.server.test_bypass import QUESTIONS
from tests.server.test_dialect_fuzz import places_of
from tests.server.test_forget_shapes import BENIGN, SHAPES

TEXTS = (*QUESTIONS, *BENIGN)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 0.5, 1e300, "", "x", "user", "text", "tool",
    "\ud800", "\x00", "<prompt_embeds>", [], {}, [[]], [{}], [None], ["x"], [1, 2],
    {"type": "text"}, {"type": "text", "text": "x"}, {"role": "user", "content": "x"},
    {"type": "image_url", "image_url": {"url": "data:,x"}}, {"type": "input_text", "text": "x"},
)  # fmt: skip
KEYS = (
    "content", "text", "type", "role", "name", "prompt", "input", "messages", "prompt_embeds",
    "tools", "n", "echo", "suffix", "stream", "documents", "prefix", "x", "", "\u200bcontent",
)  # fmt: skip


def changed(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change up to three places of a body."""
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        ways = list(places_of(body))
        if not ways:
            break
        *way, key = rng.choice(ways)
        node: Any = body
        for step in way:
            node = node[step]
        change(node, key, rng)
    return body


def change(node: Any, key: Any, rng: random.Random) -> None:
    match rng.randrange(6):
        case 0:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        case 1:
            del node[key]
        case 2 if isinstance(node, dict):
            node[rng.choice(KEYS)] = node.pop(key)
        case 3 if isinstance(node, dict):
            node[rng.choice(KEYS)] = copy.deepcopy(rng.choice((*VALUES, *TEXTS)))
        case 4:
            node[key] = rng.choice(([node[key]], {"text": node[key]}, str(node[key])))
        case _:
            value = copy.deepcopy(node[key])
            if isinstance(node, list):
                node.insert(rng.randrange(len(node) + 1), value)
            else:
                node[key] = rng.choice(TEXTS) if isinstance(value, str) else value


def scrambled(body: bytes, rng: random.Random) -> bytes:
    """Change some bytes."""
    made = bytearray(body)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(made))
        match rng.randrange(4):
            case 0:
                made[at] = rng.randrange(256)
            case 1:
                del made[at : at + rng.randrange(1, 9)]
            case 2:
                made[at:at] = made[at : at + rng.randrange(1, 40)]
            case _:
                made[at:at] = rng.choice((b'"', b"\\", b"{", b"]", b",", b"\\u0000", b"\xed\xa0"))
        if not made:
            break
    return bytes(made)


def random_request(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(sorted(SHAPES))
    make = SHAPES[path][rng.choice(sorted(SHAPES[path]))]
    body = make(rng.choice(TEXTS)) | {"model": "m"}
    if path not in ("/v1/embeddings", "/v1/messages/count_tokens") and rng.random() < 0.2:
        body["stream"] = True
    made = json.dumps(changed(copy.deepcopy(body), rng)).encode()
    return path, scrambled(made, rng) if rng.random() < 0.25 else made


def check(judged: Judged, count: int, seed: int) -> None:
    rng = random.Random(seed)
    ended: Counter[str] = Counter()
    for number in range(count):
        path, body = random_request(rng)
        try:
            status, _ = judged.send(path, body)
        except AssertionError as error:
            raise AssertionError(f"request {number} of seed {seed}: {path} {body!r}") from error
        assert status in (200, 400, 404), (status, path, body)
        for question in QUESTIONS:
            assert not judged.shows(question), (path, body)
        ended[f"{status} {judged.treatment()}"] += 1
    assert ended.total() == count
    assert ended["200 pass"] > count // 10, ended
    assert ended["200 corrupt"] > count // 20, ended
    assert ended["400 undecided"] > count // 10, ended


def test_almost_right_requests_break_nothing_and_pass_nothing_by(judged: Judged) -> None:
    check(judged, 3_000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_many_almost_right_requests_break_nothing_and_pass_nothing_by(judged: Judged) -> None:
    check(judged, 100_000, seed=2)


def test_words_of_a_megabyte_are_not_kept(judged: Judged) -> None:
    """What is remembered of words would otherwise hold all bodies that were ever sent."""
    rng = random.Random(3)

    def send() -> None:
        words = (bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=20_000)) for _ in range(9))
        text = b" ".join(words).decode()
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
        judged.send("/v1/chat/completions", body.encode())

    for _ in range(3):
        send()
    judged.guard.decided.clear()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(20):
            send()
        judged.guard.decided.clear()
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1_500_000, kept  # of 3,600,000 letters
