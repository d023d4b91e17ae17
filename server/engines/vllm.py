"""The vLLM engine: HTTP to an unmodified vLLM that was started with `--enable-prompt-embeds`.

Bodies go out and come back byte for byte, each piece as soon as it arrives. Here, and nowhere else,
transport faults become the project's engine errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from guard.errors import (
    ConfigError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from server.engines.base import EngineResponse

REQUEST_HEADERS: Final = frozenset({"accept", "authorization", "content-type", "x-request-id"})
RESPONSE_HEADERS: Final = frozenset(
    {"cache-control", "content-type", "retry-after", "x-request-id"}
)

_MAX_CONTROL_BYTES: Final = 4_000_000
_FAULTS: Final = (aiohttp.ClientError, OSError, EOFError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class VllmTimeouts:
    """How long to wait for vLLM, in seconds.

    Attributes:
        connect: For a connection.
        read: For the first byte, and between two pieces of an answer. Without streaming nothing
            comes before the whole answer is done.
        control: For health and the list of models, all in all.
    """

    connect: float = 5.0
    read: float = 600.0
    control: float = 10.0


class VllmEngine:
    """An `Engine` that is a vLLM server.

    Args:
        upstream_url: Where vLLM serves, e.g. `http://127.0.0.1:8001`; a trailing `/v1` is allowed.
        api_key: The key that vLLM was started with; it replaces a client's own.
        timeouts: How long to wait.
        max_connections: Connections held at most; further requests wait for one.
        socket_path: A Unix domain socket to go through; the URL's host is then only a name.

    Raises:
        ConfigError: The URL is none.
    """

    name = "vllm"

    def __init__(
        self,
        upstream_url: str,
        api_key: str | None = None,
        timeouts: VllmTimeouts | None = None,
        *,
        max_connections: int = 512,
        socket_path: str | None = None,
    ) -> None:
        self.url = _checked_url(upstream_url)
        self._api_key = api_key
        self._timeouts = timeouts or VllmTimeouts()
        self._max_connections, self._socket_path = max_connections, socket_path
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Make the connection pool; connections are opened when they are needed."""
        if self._session is not None:
            return
        # vLLM closes idle connections after five seconds; reusing one at that moment would fail.
        pool: dict[str, Any] = {"limit": self._max_connections, "keepalive_timeout": 3.0}
        connector = (
            aiohttp.UnixConnector(self._socket_path, **pool)
            if self._socket_path
            else aiohttp.TCPConnector(**pool)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=None,
                sock_connect=self._timeouts.connect,
                sock_read=self._timeouts.read,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )

    async def close(self) -> None:
        """Close all connections, and with them every running generation."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def health(self) -> None:
        """Return if vLLM serves a model.

        Raises:
            EngineError: It doesn't; the message says what to look at.
        """
        await self._control("/health")
        if not await self.models():
            raise EngineUnavailableError(f"vLLM at {self.url} serves no model")

    async def models(self) -> list[str]:
        """Return the names of the served models, without LoRA adapters.

        Raises:
            EngineError: vLLM can't be reached, refuses, or does not answer as vLLM does.
        """
        body = await self._control("/v1/models")
        try:
            entries = json.loads(body)["data"]
            return [str(entry["id"]) for entry in entries if not entry.get("parent")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineUnavailableError(
                f"{self.url}/v1/models gave no list of models ({type(error).__name__}); is the "
                "upstream a vLLM server?"
            ) from error

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        """Send a request; see `Engine.post`.

        Cancelling the call or closing the answer closes the connection, at which vLLM stops
        generating.

        Raises:
            EngineUnavailableError: vLLM can't be reached, or left before it answered.
            EngineTimeoutError: vLLM did not answer in time.
        """
        allowed = {k.lower(): v for k, v in headers.items() if k.lower() in REQUEST_HEADERS}
        response = await self._send("POST", path, body, allowed)
        kept = [
            (name.lower(), value)
            for name, value in response.headers.items()
            if name.lower() in RESPONSE_HEADERS
        ]
        return EngineResponse(response.status, kept, _Relay(response, self.url))

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise EngineUnavailableError("the vLLM engine is not started")
        sent = {"accept-encoding": "identity", **(headers or {})}
        if self._api_key:
            sent["authorization"] = f"Bearer {self._api_key}"
        try:
            return await self._session.request(
                method, self.url + path, data=body, headers=sent, allow_redirects=False
            )
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            raise EngineTimeoutError(f"vLLM at {self.url} did not answer in time") from error
        except _FAULTS as error:
            raise _unavailable(self.url, error) from error

    async def _control(self, path: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeouts.control):
                response = await self._send("GET", path)
                relay = _Relay(response, self.url)
                try:
                    body = await _read(relay)
                finally:
                    await relay.aclose()
        except TimeoutError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineTimeoutError(
                f"vLLM at {self.url} did not answer {path} in {self._timeouts.control} s"
            ) from error
        if response.status != 200:
            raise EngineRefusedError(response.status, body)
        return body


class _Relay:
    """The pieces of an answer as they arrive.

    A class and not a generator: closing a generator that was never started runs none of its code,
    and the upstream connection would stay open.
    """

    def __init__(self, response: aiohttp.ClientResponse, url: str) -> None:
        self._response, self._url = response, url

    def __aiter__(self) -> _Relay:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            self._response.close()
            raise EngineTimeoutError(
                f"vLLM at {self._url} stopped sending in the middle of an answer"
            ) from error
        except _FAULTS as error:
            self._response.close()
            raise _unavailable(self._url, error, "in the middle of an answer") from error
        except asyncio.CancelledError:
            self._response.close()
            raise
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Close the connection unless the whole answer has come; vLLM then stops generating."""
        self._response.close()


async def _read(relay: _Relay) -> bytes:
    pieces, size = [], 0
    async for piece in relay:
        size += len(piece)
        if size > _MAX_CONTROL_BYTES:
            raise EngineUnavailableError(
                f"the upstream's answer is longer than {_MAX_CONTROL_BYTES} bytes; is it vLLM?"
            )
        pieces.append(piece)
    return b"".join(pieces)


def _unavailable(url: str, error: BaseException, when: str = "") -> EngineUnavailableError:
    where = f" {when}" if when else ""
    return EngineUnavailableError(
        f"vLLM at {url} can't be reached or went away{where}: {type(error).__name__}: {error}"
    )


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"upstream {url!r} is not a URL like http://127.0.0.1:8001")
    if parts.username or parts.password:
        raise ConfigError("give the upstream's key as api_key, not within the URL")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
