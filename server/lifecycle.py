"""How a server ends: first it says so while it answers as ever, then it takes no more.

Answers in work have their time to end; those that still run are then cut, and their clients told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

log = logging.getLogger(__name__)


class Lifecycle:
    """Whether the server is about to end, and when it stops taking requests.

    Args:
        drain_s: How long it goes on taking requests once it has said that it ends.

    Attributes:
        is_cut: Whether answers in work were cancelled because their time was over.
    """

    def __init__(self, drain_s: float = 0.0) -> None:
        self.drain_s = drain_s
        self.is_cut = False
        self._until: float | None = None
        self._in_work: set[asyncio.Task[Any]] = set()

    @property
    def draining(self) -> bool:
        """Whether `/ready` answers 503, so that load balancers send clients elsewhere."""
        return self._until is not None

    @property
    def is_over(self) -> bool:
        """Whether no more requests are to be taken; those in work go on."""
        return self._until is not None and time.monotonic() >= self._until

    def drain(self, *, at_once: bool = False) -> None:
        """Say that it ends; a second time it ends at once."""
        if at_once or self._until is not None:
            self._until = time.monotonic()
        else:
            self._until = time.monotonic() + self.drain_s

    def begin(self) -> asyncio.Task[Any]:
        """Let the running task be cancelled by `cut`, until `end`."""
        task = asyncio.current_task()
        assert task is not None  # called in a coroutine
        self._in_work.add(task)
        return task

    def end(self, task: asyncio.Task[Any]) -> None:
        """Let a task not be cancelled any more."""
        self._in_work.discard(task)

    def cut(self) -> None:
        """Cancel what is in work; call in the event loop."""
        self.is_cut = True
        if self._in_work:
            log.warning("%d requests are cut: shutdown_timeout_s is over", len(self._in_work))
        for task in tuple(self._in_work):
            task.cancel()
