"""Several engines that serve the same model as one: each request goes to the least busy.

A replica that fails is taken out, looked at in the background, and let in again once it answers,
has passed the check that all were started with, and holds the adapters. A request is tried again
only where nothing of an answer has come, and only for what the next replica may do better: a
connection that can't be made or breaks, or a 503.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Final

from guard.errors import (
    ConfigError,
    EngineBusyError,
    EngineError,
    EngineTimeoutError,
    EngineUnavailableError,
    GuardError,
)
from guard.types import AdapterUse
from server.engines.base import Engine, EngineResponse
from server.engines.replica import Counted, HealthOptions, Replica, worth_another

log = logging.getLogger(__name__)

Examine = Callable[[Engine], Awaitable[None]]

_AWAY: Final = (EngineUnavailableError, EngineTimeoutError, EngineBusyError)
"""What may be better in a while; any other error stays until somebody changes something."""

_LONGEST_PAUSE_S: Final = 60.0


class UpstreamPool:
    """An `Engine` made of several that serve the same model.

    Args:
        engines: At least one. They are started and closed with the pool.
        options: When one is taken out and let in.

    Raises:
        ConfigError: There is none.
    """

    def __init__(self, engines: Sequence[Engine], options: HealthOptions | None = None) -> None:
        if not engines:
            raise ConfigError("a pool of upstreams needs at least one")
        self.name = engines[0].name
        self._options = options or HealthOptions()
        self._replicas = [Replica(engine, str(number)) for number, engine in enumerate(engines)]
        self._adapters: tuple[AdapterUse, ...] = ()
        self._examine: Examine | None = None
        self._generation = 0  # of the two above: who was let in meanwhile has to be asked anew
        self._turn = count()
        self._syncing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    # --- Life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all, look at each once, and go on looking in the background."""
        if self._tasks:
            return
        await asyncio.gather(*(replica.engine.start() for replica in self._replicas))
        await asyncio.gather(*(self._first_look(replica) for replica in self._replicas))
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]

    async def close(self) -> None:
        """Stop looking, and close all."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closed = await asyncio.gather(
            *(replica.engine.close() for replica in self._replicas), return_exceptions=True
        )
        for error in closed:
            if isinstance(error, BaseException):
                raise error

    async def health(self) -> None:
        """Return if one replica can answer, by its last check.

        Raises:
            EngineUnavailableError: None can, or they serve no model in common.
        """
        if not await self.models():
            raise EngineUnavailableError("the upstreams serve no model in common")

    async def models(self) -> list[str]:
        """Return the names that every healthy replica serves, in the first one's order.

        Raises:
            EngineUnavailableError: None is healthy.
        """
        first, *others = self._healthy()
        return [name for name in first.models if all(name in other.models for other in others)]

    def adapter_figures(self) -> dict[str, int]:
        """Return what the replicas tell of their adapters, summed."""
        total: Counter[str] = Counter()
        for replica in self._replicas:
            figures = getattr(replica.engine, "adapter_figures", None)
            total.update(figures() if figures is not None else {})
        return dict(total)

    def upstream_figures(self) -> dict[str, dict[str, int]]:
        """Return each replica's numbers by its label, for metrics; labels tell no address."""
        return {replica.label: replica.figures() for replica in self._replicas}

    # --- What all replicas must have or pass ------------------------------------------------------

    async def examine(self, examine: Examine) -> None:
        """Put each healthy replica to a test now, and every other one before it is let in.

        Args:
            examine: Raises if a replica doesn't fit.

        Raises:
            GuardError: One doesn't fit, or none could be asked.
        """
        self._examine = examine
        self._generation += 1
        await self._on_all(lambda replica: examine(replica.engine), self._healthy())

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None:
        """Make adapters ready on every healthy replica; the others get them before they return.

        Raises:
            EngineError: One can't take them, or none is there.
        """
        async with self._syncing:
            done: set[Replica] = set()
            todo = self._healthy()
            while todo:
                await self._on_all(lambda replica: replica.engine.sync_adapters(adapters), todo)
                done.update(todo)
                # Who was let in meanwhile came with the old ones.
                todo = [one for one in self._replicas if one.healthy and one not in done]
            self._adapters = tuple(adapters)
            self._generation += 1

    async def _on_all(
        self, work: Callable[[Replica], Awaitable[None]], replicas: Sequence[Replica]
    ) -> None:
        """Do it on all at once; take out who is away, unless that is everybody."""
        outcomes = await asyncio.gather(
            *(work(replica) for replica in replicas), return_exceptions=True
        )
        errors = {
            one: error
            for one, error in zip(replicas, outcomes, strict=True)
            if isinstance(error, BaseException)
        }
        for error in errors.values():
            if not isinstance(error, _AWAY):
                raise error
        for one, error in errors.items():
            self._eject(one, error)
        if len(errors) == len(replicas):
            raise next(iter(errors.values()))

    # --- Requests ---------------------------------------------------------------------------------

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        """Send a request to the least busy replica; see `Engine.post`.

        Each healthy replica is tried at most once, and never after the first byte of an answer.
        """
        tried: set[Replica] = set()
        while True:
            replica = self._next(tried)
            tried.add(replica)
            replica.outstanding += 1
            try:
                response = await replica.engine.post(path, body, headers, adapters)
            except BaseException as error:
                self._ended(replica, error)
                if not worth_another(error) or not self._others(tried):
                    raise
            else:
                counted = Counted(response, self._ending(replica))
                if response.status != 503 or not self._others(tried):
                    return EngineResponse(response.status, response.headers, counted)
                await counted.aclose()
            replica.retried += 1

    def _healthy(self) -> list[Replica]:
        healthy = [replica for replica in self._replicas if replica.healthy]
        if not healthy:
            raise EngineUnavailableError(f"none of {len(self._replicas)} upstreams is healthy")
        return healthy

    def _others(self, tried: set[Replica]) -> bool:
        return any(one.healthy and one not in tried for one in self._replicas)

    def _next(self, tried: set[Replica]) -> Replica:
        """Choose the least busy; among equals, each in turn."""
        choice = [one for one in self._healthy() if one not in tried]
        if not choice:
            raise EngineUnavailableError("no other upstream is healthy")
        least = min(one.outstanding for one in choice)
        choice = [one for one in choice if one.outstanding == least]
        return choice[next(self._turn) % len(choice)]

    def _ending(self, replica: Replica) -> Callable[[BaseException | None], None]:
        return lambda error: self._ended(replica, error)

    def _ended(self, replica: Replica, error: BaseException | None) -> None:
        replica.outstanding -= 1
        if error is None:
            replica.failed = 0
        elif isinstance(error, EngineUnavailableError):
            # Never the last one: with nobody left, a request had better try.
            self._failed(replica, error, unless_last=True)

    # --- Health -----------------------------------------------------------------------------------

    def _failed(self, replica: Replica, error: BaseException, unless_last: bool = False) -> None:
        replica.failures += 1
        replica.failed += 1
        if replica.failed < self._options.fall or (unless_last and not self._others({replica})):
            return
        self._eject(replica, error)

    def _eject(self, replica: Replica, error: BaseException) -> None:
        replica.failed = replica.passed = 0
        if replica.healthy:
            replica.healthy = False
            replica.ejections += 1
            log.warning("upstream %s is taken out: %s", replica.label, error)

    async def _first_look(self, replica: Replica) -> None:
        try:
            await replica.check(self._options.limit_s)
            replica.healthy = True
        except EngineError as error:
            log.warning("upstream %s is not there yet: %s", replica.label, error)

    async def _watch(self, replica: Replica) -> None:
        """Look again and again; longer apart while it is there but doesn't fit."""
        pause = self._options.period_s
        while True:
            await asyncio.sleep(pause)
            try:
                fits = await self._look(replica)
            except Exception:
                log.exception("upstream %s could not be checked", replica.label)
                fits = False
            pause = self._options.period_s if fits else min(pause * 4, _LONGEST_PAUSE_S)

    async def _look(self, replica: Replica) -> bool:
        """Check it once and draw the conclusion; False if it is there but doesn't fit."""
        try:
            await replica.check(self._options.limit_s)
        except EngineError as error:
            replica.passed = 0
            if replica.healthy:
                self._failed(replica, error)
            return True
        if not replica.healthy:
            return await self._let_in(replica)
        replica.failed = 0
        return True

    async def _let_in(self, replica: Replica) -> bool:
        """Let it in if it has been good for long enough and fits; False if it doesn't fit."""
        replica.passed += 1
        if replica.passed < self._options.rise:
            return True
        replica.passed = 0
        try:
            await self._admit(replica)
        except _AWAY as error:
            log.info("upstream %s went away again: %s", replica.label, error)
            return True
        except GuardError as error:
            log.error("upstream %s is not let in: %s", replica.label, error)
            return False
        log.warning("upstream %s is let in", replica.label)
        return True

    async def _admit(self, replica: Replica) -> None:
        """Have it pass and hold what the others do; what these are may change meanwhile."""
        generation = None
        while generation != self._generation:
            generation = self._generation
            others = await self.models() if self._others({replica}) else replica.models
            if not set(others) & set(replica.models):
                raise ConfigError(f"it serves {', '.join(replica.models)}, which no other does")
            if self._examine is not None:
                await self._examine(replica.engine)
            await replica.engine.sync_adapters(self._adapters)
        replica.failed = 0
        replica.healthy = True
