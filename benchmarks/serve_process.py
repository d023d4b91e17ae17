"""The processes of `bench serve`: started on a core of their own, read through /proc, ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import msgspec

from benchmarks.serve_load import Job, Outcome
from guard.errors import EngineError

READY_WITHIN_S: Final = 300.0
_LOOK_S: Final = 0.01
_END_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: servers on one core, client and mock on another, if there are two."""

    server: frozenset[int]
    client: frozenset[int]

    @classmethod
    def pick(cls) -> Cores:
        """Take the first and the last core that this process may use."""
        found = sorted(os.sched_getaffinity(0))
        return cls(frozenset(found[-1:]), frozenset(found[:1]))


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """Run this thread, and what it starts, on some cores until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A server process and its children.

    Args:
        words: Its command line.
        port: Where it listens.
        ready: Path that answers 200 once it serves.
        cores: Where it runs.
        log: File for what it says.
        environ: Its environment.

    Attributes:
        cold_start_s: From its start until `ready` answered; set by `wait`.
    """

    def __init__(
        self,
        words: Sequence[str],
        port: int,
        ready: str,
        cores: frozenset[int],
        log: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self._ready, self._log = port, ready, log
        self.cold_start_s = 0.0
        self._begun = time.monotonic()
        with on(cores), log.open("wb") as output:
            self._process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environ) if environ is not None else None,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait(self) -> None:
        """Wait until it serves.

        Raises:
            EngineError: If it ends, or doesn't in time; with the end of what it said.
        """
        while time.monotonic() - self._begun < READY_WITHIN_S:
            if self._process.poll() is not None:
                raise EngineError(f"{self._name()} ended at its start: {self._said()}")
            if self._answers():
                self.cold_start_s = time.monotonic() - self._begun
                return
            time.sleep(_LOOK_S)
        raise EngineError(f"{self._name()} was not ready in {READY_WITHIN_S:g} s: {self._said()}")

    def stop(self) -> None:
        """End it, at the latest after some seconds."""
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cpu_ns(self) -> int:
        """Return the time on a CPU of all its threads, its children's too, in nanoseconds."""
        found = 0
        for pid in self.pids():
            for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with suppress(OSError, IndexError, ValueError):
                    found += int(task.read_text().split()[0])
        return found

    def rss_mb(self) -> float:
        """Return the memory that it holds, its children's too, in MB."""
        pages = 0
        for pid in self.pids():
            with suppress(OSError, IndexError, ValueError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def maps(self, library: str) -> bool:
        """Say whether a library lies in its memory, e.g. `torch`: it, or a file in its folder."""
        for pid in self.pids():
            with suppress(OSError):
                if f"/{library}/" in Path(f"/proc/{pid}/maps").read_text():
                    return True
        return False

    def pids(self) -> list[int]:
        """Return its process and its children's."""
        found, new = [], [self._process.pid]
        while new:
            pid = new.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    new += [int(child) for child in children.read_text().split()]
        return found

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self._ready)
            return connection.getresponse().status == 200
        except (OSError, ValueError):
            return False
        finally:
            connection.close()

    def _name(self) -> str:
        return Path(str(self._process.args[0])).name  # type: ignore[index]

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return " ".join(line for line in lines[-12:] if line.strip())[-600:] or "nothing was said"


class Client:
    """The client process; see `benchmarks.serve_load`.

    Args:
        texts: Sets of texts that loads may ask.
        cores: Where it runs.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], cores: frozenset[int]) -> None:
        with on(cores):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serve_load"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        self._send(msgspec.json.encode(dict(texts)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                _there(pipe).close()
        self._process.terminate()
        self._process.wait()

    def run(self, job: Job) -> Outcome:
        """Run a job and return what came of it.

        Raises:
            EngineError: If the client ended; what it said is on standard error.
        """
        self._send(msgspec.json.encode(job))
        line = _there(self._process.stdout).readline()
        if not line:
            raise EngineError(
                "the client of the benchmark ended: a server did not answer, or broke a stream"
            )
        return msgspec.json.decode(line, type=Outcome)

    def _send(self, line: bytes) -> None:
        pipe = _there(self._process.stdin)
        try:
            pipe.write(line + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise EngineError("the client of the benchmark ended") from None


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
