"""`bench serve`: the guard beside the bare upstream, a bare relay and its peers, in one run.

All servers run at the same time and are asked one after another, round by round, in an order that
turns: a noisy moment meets all alike, and ratios are taken within a round. Servers share one core,
client and mock another. No text is ever asked twice of one server, so that no cache answers; only
the points named `fixed` ask the same ~75 tokens always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.serve_arms import API_KEY, DIRECT, GUARD, Arm, Running
from benchmarks.serve_load import Job, Load, Outcome
from benchmarks.serve_process import Client
from guard.types import Progress

C8_FIXED, C1, C1_STREAM, C8_ONCE = "c8 fixed", "c1", "c1 stream", "c8 once"
STREAMS, STREAMS_BUSY = "streams", "streams, detectors busy"
POINTS: Final = (C8_FIXED, C1, C1_STREAM, C8_ONCE, STREAMS, STREAMS_BUSY)
_ALL: Final = ("direct", "relay", "off", "on", "variant", "many", "peer")
_OURS: Final = ("direct", "relay", "off", "on", "variant")
_WHO: Final = {
    C8_FIXED: ("direct", "relay", "off", "on", "variant", "peer"),
    C1: _ALL,
    C1_STREAM: _ALL,
    C8_ONCE: ("off", "on", "variant", "many"),
    STREAMS: _OURS,
    STREAMS_BUSY: _OURS,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured in each round.

    Attributes:
        rounds: How often all of it is done.
        count: Requests one after another.
        streams_count: Streamed requests one after another.
        seconds: How long eight connections ask.
        streams: Paced streams at the same time.
        chunks: Events of each.
        warm: Requests before the first round.
    """

    rounds: int = 5
    count: int = 200
    streams_count: int = 60
    seconds: float = 2.0
    streams: int = 4
    chunks: int = 100
    warm: int = 100


QUICK: Final = Sizes(1, 12, 6, 0.3, 2, 40, 10)
"""Enough to see that it works; the figures mean nothing."""


@dataclass(slots=True)
class Measured:
    """What one server did at one point, round by round.

    Attributes:
        outcomes: A round's each.
        cpu_us: Time on a CPU of each round's requests, all together.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


Found = dict[tuple[str, str], Measured]
"""By point and by the arm's name."""


class Bench:
    """One run over servers that are up.

    Args:
        running: The servers.
        client: Asks them.
        sizes: How much.
        asked: Name of the set of texts that keep the detectors busy.
    """

    def __init__(
        self, running: Running, client: Client, sizes: Sizes, asked: str = "plain"
    ) -> None:
        self._running, self._client, self._sizes, self._asked = running, client, sizes, asked
        self._next: dict[tuple[str, str], int] = defaultdict(int)
        self._busy_rate = 50.0

    def run(self, progress: Progress) -> Found:
        """Measure everything, and return it."""
        found: Found = defaultdict(Measured)
        for arm in self._running.arms:
            self._load(arm, Load(port=0, fixed=True, count=self._sizes.warm, seconds=30.0))
        steps = [(turn, point) for turn in range(self._sizes.rounds) for point in POINTS]
        for number, (turn, point) in enumerate(steps):
            progress("serve: rounds", number, len(steps))
            for arm in self._order(self._running.of(*_WHO[point]), turn, point):
                self._measure(point, arm, found[point, arm.name])
        progress("serve: rounds", len(steps), len(steps))
        return dict(found)

    def _order(self, arms: Sequence[Arm], turn: int, point: str) -> list[Arm]:
        """Turn the order from round to round; the guard first where its rate is the others'."""
        shift = turn % len(arms)
        turned = [*arms[shift:], *arms[:shift]]
        if point == STREAMS_BUSY:
            turned.sort(key=lambda arm: arm.name != GUARD)
        return turned

    def _measure(self, point: str, arm: Arm, measured: Measured) -> None:
        before = arm.server.cpu_ns() if arm.server else 0
        outcome = self._ask(point, arm)
        after = arm.server.cpu_ns() if arm.server else 0
        measured.outcomes.append(outcome)
        measured.cpu_us.append((after - before) / 1e3)

    def _ask(self, point: str, arm: Arm) -> Outcome:
        sizes = self._sizes
        if point == C8_FIXED:
            return self._load(arm, Load(port=0, concurrency=8, fixed=True, seconds=sizes.seconds))
        if point == C1:
            return self._load(arm, Load(port=0, count=sizes.count, seconds=30.0))
        if point == C1_STREAM:
            load = Load(port=0, count=sizes.streams_count, seconds=30.0, stream=True)
            return self._load(arm, load)
        if point == C8_ONCE:
            return self._load(arm, Load(port=0, concurrency=8, seconds=sizes.seconds))
        return self._streams(arm, busy=point == STREAMS_BUSY)

    def _load(self, arm: Arm, load: Load) -> Outcome:
        ready = self._for(arm, load)
        outcome = self._client.run(Job(load=ready))
        if not load.fixed:
            self._next[arm.name, load.texts] += outcome.asked
        return outcome

    def _for(self, arm: Arm, load: Load) -> Load:
        load.port, load.key = arm.port, API_KEY
        load.start = self._next[arm.name, load.texts]
        return load

    def _streams(self, arm: Arm, busy: bool) -> Outcome:
        """Follow paced streams; busy ones beside what keeps the guard's detectors busy.

        What has no detectors gets as many requests a second as the guard could take.
        """
        sizes = self._sizes
        job = Job(
            streams=sizes.streams,
            chunks=sizes.chunks,
            upstream=self._running.upstream,
            port=arm.port,
            key=API_KEY,
            start=self._next[arm.name, "plain"],
        )
        self._next[arm.name, "plain"] += sizes.streams
        if busy:
            has_detectors = arm.kind in ("on", "variant")
            rate = None if has_detectors else self._busy_rate
            load = Load(port=0, concurrency=8, texts=self._asked, rate=rate)
            job.load = self._for(arm, load)
        outcome = self._client.run(job)
        if busy:
            self._next[arm.name, self._asked] += outcome.asked
            if arm.name == GUARD:
                self._busy_rate = max(1.0, outcome.asked / max(outcome.seconds, 1e-9))
        return outcome


__all__ = ["DIRECT", "POINTS", "QUICK", "Bench", "Found", "Measured", "Sizes"]
