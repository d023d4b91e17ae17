"""What is seen of one request: metrics, a line of the log, spans. Never any of its content."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

from starlette.types import Message, Scope

from guard.types import Decision
from server.access_log import log_request, request_id
from server.answer_texts import Piece
from server.limits import header
from server.metrics import Metrics
from server.protocol import ACCEPTED_AT, RECEIVED_AT
from server.tracing import RequestTrace, Tracing

P = ParamSpec("P")
R = TypeVar("R")

Stage = Literal["body", "decide", "rewrite", "upstream"]
"""`upstream` lasts until the engine's answer begins; one request may have several."""
CheckOutcome = Literal["clean", "suspected", "hit"]
"""Of a check of a part of an answer: nothing at a first look, nothing when read whole, a target."""


class Observer:
    """What all requests share.

    Args:
        metrics: Counts them.
        tracing: Traces them; None traces nothing.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.metrics, self._tracing = metrics, tracing
        self.stages = {
            "body": metrics.body_seconds,
            "decide": metrics.decide_seconds,
            "rewrite": metrics.rewrite_seconds,
            "upstream": metrics.first_byte_seconds,
        }

    def begin(self, endpoint: str, scope: Scope) -> Observation:
        """Begin to observe a request."""
        return Observation(self, self._tracing, endpoint, scope)

    def close(self) -> None:
        """Send the spans that are left; may take seconds."""
        if self._tracing is not None:
            self._tracing.close()


class Observation:
    """One request.

    Attributes:
        request_id: The client's, if it has the form of one, or a new one.
        key: Name of the caller's key.
        bytes_in: Length of the body.
        route: What was done with it.
    """

    def __init__(
        self, observer: Observer, tracing: Tracing | None, endpoint: str, scope: Scope
    ) -> None:
        self._observer, self._metrics, self._endpoint = observer, observer.metrics, endpoint
        self._trace = None if tracing is None else tracing.request(endpoint, scope)
        self.request_id = request_id(header(scope, b"x-request-id"))
        self.key: str | None = None
        self.bytes_in = 0
        self.route = "none"
        self._bytes_out = 0
        self._took: dict[str, float] = {}
        self._begun = time.perf_counter()
        self._waited(scope.get("state") or {})

    def _waited(self, state: dict[str, Any]) -> None:
        """Take note of the time before the request got here."""
        received, accepted = state.get(RECEIVED_AT), state.get(ACCEPTED_AT)
        if received is not None:
            self._took["queue"] = self._begun - received
            self._metrics.queue_wait_seconds.observe(self._took["queue"])
            if accepted is not None:
                self._metrics.connection_wait_seconds.observe(received - accepted)

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """Time and trace a part of the work; one that fails is traced only."""
        if self._trace is None:
            return _Timed(self, name)
        return self._traced(name, self._trace)

    @contextmanager
    def _traced(self, name: Stage, trace: RequestTrace) -> Iterator[None]:
        with _Timed(self, name), trace.part(name):
            yield

    def took(self, name: Stage, seconds: float) -> None:
        """Take note of how long a part of the work took."""
        self._took[name] = self._took.get(name, 0.0) + seconds
        self._observer.stages[name].observe(seconds)

    def detecting(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return `function` for a worker to call: its waiting and working are timed."""
        asked = time.perf_counter()

        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            begun = time.perf_counter()
            self._metrics.worker_wait_seconds.observe(begun - asked)
            result = function(*args, **kwargs)
            self._metrics.detect_seconds.observe(time.perf_counter() - begun)
            return result

        return timed

    def decided(self, decision: Decision, route: str) -> None:
        """Take note of a decision.

        Args:
            decision: What the guard said.
            route: What is done; another than the guard's where not everything was read.
        """
        self.route = route
        self._metrics.decided(decision, route)
        if self._trace is not None:
            self._trace.decided(decision, route)

    def headers(self) -> dict[str, str]:
        """Return the headers that continue the trace at the engine; empty without tracing."""
        return {} if self._trace is None else self._trace.headers()

    def checked(self, outcome: CheckOutcome) -> None:
        """Count a check of a piece of the answer."""
        self._metrics.answer_checks.labels(outcome).inc()

    def released(self, gone: Sequence[Piece], held: int) -> None:
        """Take note that pieces of a stream leave.

        Args:
            gone: Those that leave.
            held: How many were held back until now, these among them.
        """
        if not gone:
            return
        now = time.perf_counter()
        for piece in gone:
            self._metrics.hold_back_seconds.observe(now - piece.came_at)
        self._metrics.hold_back_tokens.observe(held)

    def sent(self, message: Message) -> None:
        """Take note of a message to the client, before it is sent."""
        body = message.get("body", b"")
        if body and not self._bytes_out:
            self._took["first_byte"] = time.perf_counter() - self._begun
        self._bytes_out += len(body)

    def done(self, status: int) -> None:
        """End the request's trace, count it and write its line.

        Args:
            status: What was sent; 499 if the client left before.
        """
        total = self._took["total"] = time.perf_counter() - self._begun
        if self._trace is not None:
            self._trace.end(status, self.key)
        self._metrics.request_seconds.observe(total)
        self._metrics.answered(self._endpoint, self.route, status)
        log_request(self._line(status))

    def _line(self, status: int) -> dict[str, Any]:
        line: dict[str, Any] = {
            "event": "request",
            "request_id": self.request_id,
            "endpoint": self._endpoint,
            "status": status,
            "route": self.route,
            "key": self.key,
            "bytes_in": self.bytes_in,
            "bytes_out": self._bytes_out,
        }
        if self._trace is not None:
            line["trace_id"] = self._trace.trace_id
        for name, took in self._took.items():
            line[f"{name}_ms"] = int(took * 1e6 + 0.5) / 1e3  # `round` takes four times as long
        return line


class _Timed:
    """Times a part of a request's work; a class, because a generator takes thrice as long."""

    __slots__ = ("_begun", "_name", "_observation")

    def __init__(self, observation: Observation, name: Stage) -> None:
        self._observation, self._name, self._begun = observation, name, 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._observation.took(self._name, time.perf_counter() - self._begun)
