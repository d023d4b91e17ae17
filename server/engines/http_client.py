"""An HTTP/1.1 client for one server: what a proxy needs of one, and little else.

Bodies go out and come back as they are: no redirects, cookies, retries, compression or proxies. A
general client takes several times as long for a request, which was a fifth of all that a guarded
one took (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from server.engines.http_connection import Answer, Connection, ConnectTimeout


class HttpClient:
    """Connections to one server; belongs to the event loop that it is made in.

    Args:
        url: The server's base URL; its path goes before those of requests.
        connect_timeout_s: For a connection, to whichever of the addresses of its name.
        read_timeout_s: How long the server may be silent while it is asked something.
        max_connections: Connections at most; further requests wait for one.
        keep_s: How long a connection that is not used is kept.
        socket_path: A Unix socket to go through; the URL's host is then only a name.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 600.0,
        max_connections: int = 512,
        keep_s: float = 3.0,
        socket_path: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._path = parts.hostname or "", quote(parts.path.rstrip("/"), safe="/%")
        self._port = parts.port or (443 if self._tls else 80)
        self._socket_path = socket_path
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        self._keep_s = keep_s
        name = parts.netloc
        self._host_line = f"host: {name if name.isascii() else name.encode('idna').decode()}\r\n"
        self._loop = asyncio.get_running_loop()
        self._places = asyncio.Semaphore(max_connections)
        self._idle: list[Connection] = []  # the one that was used last is used next
        self._all: set[Connection] = set()
        self._tidying: asyncio.TimerHandle | None = None
        self._emptied = asyncio.Event()

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        """Send a request and wait for the head of its answer.

        Args:
            method: HTTP method.
            path: Path and query, as they go over the wire.
            body: None sends none.
            headers: All but `host` and `content-length`.

        Raises:
            ConnectTimeout: There was no connection in time.
            ReadTimeout: The server was silent for too long.
            OSError: It can't be reached, went away, or speaks no HTTP.
            ValueError: A header can't be sent.
        """
        head = self._head(method, path, body, headers)
        await self._places.acquire()
        try:
            connection = self._kept() or await self._connect()
        except BaseException:
            self._places.release()
            raise
        return await connection.ask(head, body or b"")  # its end gives the place back

    async def close(self) -> None:
        """Close all connections; answers in work are broken off."""
        if self._tidying is not None:
            self._tidying.cancel()
        self._idle.clear()
        self._emptied.clear()
        for connection in tuple(self._all):
            connection.abort()
        if self._all:
            await self._emptied.wait()

    def _head(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> bytes:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        length = "" if body is None else f"content-length: {len(body)}\r\n"
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._host_line}{lines}{length}\r\n"
        data = head.encode("latin-1")
        most = len(headers) + (3 if body is None else 4)
        if data.count(b"\n") != most or data.count(b"\r") != most or b"\0" in data:
            raise ValueError("a header holds the end of a line")
        return data

    def _kept(self) -> Connection | None:
        """Return a connection that can be used again."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and not self._is_stale(connection):
                return connection
            connection.abort()
        return None

    def _is_stale(self, connection: Connection) -> bool:
        return connection.idle_since + self._keep_s <= self._loop.time()

    async def _connect(self) -> Connection:
        def make() -> Connection:
            return Connection(self._loop, self._read_timeout_s, self._ended, self._gone)

        name = self._host if self._tls else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._socket_path is not None:
                    _, connection = await self._loop.create_unix_connection(
                        make, self._socket_path, ssl=self._tls, server_hostname=name
                    )
                else:
                    _, connection = await self._loop.create_connection(
                        make, self._host, self._port, ssl=self._tls, server_hostname=name
                    )
        except TimeoutError as error:
            raise ConnectTimeout(f"no connection within {self._connect_timeout_s:g} s") from error
        if connection.is_open:  # else it was lost at once
            self._all.add(connection)
        return connection

    def _ended(self, connection: Connection, keeps: bool) -> None:
        self._places.release()
        if keeps:
            self._idle.append(connection)
            if self._tidying is None:
                self._tidying = self._loop.call_later(self._keep_s, self._tidy)

    def _gone(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._all:
            self._emptied.set()

    def _tidy(self) -> None:
        """Close what was not used for long."""
        self._tidying = None
        for connection in [one for one in self._idle if self._is_stale(one)]:
            connection.abort()
        if self._all:
            self._tidying = self._loop.call_later(self._keep_s, self._tidy)
