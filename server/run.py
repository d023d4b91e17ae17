"""Runs the application on uvicorn."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from server.lifecycle import Lifecycle
from server.protocol import LimitedProtocol

_CLOSE: Final = (b"connection", b"close")
_LAST_WORDS_S: Final = 5
"""For the clients of answers that were cut to be told; then their connections break."""


class _Server(uvicorn.Server):
    """Uvicorn that says where it listens, and that it ends before it does."""

    on_started: Callable[[str], None] | None = None
    lifecycle: Lifecycle
    shutdown_timeout_s: float

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections; cut what still runs when its time is over."""
        loop = asyncio.get_running_loop()
        end = loop.call_later(self.shutdown_timeout_s, self.lifecycle.cut)
        await super().shutdown(sockets)
        end.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started(self.address())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at SIGTERM; end at once at SIGINT, or at a second signal."""
        self.lifecycle.drain(at_once=sig == signal.SIGINT)
        if self.lifecycle.is_over:
            super().handle_exit(sig, frame)
        else:
            self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second if it is time to end."""
        ends = await super().on_tick(counter)
        headers = self.server_state.default_headers
        if self.lifecycle.draining and _CLOSE not in headers:
            # Clients that keep their connection would never meet another server.
            self.server_state.default_headers = [*headers, _CLOSE]
        return ends or self.lifecycle.is_over

    def address(self) -> str:
        """Return the first address that is listened on."""
        bound = self.servers[0].sockets[0].getsockname()
        if isinstance(bound, str):
            return f"unix:{bound}"
        host = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        return f"http://{host}:{bound[1]}"


def make_server(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: str | None = None,
    shutdown_timeout_s: int = 30,
    on_started: Callable[[str], None] | None = None,
    lifecycle: Lifecycle | None = None,
) -> uvicorn.Server:
    """Build the server without running it; see `serve`."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        uds=uds,
        loop="uvloop",
        http=LimitedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        # Forwarded addresses are what a client claims; /metrics goes by the real peer.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=shutdown_timeout_s + _LAST_WORDS_S,
    )
    server = _Server(config)
    server.on_started = on_started
    state = getattr(app, "state", None)
    server.lifecycle = lifecycle or getattr(state, "lifecycle", None) or Lifecycle()
    server.shutdown_timeout_s = shutdown_timeout_s
    return server


def serve(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: str | None = None,
    shutdown_timeout_s: int = 30,
    on_started: Callable[[str], None] | None = None,
    lifecycle: Lifecycle | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; answers in work get `shutdown_timeout_s` to end.

    At SIGTERM the server first goes on for the lifecycle's `drain_s`.

    Args:
        app: The application.
        host: Address to listen on.
        port: TCP port; 0 picks a free one.
        uds: Path of a Unix socket, instead of host and port.
        shutdown_timeout_s: Seconds for running answers at shutdown.
        on_started: Called with the address once requests are taken.
        lifecycle: None takes the application's, so that `/ready` tells of the end.

    Raises:
        KeyboardInterrupt: After a shutdown by SIGINT.
        SystemExit: If the application or the socket could not be started.
    """
    server = make_server(
        app,
        host,
        port,
        uds=uds,
        shutdown_timeout_s=shutdown_timeout_s,
        on_started=on_started,
        lifecycle=lifecycle,
    )
    server.run()
