"""The vLLM engine: HTTP to an unmodified vLLM that was started with `--enable-prompt-embeds`.

Bodies go out and come back byte for byte, each piece as soon as it arrives; with an adapter, all
but the model's name. Here, and nowhere else, transport faults become the project's engine errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
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
from guard.types import AdapterUse
from server.engines.adapter_choice import AdapterOptions
from server.engines.adapter_pool import AdapterCounts
from server.engines.base import EngineResponse
from server.engines.vllm_adapters import VllmAdapters
from server.engines.vllm_relay import FAULTS, Relay, unavailable

_LONG_BYTES: Final = 2**20
REQUEST_HEADERS: Final = frozenset(
    {"accept", "authorization", "content-type", "traceparent", "tracestate", "x-request-id"}
)
RESPONSE_HEADERS: Final = frozenset(
    {"cache-control", "content-type", "retry-after", "x-request-id"}
)


@dataclass(frozen=True, slots=True)
class VllmTimeouts:
    """How long to wait for vLLM, in seconds.

    Attributes:
        connect: For a connection.
        read: For the first byte, and between two pieces of an answer. Without streaming nothing
            comes before the whole answer is done.
        control: For health and the list of models, all in all.
        adapter: For loading or unloading an adapter, all in all.
    """

    connect: float = 5.0
    read: float = 600.0
    control: float = 10.0
    adapter: float = 60.0


class VllmEngine:
    """An `Engine` that is a vLLM server.

    Args:
        upstream_url: Where vLLM serves, e.g. `http://127.0.0.1:8001`; a trailing `/v1` is allowed.
        api_key: The key that vLLM was started with; sent where a request has none of its own.
        timeouts: How long to wait.
        max_connections: Connections held at most; further requests wait for one.
        socket_path: A Unix domain socket to go through; the URL's host is then only a name.
        adapters: How unlearning adapters are given to vLLM.

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
        adapters: AdapterOptions | None = None,
    ) -> None:
        self.url = _checked_url(upstream_url)
        self._api_key = api_key
        self._timeouts = timeouts or VllmTimeouts()
        self._max_connections, self._socket_path = max_connections, socket_path
        self._session: aiohttp.ClientSession | None = None
        self._adapters = VllmAdapters(self._ask, self.models, adapters or AdapterOptions())

    @property
    def adapter_counts(self) -> AdapterCounts:
        """What happened with adapters since the start."""
        return self._adapters.pool.counts

    @property
    def adapters_loaded(self) -> int:
        """How many adapters vLLM holds for us, each strength being one."""
        return self._adapters.pool.loaded

    def adapter_figures(self) -> dict[str, int]:
        """Return both as numbers by name, for metrics."""
        return {"loaded": self.adapters_loaded, **asdict(self.adapter_counts)}

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
        """Unload the adapters and close all connections, and with them every generation."""
        if self._session is None:
            return
        try:
            await self._adapters.pool.close()
        finally:
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

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None:
        """Load adapters into vLLM and unload all others; see `Engine.sync_adapters`.

        Those that exceed the number to be held are loaded when they are asked for.

        Raises:
            EngineError: vLLM can't be reached or takes no adapters; the message names the flags
                that it must be started with.
        """
        await self._adapters.sync(adapters)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        """Send a request; see `Engine.post`.

        Cancelling the call or closing the answer closes the connection, at which vLLM stops
        generating.

        Raises:
            EngineUnavailableError: vLLM can't be reached, or left before it answered.
            EngineTimeoutError: vLLM did not answer in time.
            EngineError: An adapter can't be loaded.
        """
        lowered = {name.lower(): value for name, value in headers.items()}
        allowed = {name: value for name, value in lowered.items() if name in REQUEST_HEADERS}
        if not adapters:
            return await self._exchange(path, body, allowed)

        async def exchange(sent: bytes) -> EngineResponse:
            return await self._exchange(path, sent, allowed)

        return await self._adapters.answer(body, adapters, exchange)

    async def _exchange(self, path: str, body: bytes, allowed: Mapping[str, str]) -> EngineResponse:
        response = await self._send("POST", path, body, allowed)
        lines = [(name.lower(), value) for name, value in response.headers.items()]
        kept = [line for line in lines if line[0] in RESPONSE_HEADERS]
        return EngineResponse(response.status, kept, Relay(response, self.url))

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
        if self._api_key and "authorization" not in sent:
            sent["authorization"] = f"Bearer {self._api_key}"
        try:
            return await self._session.request(
                method, self.url + path, data=_data(body), headers=sent, allow_redirects=False
            )
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            raise EngineTimeoutError(f"vLLM at {self.url} did not answer in time") from error
        except FAULTS as error:
            raise unavailable(self.url, error) from error

    async def _control(self, path: str) -> bytes:
        status, body = await self._whole("GET", path, None, self._timeouts.control)
        if status != 200:
            raise EngineRefusedError(status, body)
        return body

    async def _ask(self, path: str, fields: dict[str, Any]) -> tuple[int, bytes]:
        return await self._whole("POST", path, json.dumps(fields).encode(), self._timeouts.adapter)

    async def _whole(
        self, method: str, path: str, body: bytes | None, limit_s: float
    ) -> tuple[int, bytes]:
        """Ask something that isn't a client's question, and read the answer to its end."""
        headers = None if body is None else {"content-type": "application/json"}
        try:
            async with asyncio.timeout(limit_s):
                response = await self._send(method, path, body, headers)
                relay = Relay(response, self.url)
                try:
                    return response.status, await relay.read()
                finally:
                    await relay.aclose()
        except TimeoutError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineTimeoutError(
                f"vLLM at {self.url} did not answer {path} in {limit_s} s"
            ) from error


def _data(body: bytes | None) -> bytes | BytesIO | None:
    """Let a long body be sent in pieces, between which others have their turn."""
    return body if body is None or len(body) < _LONG_BYTES else BytesIO(body)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"upstream {url!r} is not a URL like http://127.0.0.1:8001")
    if parts.username or parts.password:
        raise ConfigError("give the upstream's key as api_key, not within the URL")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
