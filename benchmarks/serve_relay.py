"""The least that a proxy in Python does: an ASGI application that passes requests on by aiohttp.

No check, no limit, no metric. `bench serve` measures the guard beside it, with the same server, to
tell what the guard adds from what Python costs; run as a process of its own:

    python -m benchmarks.serve_relay --port 8002 --upstream http://127.0.0.1:8001
"""

from __future__ import annotations

import argparse
from typing import Any

import aiohttp
import uvicorn

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


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="A bare relay in front of an engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
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
