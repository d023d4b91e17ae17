"""How a server ends: first it says so while it answers as ever, then it takes no more."""

from __future__ import annotations

import time


class Lifecycle:
    """Whether the server is about to end, and when it stops taking requests.

    Args:
        drain_s: How long it goes on taking requests once it has said that it ends.
    """

    def __init__(self, drain_s: float = 0.0) -> None:
        self.drain_s = drain_s
        self._until: float | None = None

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
