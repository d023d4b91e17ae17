"""What one worker holds while it answers many thousands of requests of all kinds.

    python -m benchmarks.serve_memory --bundle bundles/example --key-file bundles/example.key \
        --plain general_prompts.jsonl:question --asked probes.jsonl:question --requests 150000

Prints a line of JSON every `--every` requests: those answered, by status; resident memory, and of
it what is no file's; open files and threads. No request is sent twice: what memory is made to
remember is different each time. The upstream is the mock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.labelled import load_examples, parse_source
from benchmarks.mock_upstream import MODEL
from benchmarks.serve_arms import API_KEY, Arms, BundlePlace, running
from benchmarks.serve_load import Channel
from benchmarks.serve_process import Cores, Server

AT_ONCE: Final = 8
KINDS: Final = (
    *("plain",) * 6, *("plain stream",) * 2, *("flagged",) * 2, "flagged stream", "completion",
    "flagged completion", "messages", "responses", "long", "malformed", "undeclared",
    "unknown model", "aborted",
)  # fmt: skip
"""Drawn alike; four of twenty are flagged."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What is asked; texts that come round again get a number.

    Attributes:
        plain: Benign ones.
        asked: Those that need the encoder, most of them flagged.
    """

    plain: Sequence[str]
    asked: Sequence[str]

    def of(self, kind: str, number: int) -> str:
        """Return a text that was never asked before."""
        texts = self.asked if "flagged" in kind else self.plain
        text = f"{texts[number % len(texts)]} ({number})"
        return " ".join([text, *self.plain[:40]]) if kind == "long" else text


def request(kind: str, number: int, texts: Texts) -> bytes:
    """Return a request as it goes over the wire."""
    text = texts.of(kind, number)
    path = "/v1/chat/completions"
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 32}
    match kind:
        case "completion" | "flagged completion":
            path, fields["prompt"] = "/v1/completions", text
        case "messages":
            path, fields["messages"] = "/v1/messages", [{"role": "user", "content": text}]
        case "responses":
            path, fields = "/v1/responses", {"model": MODEL, "input": text}
        case _:
            fields["messages"] = [{"role": "user", "content": text}]
    if kind.endswith("stream") or kind == "aborted":
        fields["stream"] = True
    if kind == "undeclared":
        fields[f"field{number}"] = 1
    if kind == "unknown model":
        fields["model"] = f"m{number}"
    body = json.dumps(fields).encode()
    if kind == "malformed":
        body = body[:-1]
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {API_KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, texts: Texts, numbers: range, seed: int) -> Counter[str]:
    """Send so many requests over `AT_ONCE` connections, and return what became of each kind."""
    work: Iterator[tuple[int, str]] = zip(
        numbers, random.Random(seed).choices(KINDS, k=len(numbers)), strict=True
    )
    ended: Counter[str] = Counter()

    async def client() -> None:
        channel = Channel(port)
        try:
            for number, kind in work:
                ended[await _one(channel, port, kind, request(kind, number, texts))] += 1
        finally:
            channel.close()

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return ended


async def _one(channel: Channel, port: int, kind: str, data: bytes) -> str:
    if kind != "aborted":
        return f"{kind} {(await channel.ask(data)).status}"
    leaving = Channel(port)
    asking = asyncio.ensure_future(leaving.ask(data))
    await asyncio.sleep(0.001)
    leaving.close()
    await asyncio.wait({asking})
    asking.exception()
    return kind


def held(server: Server) -> dict[str, float]:
    """Return what the server's process holds: memory in MB, files and threads."""
    (pid,) = server.pids()
    process = Path(f"/proc/{pid}")
    told = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "rss_mb": round(server.rss_mb(), 1),
        "anonymous_mb": round(int(told["RssAnon"].split()[0]) * 1024 / 1e6, 1),
        "files": len(list((process / "fd").iterdir())),
        "threads": int(told["Threads"]),
    }


def main() -> None:
    """Start a guard, ask, and print what it holds."""
    parser = argparse.ArgumentParser(description="Memory of one worker over many requests.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--plain", required=True, metavar="FILE:FIELD")
    parser.add_argument("--asked", required=True, metavar="FILE:FIELD")
    parser.add_argument("--requests", type=int, default=150_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = Texts(
        *(
            [example.text for example in load_examples(parse_source(spec)).examples]
            for spec in (options.plain, options.asked)
        )
    )
    place = BundlePlace.of(options.bundle, options.key_file)
    with (
        tempfile.TemporaryDirectory() as work,
        running(Arms(place), Path(work), Cores.pick(), lambda *_: None, only=("on",)) as up,
    ):
        (arm,) = up.of("on")
        assert arm.server is not None
        _print({"requests": 0, **held(arm.server)})
        begun = time.monotonic()
        for start in range(0, options.requests, options.every):
            numbers = range(start, min(start + options.every, options.requests))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                ended = runner.run(ask(arm.port, texts, numbers, options.seed + start))
            line: dict[str, Any] = {"requests": numbers.stop, **held(arm.server)}
            line["seconds"] = round(time.monotonic() - begun)
            _print(line | {"answers": dict(sorted(ended.items()))})


def _print(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
