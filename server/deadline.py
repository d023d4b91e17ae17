"""A limit on how long a request waits, with one timer for all that it waits for."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self


class Deadline:
    """Limits one wait after another of the running task; not one within another.

    `asyncio.timeout` makes a timer for each wait. Most waits are over at once, and three such
    timers took a twentieth of a request's time; here the end is moved and the timer stays.

        with deadline.within(60):
            await ...

    raises a TimeoutError as `asyncio.timeout` does. Whoever made one closes it.
    """

    __slots__ = ("_before", "_fires_at", "_is_late", "_loop", "_task", "_timer", "_until")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._until = self._fires_at = 0.0
        self._before = 0
        self._is_late = False

    def within(self, seconds: float) -> Self:
        """Set the end; while a wait is limited, this moves it."""
        self._until = self._loop.time() + seconds
        if self._until < self._fires_at:
            self.close()
        if self._timer is None:
            self._set()
        return self

    def close(self) -> None:
        """Give the timer back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None  # called in a coroutine
        self._before, self._is_late = self._task.cancelling(), False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._is_late and task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _look(self) -> None:
        self._timer = None
        if self._task is None:  # the next wait sets it again
            return
        if self._loop.time() < self._until:
            self._set()
        else:
            self._is_late = True
            self._task.cancel()

    def _set(self) -> None:
        self._fires_at = self._until
        self._timer = self._loop.call_at(self._until, self._look)
