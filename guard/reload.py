"""A guard that follows its bundle: a new version is loaded beside the old one, then swapped in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from guard.answers import AnswerGuard
from guard.errors import (
    EngineBusyError,
    EngineTimeoutError,
    EngineUnavailableError,
    GuardError,
)
from guard.follow import Follower
from guard.memory import give_back
from guard.pipeline import Guard, Inspection, Rewritten
from guard.types import AdapterUse

log = logging.getLogger(__name__)

_NOT_CHECKED: Final = "the self-check of the engine has not passed yet"


@dataclass(frozen=True, slots=True)
class HeldInspection(Inspection):
    """An inspection, and the guard that made it: it alone may act on it."""

    guard: Guard


class LiveGuard:
    """Passes requests to the newest good version of a bundle.

    A request that one version decided on is rewritten and recorded by the same one. A version that
    can't be loaded is reported once and the old one kept.

    Args:
        load: Loads and verifies the current version.
        current_version: Reads its number.
        closed: Refuse every request until `open` is called: nothing is sent on unchecked.

    Attributes:
        prepare: Called with the adapters of the version in use and of a new one before that is
            swapped in, and with the new one's alone after it; an error keeps the old version.
    """

    def __init__(
        self,
        load: Callable[[], Guard],
        current_version: Callable[[], int],
        closed: bool = False,
    ) -> None:
        self._load, self._current_version = load, current_version
        self._guard = load()
        give_back()
        self._seen = self._guard.version
        self._closed = closed
        self.prepare: Callable[[Sequence[AdapterUse]], None] = lambda adapters: None
        self._follower = Follower("bundle-reload", self.refresh)

    @property
    def guard(self) -> Guard:
        """The guard that new requests go to."""
        return self._guard

    def open(self) -> None:
        """Take requests: the self-check has passed."""
        self._closed = False

    def inspect(self, endpoint: str, body: bytes) -> HeldInspection:
        """Parse a request and decide on it; see `Guard.inspect`."""
        if self._closed:
            # Not a StageError: `on_error: pass` must not send requests to an engine unchecked.
            raise EngineUnavailableError(_NOT_CHECKED)
        guard = self._guard
        return _held(guard.inspect(endpoint, body), guard)

    def begin(self, endpoint: str, body: bytes) -> HeldInspection | Callable[[], HeldInspection]:
        """Do what of `inspect` takes little; see `Guard.begin`."""
        if self._closed:
            raise EngineUnavailableError(_NOT_CHECKED)
        guard = self._guard
        begun = guard.begin(endpoint, body)
        if isinstance(begun, Inspection):
            return _held(begun, guard)
        return lambda: _held(begun(), guard)

    def rewrite(self, inspection: Inspection) -> Rewritten:
        """Rewrite a flagged request; see `Guard.rewrite`."""
        return self._guard_of(inspection).rewrite(inspection)

    def record(self, inspection: Inspection) -> None:
        """Write a flagged decision to the ledger; see `Guard.record`."""
        self._guard_of(inspection).record(inspection)

    def answers(self, inspection: Inspection) -> AnswerGuard:
        """Return what judges the answers to a request; see `Guard.answers`."""
        return self._guard_of(inspection).answers(inspection)

    def follow(self, every_s: float) -> None:
        """Look for new versions in a thread of its own, until `stop`."""
        self._follower.start(every_s)

    def stop(self) -> None:
        """Stop looking."""
        self._follower.stop()

    def refresh(self) -> bool:
        """Load the current version if it is new; say whether it was swapped in."""
        try:
            version = self._current_version()
            if version == self._seen:
                return False
            self._seen = version
            guard = self._load()
            self.prepare((*self._guard.adapters, *guard.adapters))
        except (EngineUnavailableError, EngineTimeoutError, EngineBusyError) as error:
            self._seen = self._guard.version  # the engine may be better next time
            log.error("the engine can't take the bundle's new version yet: %s", error)
            return False
        except (GuardError, OSError) as error:
            log.error(
                "the bundle's new version can't be used, version %d stays: %s",
                self._guard.version,
                error,
            )
            return False
        self._guard = guard
        log.warning("bundle version %d is in use now", guard.version)
        try:
            self.prepare(guard.adapters)
        except (GuardError, OSError) as error:
            log.error("adapters that no target needs any more may still be loaded: %s", error)
        give_back()
        return True

    def _guard_of(self, inspection: Inspection) -> Guard:
        return inspection.guard if isinstance(inspection, HeldInspection) else self._guard


def _held(inspection: Inspection, guard: Guard) -> HeldInspection:
    return HeldInspection(inspection.request, inspection.decision, guard)
