"""Several processes that serve on one socket, and the one that watches over them.

The workers are forked before anything but the settings was loaded, and inherit the listening
sockets: while one of them starts again, the others take the connections that wait there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Final

from guard.errors import EngineError

log = logging.getLogger(__name__)

_BACKLOG: Final = 2048
_STOPPING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_GAVE_UP: Final = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the workers this process is.

    Attributes:
        index: Its number, from 0.
        starts: How often this number was started, this time included.
        alive: A pipe that ends with the supervisor.
    """

    index: int
    starts: int
    alive: int

    def follow(self) -> None:
        """End in an orderly way when the supervisor is gone; call in the running event loop."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self.alive)
            signal.raise_signal(signal.SIGTERM)

        loop.add_reader(self.alive, ended)


def listen(host: str, port: int) -> list[socket.socket]:
    """Bind and listen on all addresses of a host, at one port; 0 picks a free one.

    Raises:
        EngineError: It can't be listened on.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((info[0], str(info[4][0])) for info in found):
            made = socket.create_server((address, port), family=family, backlog=_BACKLOG)
            sockets.append(made)
            port = made.getsockname()[1]
    except OSError as error:
        for made in sockets:
            made.close()
        raise EngineError(f"can't listen on {host}:{port}: is the port in use? (--port)") from error
    return sockets


class Supervisor:
    """Starts the workers, starts again those that die, and passes signals on.

    Args:
        count: How many.
        grace_s: Seconds for the workers to end after a signal; then they are killed.
        final: Exit codes that another start would not change: all end with such a one.
        max_restarts: Restarts within `within_s` seconds after which it gives up.
        within_s: See above.
    """

    def __init__(
        self,
        count: int,
        grace_s: float,
        *,
        final: frozenset[int] = frozenset(),
        max_restarts: int = 10,
        within_s: float = 60.0,
    ) -> None:
        self._count, self._grace_s, self._final = count, grace_s, final
        self._max_restarts, self._within_s = max_restarts, within_s
        self._workers: dict[int, int] = {}
        self._starts: Counter[int] = Counter()
        self._restarts: deque[float] = deque()
        self._stopping = False
        self._code = 0
        self._alive = (-1, -1)

    def run(self) -> Place | int:
        """Start the workers; in each of these, return its place at once.

        Returns:
            In the supervisor, when all have ended: the exit code, 0 after a signal.
        """
        self._alive = os.pipe()
        for number in _STOPPING:
            signal.signal(number, self._forward)
        signal.signal(signal.SIGALRM, self._kill)
        for index in range(self._count):
            if (place := self._fork(index)) is not None:
                return place
        return self._watch()

    def _watch(self) -> Place | int:
        while self._workers:
            pid, status = os.waitpid(-1, 0)
            index = self._workers.pop(pid, None)
            if index is None or self._stopping:
                continue
            code = os.waitstatus_to_exitcode(status)
            if code in self._final:
                self._end(code)
            elif not self._may_restart():
                log.error("workers end again and again: giving up")
                self._end(_GAVE_UP)
            else:
                log.warning("worker %d ended (%s); starting another", index, _ended(code))
                if (place := self._fork(index)) is not None:
                    return place
        signal.alarm(0)
        return self._code

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts.append(now)
        while self._restarts[0] < now - self._within_s:
            self._restarts.popleft()
        return len(self._restarts) <= self._max_restarts

    def _fork(self, index: int) -> Place | None:
        sys.stdout.flush()
        sys.stderr.flush()
        with _held_signals():
            if self._stopping:
                return None
            self._starts[index] += 1
            pid = os.fork()
            if pid:
                self._workers[pid] = index
                return None
            # A group of its own: Ctrl-C reaches the supervisor alone, which passes it on once.
            os.setpgid(0, 0)
            os.close(self._alive[1])
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return Place(index, self._starts[index], self._alive[0])

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        self._send(number)
        signal.alarm(max(1, round(self._grace_s)))

    def _end(self, code: int) -> None:
        self._code = code
        self._forward(signal.SIGTERM, None)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        log.error("workers did not end within %g s: killing them", self._grace_s)
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for pid in list(self._workers):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def _held_signals() -> Iterator[None]:
    """Let no signal in between a fork and knowing of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING | {signal.SIGALRM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
