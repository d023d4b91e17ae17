"""Look at something again and again, in a thread, while a server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

FileState = tuple[int, int, int]


class Follower:
    """Calls `look` every so often, in a thread of its own, until `stop`.

    Args:
        name: Of the thread.
        look: What to do; raises nothing.
    """

    def __init__(self, name: str, look: Callable[[], object]) -> None:
        self._name, self._look = name, look
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, every_s: float) -> None:
        """Begin to look; never where `every_s` is 0, and once however often this is called."""
        if every_s > 0 and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(every_s,), name=self._name, daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Look no more; what looks now ends first."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, every_s: float) -> None:
        while not self._stopping.wait(every_s):
            self._look()


def file_state(path: Path) -> FileState | None:
    """Return what tells one state of a file from another; None if it isn't there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
