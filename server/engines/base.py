"""What the proxy needs of an engine: one way to post a body and to read the answer back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from guard.types import AdapterUse


@dataclass(slots=True)
class EngineResponse:
    """An engine's answer: its status and headers now, its body as it comes.

    Whoever gets one must read it to the end or call `aclose`: that is what cancels the generation
    when a client leaves.

    Attributes:
        status: HTTP status.
        headers: Headers in the engine's order; names in lower case.
        chunks: The body. A streamed answer yields each piece as soon as the engine sent it.
    """

    status: int
    headers: list[tuple[str, str]]
    chunks: AsyncIterator[bytes]

    async def aclose(self) -> None:
        """Stop reading and cancel the generation if it still runs; harmless when it is done."""
        if isinstance(self.chunks, AsyncGenerator):
            await self.chunks.aclose()
            return
        close = getattr(self.chunks, "aclose", None)
        if close is not None:
            await close()

    async def read(self) -> bytes:
        """Return the whole body that is left."""
        return b"".join([chunk async for chunk in self.chunks])


class Engine(Protocol):
    """Something that answers OpenAI requests."""

    name: str

    async def start(self) -> None:
        """Load or connect; harmless when done before."""
        ...

    async def close(self) -> None:
        """Stop, and give back everything that is held; harmless when done before."""
        ...

    async def health(self) -> None:
        """Return if requests can be answered.

        Raises:
            EngineError: They can't be.
        """
        ...

    async def models(self) -> list[str]:
        """Return the public model names; LoRA adapters are not among them."""
        ...

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None:
        """Make ready the adapters that may be asked for from now on, and give up all others.

        Called at the start and after every reload of the bundle. Requests that still run with an
        adapter that was given up end as they began.

        Args:
            adapters: One for each; their weights don't count.

        Raises:
            EngineError: One can't be loaded.
        """
        ...

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        """Send a request and return as soon as status and headers of the answer are known.

        Args:
            path: E.g. `/v1/chat/completions`.
            body: The JSON body, sent as it is but for the model's name, where an adapter is one.
            headers: Headers for the engine.
            adapters: What the model is to be changed by for this answer alone, most important
                first. An engine that can't have them all at once takes the first, and says so in
                its log and metrics.

        Returns:
            The answer, under the model's name that was asked for. A request that the engine finds
            wrong is an answer too, with its status.

        Raises:
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine can't be reached.
            EngineTimeoutError: No answer in time.
        """
        ...
