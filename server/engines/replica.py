"""One of several engines behind an `UpstreamPool`: its health, what it has to do, its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from guard.errors import EngineError, EngineTimeoutError, EngineUnavailableError
from server.engines.base import Engine, EngineResponse


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """When a replica is taken out and let in.

    Attributes:
        period_s: Between two checks of one replica.
        fall: Failures in a row, of checks or requests, after which it is taken out.
        rise: Good checks in a row after which it is let in.
        limit_s: For one check; a busy engine is slow to say that it is well.
    """

    period_s: float = 5.0
    fall: int = 3
    rise: int = 2
    limit_s: float = 10.0


@dataclass(eq=False, slots=True)
class Replica:
    """An engine, and what the pool knows of it.

    Attributes:
        engine: What answers.
        label: Tells it from the others, in logs and metrics.
        healthy: Whether it is given requests.
        outstanding: Requests that it is answering.
        models: Names that it served when it was last asked.
        failed: Failures in a row while it was healthy.
        passed: Good checks in a row while it was not.
        failures: Failures since the start.
        ejections: How often it was taken out since the start.
        retried: Requests that went on to another replica.
    """

    engine: Engine
    label: str
    healthy: bool = False
    outstanding: int = 0
    models: tuple[str, ...] = ()
    failed: int = 0
    passed: int = 0
    failures: int = 0
    ejections: int = 0
    retried: int = 0

    async def check(self, limit_s: float) -> None:
        """Ask whether it can answer, and under which names.

        Raises:
            EngineError: It can't, or not within `limit_s`.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self.engine.health()
                self.models = tuple(await self.engine.models())
        except TimeoutError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineTimeoutError(f"no answer to a check within {limit_s:g} s") from error

    def figures(self) -> dict[str, int]:
        """Return numbers by name, for metrics."""
        return {
            "healthy": int(self.healthy),
            "outstanding": self.outstanding,
            "failures": self.failures,
            "ejections": self.ejections,
            "retried": self.retried,
        }


class Counted:
    """A replica's answer; says once how it ended, whoever ends it.

    Args:
        response: The answer.
        ended: Called with what broke it off, or None.
    """

    def __init__(
        self, response: EngineResponse, ended: Callable[[BaseException | None], None]
    ) -> None:
        self._response, self._ended = response, ended
        self._chunks: AsyncIterator[bytes] = aiter(response.chunks)
        self._is_over = False

    def __aiter__(self) -> Counted:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            self._end(None)
            raise
        except BaseException as error:
            self._end(error)
            raise

    async def aclose(self) -> None:
        """Cancel the generation if it still runs."""
        try:
            await self._response.aclose()
        finally:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._ended(error)


def worth_another(error: BaseException) -> bool:
    """Say if nothing came and another replica may do better; late is not: it may be at work."""
    if isinstance(error, EngineTimeoutError):
        return isinstance(error.__cause__, aiohttp.ConnectionTimeoutError)
    return isinstance(error, EngineUnavailableError)
