"""The adapters that vLLM holds for us: loaded when needed, counted, and unloaded by age.

vLLM knows them by random names, drawn anew in every process, so that nobody can ask for one. What
it lost by a restart is loaded again at the first request that wants it. Beyond `--max-cpu-loras`
vLLM drops adapters by itself and reads their folders again, so these stay as long as a name does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from guard.errors import ArtifactError, EngineError
from guard.types import AdapterUse
from server.engines.adapter_choice import AdapterChoice, AdapterOptions
from server.engines.materialise import AdapterFolder, Part

log = logging.getLogger(__name__)

Ids = frozenset[tuple[str, float]]


@dataclass(slots=True)
class AdapterCounts:
    """What happened since the start, for metrics.

    Attributes:
        hits: Requests whose adapter was loaded already.
        loads: Adapters loaded into vLLM.
        lost: Adapters that vLLM had lost, by a restart, when a request wanted them.
        evictions: Adapters unloaded to make room for others.
        left_out: Requests answered with fewer adapters than were asked for.
    """

    hits: int = 0
    loads: int = 0
    lost: int = 0
    evictions: int = 0
    left_out: int = 0


class AdapterUpstream(Protocol):
    """What the pool needs of vLLM."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Make vLLM know an adapter; harmless if it does already."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Make vLLM forget it; harmless if it has already."""
        ...


@dataclass(eq=False, slots=True)
class LoadedAdapter:
    """One name that vLLM may be given, and who uses it.

    Attributes:
        parts: What it is made of.
        name: What vLLM calls it.
        users: Requests that are being answered with it.
        is_loaded: As far as we know.
        times: How often it was loaded; tells one loss from the next.
        lock: Held while it is loaded or unloaded.
    """

    parts: tuple[Part, ...]
    name: str = field(default_factory=lambda: secrets.token_hex(16))
    users: int = 0
    is_loaded: bool = False
    times: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class AdapterPool:
    """Adapters by content and strength, least recently used first. For one event loop.

    Args:
        upstream: The vLLM to load them into.
        options: Where, how many, and how several are put together.
    """

    def __init__(self, upstream: AdapterUpstream, options: AdapterOptions) -> None:
        self.counts = AdapterCounts()
        self._upstream, self._options = upstream, options
        self._choice = AdapterChoice(options)
        self._folder = AdapterFolder(options.folder, options.upstream_folder)
        self._entries: dict[Ids, LoadedAdapter] = {}
        self._wanted: frozenset[str] = frozenset()
        self._tasks: set[asyncio.Task[None]] = set()
        self._syncing, self._trimming, self._disk = (asyncio.Lock() for _ in range(3))

    @property
    def loaded(self) -> int:
        """How many names vLLM holds for us."""
        return sum(entry.is_loaded for entry in self._entries.values())

    async def sync(self, uses: Sequence[AdapterUse]) -> None:
        """Load what fits of these, full strength before the weaker ones, and give up all others.

        Raises:
            EngineError: One can't be loaded; none is given up then.
        """
        async with self._syncing:
            before, wanted = self._wanted, frozenset(use.key for use in uses)
            self._wanted = before | wanted
            plan = [(Part(use, step),) for step in reversed(self._choice.steps) for use in uses]
            try:
                # The most important last: it is then the last to make room for another.
                for parts in reversed(plan[: self._options.max_loaded]):
                    await self._ready(self._touch(parts))
            except BaseException:
                self._wanted = before
                raise
            self._wanted = wanted
            self._choice.keep(wanted)
            await self._trim()

    async def acquire(self, uses: Sequence[AdapterUse]) -> LoadedAdapter:
        """Return the loaded adapter to answer a request with; give it back with `release`.

        Args:
            uses: At least one, the most important first.

        Raises:
            EngineError: It can't be loaded.
        """
        entry = self._touch(self._chosen(uses))
        entry.users += 1
        self.counts.hits += entry.is_loaded
        try:
            await self._ready(entry)
        except BaseException:
            self.release(entry)
            raise
        return entry

    def release(self, entry: LoadedAdapter) -> None:
        """Take note that a request was answered."""
        entry.users -= 1
        self._trim_later()

    async def reload(self, entry: LoadedAdapter, times: int) -> None:
        """Load again what vLLM doesn't know any more.

        Args:
            entry: The adapter.
            times: Its `times` when the request was sent: if it was loaded since, that will do.

        Raises:
            EngineError: It can't be loaded.
        """
        if entry.times == times and entry.is_loaded:
            entry.is_loaded = False
            self.counts.lost += 1
        await self._ready(entry)

    async def close(self) -> None:
        """Unload everything and delete the folder; vLLM's faults don't matter any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            if entry.is_loaded and not await self._unload(entry):
                break  # vLLM is not there: one attempt will do
        self._entries.clear()
        await asyncio.to_thread(self._folder.close)

    # --- Which one --------------------------------------------------------------------------------

    def _chosen(self, uses: Sequence[AdapterUse]) -> tuple[Part, ...]:
        parts = self._choice.fitting(uses)
        if len(parts) > 1 and self._options.together == "strongest" and not self._is_one(parts):
            parts = parts[:1]
        self.counts.left_out += len(parts) < len(uses)
        return parts

    def _is_one(self, parts: tuple[Part, ...]) -> bool:
        """Say if these are loaded as one adapter; if they recur, begin to make them one."""
        entry = self._entries.get(_ids(parts))
        if entry is not None:
            return entry.is_loaded
        if self._choice.recurs(parts):
            self._start(self._prepare(self._touch(parts)))
        return False

    async def _prepare(self, entry: LoadedAdapter) -> None:
        try:
            await self._ready(entry)
        except EngineError as error:
            log.warning("adapters that recur together could not be made one: %s", error)
            await self._drop(entry)

    def _touch(self, parts: tuple[Part, ...]) -> LoadedAdapter:
        """Return the entry, new if need be, as the most recently used one."""
        ids = _ids(parts)
        entry = self._entries.pop(ids, None) or LoadedAdapter(parts)
        self._entries[ids] = entry
        return entry

    # --- Loading ----------------------------------------------------------------------------------

    async def _ready(self, entry: LoadedAdapter) -> None:
        """Wait until it is loaded. A client that leaves doesn't stop what others wait for too."""
        if not entry.is_loaded:
            await asyncio.shield(self._start(self._load(entry)))

    async def _load(self, entry: LoadedAdapter) -> None:
        async with entry.lock:
            if entry.is_loaded:
                return
            try:
                async with self._disk:
                    path = await asyncio.to_thread(self._folder.write, entry.name, entry.parts)
            except ArtifactError as error:
                raise EngineError(f"an adapter can't be given to vLLM: {error}") from error
            await self._upstream.load_adapter(entry.name, path)
            entry.is_loaded = True
            entry.times += 1
            self.counts.loads += 1
        self._trim_later()

    # --- Unloading --------------------------------------------------------------------------------

    def _surplus(self) -> LoadedAdapter | None:
        """Return what to unload next: what nobody wants any more, or the oldest of too many."""
        idle = [e for e in self._entries.values() if not e.users and not e.lock.locked()]
        given_up = next((entry for entry in idle if not self._is_wanted(entry)), None)
        if given_up is not None or self.loaded <= self._options.max_loaded:
            return given_up
        return next((entry for entry in idle if entry.is_loaded), None)

    def _trim_later(self) -> None:
        if not self._trimming.locked() and self._surplus() is not None:
            self._start(self._trim())

    async def _trim(self) -> None:
        async with self._trimming:
            while (entry := self._surplus()) is not None:
                async with entry.lock:
                    self.counts.evictions += self._is_wanted(entry)
                    await self._unload(entry)
                    if len(entry.parts) > 1 or not self._is_wanted(entry):
                        await self._drop(entry)

    async def _unload(self, entry: LoadedAdapter) -> bool:
        """Unload it; say whether vLLM could be asked."""
        was_loaded, entry.is_loaded = entry.is_loaded, False
        try:
            if was_loaded:
                await self._upstream.unload_adapter(entry.name)
        except EngineError as error:
            log.warning("an adapter could not be unloaded: %s", error)
            return False
        return True

    async def _drop(self, entry: LoadedAdapter) -> None:
        """Delete its folder, and that of its weights with the last strength of an adapter."""
        if entry.users:
            return
        self._entries.pop(_ids(entry.parts), None)
        async with self._disk:
            left = {part.use.key for other in self._entries.values() for part in other.parts}
            await asyncio.to_thread(self._folder.remove, entry.name)
            for key in {part.use.key for part in entry.parts} - left:
                await asyncio.to_thread(self._folder.forget, key)

    def _is_wanted(self, entry: LoadedAdapter) -> bool:
        return all(part.use.key in self._wanted for part in entry.parts)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # raised where it is waited for; in the background nobody does


def _ids(parts: Sequence[Part]) -> Ids:
    return frozenset(part.id for part in parts)
