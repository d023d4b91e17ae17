"""The least that a proxy in Python does: an ASGI application that passes requests on by aiohttp.

No check, no limit, no metric. `bench serve` measures the guard beside it, with the same server and
HTTP client, to tell what the guard adds from what Python costs; run as a process of its own:

    python -m benchmarks.serve_relay --port 8002 --upstream http://127.0.0.1:8001
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvicorn

from benchmarks.serve_load import FIXED_PROMPT
from server.limits import NICER, give_way

_KEPT = ("content-type", "content-length")


class Relay:
    """The application.

    Args:
        upstream: Base URL that requests go to.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        assert self._session is not None
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        url = self._upstream + scope["path"]
        async with self._session.request(
            scope["method"], url, data=body or None, headers=headers
        ) as answer:
            kept = [
                (name.lower().encode(), value.encode())
                for name, value in answer.headers.items()
                if name.lower() in _KEPT
            ]
            start = {"type": "http.response.start", "status": answer.status, "headers": kept}
            await send(start)
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                connector = aiohttp.TCPConnector(limit=512)
                self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
            elif self._session is not None:
                await self._session.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


# --- What decisions do beside a loop, and nothing of what they are for ----------------------------


def _count(_: Path | None) -> None:
    """Keep Python busy."""
    while True:
        sum(range(1_000))


def _encode(folder: Path | None) -> None:
    """Run passes of a bundle's encoder, which leave Python's lock to others meanwhile."""
    from classifiers.encoder import OnnxEncoder

    encoder = OnnxEncoder(folder or Path(), threads=1)
    windows = encoder.windows(FIXED_PROMPT)
    while True:
        encoder.states(windows)


def _thread(work: Callable[[Path | None], None], encoder: Path | None) -> None:
    def below() -> None:
        give_way()
        work(encoder)

    threading.Thread(target=below, daemon=True).start()


def _both(encoder: Path | None) -> None:
    _thread(_count, encoder)
    _thread(_encode, encoder)


def _process(work: Callable[[Path | None], None], encoder: Path | None) -> None:
    parent = os.getpid()
    if os.fork():
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.nice(NICER)
    work(encoder)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


BESIDE: Final[dict[str, Callable[[Path | None], None]]] = {
    "python thread": partial(_thread, _count),
    "encoder thread": partial(_thread, _encode),
    "both threads": _both,
    "python process": partial(_process, _count),
    "encoder process": partial(_process, _encode),
}
"""Each ten steps of priority below the loop, as the guard's own threads are."""


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="A bare relay in front of an engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--beside", choices=sorted(BESIDE), help="What runs beside, without end.")
    parser.add_argument("--encoder", type=Path, help="Folder of the encoder's files.")
    options = parser.parse_args()
    if options.beside is not None:
        BESIDE[options.beside](options.encoder)
    uvicorn.run(
        Relay(options.upstream),
        port=options.port,
        loop="uvloop",
        http="httptools",
        log_level="error",
        access_log=False,
    )


if __name__ == "__main__":
    main()
