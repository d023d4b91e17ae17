"""One thread that generates, and the way of its steps into the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress

from guard.errors import EngineBusyError, EngineError, EngineUnavailableError
from server.engines.embedded.steps import Step

Generate = Callable[[Callable[[], bool]], Generator[Step, None, None]]
"""Makes the steps of a request; its argument says whether the client has left."""


class Worker:
    """Runs one generation at a time; a bounded number waits, first come first served.

    Args:
        max_queue: Requests that may wait beside the one that runs.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")
        self._live: set[Generation] = set()
        self._seconds = 1.0
        self._closed = False

    @property
    def depth(self) -> int:
        """Requests that run or wait."""
        return len(self._live)

    def check_room(self) -> None:
        """Return if another request may come.

        Raises:
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is closed.
        """
        if self._closed:
            raise EngineUnavailableError("the embedded engine is closed")
        if self.depth > self._max_queue:
            raise EngineBusyError(
                f"the embedded engine answers one request at a time and {self._max_queue} are "
                "waiting; try again later",
                retry_after_s=max(1, min(60, round(self._seconds))),
            )

    def submit(self, generate: Generate) -> Generation:
        """Queue a generation; to be called in the event loop.

        Raises:
            EngineBusyError: The queue is full.
        """
        self.check_room()
        generation = Generation(generate, self._executor, self._ended)
        self._live.add(generation)
        return generation

    async def run(self, work: Callable[[], None]) -> None:
        """Run something else in the worker's thread."""
        await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def close(self) -> None:
        """Cancel everything and stop the thread."""
        self._closed = True
        for generation in tuple(self._live):
            generation.cancel()
        await asyncio.to_thread(self._executor.shutdown)

    def _ended(self, generation: Generation, seconds: float | None) -> None:
        self._live.discard(generation)
        if seconds is not None:
            # A running mean, so that Retry-After follows what requests take these days.
            self._seconds += 0.2 * (seconds - self._seconds)


class Generation:
    """The steps of one request, as they come.

    Args:
        generate: Makes the steps, in the worker's thread.
        executor: The worker's thread.
        ended: Called in the event loop when the thread is done with it, with the seconds that it
            took, or None if it never ran.
    """

    def __init__(
        self,
        generate: Generate,
        executor: ThreadPoolExecutor,
        ended: Callable[[Generation, float | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._ended = ended
        self._seconds: float | None = None
        self._future: Future[None] = executor.submit(self._work, generate)
        self._future.add_done_callback(lambda _: self._call(self._finish))

    def cancel(self) -> None:
        """Stop at the next token, or never begin."""
        self._cancelled.set()
        self._future.cancel()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield the steps; the generation is cancelled when the reader stops reading.

        Raises:
            EngineError: The generation failed.
            EngineUnavailableError: It was cancelled while this was read, e.g. by a shutdown.
        """
        try:
            while (step := await self._steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise EngineError(f"the generation failed: {type(step).__name__}") from step
                yield step
            if self._cancelled.is_set():
                raise EngineUnavailableError("the generation was cancelled")
        finally:
            self.cancel()

    def _work(self, generate: Generate) -> None:
        started = time.monotonic()
        try:
            with closing(generate(self._cancelled.is_set)) as steps:
                for step in steps:
                    self._put(step)
        except Exception as error:
            if not self._cancelled.is_set():
                self._put(error)
        finally:
            self._seconds = time.monotonic() - started

    def _put(self, item: Step | BaseException) -> None:
        self._call(lambda: self._steps.put_nowait(item))

    def _finish(self) -> None:
        self._steps.put_nowait(None)
        self._ended(self, self._seconds)

    def _call(self, function: Callable[[], None]) -> None:
        # The loop may be closed already when a process ends; then nobody listens any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)
