"""Follow the settings file: what may change while a server runs, changes without a restart.

A request is served to its end by the settings that it began with, so no stream is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from guard.errors import GuardError
from guard.follow import FileState, Follower, file_state
from guard.settings import Settings

log = logging.getLogger(__name__)

LIVE: Final = (
    "body_timeout_s",
    "decide_timeout_s",
    "embeddings",
    "equalise_s",
    "hold_back",
    "idle_timeout_s",
    "max_body_bytes",
    "on_error",
    "output_guard",
)
"""Settings that take effect with the next request; all others are read once, at the start."""


_UNSEEN: Final[FileState] = (0, 0, 0)


class LiveSettings:
    """The settings of a running server, and what follows their file.

    Args:
        settings: Those that the server started with.
        path: Their file, if there is one.
        load: Puts the settings together again.
        apply: Takes new ones into use; called from another thread.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path | None,
        load: Callable[[], Settings],
        apply: Callable[[Settings], None],
    ) -> None:
        self._settings, self._path, self._load, self._apply = settings, path, load, apply
        # What changed since the settings were read, which may be minutes ago, is seen at once.
        self._state: FileState | None = _UNSEEN
        self._follower = Follower("settings", self.refresh)

    def follow(self, every_s: float) -> None:
        """Look for a change every so often, in a thread; never at 0, or where there is no file."""
        if self._path is not None:
            self._follower.start(every_s)

    def stop(self) -> None:
        """Look no more."""
        self._follower.stop()

    def refresh(self) -> bool:
        """Take a changed file into use, and say True if anything is new; a bad one is reported.

        What only a restart can change stays as it is, and is named in the log.
        """
        state = None if self._path is None else file_state(self._path)
        if state == self._state:
            return False
        self._state = state
        try:
            wanted = self._load()
        except (GuardError, OSError) as error:
            log.error("the settings stay as they were: %s", error)
            return False
        changed = {n for n in Settings.model_fields if _differ(wanted, self._settings, n)}
        if waiting := sorted(changed.difference(LIVE)):
            log.warning("takes a restart to have an effect: %s", ", ".join(waiting))
        live = {name: getattr(wanted, name) for name in changed.intersection(LIVE)}
        if not live:
            return False
        settings = self._settings.model_copy(update=live)
        self._apply(settings)
        self._settings = settings
        log.info("new settings: %s", ", ".join(f"{name}={live[name]}" for name in sorted(live)))
        return True


def _differ(one: Settings, other: Settings, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))
