"""vLLM's answers as they arrive; transport faults on the way become the project's engine errors."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp

from guard.errors import EngineTimeoutError, EngineUnavailableError

FAULTS: Final = (aiohttp.ClientError, OSError, EOFError, asyncio.IncompleteReadError)
"""What aiohttp raises when a peer can't be reached, leaves, or doesn't speak HTTP."""

_MAX_BYTES: Final = 4_000_000


class Relay:
    """The pieces of an answer as they arrive.

    A class and not a generator: closing a generator that was never started runs none of its code,
    and the upstream connection would stay open.
    """

    def __init__(self, response: aiohttp.ClientResponse, url: str) -> None:
        self._response, self._url = response, url

    def __aiter__(self) -> Relay:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            self._response.close()
            raise EngineTimeoutError(
                f"vLLM at {self._url} stopped sending in the middle of an answer"
            ) from error
        except FAULTS as error:
            self._response.close()
            raise unavailable(self._url, error, "in the middle of an answer") from error
        except asyncio.CancelledError:
            self._response.close()
            raise
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Close the connection unless the whole answer has come; vLLM then stops generating."""
        self._response.close()

    async def read(self) -> bytes:
        """Return the whole answer, if it is as short as vLLM's own are.

        Raises:
            EngineUnavailableError: It is longer.
        """
        pieces, size = [], 0
        async for piece in self:
            size += len(piece)
            if size > _MAX_BYTES:
                raise EngineUnavailableError(
                    f"the upstream's answer is longer than {_MAX_BYTES} bytes; is it vLLM?"
                )
            pieces.append(piece)
        return b"".join(pieces)


def unavailable(url: str, error: BaseException, when: str = "") -> EngineUnavailableError:
    """Say that vLLM could not be talked to."""
    where = f" {when}" if when else ""
    return EngineUnavailableError(
        f"vLLM at {url} can't be reached or went away{where}: {type(error).__name__}: {error}"
    )
